"""What is fuzzed of other libraries' formats and of repositories: pyreft's files, GGUF, .onnx_adapter, the index, OCI manifests."""

from pathlib import Path

from harness import Target
from own_targets import make_adapter, make_manifest

from reft_edge.adapter.base import Base
from reft_edge.adapter.config import INTERVENTIONS
from reft_edge.adapter.linear import fold
from reft_edge.convert.tensor_file import parse_tensors
from reft_edge.convert.torch_zip import read_entries
from reft_edge.errors import ReftEdgeError
from reft_edge.model.gguf_header import check_model, parse_gguf_header

BASE = Base("base", "0" * 16, 8, 4)


def pyreft_target(folder: Path) -> Target:
    """A tensor file in a folder of pyreft that has no config.json."""
    from reft_edge.convert.from_pyreft import Asked, from_pyreft
    from reft_edge.convert.to_pyreft import to_pyreft

    seeds = []
    for kind in INTERVENTIONS[:-2]:
        to_pyreft(make_adapter(kind, positions="f2", layers=(0,)), folder / kind)
        seeds.append(next((folder / kind).glob("intkey_*.bin")).read_bytes())
    unsafe = folder / "unsafe"
    unsafe.mkdir()

    def read(content: bytes) -> None:
        (unsafe / "intkey_layer_0_comp_block_output_unit_pos_nunit_1#0.bin").write_bytes(content)
        try:
            adapter = from_pyreft(unsafe, lambda: BASE, Asked("f2", "linear", None, True))
        except ReftEdgeError:  # ConsReFT and LoBiReFT have the same tensors; here the user says which
            adapter = from_pyreft(unsafe, lambda: BASE, Asked("f2", None, "consreft", True))
        fold(adapter)

    return Target(read, seeds, len(seeds))


def torch_pickle_target(folder: Path) -> Target:
    """The pickle of a tensor file, in a zip whose checksums are right, beside the numbers that it may ask for."""
    import io
    import zipfile

    import torch

    stored = {"W": torch.ones(2, 8), "b": torch.ones(2).bfloat16(), "count": torch.tensor(8)}
    linear = torch.nn.Linear(8, 2, bias=False)
    seeds = []
    for state in (stored, linear.state_dict(), {"weight": linear.weight}, {"view": torch.ones(2, 8)[1:].mT}):
        content = io.BytesIO()
        torch.save(state, content)
        with zipfile.ZipFile(content) as archive:
            seeds.append(archive.read("archive/data.pkl"))
    unsafe = [
        b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00\x40\x85R.",
        b"\x80\x02cos\nsystem\n(X\x02\x00\x00\x00idtR.",
    ]

    def read(content: bytes) -> None:
        whole = io.BytesIO()
        with zipfile.ZipFile(whole, "w") as archive:
            archive.writestr("archive/data.pkl", content)
            for key, numbers in enumerate((64, 4, 8)):
                archive.writestr(f"archive/data/{key}", bytes(numbers))
        for array in parse_tensors(whole.getvalue(), 1 << 12).values():
            assert array.nbytes <= 4 << 12

    return Target(read, [*seeds, *unsafe], len(seeds))


