"""Which base model an adapter is for: its name, fingerprint and sizes, without its weights."""

from collections.abc import Callable
from pathlib import Path

from reft_edge.adapter.base import Base
from reft_edge.errors import ReftEdgeError
from reft_edge.model.manifest import load_manifest


def find_base(
    model: str | None, folder: Path | None, report: Callable[[str], None] = lambda message: None
) -> Base:
    """The base from a MODEL, whose weights are read, or from the manifest of a folder that it was exported to.

    Raises ReftEdgeError unless exactly one of them is given and can be read.
    """
    if (model is None) == (folder is None):
        raise ReftEdgeError(
            "the file does not say which base model it is for: give the model with --model MODEL, or a folder "
            "that it was exported to with --for DIR" + (", not both" if model else "")
        )
    if folder is not None:
        manifest = load_manifest(folder)
        return Base(manifest.base_name, manifest.base_fingerprint, manifest.hidden_size, manifest.num_layers)
    from reft_edge.model.encoders import load_network
    from reft_edge.model.fingerprint import fingerprint
    from reft_edge.model.source import resolve_model

    assert model is not None
    source = resolve_model(model, report)
    loaded = load_network(source)
    return Base(source.name, fingerprint(loaded), loaded.config.hidden_size, loaded.config.num_hidden_layers)
