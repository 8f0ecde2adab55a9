"""MODEL as a stranger's file or folder: GGUF headers, files of any name, folders with code, what a Hub download takes."""

import ast
import io
import json
import os
import shutil
import struct
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import gguf
import huggingface_hub
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reft_edge.errors import ReftEdgeError
from reft_edge.model.fingerprint import fingerprint
from reft_edge.model.gguf_header import check_model, parse_gguf_header, read_gguf_header
from reft_edge.model.hub import choose_files
from reft_edge.model.loading import load_model, load_model_prompts
from reft_edge.model.source import ModelFolder, resolve_model
from tests.helpers.tiny_gguf import write_gguf

LIMIT = 128 << 20


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REFT_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny(tmp_path, tiny_model) -> Path:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_model)
    return path


def text(content: str | bytes) -> bytes:
    content = content.encode() if isinstance(content, str) else content
    return struct.pack("<Q", len(content)) + content


def pair(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(name: str, kind: int, count: int, values: bytes) -> bytes:
    return pair(name, 9, struct.pack("<IQ", kind, count) + values)


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    sizes = b"".join(struct.pack("<Q", size) for size in shape)
    return text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)


LLAMA = pair("general.architecture", 8, text("llama"))


def whole(
    *pairs: bytes, tensors: tuple[bytes, ...] = (), data: int = 0, counts=None, version: int = 3
) -> bytes:
    counts = counts or (len(tensors), len(pairs))
    content = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(tensors)
    return content + bytes(-len(content) % 32) + bytes(data)


EMBEDDING = tensor("token_embd.weight", (4, 8))
FLOATS, SHORTS, BYTES, TEXT = 6, 2, 0, 8

