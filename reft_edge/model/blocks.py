"""Where the blocks of a PyTorch model are, and their attention and MLP parts."""

from typing import Any

from torch import nn

from reft_edge.errors import ReftEdgeError

_MODULES = {"attention": ("self_attn", "linear_attn", "conv"), "mlp": ("mlp", "feed_forward", "shared_mlp")}
"""What transformers calls a decoder block's parts."""


def decoder_layers(model: Any) -> nn.ModuleList:
    """The model's blocks in order. Raises ReftEdgeError if there is no single list of `num_hidden_layers` blocks."""
    count = model.config.num_hidden_layers
    found = [
        module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    blocks = [
        module for module in found if type(module[0]).__name__.endswith(("DecoderLayer", "Block", "Layer"))
    ]
    if len(blocks) != 1:
        raise ReftEdgeError(
            f"cannot tell which modules are the {count} blocks of {type(model).__name__}; "
            f"found {len(blocks)} lists of that many blocks"
        )
    return blocks[0]


def component_module(block: nn.Module, component: str) -> nn.Module:
    """The module whose output is a block's `component`. Raises ReftEdgeError if there is no such one."""
    if component == "block":
        return block
    found = [module for name, module in block.named_children() if name in _MODULES[component]]
    if len(found) != 1:
        raise ReftEdgeError(
            f"cannot tell which module is the {component} of {type(block).__name__}; looked for "
            f"{' or '.join(_MODULES[component])} and found {', '.join(name for name, _ in block.named_children())}"
        )
    return found[0]
