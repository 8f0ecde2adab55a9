"""torch.save's files, read by readers of our own: what torch writes comes back, and nothing else gets in."""

import io
import pickle
import pickletools
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reft_edge.convert.folder import open_inside
from reft_edge.convert.tensor_file import parse_tensors, read_tensors
from reft_edge.convert.torch_zip import read_entries
from reft_edge.errors import ReftEdgeError

LIMIT = 1 << 16


def saved(state: object) -> bytes:
    content = io.BytesIO()
    torch.save(state, content)
    return content.getvalue()


def with_pickle(code: bytes, storage: bytes = bytes(64)) -> bytes:
    """A zip as torch.save writes it, with this pickle."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", code)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", storage)
    return content.getvalue()


STATES = {
    "every type": {
        str(dtype): torch.arange(6).to(dtype).reshape(2, 3)
        for dtype in (
            torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
            torch.int8, torch.uint8, torch.bool,
        )
    },
    "views": {
        "transposed": torch.randn(4, 5).mT,
        "strided": torch.randn(20)[3:15:3],
        "row": torch.randn(4, 5)[2],
        "none": torch.zeros(3, 0),
        "scalar": torch.tensor(7),
    },
    "parameters": {"p": torch.nn.Parameter(torch.randn(3))},
    "a module's": torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(5, 3)).state_dict(),
    "ordered": OrderedDict(a=torch.randn(2)),
    "empty": {},
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_what_torch_saves_comes_back(name):
    found = parse_tensors(saved(STATES[name]), LIMIT)
    assert list(found) == list(STATES[name])
    for key, tensor in STATES[name].items():
        assert found[key].dtype == np.float32
        assert found[key].shape == tuple(tensor.shape)
        assert np.array_equal(found[key], tensor.detach().float().numpy())


def test_two_tensors_of_one_storage():
    both = torch.randn(4, 6)
    content = saved({"upper": both[:2], "lower": both[2:]})
    found = parse_tensors(content, LIMIT)
    assert np.array_equal(np.concatenate([found["upper"], found["lower"]]), both.numpy())


def bomb(count: int) -> bytes:
    asked = b"cbuiltins\nbytearray\nJ" + struct.pack("<i", 1 << 30) + b"\x85R"
    return b"\x80\x02](" + asked * count + b"e."


TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x10tQ"


def tensor(offset: bytes = b"K\x00", shape: bytes = b"K\x10\x85", strides: bytes = b"K\x01\x85") -> bytes:
    """A pickle of one named tensor over 16 floats."""
    made = TENSOR + offset + shape + strides + b"\x89ccollections\nOrderedDict\n)RtR"
    return b"\x80\x02}X\x01\x00\x00\x00a" + made + b"s."


def test_the_pickle_written_here_is_one():
    assert parse_tensors(with_pickle(tensor()), LIMIT)["a"].shape == (16,)


PICKLES = {
    "bytearrays": (bomb(3), "EMPTY_LIST"),
    "a bytearray": (b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00\x40\x85R.", "builtins.bytearray"),
    "a command": (b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00id\x85R.", "os.system"),
    "a name by its parts": (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "protocol 4"),
    "an allowed function of torch": (b"\x80\x02ctorch._utils\n_rebuild_sparse_tensor\n.", "_rebuild_sparse_tensor"),
    "a type for a function": (b"\x80\x02ctorch\nFloatStorage\nJ\x00\x00\x00\x40\x85R.", "otherwise than torch.save"),
    "a filled dictionary": (b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.", "otherwise than torch.save"),
    "a huge number": (b"\x80\x02\x8b" + struct.pack("<I", 60_000) + b"\x7f" * 60_000 + b".", "LONG4"),
    "a large number": (b"\x80\x02\x8a\x09" + b"\x7f" * 9 + b".", "no size of a tensor"),
    "digits": (b"\x80\x02I" + b"9" * 5000 + b"\n.", "malformed"),
    "out-of-band buffers": (b"\x80\x05\x97.", "protocol 5"),
    "buffers": (b"\x80\x02\x97.", "NEXT_BUFFER"),
    "frames": (b"\x80\x02\x95" + struct.pack("<Q", 1 << 62) + b"}.", "FRAME"),
    "an object": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "NEWOBJ"),
    "a state for a tensor": (tensor()[:-2] + b"}bs.", "state of something"),
    "an extension": (b"\x80\x02\x82\x01.", "EXT1"),
    "a second end": (b"\x80\x02}.}.", "bytes after its end"),
    "no end": (b"\x80\x02}", "malformed"),
    "values left": (b"\x80\x02}}.", "leaves values behind"),
    "nothing to take": (b"\x80\x02R.", "never made"),
    "a mark taken": (b"\x80\x02(\x85.", "never made"),
    "an unknown memo": (b"\x80\x02h\x07.", "never made"),
    "text as key twice": (tensor()[:-1] + b"X\x01\x00\x00\x00aK\x01s.", "twice"),
    "a number as key": (b"\x80\x02}K\x01K\x01s.", "not a named tensor"),
    "a text": (b"\x80\x02X\x01\x00\x00\x00a.", "holds a text"),
    "a storage": (b"\x80\x02}X\x01\x00\x00\x00a" + TENSOR[TENSOR.index(b"(X") :] + b"s.", "not a named tensor"),
    "another storage": (tensor().replace(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x001"), "does not hold"),
    "a path for a key": (tensor().replace(b"X\x01\x00\x00\x000", b"X\x0b\x00\x00\x00../data.pkl"), "does not hold"),
    "beyond its storage": (tensor(offset=b"K\x01"), "reaches beyond"),
    "far strides": (tensor(shape=b"K\x02\x85", strides=b"J\x00\x00\x00\x7f\x85"), "reaches beyond"),
    "negative strides": (tensor(strides=b"J\xff\xff\xff\xff\x85"), "no whole numbers"),
    "a negative offset": (tensor(offset=b"J\xff\xff\xff\xff"), "no whole numbers"),
    "repeated numbers": (tensor(shape=b"J\x00\x00\x00\x7f\x85", strides=b"K\x00\x85"), "claims"),
    "an empty shape that is huge": (tensor(shape=b"J\x00\x00\x00\x7fK\x00\x86", strides=b"K\x00K\x00\x86"), "claims"),
    "true as a size": (tensor(shape=b"\x88\x85"), "no whole numbers"),
    "other strides": (tensor(strides=b"K\x01K\x01\x86"), "no whole numbers"),
    "many dimensions": (tensor(shape=b"(" + b"K\x01" * 80 + b"t", strides=b"(" + b"K\x01" * 80 + b"t"), "otherwise"),
    "a quantised type": (tensor().replace(b"FloatStorage", b"QInt8Storage"), "QInt8Storage"),
    "a longer pickle": (b"\x80\x02}" + b"q\x00" * (1 << 18) + b".", "at most 524,288"),
}  # fmt: skip


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_of_anything_else_is_refused_without_memory(name):
    code, message = PICKLES[name]
    content = with_pickle(code)
    tracemalloc.start()
    try:
        with pytest.raises(ReftEdgeError, match=message):
            parse_tensors(content, LIMIT)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_values_in_values_are_not_looked_through():
    """Each tuple holds the one before twice: written out, 2 to the power of 5,000 values; and 20,000 dictionaries deep."""
    doubled = b"\x80\x02)" + b"q\x00h\x00\x86" * 5000 + b"."
    deep = b"\x80\x02" + b"}X\x01\x00\x00\x00a" * 20_000 + b"}" + b"s" * 20_000 + b"."
    for code, message in ((doubled, "holds a tuple"), (deep, "a dictionary under 'a'")):
        with pytest.raises(ReftEdgeError, match=message):
            parse_tensors(with_pickle(code), LIMIT)


@given(st.binary(max_size=60), st.integers(0, 90))
def test_no_damaged_pickle_gets_through(piece, at):
    code = tensor()
    at = min(at, len(code))
    try:
        found = parse_tensors(with_pickle(code[:at] + piece + code[at + len(piece) :]), LIMIT)
    except ReftEdgeError:
        return
    assert sum(array.size for array in found.values()) <= 16


def test_old_files_and_files_in_files_are_refused(tmp_path):
    innocent = saved({"a": torch.ones(2)})
    old = io.BytesIO()
    torch.save({"weight": torch.ones(2)}, old, _use_new_zipfile_serialization=False)
    spliced = bytearray(innocent)
    spliced[spliced.index(b"PK\1\2") : spliced.index(b"PK\1\2")] = b"hidden"
    for content, message in (
        (old.getvalue(), "not a file of torch.save's zip format"),
        (old.getvalue() + innocent, "not a file of torch.save's zip format"),
        (innocent + innocent, "belong to no entry|no whole file|agree"),
        (b"PK\3\4" + old.getvalue() + innocent, "agree|belong to no entry"),
        (innocent + b"tail", "no whole file"),
        (bytes(spliced), "agree|belong"),
        (innocent[:-1], "ends early"),
        (innocent[: len(innocent) // 2], "ends early"),
        (b"PK\3\4", "ends early"),
        (b"", "not a file"),
        (pickle.dumps({"a": 1}), "not a file"),
    ):
        (tmp_path / "x.bin").write_bytes(content)
        with pytest.raises(ReftEdgeError, match=message):
            read_tensors(tmp_path / "x.bin", LIMIT)


def zipped(*entries: tuple[str, bytes], method: int = zipfile.ZIP_STORED, comment: bytes = b"") -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as archive:
        for name, data in entries:
            archive.writestr(name, data)
        archive.comment = comment
    return content.getvalue()


PICKLE = ("a/data.pkl", b"\x80\x02}.")


def changed(content: bytes, mark: bytes, at: int, value: bytes) -> bytes:
    """With `value` written `at` bytes after the last `mark`."""
    start = content.rindex(mark) + at
    return content[:start] + value + content[start + len(value) :]


ZIPS = {
    "a comment": (zipped(PICKLE, comment=b"hello"), "no whole file"),
    "compressed": (zipped(PICKLE, method=zipfile.ZIP_DEFLATED), "compressed"),
    "two pickles": (zipped(PICKLE, ("a/b/data.pkl", b"\x80\x02}.")), "expected one data.pkl"),
    "no pickle": (zipped(("a/data/0", b"")), "expected one data.pkl"),
    "two folders": (zipped(PICKLE, ("b/data/0", b"")), "more than one folder"),
    "big-endian": (zipped(PICKLE, ("a/byteorder", b"big")), "byte order"),
    "a name beyond ASCII": (zipped(PICKLE, ("a/é", b"")), "name"),
    "encrypted": (changed(changed(zipped(PICKLE), b"PK\1\2", 8, b"\1"), b"PK\3\4", 6, b"\1"), "of a kind"),
    "a later version": (changed(zipped(PICKLE), b"PK\1\2", 6, b"\xfd"), "of a kind"),
    "flags that differ": (changed(zipped(PICKLE), b"PK\3\4", 6, b"\x08"), "agree"),
    "names that differ": (changed(zipped(PICKLE), b"PK\3\4", 30, b"b"), "agree"),
    "sizes that differ": (changed(zipped(PICKLE), b"PK\3\4", 18, b"\3"), "agree"),
    "a checksum": (changed(zipped(PICKLE), b"PK\3\4", 40, b"\x90"), "damaged"),
    "an offset": (changed(zipped(PICKLE), b"PK\1\2", 42, b"\1"), "agree"),
    "a size beyond": (
        changed(changed(zipped(PICKLE), b"PK\1\2", 20, b"\xff\xff\0\0\xff\xff\0\0"), b"PK\3\4", 18, b"\xff\xff\0\0\xff\xff\0\0"),
        "beyond its place",
    ),
    "sizes of 64 bits": (changed(zipped(PICKLE), b"PK\1\2", 20, b"\xff" * 8), "of a kind"),
    "fewer entries": (changed(zipped(PICKLE, ("a/version", b"3")), b"PK\5\6", 8, b"\1\0\1\0"), "belong to no entry"),
    "more entries": (changed(zipped(PICKLE), b"PK\5\6", 8, b"\2\0\2\0"), "truncated"),
    "another disk": (changed(zipped(PICKLE), b"PK\5\6", 4, b"\1"), "entries"),
    "another second end": (changed(saved({}), b"PK\6\6", 32, b"\7"), "do not agree"),
    "a locator elsewhere": (changed(saved({}), b"PK\6\7", 8, b"\7"), "do not agree"),
}  # fmt: skip


@pytest.mark.parametrize("name", ZIPS)
def test_a_zip_that_can_be_read_two_ways_is_refused(name):
    content, message = ZIPS[name]
    with pytest.raises(ReftEdgeError, match=message):
        parse_tensors(content, LIMIT)


def test_two_entries_of_one_name_are_refused():
    with pytest.warns(UserWarning, match="Duplicate name"):
        content = zipped(PICKLE, PICKLE)
    with pytest.raises(ReftEdgeError, match="two entries of one name"):
        read_entries(content)


def test_pythons_zips_are_read_too():
    assert parse_tensors(zipped(PICKLE), LIMIT) == {}


def test_every_operation_of_pickles_has_an_answer():
    """None of the 68 raises anything but a refusal, whatever follows it."""
    for operation in pickletools.opcodes:
        for rest in (b".", b"\x00" * 16 + b".", b"a\nb\n.", b"\xff" * 9):
            try:
                parse_tensors(with_pickle(b"\x80\x02})" + operation.code.encode("latin-1") + rest), LIMIT)
            except ReftEdgeError:
                continue


def test_links_out_of_a_folder_and_what_is_no_file_are_refused(tmp_path):
    import os

    content = saved({"a": torch.ones(2)})
    (tmp_path / "outside.bin").write_bytes(content)
    folder = tmp_path / "given"
    folder.mkdir()
    (folder / "real.bin").write_bytes(content)
    (folder / "inside.bin").symlink_to("real.bin")
    (folder / "outside.bin").symlink_to("../outside.bin")
    (folder / "loop.bin").symlink_to("loop.bin")
    os.mkfifo(folder / "fifo.bin")
    assert read_tensors(folder / "inside.bin", LIMIT).keys() == {"a"}
    for name in ("outside.bin", "loop.bin", "fifo.bin", "."):
        with pytest.raises(ReftEdgeError, match=r"link|not a regular file|s a directory"):
            read_tensors(folder / name, LIMIT)


def test_a_snapshot_of_the_hub_is_links_into_its_blobs(tmp_path):
    content = saved({"a": torch.ones(2)})
    snapshot = tmp_path / "models--o--n/snapshots/abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--o--n/blobs").mkdir()
    (tmp_path / "models--o--n/blobs/123").write_bytes(content)
    (snapshot / "x.bin").symlink_to("../../blobs/123")
    with open_inside(Path(snapshot / "x.bin")) as file:
        assert file.read() == content
