"""Where a training writes: its adapter, its checkpoint beside it, and elsewhere where there is no room."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from reft_edge.adapter.config import Adapter
from reft_edge.adapter.file import save_adapter
from reft_edge.errors import ReftEdgeError
from reft_edge.files import check_place, write_atomically
from reft_edge.locks import held
from reft_edge.steering.interventions import Interventions
from reft_edge.training.checkpoint import Checkpoint
from reft_edge.training.rescue import is_full, written_elsewhere


def checkpoint_of(output: Path) -> Path:
    """Where the checkpoint of a training to `output` is."""
    return output.with_name(output.name + ".checkpoint")


@contextmanager
def training_to(output: Path, report: Callable[[str], None] = lambda message: None) -> Iterator[None]:
    """Be the one training that writes to `output`. Raises ReftEdgeError at once if another one is under way."""
    busy = f"another training writes to {output}; wait for its end, stop it, or give another output with -o"
    with held(output.with_name(f".{output.name}.lock"), busy) as locks:
        if not locks:
            report(f"this disk has no locks; let no other training write to {output}")
        yield


def check_room(output: Path, checkpoint: Path, interventions: Interventions) -> None:
    """Raise ReftEdgeError unless the adapter can be written, and a checkpoint could have its name."""
    parameters = sum(tensor.numel() for tensor in interventions.tensors().values())
    check_place(output, room=4 * parameters)
    check_place(checkpoint)


def write_adapter(adapter: Adapter, output: Path, checkpoint: Checkpoint) -> int:
    """The size of the file that was written.

    Where `output` cannot be written: first another folder is tried; then, if it is for want of room, the checkpoint, which
    the adapter replaces, gives way. Raises ReftEdgeError that says where the adapter is if it is not at `output`.
    """
    try:
        save_adapter(adapter, output)
    except ReftEdgeError as error:
        elsewhere = written_elsewhere(lambda path: save_adapter(adapter, path), output.name)
        if not (is_full(error) and _without_checkpoint(adapter, output, checkpoint)):
            where = f"the trained adapter is at {elsewhere}: move it from there" if elsewhere else ""
            if elsewhere is None and checkpoint.is_mine():
                where = f"{checkpoint.path} is kept: --resume writes the adapter once that can be"
            raise ReftEdgeError(f"{error}; {where or 'no other folder takes the adapter'}") from error
        if elsewhere is not None:
            elsewhere.unlink()
            elsewhere.parent.rmdir()
    return output.stat().st_size


def _without_checkpoint(adapter: Adapter, output: Path, checkpoint: Checkpoint) -> bool:
    """Whether the adapter could be written in place of the checkpoint, which is put back if not."""
    if not checkpoint.is_mine():
        return False
    content = checkpoint.path.read_bytes()
    checkpoint.remove()
    try:
        save_adapter(adapter, output)
    except ReftEdgeError:
        with suppress(ReftEdgeError):
            write_atomically(checkpoint.path, content)
        return False
    return True