def torch_zip_target(folder: Path) -> Target:
    """The zip of a tensor file: what our reader takes, Python's takes for the same entries."""
    import io
    import zipfile

    import torch

    seeds = []
    for state in ({"W": torch.ones(2, 8)}, {"W": torch.ones(2), "b": torch.ones(1)}):
        content = io.BytesIO()
        torch.save(state, content)
        seeds.append(content.getvalue())
    plain = io.BytesIO()
    with zipfile.ZipFile(plain, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    seeds.append(plain.getvalue())

    def read(content: bytes) -> None:
        entries = read_entries(content)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            assert archive.namelist() == list(entries)
            for name, data in entries.items():
                assert archive.read(name) == bytes(data)

    return Target(read, seeds, len(seeds))


def pyreft_config_target(folder: Path) -> Target:
    """The config.json of a pyreft folder whose tensors are sound."""
    from reft_edge.convert.from_pyreft import Asked, from_pyreft
    from reft_edge.convert.to_pyreft import to_pyreft

    saved = folder / "saved"
    to_pyreft(make_adapter("loreft"), saved)
    seed = (saved / "config.json").read_bytes()

    def read(content: bytes) -> None:
        (saved / "config.json").write_bytes(content)
        fold(from_pyreft(saved, lambda: BASE, Asked("f2+l2", "linear", None, True)))

    return Target(read, [seed], 1)


def control_vector_target(folder: Path) -> Target:
    """Control vectors in GGUF."""
    from reft_edge.convert.control_vector import constant_edit, from_control_vector, write_control_vector

    path = folder / "vector.gguf"
    steering = make_adapter("steering", positions="all+gen", tied=True, layers=(1, 2))
    write_control_vector(path, constant_edit(steering), "llama")
    seeds = [path.read_bytes()]

    def read(content: bytes) -> None:
        path.write_bytes(content)
        fold(from_control_vector(path, BASE, False))

    return Target(read, seeds, 1)


def onnx_adapter_target(folder: Path) -> Target:
    """Packed adapters."""
    import numpy as np

    from reft_edge.convert.onnx_adapter import from_onnx_adapter
    from reft_edge.runtime.binding import port_inputs
    from reft_edge.runtime.onnx_runtime import import_onnxruntime, ort_value

    ort, manifest, path = import_onnxruntime(), make_manifest(), folder / "packed.onnx_adapter"
    seeds = []
    for kind in ("loreft", "steering"):
        packed = ort.AdapterFormat()
        packed.set_adapter_version(1)
        packed.set_model_version(1)
        inputs = port_inputs(fold(make_adapter(kind)), manifest, np.dtype(np.float32))
        packed.set_parameters({name: ort_value(array, False) for name, array in inputs.items()})
        packed.export_adapter(str(path))
        seeds.append(path.read_bytes())

    def read(content: bytes) -> None:
        path.write_bytes(content)
        fold(from_onnx_adapter(path, manifest, False))

    return Target(read, seeds, len(seeds))


def gguf_model_target(folder: Path) -> Target:
    """The header of a GGUF model, as it is checked before a library reads the file."""
    import io

    import gguf
    import numpy as np

    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_vocab_size(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"<{number}>" for number in range(8)])
    writer.add_token_types([1] * 8)
    writer.add_token_scores([0.0] * 8)
    writer.add_token_merges(["a b"])
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    quantised = gguf.quants.quantize(np.zeros((4, 32), np.float32), gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("blk.0.attn_q.weight", quantised, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    def read(content: bytes) -> None:
        header = parse_gguf_header(io.BytesIO(content), len(content), 1 << 20)
        check_model(header)
        assert all(tensor.start <= len(content) for tensor in header.tensors)
        assert sum(count for _, count in header.arrays.values()) <= len(content)

    return Target(read, [path.read_bytes(), b"GGUF" + bytes(40)], 1)


def adapterhub_config_target(folder: Path) -> Target:
    """The adapter_config.json of an AdapterHub folder whose tensors are sound."""
    import json

    import torch

    from reft_edge.convert.from_adapterhub import from_adapterhub
    from reft_edge.convert.from_pyreft import Asked

    config = {
        "architecture": "reft",
        "layers": [1],
        "prefix_positions": 2,
        "suffix_positions": 1,
        "r": 2,
        "tied_weights": True,
    }
    config |= {"orthogonality": False, "non_linearity": None}
    seed = json.dumps({"config": config, "hidden_size": 8}).encode()
    names = {"learned_source.weight": (2, 8), "learned_source.bias": (2,), "projection.weight": (2, 8)}
    place = "model.layers.1.reft_layer.refts.a.units.0."
    torch.save(
        {place + name: torch.ones(shape) for name, shape in names.items()}, folder / "pytorch_adapter.bin"
    )

    def read(content: bytes) -> None:
        (folder / "adapter_config.json").write_bytes(content)
        asked = Asked(intervention="noreft", raw=True)
        adapter = from_adapterhub(folder, lambda: BASE, asked)
        if adapter.config.act_fn == "linear":
            fold(adapter)

    return Target(read, [seed], 1)
