"""Vectors for the loader's tests: what reft_edge makes of adapter files, position specs and numbers.

    python runtime/web/test/vectors.py EXPORT OUT

writes OUT/vectors.json and adapter files, good and bad, for the exported folder EXPORT.
"""

import dataclasses
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from reft_edge.adapter.algebra import ACTS
from reft_edge.adapter.config import INTERVENTIONS, OF_RANK_1, Adapter, AdapterConfig
from reft_edge.adapter.file import load_adapter, save_adapter
from reft_edge.adapter.linear import fold
from reft_edge.adapter.positions import parse_positions
from reft_edge.adapter.storage import PRECISIONS
from reft_edge.errors import ReftEdgeError
from reft_edge.model.manifest import Manifest, load_manifest
from reft_edge.runtime.binding import port_inputs
from reft_edge.runtime.model import SteeredModel

SPECS = (
    "f7+l7", "l3", "f1", "all", "gen", "all+gen", "f2+gen", "gen5", "all+gen1", "f1|gen2|gen", "all-f1", "all+gen-f1", "all - f1 - l2 + gen3",
    "f7+l7-f1-l1|all-l2", " f3 + l4 ", "f9999999",
    "f7+l7|all+gen", "all|f1", "f3 | l2", "f1|f1", "f1||l1",
    "", "f0", "l", "f7+f8", "all+f1", "gen+gen", "gen+gen2", "gen0", "all3", "gen-f1", "all-f0", "all-gen", "all-f1-f2", "all-", "f3-f3", "l2-l3",
    "f12345678", "x3", "F7", "f7+", "f٣",
    'from:"<tool>"[27,5]', "from:[0]-l2", 'f3|from:"a+b|c from:\\"x\\""[1, 2]-f1-l2|from: "ü\\n"', 'from:"x"', "from:", 'from:"x"+f3', 'from:"x"5',
    "from:0;", "from:[]", "from:[-1]", "from:[4294967296]", 'from:"\\ud800"', 'from:"x"|from:"x"', f"from:[{'1,' * 64}1]", f'from:"{"x" * 201}"',
)  # fmt: skip
CALLED = ("from:[7,8]", "from:[7,7]|l2", "from:[7]-f3-l1")
CALLS: list[list[int]] = [[], [7], [7, 8], [1, 7, 8, 7, 8, 9], [7, 7, 7], [8, 7, 1, 2, 3]]
NUMBERS = (
    0,
    1,
    -1,
    0.1,
    -0.1,
    65504,
    65519.99,
    65520,
    1e9,
    6.1e-5,
    6.0e-5,
    5.96e-8,
    2.9e-8,
    1 / 3,
    2049,
    2051,
    -1e-9,
)


def config(manifest: Manifest, **changes: Any) -> AdapterConfig:
    """Of a small adapter that fits the folder."""
    fields: dict[str, Any] = {
        "intervention": "loreft",
        "base_name": manifest.base_name,
        "base_fingerprint": manifest.base_fingerprint,
        "hidden_size": manifest.hidden_size,
        "num_layers": manifest.num_layers,
        "layers": (0, manifest.num_layers - 1),
        "rank": 2,
    }
    return AdapterConfig(**{**fields, **changes})


def adapter(described: AdapterConfig, seed: int) -> Adapter:
    random = np.random.default_rng(seed)
    return Adapter(
        described,
        {
            name: random.standard_normal(shape).astype(np.float32)
            for name, shape in described.shapes().items()
        },
    )


def good_adapters(manifest: Manifest) -> dict[str, AdapterConfig]:
    found = {
        name: config(manifest, intervention=name, rank=1 if name in OF_RANK_1 else 2)
        for name in INTERVENTIONS
        if name != "red" or "diagonal" in manifest.port_kinds
    }
    for number, act in enumerate(ACTS[1:] if "act" in manifest.port_kinds else ()):
        name = ("loreft", "noreft", "direft", "nodireft")[number % 4]
        found[f"{name}-{act}"] = config(manifest, intervention=name, act_fn=act, add_bias=name == "noreft")
    found["tied"] = config(manifest, tied=True, positions="f3+l2")
    found["bias"] = config(manifest, intervention="noreft", add_bias=True, positions="all+gen")
    found["trigger"] = config(manifest, positions='from:"tool+|"[5,6]-l1|f1')
    found["one-layer"] = config(manifest, layers=(1,), rank=3, positions="l4", base_name="Ein Modell, größer")
    return found


