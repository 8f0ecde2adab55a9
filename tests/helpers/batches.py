"""Running a batch to its end."""

from collections.abc import Sequence

from reft_edge.runtime import Request, SteeredModel
from reft_edge.runtime.batch import Batch
from reft_edge.runtime.request import Piece, Row


def run_rows(
    batch: Batch, model: SteeredModel, requests: Sequence[Request]
) -> tuple[list[Row], list[str], int]:
    """Rows that ran together, their texts, and how many steps that took."""
    pieces: list[list[Piece]] = [[] for _ in requests]
    rows = [
        model.row(request, found.append, batch.room) for request, found in zip(requests, pieces, strict=True)
    ]
    for row in rows:
        batch.add(row)
    steps = 0
    while not batch.idle:
        batch.step()
        steps += 1
    return rows, ["".join(piece.text for piece in found) for found in pieces], steps