MALFORMED = {
    "no header": (b"GGUF", "ends early"),
    "version": (whole(LLAMA, version=9), "version 9"),
    "many pairs": (whole(counts=(0, 1 << 40)), "claims"),
    "many tensors": (whole(counts=(1 << 40, 0)), "claims"),
    "a long name": (whole(text("x" * 5000)), "a name of 5,000 bytes"),
    "an endless text": (whole(pair("x", 8, struct.pack("<Q", 1 << 62))), "ends early"),
    "an endless array": (whole(array("x", BYTES, 1 << 62, b"")), "ends early"),
    "endless texts": (whole(array("x", TEXT, 1 << 50, b"")), "ends early"),
    "an array in an array": (whole(array("x", 9, 1, struct.pack("<IQ", 9, 1))), "array of type 9"),
    "a type": (whole(pair("x", 13, b"")), "unknown type 13"),
    "a pair twice": (whole(LLAMA, LLAMA), "twice"),
    "alignment 0": (whole(pair("general.alignment", 4, struct.pack("<I", 0))), "aligns"),
    "a huge alignment": (whole(pair("general.alignment", 4, struct.pack("<I", 1 << 31))), "aligns"),
    "dimensions": (whole(tensors=(tensor("x", (1,) * 9),)), "9 dimensions"),
    "a tensor twice": (whole(tensors=(EMBEDDING, EMBEDDING), data=999), "twice"),
    "two at one place": (whole(tensors=(EMBEDDING, tensor("x", (4,))), data=999), "place of its own"),
    "between": (whole(tensors=(tensor("x", (4,), 0, 7),), data=99), "place of its own"),
    "no such type": (whole(tensors=(tensor("x", (4,), 99),), data=99), "GGML type 99"),
    "a broken block": (whole(tensors=(tensor("x", (31,), 8),), data=99), "multiple of 32"),
    "no data": (whole(tensors=(EMBEDDING,)), "ends early: its tensors need"),
    "a byte less": (whole(tensors=(EMBEDDING,), data=127), "ends early: its tensors need"),
    "huge tensors": (whole(tensors=(tensor("x", (1 << 40, 1 << 40)),)), "ends early"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_header_is_refused_before_any_reader_sees_the_file(tmp_path, name):
    content, message = MALFORMED[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ReftEdgeError, match=message):
            resolve_model(str(path))
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


TOKENS = array("tokenizer.ggml.tokens", TEXT, 8, text("a") * 8)
LONG = {
    "3 million bytes": array("x", BYTES, 3_000_000, bytes(3_000_000)),
    "bytes as scores": array("tokenizer.ggml.scores", BYTES, 3_000_000, bytes(3_000_000)),
    "more scores than tokens": array("tokenizer.ggml.scores", FLOATS, 100_000, bytes(400_000)),
    "texts": array("llama.notes", TEXT, 100_000, text("") * 100_000),
    "merges": array("tokenizer.ggml.merges", TEXT, 100_000, text("") * 100_000),
    "a long map of characters": array("tokenizer.ggml.precompiled_charsmap", BYTES, 2 << 20, bytes(2 << 20)),
    "a tokenizer's own": array("tokenizer.ggml.other", SHORTS, 100_000, bytes(200_000)),
}


@pytest.mark.parametrize("name", LONG)
def test_long_lists_are_refused(tmp_path, name):
    path = tmp_path / "model.gguf"
    path.write_bytes(whole(LLAMA, TOKENS, LONG[name], tensors=(EMBEDDING,), data=128))
    with pytest.raises(ReftEdgeError, match=r"at most .* are accepted"):
        resolve_model(str(path))


def test_metadata_must_fit_the_tensors(tmp_path):
    many = array("tokenizer.ggml.tokens", TEXT, 100_000, text("a") * 100_000)
    for pairs, message in (
        ((LLAMA, many), "100,000 tokens, and its embedding has 8"),
        ((LLAMA, pair("llama.block_count", 4, struct.pack("<I", 1 << 31))), "block_count 2,147,483,648"),
        ((LLAMA, pair("llama.vocab_size", 4, struct.pack("<I", 1 << 31))), "vocab_size"),
        ((LLAMA, pair("llama.expert_count", 4, struct.pack("<I", 1 << 31))), "expert_count"),
        ((LLAMA, pair("llama.block_count", 5, struct.pack("<i", -1))), "block_count -1"),
    ):
        path = tmp_path / "model.gguf"
        path.write_bytes(whole(*pairs, tensors=(EMBEDDING,), data=128))
        with pytest.raises(ReftEdgeError, match=message):
            resolve_model(str(path))
    path.write_bytes(whole(LLAMA, tensors=(tensor("x", (4,)),), data=128))
    with pytest.raises(ReftEdgeError, match="holds no language model"):
        resolve_model(str(path))


def test_a_model_larger_than_its_file_is_refused(tmp_path, tiny):
    content = tiny.read_bytes()
    name = b"llama.feed_forward_length" + struct.pack("<I", 4)
    at = content.index(name) + len(name)
    tiny.write_bytes(content[:at] + struct.pack("<I", 1 << 30) + content[at + 4 :])
    with pytest.raises(ReftEdgeError, match=r"a model of .* parameters, and it holds"):
        resolve_model(str(tiny))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("context_length", 1 << 31, "context_length 2,147,483,648; its tensors account for 262,144"),
        ("context_length", (1 << 18) + 1, "context_length 262,145"),
        ("block_count", 0, "block_count 0, and it holds 3"),
        ("block_count", 2, "block_count 2, and it holds 3"),
    ],
)
def test_numbers_are_what_the_tensors_account_for(tiny, field, value, message):
    """Each position of the context takes memory in the graph; a block that is not counted would be left out."""
    content = tiny.read_bytes()
    name = f"llama.{field}".encode() + struct.pack("<I", 4)
    at = content.index(name) + len(name)
    tiny.write_bytes(content[:at] + struct.pack("<I", value) + content[at + 4 :])
    with pytest.raises(ReftEdgeError, match=message):
        resolve_model(str(tiny))


@pytest.mark.parametrize("field", ["llama.context_length", "llama.block_count", "llama.vocab_size"])
@pytest.mark.parametrize(
    "value",
    [
        struct.pack("<IIQI", 9, 4, 1, 1 << 31),
        struct.pack("<If", 6, 2.0**31),
        struct.pack("<IQ", 8, 4) + b"1e12",
    ],
    ids=["list", "fraction", "text"],
)
def test_a_number_in_another_dress_is_refused(tiny, field, value):
    """Readers take a list of one number for that number."""
    content = tiny.read_bytes()
    name = field.encode()
    at = content.index(name) + len(name)
    tiny.write_bytes(content[:at] + value + content[at + 8 :])
    with pytest.raises(ReftEdgeError, match=rf"{field}' is no whole number"):
        check_model(parse_gguf_header(io.BytesIO(tiny.read_bytes() + bytes(64)), 1 << 40, LIMIT))
    with pytest.raises(ReftEdgeError):
        resolve_model(str(tiny))


