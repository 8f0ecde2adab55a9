"""Optimum's exporter, and ports in the graph that it writes, in one step."""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from reft_edge.errors import ReftEdgeError
from reft_edge.export.add_ports import Ported, add_ports
from reft_edge.folders import check_target, scratch_folder
from reft_edge.json_files import read_object
from reft_edge.model.encoders import is_encoder
from reft_edge.model.manifest import MANIFEST
from reft_edge.model.pretrained import quiet_libraries, rotary_for_4, transformers_4
from reft_edge.model.source import ModelFolder

_TASK = "text-generation-with-past"
_GRAPH = "model.onnx"
_INSTALL = "make an environment of its own, and in it: pip install 'reft-edge[optimum]'"

Report = Callable[[str], None]


def export_with_optimum(
    model: ModelFolder, output: Path, layers: str = "all", report: Report = lambda step: None
) -> Ported:
    """Have Optimum export a decoder, in float32 and with a KV cache, and add a port after each of `layers`.

    What Optimum writes is kept beside `output` until the ports are in, and then removed. `report` is told each step;
    nothing is left at `output` unless everything succeeded. Raises ReftEdgeError if Optimum is not installed or cannot
    export the model, or as `add_ports` does.
    """
    exporter = _exporter()
    if is_encoder(model):
        raise ReftEdgeError(
            f"{model.name} is an encoder; ports go into decoders that Optimum exports. Leave --exporter away"
        )
    check_target(output, MANIFEST)
    output.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(output.parent) as work, _as_optimum_reads_it(model, work / "model") as source:
        report("Optimum exports the model")
        exported = work / "exported"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exporter(
                    str(source.path),
                    output=str(exported),
                    task=_TASK,
                    local_files_only=True,
                    trust_remote_code=False,
                    do_validation=False,  # ours is stricter
                )
        except Exception as error:  # Optimum and torch raise many kinds here
            raise ReftEdgeError(
                f"Optimum could not export {model.name}: {str(error) or type(error).__name__}"
            ) from error
        if not (exported / _GRAPH).is_file():
            raise ReftEdgeError(f"Optimum wrote no {_GRAPH} for {model.name}; its exporter does not go here")
        return add_ports(exported / _GRAPH, output, source, layers, report)


def _exporter() -> Callable[..., Any]:
    """Optimum's `main_export`. Raises ReftEdgeError if it, or the transformers that it works with, is not installed."""
    try:
        optimum, transformers = version("optimum-onnx"), version("transformers")
        if not transformers_4():
            raise ReftEdgeError(
                f"optimum-onnx {optimum} needs transformers below 4.58, and this environment has {transformers}; {_INSTALL}"
            )
        from optimum.exporters.onnx import main_export
        from optimum.utils import logging
    except (PackageNotFoundError, ModuleNotFoundError) as error:
        raise ReftEdgeError(f"Optimum's exporter needs the package {error.name!r}; {_INSTALL}") from error
    quiet_libraries()
    logging.set_verbosity_error()
    return main_export  # type: ignore[no-any-return]


@contextmanager
def _as_optimum_reads_it(model: ModelFolder, place: Path) -> Iterator[ModelFolder]:
    """The model, or at `place` a folder with the same files and a config.json that transformers 4 understands."""
    config = read_object(model.path / "config.json")
    told = rotary_for_4(config, model.name)
    if not told:
        yield model
        return
    place.mkdir()
    for file in model.path.iterdir():
        if file.name != "config.json":
            _link(file, place / file.name)
    (place / "config.json").write_text(json.dumps(config | told), encoding="utf-8")
    yield ModelFolder(place, model.name, model.gguf)


def _link(file: Path, place: Path) -> None:
    try:
        place.symlink_to(file.resolve(), target_is_directory=file.is_dir())
    except OSError:  # Windows asks for a privilege
        (shutil.copytree if file.is_dir() else shutil.copyfile)(file, place)
