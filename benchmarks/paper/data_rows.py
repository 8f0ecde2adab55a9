"""Rows of the data folder that run.py reads, as the scripts that prepare it write them."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def letters(text: str) -> str:
    """What tells questions apart: no case, spaces or signs."""
    return re.sub(r"[^a-z0-9]", "", text.lower())


def write(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    print(f"{path}: {text.count(chr(10))} rows")