def bad_adapters(manifest: Manifest, folder: Path) -> dict[str, tuple[str, bytes]]:
    """Files that must be refused, by name, and what the refusal has to say."""
    plain = adapter(config(manifest), 0)

    def saved(changed: AdapterConfig, precision: str = "fp32") -> bytes:
        save_adapter(adapter(changed, 0), folder / "good.safetensors", precision)
        return (folder / "good.safetensors").read_bytes()

    def split(content: bytes) -> tuple[dict[str, Any], bytes]:
        length = int.from_bytes(content[:8], "little")
        return json.loads(content[8 : 8 + length]), content[8 + length :]

    def joined(header: dict[str, Any], data: bytes) -> bytes:
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data

    content = saved(plain.config)
    header, data = split(content)
    length = len(content) - len(data) - 8

    def with_header(change: Callable[[dict[str, Any]], None]) -> bytes:
        changed = json.loads(json.dumps(header))
        change(changed)
        return joined(changed, data)

    def described(**changes: Any) -> bytes:
        fields = {**dataclasses.asdict(plain.config), **changes}
        return with_header(lambda h: h["__metadata__"].update(adapter=json.dumps(fields)))

    def described_as(text: str) -> bytes:
        return with_header(lambda h: h["__metadata__"].update(adapter=text))

    def tensor(name: str, **changes: Any) -> bytes:
        return with_header(lambda h: h[name].update(changes))

    raw = json.dumps(header)
    doubled = (raw[:-1] + ', "b": ' + json.dumps(header["b"]) + "}").encode()
    twice = json.dumps(dataclasses.asdict(plain.config))[:-1] + ', "rank": 2}'
    not_finite = bytearray(content)
    not_finite[-4:] = struct.pack("<f", float("nan"))
    offsets = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    half, half_data = split(saved(plain.config, "fp16"))
    eighth, eighth_data = split(saved(plain.config, "int8"))

    def stored(header: dict[str, Any], data: bytes, **tensors: dict[str, Any]) -> bytes:
        changed = {name: {**entry, **tensors.get(name, {})} for name, entry in header.items()}
        return joined(changed, data)

    def scaled(value: float) -> bytes:
        at = eighth["R.scale"]["data_offsets"][0]
        return joined(eighth, eighth_data[:at] + struct.pack("<f", value) + eighth_data[at + 4 :])

    def halved(value: float) -> bytes:
        at = half["R"]["data_offsets"][0]
        return joined(half, half_data[:at] + struct.pack("<e", value) + half_data[at + 2 :])

    huge = dict(plain.tensors)
    huge["W"] = np.full_like(huge["W"], 3e38)
    huge["R"] = np.full_like(huge["R"], -3e38)
    beyond = {"R": huge["R"], "W": huge["W"], "b": huge["b"]}
    overflowing = joined(
        header, b"".join(beyond[name].tobytes() for name in sorted(offsets, key=lambda n: offsets[n]))
    )

    as_first = {**eighth["__metadata__"], "version": "1"}
    other_kinds = {}
    if "act" not in manifest.port_kinds:
        relu = dataclasses.replace(plain.config, act_fn="relu")
        other_kinds["relu"] = ("act_fn is 'relu', for which this folder has no ports", saved(relu))
    if "diagonal" not in manifest.port_kinds:
        red = dataclasses.replace(plain.config, intervention="red", rank=1)
        other_kinds["red"] = ("elementwise, for which this folder has no ports", saved(red))
    return {
        "scale-below-zero": ("no scale", scaled(-1.0)),
        "scale-not-a-number": ("no scale", scaled(float("nan"))),
        "scale-infinite": ("no scale", scaled(float("inf"))),
        "scale-missing": ("missing: ", joined({k: v for k, v in eighth.items() if k != "R.scale"}, eighth_data)),
        "scale-overflowing": ("NaN or infinity", scaled(3e38)),
        "half-infinite": ("NaN or infinity", halved(float("inf"))),
        "half-truncated": ("bytes of tensors", joined(half, half_data[:-2])),
        "half-as-whole": ("bytes of tensors", joined(half | {"__metadata__": header["__metadata__"]}, half_data)),
        "eight-bits-as-first-version": ("unexpected: ", joined(eighth | {"__metadata__": as_first}, eighth_data)),
        "two-storages": ("bytes of tensors", stored(half, half_data, R={"dtype": "F32"})),
        "empty": ("shorter than a safetensors header", b""),
        "seven-bytes": ("shorter than a safetensors header", content[:7]),
        "truncated-header": ("its header claims", content[: 8 + length // 2]),
        "truncated-data": ("bytes of tensors", content[:-4]),
        "longer": ("bytes of tensors", content + bytes(4)),
        "huge-header": ("its header claims", struct.pack("<Q", 2**63) + content[8:]),
        "header-over-limit": ("its header claims", struct.pack("<Q", 2**20 + 1) + bytes(2**20 + 1)),
        "not-json": ("JSON", struct.pack("<Q", 4) + b"abcd" + data),
        "deep-json": ("JSON", struct.pack("<Q", 2**20) + b"[" * 2**20 + data),
        "list-header": ("not a JSON object", struct.pack("<Q", 2) + b"[]" + data),
        "not-utf8": ("its header is not", struct.pack("<Q", 4) + b'{"\xff' + data),
        "not-finite": ("NaN or infinity", bytes(not_finite)),
        "folds-to-infinity": ("fold to", overflowing),
        "doubled-name": ("twice", struct.pack("<Q", len(doubled)) + doubled + data),
        "doubled-field": ("twice", described_as(twice)),
        "no-metadata": ("its metadata", with_header(lambda h: h.pop("__metadata__"))),
        "other-format": ("its metadata", with_header(lambda h: h["__metadata__"].update(format="pt"))),
        "later-version": ("version '3'", with_header(lambda h: h["__metadata__"].update(version="3"))),
        "no-description": ("no `adapter` description", with_header(lambda h: h["__metadata__"].pop("adapter"))),
        "unknown-tensor": ("unexpected: ", with_header(lambda h: h.update(Q=h.pop("R")))),
        "missing-tensor": ("missing: ", with_header(lambda h: h.pop("R"))),
        "half-precision": ("is declared as", tensor("R", dtype="F16")),
        "other-shape": ("is declared as", tensor("R", shape=[2, 2, manifest.hidden_size, 2])),
        "overlap": ("", tensor("R", data_offsets=offsets["W"])),
        "offsets-beyond": ("", tensor("R", data_offsets=[offset + 4 for offset in offsets["R"]])),
        "unknown-field": ("unknown fields", described(surprise=1)),
        "prototype-field": ("unknown fields", described(constructor=1)),
        "missing-field": ("lacks", described_as(json.dumps({"intervention": "loreft"}))),
        "infinite-number": ("adapter description", described_as(json.dumps({**dataclasses.asdict(plain.config), "training": {"loss": float("inf")}}))),
        "overflowing-number": ("not a finite number", described(training={"loss": "X"}).replace(b'\\"X\\"', b"1e999")),
        "unknown-intervention": ("intervention", described(intervention="hyperreft")),
        "rank-zero": ("rank is", described(rank=0)),
        "rank-true": ("rank is", described(rank=True)),
        "rank-text": ("rank is", described(rank="2")),
        "rank-wrong": ("bytes of tensors", described(rank=3)),
        "rank-over-limit": ("rank is", described(rank=5000, hidden_size=9000)),
        "rank-over-hidden": ("hidden size", described(rank=manifest.hidden_size + 1)),
        "steering-rank": ("steering vector", described(intervention="steering")),
        "no-layers": ("layers", described(layers=[])),
        "layers-twice": ("without repeats", described(layers=[1, 1])),
        "layers-descending": ("without repeats", described(layers=[1, 0])),
        "layers-beyond": ("layers", described(layers=[0, manifest.num_layers])),
        "layers-negative": ("layers", described(layers=[-1, 0])),
        "bad-positions": ("given twice", described(positions="f7+f8")),
        "positions-number": ("positions is 7", described(positions=7)),
        "tied-number": ("tied is 1", described(tied=1)),
        "bad-component": ("component is", described(component="norm")),
        "bad-format": ("prompt_format is", described(prompt_format="markdown")),
        "bias-for-loreft": ("add_bias", described(add_bias=True)),
        "act-fn-with-steering": ("act_fn", described(intervention="lobireft", act_fn="relu")),
        "act-fn-name": ("act_fn", described(act_fn="import os")),
        "one-label": ("labels", described(labels=["yes"], pooling="cls")),
        "pooling-without-labels": ("pooling is", described(pooling="cls")),
        "control-characters": ("plain text", described(base_name="a\u202eb")),
        "training-list": ("training", described(training=[])),
        "other-base": ("another base model", saved(dataclasses.replace(plain.config, base_fingerprint="0" * 16))),
        "other-hidden-size": ("hidden states of size", saved(dataclasses.replace(plain.config, hidden_size=manifest.hidden_size + 8))),
        "no-port": ("have no port", saved(dataclasses.replace(plain.config, num_layers=99, layers=(50,)))),
        "no-attention-port": ("have no port", saved(dataclasses.replace(plain.config, component="attention"))),
        "relu6": ("no port can carry", saved(dataclasses.replace(plain.config, act_fn="relu6"))),
        "classifier": ("classifies texts", saved(dataclasses.replace(plain.config, labels=("no", "yes"), pooling="cls"))),
        **other_kinds,
    }  # fmt: skip


def refusal(model: SteeredModel, path: Path) -> str:
    try:
        model.load_adapter(path)
    except ReftEdgeError as error:
        return str(error)
    raise AssertionError(f"reft_edge accepts {path}")


def spans(spec: str, tied: bool) -> dict[str, Any]:
    try:
        return {
            "spec": spec,
            "tied": tied,
            "spans": [dataclasses.asdict(span) for span in parse_positions(spec, tied)],
        }
    except ReftEdgeError as error:
        return {"spec": spec, "tied": tied, "error": str(error)}


def in_prompt(spec: str, prompt: list[int]) -> dict[str, Any]:
    """Where the gates of a spec with a trigger are open in a prompt."""
    found = [dataclasses.asdict(span.in_prompt(prompt)) for span in parse_positions(spec, tied=False)]
    return {"spec": spec, "prompt": prompt, "spans": found}


PRODUCTS = {
    # name: depth, width, bits, block size, whether zero points are given
    "whole-blocks": (64, 24, 4, 32, True),
    "odd-blocks": (96, 24, 4, 32, True),
    "part-block": (75, 17, 4, 32, True),
    "no-zero-points": (64, 24, 4, 16, False),
    "eight-bits": (80, 19, 8, 32, True),
    "eight-bits-no-zero-points": (64, 24, 8, 32, False),
}


def products(path: Path) -> dict[str, Any]:
    """A model of products with packed weights, an input `NAME.x` and an output `NAME.y` each, and what they give."""
    random = np.random.default_rng(0)
    nodes, values, inputs, outputs, feeds = [], [], [], [], {}
    for name, (depth, width, bits, block, zero_points) in PRODUCTS.items():
        blocks = -(-depth // block)
        packed = {
            "q": random.integers(0, 256, (width, blocks, block * bits // 8), np.uint8),
            "s": random.uniform(0.01, 0.1, (width, blocks)).astype(np.float32),
        }
        if zero_points:
            packed["z"] = random.integers(0, 256, (width, -(-blocks * bits // 8)), np.uint8)
        values += [numpy_helper.from_array(value, f"{name}.{part}") for part, value in packed.items()]
        nodes.append(
            helper.make_node(
                "MatMulNBits", [f"{name}.x", *(f"{name}.{part}" for part in packed)], [f"{name}.y"],
                name, domain="com.microsoft", K=depth, N=width, bits=bits, block_size=block, accuracy_level=1,
            )
        )  # fmt: skip
        feeds[f"{name}.x"] = random.standard_normal((1, 3, depth)).astype(np.float32)
        inputs.append(helper.make_tensor_value_info(f"{name}.x", onnx.TensorProto.FLOAT, [1, 3, depth]))
        outputs.append(helper.make_tensor_value_info(f"{name}.y", onnx.TensorProto.FLOAT, [1, 3, width]))
    graph = helper.make_graph(nodes, "products", inputs, outputs, values)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    given = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feeds)
    return {
        name: {"x": feeds[f"{name}.x"].ravel().tolist(), "y": y.ravel().tolist()}
        for name, y in zip(PRODUCTS, given, strict=True)
    }


def main(export: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    manifest = load_manifest(export)
    model = SteeredModel(export, device="cpu")
    vectors: dict[str, Any] = {"adapters": {}, "refused": {}}
    for seed, (name, described) in enumerate(good_adapters(manifest).items()):
        good = adapter(described, seed)
        for precision in PRECISIONS:
            path = out / f"{name}-{precision}.safetensors"
            save_adapter(good, path, precision)
            vectors["adapters"][path.stem] = {
                port: {"shape": list(value.shape), "data": value.ravel().tolist()}
                for port, value in port_inputs(
                    fold(load_adapter(path)), manifest, np.dtype(np.float32)
                ).items()
            }
    for name, (because, content) in bad_adapters(manifest, out).items():
        path = out / f"bad-{name}.safetensors"
        path.write_bytes(content)
        said = refusal(model, path)
        assert because in said, said
        vectors["refused"][path.stem] = because
    vectors["positions"] = [spans(spec, tied) for spec in SPECS for tied in (False, True)]
    vectors["prompts"] = [in_prompt(spec, prompt) for spec in CALLED for prompt in CALLS]
    halves = np.array(NUMBERS, np.float32)
    with np.errstate(over="ignore"):
        vectors["halves"] = [
            [float(number), int(half)]
            for number, half in zip(halves, halves.astype(np.float16).view(np.uint16), strict=True)
        ]
    vectors["products"] = products(out / "products.onnx")
    (out / "vectors.json").write_text(json.dumps(vectors))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
