"""Training in several processes, started by `accelerate launch` or torchrun: the same adapter as one process trains.

Every process holds the interventions and all rows; of each forward pass it computes its share. Gradients are summed, not
averaged, and the loss was divided by the whole step's count of tokens before, so that shares of unlike length weigh right.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from reft_edge.errors import ReftEdgeError
from reft_edge.model.blocks import decoder_layers
from reft_edge.model.packed import is_quantised

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes of a training, seen from one of them; by default it is alone."""

    accelerator: Any = None
    rank: int = 0
    count: int = 1
    sharded: bool = False
    """Whether the base is sharded by FSDP."""

    @property
    def main(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """On each machine one process passes through the block before the others do."""
        if self.accelerator is None:
            yield
            return
        with self.accelerator.local_main_process_first():
            yield

    def share(self, rows: Sequence[T]) -> tuple[Sequence[T], float]:
        """This process's part of a forward pass, and the weight of its loss.

        A process for which no row is left computes one with weight 0, since FSDP needs all of them in every pass.
        """
        mine = rows[self.rank :: self.count]
        return (mine, 1.0) if mine else (rows[:1], 0.0)

    def add_up(self, loss: float, parameters: Sequence[nn.Parameter]) -> float:
        """Sum over processes of the loss, returned, and of the parameters' gradients, which all have one, in place."""
        if self.count == 1:
            return loss
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat(
            [torch.tensor([loss], device=gradients[0].device), *(g.flatten() for g in gradients)]
        )
        total: Tensor = self.accelerator.reduce(flat, reduction="sum")
        parts = torch.split(total[1:], [gradient.numel() for gradient in gradients])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter).clone()
        return float(total[0])

    def any(self, here: bool) -> bool:
        """Whether it is so in any process; the same in all of them."""
        if self.count == 1:
            return here
        device = self.accelerator.device
        total: Tensor = self.accelerator.reduce(torch.tensor(float(here), device=device), reduction="sum")
        return bool(total > 0)

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` gives in the main process, in all of them; its ReftEdgeError is raised in all of them."""
        if self.count == 1:
            return make()
        from accelerate.utils import broadcast_object_list

        made: list[Any] = [None]
        if self.main:
            try:
                made = [make()]
            except ReftEdgeError as error:
                made = [error]
        (found,) = broadcast_object_list(made)
        if isinstance(found, ReftEdgeError):
            raise found
        result: T = found
        return result

    def end(self) -> None:
        """Leave the group, once nothing is to be exchanged any more: its threads can abort a process that just exits."""
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()
            self.accelerator.end_training()

    def place(self, model: Any, device: torch.device) -> Any:
        """The model on the device, or its blocks sharded over the processes' devices where FSDP was asked for."""
        if not self.sharded:
            return model if _is_on(model, device) else model.to(device)
        if is_quantised(model):
            raise ReftEdgeError("FSDP cannot shard a base that --load-in quantised; use one of the two")
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (self.count,))
        for block in decoder_layers(model):
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)


ALONE = Processes()


def launched_processes(device: str | None) -> Processes:
    """The processes of this launch, by the environment that `accelerate launch` or torchrun sets.

    Raises ReftEdgeError if a launch of several processes names one device, ModuleNotFoundError without accelerate.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isascii() or not size.isdigit():
        raise ReftEdgeError(f"the environment says WORLD_SIZE={size!r}; expected the number of processes")
    if int(size) <= 1:
        return ALONE
    if device not in (None, "cpu"):
        raise ReftEdgeError(
            f"--device {device} is one device for {os.environ['WORLD_SIZE']} processes; leave it out, each takes its own"
        )
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=device == "cpu" or not torch.cuda.is_available())
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
    return Processes(accelerator, accelerator.process_index, accelerator.num_processes, sharded)


def launch_note(processes: Processes) -> str | None:
    """How many processes train, where a launcher started this one; None where nobody did."""
    if processes.count > 1:
        return f"{processes.count} processes train"
    if "WORLD_SIZE" not in os.environ and "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return None
    # accelerate launch gives several processes an address to meet at, also where it then starts a single one
    if "WORLD_SIZE" not in os.environ and "MASTER_ADDR" in os.environ:
        return (
            "one process trains, though several were asked for: this form of accelerate launch starts one. "
            "On GPUs add --multi_gpu; on CPUs use torchrun --nproc_per_node N -m reft_edge train ..."
        )
    return "one process trains"


def _is_on(model: Any, device: torch.device) -> bool:
    """Whether nothing has to move: a quantised model refuses to."""
    return all(parameter.device == device for parameter in model.parameters())