def test_a_truncated_model_says_so(tiny):
    content = tiny.read_bytes()
    for kept in (len(content) - 1, len(content) // 2, 500, 30):
        tiny.write_bytes(content[:kept])
        with pytest.raises(ReftEdgeError, match="ends early"):
            resolve_model(str(tiny))


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 6))
def test_no_damaged_header_gets_through(tmp_path_factory, tiny_model, seed, count):
    path = tmp_path_factory.mktemp("damaged") / "m.gguf"
    write_gguf(path, tiny_model)
    content = bytearray(path.read_bytes())
    random = np.random.default_rng(seed)
    for _ in range(count):
        content[random.integers(7000)] = random.integers(256)
    path.write_bytes(content)
    try:
        header = read_gguf_header(path, LIMIT)
        check_model(header)
    except ReftEdgeError:
        return
    assert all(part.start < len(content) for part in header.tensors)


def test_the_reader_agrees_with_the_library(tiny):
    header = read_gguf_header(tiny, LIMIT)
    check_model(header)
    library = gguf.GGUFReader(str(tiny))
    assert {part.name: (part.shape, part.kind, part.start) for part in header.tensors} == {
        part.name: (tuple(part.shape.tolist()), int(part.tensor_type), part.data_offset)
        for part in library.tensors
    }
    assert header.arrays["tokenizer.ggml.tokens"] == (TEXT, 320)


@pytest.mark.parametrize("name", ["model.GGUF", "sha256-4f2a9c", "model", "model.bin", "model.safetensors"])
def test_a_gguf_is_told_by_its_first_bytes(tmp_path, tiny, tiny_model, name):
    link = tmp_path / "given" / name
    link.parent.mkdir()
    link.symlink_to(tiny)
    folder = resolve_model(str(link))
    assert folder.name == name.removesuffix(".GGUF")
    assert folder.gguf == link
    assert fingerprint(load_model(folder)) == fingerprint(tiny_model)


def test_a_file_of_the_same_name_elsewhere_is_not_taken(tmp_path, tiny, tiny_model, monkeypatch):
    """transformers looks for the name in the current folder first."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here/tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path / "here")
    assert fingerprint(load_model(resolve_model("../tiny.gguf"))) == fingerprint(tiny_model)


@pytest.mark.parametrize("name", ["model.bin", "model.gguf", "model.GGUF", "notes", "model.onnx"])
def test_a_file_of_another_kind_is_no_name_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "model_info", lambda *args, **options: pytest.fail("asked the Hub")
    )
    Path(name).write_bytes(b"PK\3\4 and so on")
    with pytest.raises(ReftEdgeError, match=f"{name} is a file of unknown kind"):
        resolve_model(name)
    Path(name).unlink()
    Path(name).symlink_to("nothing")
    with pytest.raises(ReftEdgeError, match="cannot read"):
        resolve_model(name)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo.gguf")
    with pytest.raises(ReftEdgeError, match="not a regular file"):
        resolve_model(str(tmp_path / "fifo.gguf"))
    with pytest.raises(ReftEdgeError, match=r"there is no file .*missing.GGUF"):
        resolve_model(str(tmp_path / "missing.GGUF"))


# ---- folders ----


def test_a_folders_code_is_never_run_nor_asked_about(device_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked whether the code may run"))
    folder = tmp_path / "evil"
    shutil.copytree(device_folder / "hf", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass A: pass\nB = A\n")
    config["auto_map"] = {
        "AutoConfig": "evil.A",
        "AutoModelForCausalLM": "evil.B",
        "AutoTokenizer": ["evil.A", None],
    }
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_model(ModelFolder(folder, "evil"))
    assert type(loaded).__name__ == "LlamaForCausalLM"
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    (folder / "tokenizer.json").unlink()
    for load in (load_model, load_model_prompts):
        with pytest.raises(ReftEdgeError, match=r"code of its own .auto_map.*never run"):
            load(ModelFolder(folder, "evil"))
    assert not (tmp_path / "ran").exists()


def python_files() -> list[Path]:
    root = Path(__file__).parents[2]
    return [
        path
        for part in ("reft_edge", "export", "runtime", "benchmarks")
        for path in (root / part).rglob("*.py")
    ]


def test_every_call_into_transformers_refuses_a_folders_code():
    """Every call of from_pretrained, or from_config of an Auto class, says trust_remote_code=False; peft's takes none."""
    calls = 0
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = ast.unparse(node.func.value)
            loads = node.func.attr == "from_pretrained" or (
                node.func.attr == "from_config" and "Auto" in owner
            )
            if not loads or owner == "PeftModel":
                continue
            calls += 1
            said = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert said.get("trust_remote_code") == "False", f"{path}:{node.lineno}"
    assert calls >= 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"\xff\xfe{}", "UTF-16"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"", "not valid JSON"),
        (b"{}", "cannot load"),
        (b'{"model_type": 7}', "cannot load"),
        (b'{"model_type": "llama", "hidden_size": "many"}', "cannot load"),
        (b'{"model_type": "llama", "num_hidden_layers": []}', "cannot load"),
    ],
)
def test_a_bad_config_is_named(device_folder, tmp_path, content, message):
    folder = tmp_path / "hf"
    shutil.copytree(device_folder / "hf", folder)
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ReftEdgeError, match=message):
        load_model(resolve_model(str(folder)))


