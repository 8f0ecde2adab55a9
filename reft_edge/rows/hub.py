"""Datasets of the Hugging Face Hub, and folders that hold one, by the `datasets` library."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reft_edge.errors import ReftEdgeError
from reft_edge.extras import extra
from reft_edge.jsonl import Place
from reft_edge.rows.source import HubRows, without_none

STREAMED = 1 << 30
"""Bytes from which a dataset is streamed, not downloaded."""


def found_split(source: HubRows) -> HubRows:
    """The source with its split named. Raises ReftEdgeError if there is no such dataset, or nothing tells which split."""
    with extra("data"):
        import datasets
    if source.split is not None:
        return source
    if _saved(source):
        kept = _reading(source, lambda: datasets.load_from_disk(source.name))
        names = list(kept) if isinstance(kept, datasets.DatasetDict) else []
        if not names:
            return source
    else:
        names = _reading(source, lambda: datasets.get_dataset_split_names(source.name, source.config))
    chosen = names if len(names) == 1 else [name for name in source.splits if name in names]
    if not chosen:
        raise ReftEdgeError(f"{source} has the splits {', '.join(map(str, names))}; choose one with --split")
    return dataclasses.replace(source, split=str(chosen[0]))


def hub_rows(source: HubRows) -> Iterator[tuple[Place, Any]]:
    """The rows of a dataset, streamed where it is large or only some are read. Raises ReftEdgeError if it cannot be read."""
    with extra("data"):
        import datasets

    def load() -> Any:
        if _saved(source):
            kept = datasets.load_from_disk(source.name)
            return kept[source.split] if source.split is not None else kept
        streamed = _streamed(source)
        return datasets.load_dataset(source.name, source.config, split=source.split, streaming=streamed)

    rows = iter(_reading(source, load))
    number = 0
    while (row := _reading(source, lambda: next(rows, None))) is not None:
        number += 1
        yield Place(source, "row", number), without_none(row)


def _saved(source: HubRows) -> bool:
    """Whether it is a folder that `save_to_disk` wrote."""
    return any((Path(source.name) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _streamed(source: HubRows) -> bool:
    """A part of a split, such as train[:100], cannot be streamed."""
    import datasets

    if "[" in (source.split or "") or Path(source.name).is_dir():
        return False
    if source.limit is not None:
        return True
    info = datasets.load_dataset_builder(source.name, source.config).info
    return max(info.dataset_size or 0, info.download_size or 0) > STREAMED


def _reading(source: HubRows, read: Any) -> Any:
    try:
        return read()
    except Exception as error:  # of the network, of files, of settings: the library's kinds are many
        words = " ".join(str(error).split())[:500] or type(error).__name__
        missing = "" if Path(source.name).exists() else "there is no file of that name, and "
        raise ReftEdgeError(f"{source}: {missing}the dataset cannot be read: {words}") from error
