"""Reading the `.bin` files of strangers: torch.save's zip format, looked at before anything in it is unpickled."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reft_edge.algebra import Array
from reft_edge.errors import ReftEdgeError

_MAX_ENTRIES = 64
_MAX_PICKLE = 1 << 16
_SLACK = 1 << 16
"""For the zip's own bookkeeping: names, versions and the alignment of tensors."""


def read_tensors(path: Path, limit: int) -> dict[str, Array]:
    """The tensors of a state dict, as float32; whole numbers, which describe, as float32 too.

    `limit`: bytes of tensor data that the caller expects at most. Raises ReftEdgeError for a file that is
    larger, compressed, of torch's old format, or holds anything but dense tensors of numbers, each with bytes of
    its own in the file; it is loaded with `weights_only=True`.
    """
    try:
        limit = min(limit, _check_zip(path, limit))
        return _arrays(path, torch.load(path, map_location="cpu", weights_only=True), limit)
    except OSError as error:
        raise ReftEdgeError(f"cannot read {path}: {error.strerror or error}") from error
    except zipfile.BadZipFile as error:
        raise ReftEdgeError(
            f"{path} is not a whole file of torch.save's zip format ({error}); save it again with a current PyTorch"
        ) from error
    except ReftEdgeError:
        raise
    except (
        Exception
    ) as error:  # torch raises RuntimeError, UnpicklingError, KeyError, AttributeError and more
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ReftEdgeError(f"{path} cannot be loaded with weights_only=True: {reason:.200}") from error


def _arrays(path: Path, state: Any, limit: int) -> dict[str, Array]:
    if not isinstance(state, dict):
        raise ReftEdgeError(f"{path} holds a {type(state).__name__}; expected a dictionary of tensors")
    tensors: dict[str, Array] = {}
    taken = 0
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ReftEdgeError(f"{path} holds {name!r:.80}, which is not a named tensor")
        if tensor.layout != torch.strided or tensor.is_complex() or tensor.device.type != "cpu":
            raise ReftEdgeError(f"{path}: {name:.80} is not a dense tensor of real numbers")
        taken += tensor.numel() * tensor.element_size()
        if taken > limit:
            raise ReftEdgeError(
                f"{path}: {name:.80} claims {list(tensor.shape)} numbers, more than the file holds or its shapes allow"
            )
        tensors[name] = np.ascontiguousarray(tensor.detach().to(torch.float32).numpy())
    return tensors


def _check_zip(path: Path, limit: int) -> int:
    """The file's size in bytes, once that and its layout are plausible."""
    size = path.stat().st_size
    if size > limit + _SLACK:
        raise ReftEdgeError(
            f"{path} has {size:,} bytes; its tensors can have {limit:,} at most, by the shapes of its adapter"
        )
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if len(entries) > _MAX_ENTRIES:
            raise ReftEdgeError(f"{path} is a zip of {len(entries)} entries; expected at most {_MAX_ENTRIES}")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ReftEdgeError(f"{path} is a compressed zip, which torch.save never writes; not unpacked")
        pickles = [entry.file_size for entry in entries if entry.filename.endswith(".pkl")]
        if len(pickles) != 1 or pickles[0] > _MAX_PICKLE or sum(entry.file_size for entry in entries) > size:
            raise ReftEdgeError(f"{path} is not laid out as torch.save writes a few tensors; not unpacked")
    return size
