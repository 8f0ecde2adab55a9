"""CoLA and QNLI of GLUE, as the rows that run.py trains encoders on.

    git clone https://github.com/amrnag/Specialized-Transformers
    git clone https://github.com/jonny-vr/LLMCBench
    python benchmarks/paper/glue.py Specialized-Transformers LLMCBench DATA_FOLDER

Writes DATA_FOLDER/cola/ and DATA_FOLDER/qnli/. CoLA's test is its published dev file; the labels of GLUE's own tests are
secret. These files go by source, so rows are brought into an order drawn once. QNLI's training file is larger than
what is taken from elsewhere here, so run.py divides its published dev file, of which the pairs of at most 300 characters
are kept. SST-2 is sst2/ in DATA_FOLDER, as for the other studies.
"""

import argparse
import csv
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_rows import Row, write

COLA = {"train": "train", "dev": "val", "test": "dev"}
LONGEST = 300
"""Characters of a question and a sentence together."""


def tab_separated(path: Path) -> Iterator[list[str]]:
    """Fields by line; a quotation mark is a character like others."""
    with path.open(encoding="utf-8", newline="") as file:
        yield from csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)


def cola(lines: Iterable[list[str]]) -> Iterator[Row]:
    """A sentence, and whether it is one that speakers of English would say."""
    for _, label, _, text in lines:
        yield {"text": text.strip(), "label": int(label)}


def qnli(lines: Iterable[list[str]]) -> Iterator[Row]:
    """A question and a sentence, and whether the one is answered by the other."""
    for _, question, sentence, label in lines:
        if label != "label" and len(question) + len(sentence) <= LONGEST:
            yield {"text": question, "text2": sentence, "label": int(label == "entailment")}


def mixed(rows: Iterable[Row]) -> list[Row]:
    """The same order each time."""
    found = list(rows)
    random.Random(0).shuffle(found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cola", type=Path, help="a clone of amrnag/Specialized-Transformers")
    parser.add_argument("qnli", type=Path, help="a clone of jonny-vr/LLMCBench")
    parser.add_argument("data", type=Path)
    given = parser.parse_args()
    for part, name in COLA.items():
        lines = tab_separated(given.cola / "data/CoLA" / f"{name}.tsv")
        write(given.data / "cola" / f"{part}.jsonl", mixed(cola(lines)))
    write(given.data / "qnli/train.jsonl", qnli(tab_separated(given.qnli / "data/QNLI/dev.tsv")))


if __name__ == "__main__":
    main()
