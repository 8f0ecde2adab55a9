"""Data of LLM-Adapters, as the rows that run.py reads.

    git clone https://github.com/AGI-Edgerunners/LLM-Adapters
    python benchmarks/paper/llm_adapters.py LLM-Adapters DATA_FOLDER

Writes DATA_FOLDER/TASK/*.jsonl for arc-easy, boolq, openbookqa, social-iqa, mawps, addsub and svamp. The published tests of
OpenBookQA, PIQA and ARC-Challenge are never read. Social IQa has no training file of a size that is kept there, so its test
file is what run.py divides. A MAWPS row is kept if its equation gives its answer, and for training if its question is none
of MAWPS's or AddSub's tests.
"""

import argparse
import ast
import json
import operator
import re
from pathlib import Path

from data_rows import Row, letters, write

COPIED = {
    "arc-easy": ("ARC-Easy", ("train", "test")),
    "boolq": ("boolq", ("train", "test")),
    "openbookqa": ("openbookqa", ("train",)),
    "addsub": ("AddSub", ("test",)),
    "svamp": ("SVAMP", ("test",)),
}
MAWPS = {"train": "trainset", "dev": "validset", "test": "testset"}
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def copied(row: Row) -> Row:
    return {
        "prompt": row["instruction"].strip(),
        "completion": row["output"].strip(),
        "answer": row["answer"],
    }


def value(node: ast.AST) -> float:
    """Of numbers joined by + - * /. Raises KeyError or ValueError for anything else."""
    if isinstance(node, ast.Expression):
        return value(node.body)
    if isinstance(node, ast.BinOp):
        return float(OPERATORS[type(node.op)](value(node.left), value(node.right)))
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return float(node.value)
    raise ValueError(ast.dump(node))


def arithmetic(row: Row) -> Row | None:
    """A question whose solution is its equation with the result, as `7 + 8 = 15`; None where that is not its answer."""
    found = re.fullmatch(r"[Xx]=(.*)", row["equation"].replace(" ", ""))
    if found is None:
        return None
    said = re.sub(r"(\d)\.0+(?!\d)", r"\1", found[1])
    try:
        parsed = ast.parse(said, mode="eval")
        right = abs(value(parsed) - float(row["ans"])) < 1e-3
    except (SyntaxError, ValueError, KeyError, ZeroDivisionError):
        return None
    answer = f"{float(row['ans']):g}"
    if not right:
        return None
    return {
        "prompt": row["original_text"],
        "completion": f"{ast.unparse(parsed)} = {answer}",
        "answer": answer,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path)
    parser.add_argument("data", type=Path)
    given = parser.parse_args()
    source = given.checkout / "dataset"

    def read(name: str) -> list[Row]:
        rows: list[Row] = json.loads((source / f"{name}.json").read_text(encoding="utf-8"))
        return rows

    for task, (folder, parts) in COPIED.items():
        for part in parts:
            write(given.data / task / f"{part}.jsonl", map(copied, read(f"{folder}/{part}")))
    write(given.data / "social-iqa/train.jsonl", map(copied, read("social_i_qa/test")))
    tests = {letters(row["original_text"]) for row in read("mawps/testset") + read("mawps/validset")}
    tests |= {letters(row["instruction"]) for row in read("AddSub/test")}
    for part, name in MAWPS.items():
        rows = {letters(row["original_text"]): arithmetic(row) for row in read(f"mawps/{name}")}
        kept = {text: row for text, row in rows.items() if row and not (part == "train" and text in tests)}
        write(given.data / "mawps" / f"{part}.jsonl", kept.values())


if __name__ == "__main__":
    main()
