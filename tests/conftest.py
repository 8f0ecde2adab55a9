"""Models, exports and adapters that many tests share; built once a run."""

import os
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("steady", deadline=None)
settings.load_profile("steady")
sys.path.insert(0, str(Path(__file__).parent.parent))


def pytest_configure(config: pytest.Config) -> None:
    """On tiny models several threads wait for each other: three times the work. The real model has them all."""
    if "not real" in config.getoption("markexpr"):
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if config.getoption("dist", "no") == "load":
        config.option.dist = (
            "worksteal"  # neighbours stay together, and with them the fixtures that they share
        )


@pytest.fixture(
    scope="session", autouse=sys.platform == "linux" and find_spec("onnxruntime_genai") is not None
)
def warm_builder() -> Iterator[None]:
    """Exports in this process start from a builder that has imported all it needs."""
    from tests.helpers.warm_builder import start_warm_builder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("reft_edge.export.build"), "start_builder", start_warm_builder)
        yield


@pytest.fixture(scope="session")
def device_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `tests/helpers/tiny.py` writes: an export, adapters and PyTorch's answers.

    Taken from $REFT_EDGE_TEST_FOLDER where it is set: on a machine without torch.
    """
    if given := os.environ.get("REFT_EDGE_TEST_FOLDER"):
        return Path(given)
    from tests.helpers.tiny import write_device_folder

    folder = tmp_path_factory.mktemp("device")
    write_device_folder(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(device_folder: Path) -> object:
    """The PyTorch model behind `device_folder`."""
    from reft_edge.model.loading import load_model
    from reft_edge.model.source import ModelFolder

    return load_model(ModelFolder(device_folder / "hf", "tiny-llama"))


@pytest.fixture(scope="session")
def torch_onnx_folder(tiny_model: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_model` with a growing KV cache, as torch.onnx writes it; that takes ten seconds."""
    from tests.helpers.foreign import export_dynamo

    return export_dynamo(tiny_model, tmp_path_factory.mktemp("torch_onnx") / "onnx", cached=True).parent
