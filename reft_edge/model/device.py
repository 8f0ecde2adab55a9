"""Which device and which number type PyTorch computes with."""

import torch

from reft_edge.errors import ReftEdgeError

DTYPES = ("auto", "fp32", "bf16")


def torch_device(name: str | None) -> torch.device:
    """The named device, or CUDA where there is one, else the CPU. Raises ReftEdgeError if it cannot be used."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ReftEdgeError(
            f"cannot compute on device {name!r}: {reason}; leave --device out to choose"
        ) from error
    return device


def chosen_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """float32 or bfloat16; `auto` is bfloat16 where the device has instructions for it. Raises ReftEdgeError for others."""
    if dtype not in DTYPES:
        raise ReftEdgeError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    if dtype != "auto":
        return torch.bfloat16 if dtype == "bf16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
