"""Instructions of Self-Instruct that people wrote, with their answers, as the rows that run.py reads.

    git clone https://github.com/yizhongw/self-instruct
    python benchmarks/paper/self_instruct.py self-instruct DATA_FOLDER

Writes DATA_FOLDER/instructions/train.jsonl and test.jsonl, from the 175 seed tasks and the 252 user-oriented instructions
(Apache-2.0; arXiv 2212.10560). What a model generated there is not read. A row is kept if its answer is more than a word and
it is short enough for two cores. Rows are mixed by a hash of their text, so both files hold both kinds, and every row is of
an instruction that no other row has.
"""

import argparse
import hashlib
import json
from pathlib import Path

from data_rows import Row, letters, write

SOURCES = ("data/seed_tasks.jsonl", "human_eval/user_oriented_instructions.jsonl")
TEST_ROWS = 100
SHORTEST, LONGEST = 10, 480
"""Characters of an answer, and bytes of a row."""


def instruction(row: Row) -> Row:
    """Of a row's first instance: its input is below the instruction."""
    given = row["instances"][0]
    asked = "\n\n".join(part for part in (row["instruction"].strip(), given["input"].strip()) if part)
    return {"prompt": asked, "completion": given["output"].strip()}


def kept(rows: list[Row]) -> list[Row]:
    """In the order of a hash."""
    found = {letters(row["instruction"]): instruction(row) for row in rows}
    short = [
        row
        for row in found.values()
        if len(row["completion"]) >= SHORTEST and len("".join(row.values()).encode()) <= LONGEST
    ]
    return sorted(short, key=lambda row: hashlib.sha256(row["prompt"].encode()).digest())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path)
    parser.add_argument("data", type=Path)
    given = parser.parse_args()
    read = [
        json.loads(line)
        for source in SOURCES
        for line in (given.checkout / source).read_text(encoding="utf-8").splitlines()
    ]
    rows = kept(read)
    for part, mine in (("test", rows[:TEST_ROWS]), ("train", rows[TEST_ROWS:])):
        write(given.data / "instructions" / f"{part}.jsonl", mine)


if __name__ == "__main__":
    main()
