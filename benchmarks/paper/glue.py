"""MRPC and QNLI of GLUE, as the rows that run.py trains encoders on.

    git clone https://github.com/magsail/MRPC
    git clone https://github.com/jonny-vr/LLMCBench
    python benchmarks/paper/glue.py MRPC LLMCBench DATA_FOLDER

Writes DATA_FOLDER/mrpc/ and DATA_FOLDER/qnli/. MRPC's files are those of its authors, the test with its labels. QNLI's
training file is larger than what is taken from elsewhere here, so run.py divides its published dev file, of which the
pairs of at most 300 characters are kept. SST-2 is sst2/ in DATA_FOLDER, as for the other studies.
"""

import argparse
import csv
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_rows import Row, write

LONGEST = 300
"""Characters of a question and a sentence together."""


def tab_separated(path: Path) -> Iterator[list[str]]:
    """Fields by line; a quotation mark is a character like others."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)


def mrpc(lines: Iterable[list[str]]) -> Iterator[Row]:
    """Two sentences, and whether they say the same."""
    for label, _, _, first, second in lines:
        if label != "Quality":
            yield {"text": first, "text2": second, "label": int(label)}


def qnli(lines: Iterable[list[str]]) -> Iterator[Row]:
    """A question and a sentence, and whether the one is answered by the other."""
    for _, question, sentence, label in lines:
        if label != "label" and len(question) + len(sentence) <= LONGEST:
            yield {"text": question, "text2": sentence, "label": int(label == "entailment")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mrpc", type=Path, help="a clone of magsail/MRPC")
    parser.add_argument("qnli", type=Path, help="a clone of jonny-vr/LLMCBench")
    parser.add_argument("data", type=Path)
    given = parser.parse_args()
    for part in ("train", "test"):
        lines = tab_separated(given.mrpc / f"MRPC/msr_paraphrase_{part}.txt")
        write(given.data / f"mrpc/{part}.jsonl", mrpc(lines))
    write(given.data / "qnli/train.jsonl", qnli(tab_separated(given.qnli / "data/QNLI/dev.tsv")))


if __name__ == "__main__":
    main()
