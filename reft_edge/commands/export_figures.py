"""What the commands that write an exported folder print of it: where it is, and what its verification measured."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_edge.commands.console import print_json, say, show_table

if TYPE_CHECKING:
    from reft_edge.export.add_ports import Ported
    from reft_edge.model.manifest import Manifest

_IN_JSON = (
    "base_fingerprint",
    "precision",
    "device",
    "quantisation",
    "layers",
    "components",
    "port_kinds",
    "verification",
)
_IN_JSON_OF_PORTS = ("base_fingerprint", "precision", "cache", "layers", "port_kinds", "verification")


def print_exported(manifest: "Manifest", output: Path, seconds: float, as_json: bool) -> None:
    """Print what `export` wrote in so many seconds."""
    size = sum(file.stat().st_size for file in output.iterdir() if file.is_file())
    if as_json:
        described = {name: getattr(manifest, name) for name in _IN_JSON}
        print_json({"path": str(output), "size": size, "seconds": seconds, **described})
        return
    encodes = manifest.kind == "encoder"
    what = "an encoder" if encodes else manifest.precision
    say(
        f"wrote {output}: {size / 1e6:,.0f} MB, {what}, ports at {len(manifest.layers)} layers, {seconds:.0f} s"
    )
    if encodes:
        say("verified against PyTorch, hidden states at every token of a few texts:")
        _print_figures(_of_encoder(manifest.verification))
    else:
        same = "" if manifest.precision == "fp32" else " with the same rounded weights"
        say(f"verified against PyTorch{same}, logits at every token of a few prompts:")
        _print_figures(_of_decoder(manifest.verification))


def print_ported(ported: "Ported", output: Path, as_json: bool) -> None:
    """Print where the blocks of a graph from elsewhere were found, and what was written."""
    manifest = ported.manifest
    if as_json:
        described = {name: getattr(manifest, name) for name in _IN_JSON_OF_PORTS}
        print_json({"path": str(output), "blocks": [vars(block) for block in ported.outputs], **described})
        return
    blocks = [
        (str(block.layer), block.node, block.value, "yes" if block.layer in manifest.layers else "no")
        for block in ported.outputs
    ]
    show_table([("layer", "node", "value", "port"), *blocks])
    say(f"wrote {output}: {manifest.precision}, ports at {len(manifest.layers)} layers; verified:")
    _print_figures(_of_ports(manifest.verification))
    if manifest.cache == "none":
        say("the graph has no KV cache: it can score text, not generate")


def _print_figures(figures: dict[str, str]) -> None:
    show_table([(f"  {what}", found) for what, found in figures.items()], header=False)


def _of_decoder(figures: dict[str, Any]) -> dict[str, str]:
    return {
        "no adapter": f"max difference {figures['base_error']:.2g}; bitwise equal to the graph without ports",
        "adapter at every port": f"max difference {figures['steered_error']:.2g}, where it moves logits by "
        f"{figures['effect']:.0f}",
        "likeliest next token": f"that of the original model at {figures['agreement']:.0%} of tokens",
    }


def _of_encoder(figures: dict[str, Any]) -> dict[str, str]:
    return {
        "no adapter": f"max difference {figures['base_error']:.2g}; as written, bitwise equal to the graph without ports",
        "adapter at every port": f"max difference {figures['steered_error']:.2g}, where it moves them by "
        f"{figures['effect']:.1f}",
        "in a padded batch": f"max difference {figures['batch_error']:.2g} from each text alone",
    }


def _of_ports(figures: dict[str, Any]) -> dict[str, str]:
    fused = f"; {figures['rank0_error']:.1g} apart where nodes are fused" if figures["rank0_error"] else ""
    found = {
        "no adapter": f"bitwise equal to the graph without ports{fused}",
        "each port": f"within {figures['port_error']:.1g} of numpy, relative",
        "what each block adds": f"within {figures['block_error']:.2g} of PyTorch's, relative, and nearest to its own "
        "block's",
    }
    if figures["base_error"] is not None:
        found["logits"] = (
            f"within {figures['base_error']:.2g} of PyTorch's, with an adapter at every port "
            f"{figures['steered_error']:.2g}, where it moves them by {figures['effect']:.0f}"
        )
    return {
        **found,
        "likeliest next token": f"that of the original model at {figures['agreement']:.0%} of tokens",
    }