def test_a_config_without_architectures_loads(device_folder, tmp_path, tiny_model):
    folder = tmp_path / "hf"
    shutil.copytree(device_folder / "hf", folder)
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    assert fingerprint(load_model(resolve_model(str(folder)))) == fingerprint(tiny_model)


def test_a_decoder_without_some_of_its_weights_is_refused(device_folder, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "hf"
    shutil.copytree(device_folder / "hf", folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ReftEdgeError, match=r"lacks 1 of its weights, model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        load_model(ModelFolder(folder, "tiny"))


def test_nothing_of_the_libraries_reaches_a_log(device_folder, capfd):
    load_model(ModelFolder(device_folder / "hf", "tiny"))
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")


# ---- the Hub ----

TEXTS = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
]
PARTS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
JUNK = [
    "consolidated.safetensors", "consolidated.00.pth", "original/consolidated.00.pth", "original/params.json",
    "onnx/model.onnx", "onnx/model.safetensors", "model.fp16.safetensors", "tf_model.h5", "flax_model.msgpack",
    "model-Q4.gguf", "README.md", ".gitattributes", "adapter_model.safetensors", "sub/config.json", "run.py",
]  # fmt: skip


@pytest.mark.parametrize(
    ("weights", "taken"),
    [
        (["model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        ([*PARTS, "model.safetensors.index.json"], [*PARTS, "model.safetensors.index.json"]),
        (["model.safetensors", *PARTS, "model.safetensors.index.json"], ["model.safetensors"]),
        (["pytorch_model.bin"], ["pytorch_model.bin"]),
        (
            ["a.bin", "b.bin", "pytorch_model.bin.index.json", *PARTS, "model.safetensors.index.json"],
            [*PARTS, "model.safetensors.index.json"],
        ),
    ],
)
def test_a_download_takes_one_set_of_weights(tmp_path, monkeypatch, weights, taken):
    names = [*TEXTS, *JUNK, *weights]
    asked: dict[str, object] = {}
    siblings = [SimpleNamespace(rfilename=name, size=10) for name in names]
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "model_info",
        lambda *args, **options: SimpleNamespace(siblings=siblings, sha="abc"),
    )

    def index(model, name, revision):
        asked["index"] = name
        parts = PARTS if name.startswith("model") else ["a.bin", "b.bin"]
        (tmp_path / "index.json").write_text(json.dumps({"weight_map": {part: part for part in parts}}))
        return str(tmp_path / "index.json")

    def snapshot(model, revision, allow_patterns):
        asked["files"], asked["revision"] = allow_patterns, revision
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", index)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    said: list[str] = []
    assert resolve_model("owner/name", said.append).path == tmp_path
    assert asked["files"] == sorted([*TEXTS, *taken])
    assert asked["revision"] == "abc"
    assert said[-1] == "downloading owner/name (0 MB, once)"


def test_a_repository_without_weights_that_load_is_refused():
    for names, message in (
        ([*TEXTS, "consolidated.safetensors"], "it has consolidated.safetensors"),
        (["m-Q4.gguf", "m-Q8.gguf"], r"download the \.gguf file"),
        (TEXTS, "no weights"),
    ):
        with pytest.raises(ReftEdgeError, match=message):
            choose_files("owner/name", names)
    with pytest.raises(ReftEdgeError, match="lacks model-00002"):
        choose_files("owner/name", [*TEXTS, PARTS[0]], PARTS)
