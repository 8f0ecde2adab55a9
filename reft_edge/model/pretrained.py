"""Model folders handed to transformers: in one place, quietly, and never with Python code that a folder brings."""

from pathlib import Path
from typing import Any

from reft_edge.errors import ReftEdgeError
from reft_edge.json_files import read_object


def from_folder(kind: Any, folder: Path, name: str, **options: Any) -> Any:
    """What `kind.from_pretrained` makes of a folder; `kind` is a class of transformers', `name` is for people.

    Nothing is looked up on the Hub, and nobody is asked whether the folder's code may run: it does not. Raises ReftEdgeError
    if transformers cannot load the folder.
    """
    quiet_libraries()
    try:
        return kind.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True, **options)
    except Exception as error:  # transformers, gguf and torch raise many kinds here
        if _brings_code(folder):
            raise ReftEdgeError(
                f"{name} is a model with Python code of its own (auto_map in its config.json), which is never run; "
                "give a model that transformers has a class for"
            ) from error
        raise ReftEdgeError(f"cannot load {name}: {str(error) or type(error).__name__}") from error


def quiet_libraries() -> None:
    """transformers and huggingface_hub print bars and warnings of their own, which would run into ours and into logs."""
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    disable_progress_bars()
    hub_logging.set_verbosity_error()
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _brings_code(folder: Path) -> bool:
    try:
        return "auto_map" in read_object(folder / "config.json")
    except ReftEdgeError:
        return False
