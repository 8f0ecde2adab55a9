"""A GGUF file as a folder in the Hugging Face layout, its weights dequantised to float32, one block in memory at a time.

transformers says what a file's tensors are called and how they are stored (rows of queries and keys in another order, norms with 1
added, experts stacked), and takes a file whole. So it is given small files: one block each, and one with all that is in no
block and a few tokens. Tables with a row for each token are dequantised here.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reft_edge.errors import ReftEdgeError
from reft_edge.folders import scratch_folder
from reft_edge.model.gguf_header import GgufHeader, GgufTensor, stored_bytes
from reft_edge.model.gguf_pieces import (
    Piece,
    piece_of_block,
    piece_with_first,
    vocabulary_tensors,
    write_piece,
)
from reft_edge.model.pretrained import check_whole, from_folder

_LARGER = 1.25
"""Most parameters that a model may have for one number in its GGUF: some are stored once and used twice."""
_TOKENS = 8
"""Of a piece, by which tables are recognised."""
_AT_ONCE = 1 << 24  # numbers of a table that are in memory at a time
_SHARD = "model-{:05}.safetensors"

Rows = NDArray[np.float32]
_Loaded = tuple[Any, dict[str, Any], set[str]]


class _IndivisibleError(Exception):
    """A model whose blocks cannot be read one by one."""


def write_model(gguf: Path, header: GgufHeader, folder: Path) -> None:
    """Write config.json, generation_config.json and the weights of a checked file to a folder.

    Raises ReftEdgeError if transformers cannot read the file, if its metadata describe another model than its tensors, or if
    some of the model's weights are not in it.
    """
    with scratch_folder(folder) as scratch:
        config = _config(gguf, header, scratch)
        model = _described(config, header, gguf)
        try:
            _write_by_blocks(gguf, header, model, folder, scratch)
        except _IndivisibleError:
            for shard in folder.glob("*.safetensors"):
                shard.unlink()
            _write_whole(gguf, folder)
            return
        _save(model, folder, {})
        (folder / "model.safetensors").unlink(missing_ok=True)
    _write_index(folder)


def bytes_to_write(header: GgufHeader) -> int:
    """What the converted weights take on disk, with the block that is being converted."""
    numbers = sum(math.prod(tensor.shape) for tensor in header.tensors)
    blocks = max(1, header.numbers.get(f"{header.architecture}.block_count") or 1)
    return 4 * numbers + sum(map(stored_bytes, header.tensors)) // blocks


def write_tokenizer(gguf: Path, folder: Path) -> None:
    """Write the file's tokenizer. Raises ReftEdgeError if transformers cannot read it."""
    from transformers import AutoTokenizer

    from_folder(AutoTokenizer, gguf.parent, str(gguf), gguf_file=str(gguf.absolute())).save_pretrained(folder)


def _config(gguf: Path, header: GgufHeader, scratch: Path) -> Any:
    """The model's configuration; read from a copy without the words of the vocabulary, which take long to read."""
    from transformers import AutoConfig

    piece = scratch / "config.gguf"
    write_piece(gguf, header, Piece({part.name: part for part in header.tensors}, empty=True), piece)
    return from_folder(AutoConfig, scratch, str(gguf), gguf_file=str(piece))


def _described(config: Any, header: GgufHeader, gguf: Path) -> Any:
    """The model that the metadata describe, its parameters without content.

    Raises ReftEdgeError if it has more parameters than the file has numbers.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # transformers and torch raise many kinds here
        raise ReftEdgeError(f"cannot load {gguf}: {str(error) or type(error).__name__}") from error
    described = sum(parameter.numel() for parameter in model.parameters())
    stored = sum(math.prod(tensor.shape) for tensor in header.tensors)
    if described > _LARGER * stored + 1024:
        raise ReftEdgeError(
            f"cannot read {gguf}: its metadata describe a model of {described:,} parameters, and it holds {stored:,} numbers"
        )
    return model


def _write_whole(gguf: Path, folder: Path) -> None:
    """The model as transformers reads it at once, with all of its weights in memory."""
    model, state, missing = _load(gguf, gguf)
    check_whole(str(gguf), missing)
    _save(model, folder, state)


def _write_by_blocks(gguf: Path, header: GgufHeader, model: Any, folder: Path, scratch: Path) -> None:
    """Write a shard for each block and one for the rest. Raises _IndivisibleError if that would not be the whole model."""
    blocks = _blocks_of(model)
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    written: dict[str, list[int]] = {}
    for number in range(model.config.num_hidden_layers):
        piece = piece_with_first(header, _TOKENS) if number == 0 else piece_of_block(header, number)
        part, state, _ = _load_piece(gguf, header, piece, scratch)
        inside = {name: tensor for name, tensor in state.items() if name.startswith(f"{blocks}.0.")}
        own = {
            f"{blocks}.{number}.{name.removeprefix(f'{blocks}.0.')}": tensor
            for name, tensor in inside.items()
        }
        written |= {name: list(tensor.shape) for name, tensor in own.items()}
        _save(part, scratch / "shard", own)
        (scratch / "shard/model.safetensors").rename(folder / _SHARD.format(number + 1))
        if number == 0:
            rest = {name: tensor.numpy() for name, tensor in state.items() if name not in inside}
            tables = _tables(gguf, header, rest, expected)
            written |= {name: list(array.shape) for name, array in rest.items()}
            written |= {name: list(table.shape[::-1]) for name, table in tables.items()}
            _write_shard(folder / _SHARD.format(0), gguf, rest, tables)
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - {
        name for name, _ in model.named_parameters()
    }
    if written != {name: shape for name, shape in expected.items() if name not in tied}:
        raise _IndivisibleError


def _blocks_of(model: Any) -> str:
    """The name of the model's list of blocks."""
    from reft_edge.model.blocks import decoder_layers

    try:
        blocks = decoder_layers(model)
    except ReftEdgeError as error:
        raise _IndivisibleError from error
    found: str = next(name for name, module in model.named_modules() if module is blocks)
    return found


def _load_piece(gguf: Path, header: GgufHeader, piece: Piece, scratch: Path) -> _Loaded:
    path = scratch / "piece.gguf"
    write_piece(gguf, header, piece, path)
    try:
        return _load(path, gguf)
    except ReftEdgeError as error:
        raise _IndivisibleError from error


def _load(path: Path, gguf: Path) -> _Loaded:
    """A model of transformers'; what of it is in the file, by its names, of tensors that are shared one; and what is not.

    Raises ReftEdgeError in the name of `gguf`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with redirect_stderr(StringIO()):  # a bar for each piece
        model, loading = from_folder(
            AutoModelForCausalLM,
            path.parent,
            str(gguf),
            dtype=torch.float32,
            gguf_file=str(path.absolute()),
            output_loading_info=True,
        )
    own = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    missing = set(loading["missing_keys"])
    state = {
        name: tensor for name, tensor in model.state_dict().items() if name in own and name not in missing
    }
    return model, state, missing


def _tables(
    gguf: Path, header: GgufHeader, rest: dict[str, Rows], expected: dict[str, list[int]]
) -> dict[str, GgufTensor]:
    """Take from `rest` the tables of which a piece has a few rows; gives the whole tensors that they are."""
    left = sorted(vocabulary_tensors(header), key=lambda part: part.name != "token_embd.weight")
    found: dict[str, GgufTensor] = {}
    for name, rows in list(rest.items()):
        if list(rows.shape) == expected.get(name):
            continue
        alike = [
            part
            for part in left
            if list(part.shape[::-1]) == expected.get(name)
            and np.array_equal(_dequantised(gguf, part, 0, len(rows)), rows)
        ]
        if not alike:
            raise _IndivisibleError
        found[name] = alike[0]
        left.remove(alike[0])
        del rest[name]
    return found


def _dequantised(gguf: Path, part: GgufTensor, first: int, count: int) -> Rows:
    """Some rows of a matrix, `[count, columns]`. Raises _IndivisibleError for a kind that the library does not know."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    width = stored_bytes(part) // part.shape[1]
    with gguf.open("rb") as file:
        file.seek(part.start + first * width)
        content = np.frombuffer(file.read(count * width), np.uint8).reshape(count, width)
    try:
        rows: Rows = dequantize(content, GGMLQuantizationType(part.kind))
    except NotImplementedError as error:
        raise _IndivisibleError from error
    return rows


def _all_rows(gguf: Path, part: GgufTensor) -> Iterator[Rows]:
    columns, rows = part.shape
    step = max(1, _AT_ONCE // columns)
    for first in range(0, rows, step):
        yield _dequantised(gguf, part, first, min(step, rows - first))


def _write_shard(path: Path, gguf: Path, arrays: dict[str, Rows], tables: dict[str, GgufTensor]) -> None:
    """Write a safetensors file of float32 tensors; tables some rows at a time."""
    contents: dict[str, tuple[Sequence[int], Iterable[Rows]]] = {
        name: (array.shape, [array]) for name, array in arrays.items()
    }
    contents |= {name: (table.shape[::-1], _all_rows(gguf, table)) for name, table in tables.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (shape, _) in contents.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    described = json.dumps(header).encode()
    described += b" " * (-len(described) % 8)
    with path.open("wb") as file:
        file.write(len(described).to_bytes(8, "little") + described)
        for _, pieces in contents.values():
            for rows in pieces:
                file.write(np.ascontiguousarray(rows, "<f4").tobytes())


def _write_index(folder: Path) -> None:
    """Write which of a folder's shards holds which tensor."""
    from safetensors import safe_open

    places: dict[str, str] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "np") as file:
            places |= dict.fromkeys(file.keys(), shard.name)
    content = {
        "metadata": {"total_size": sum(shard.stat().st_size for shard in folder.glob("*.safetensors"))},
        "weight_map": places,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2), encoding="utf-8")


def _save(model: Any, folder: Path, state: dict[str, Any]) -> None:
    """`save_pretrained`, also for a model that transformers refuses to save because it came from a GGUF."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(model, attribute):
            setattr(model, attribute, None)
    model.save_pretrained(folder, state_dict=state)
