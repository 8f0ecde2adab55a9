"""The zip that torch.save writes, read strictly: a file that two zip readers could take for two things is refused.

From its first byte to its last, the file is entries one after the other, each with its own header, then the central directory
that says the same of each, then the end records. Nothing is between or around them. Entries are stored as they are.
"""

import struct
import zlib

from reft_edge.errors import ReftEdgeError

_MAX_ENTRIES = 1 << 13
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR_64 = struct.Struct("<4sIQI")
_DESCRIPTOR = struct.Struct("<4s3I")
_SIZES_FOLLOW, _UTF8 = 1 << 3, 1 << 11
_VERSION = 45
"""The latest of the zip format that such a file can ask for."""


def read_entries(content: bytes) -> dict[str, memoryview]:
    """Name to content of every entry. Raises ReftEdgeError that says what is not as torch.save writes it."""
    view = memoryview(content)
    if content[:4] != b"PK\3\4":
        raise ReftEdgeError("it is not a file of torch.save's zip format")
    start, end, count = _directory(view)
    found: dict[str, memoryview] = {}
    at, entry_at = 0, start
    for _ in range(count):
        name, data, at, entry_at = _entry(view, at, entry_at, start, end)
        if name in found:
            raise ReftEdgeError("its zip has two entries of one name")
        found[name] = data
    if at != start or entry_at != end:
        raise ReftEdgeError("its zip holds bytes that belong to no entry")
    return found


def _directory(view: memoryview) -> tuple[int, int, int]:
    """Where the central directory begins and ends, and its number of entries."""
    end_at = len(view) - _END.size
    if end_at < 0:
        raise ReftEdgeError("it is no whole file of torch.save's zip format: it ends early")
    mark, disk, first_disk, here, count, size, start, comment = _END.unpack_from(view, end_at)
    if mark != b"PK\5\6" or comment:
        raise ReftEdgeError(
            "it is no whole file of torch.save's zip format: it ends early, or something follows its end"
        )
    if disk or first_disk or here != count or not 0 < count <= _MAX_ENTRIES:
        raise ReftEdgeError(f"its zip claims {count:,} entries; expected 1 to {_MAX_ENTRIES:,}")
    end = start + size
    if end == end_at - _END_64.size - _LOCATOR_64.size:
        whole = _END_64.unpack_from(view, end)
        locator = _LOCATOR_64.unpack_from(view, end + _END_64.size)
        rest = _END_64.size - 12
        if (whole[0], whole[1], *whole[4:]) != (
            b"PK\6\6",
            rest,
            0,
            0,
            count,
            count,
            size,
            start,
        ) or locator != (
            b"PK\6\7",
            0,
            end,
            1,
        ):
            raise ReftEdgeError("its zip has two records of its end that do not agree")
    elif end != end_at:
        raise ReftEdgeError("its zip holds bytes that belong to no entry")
    return start, end, count


def _entry(
    view: memoryview, at: int, entry_at: int, start: int, end: int
) -> tuple[str, memoryview, int, int]:
    """Name and data of the entry at `at`, which the directory's record at `entry_at` describes, and where the next ones are."""
    if entry_at + _CENTRAL.size > end or at + _LOCAL.size > start:
        raise ReftEdgeError("its zip's directory is truncated")
    central = _CENTRAL.unpack_from(view, entry_at)
    local = _LOCAL.unpack_from(view, at)
    (
        mark,
        _,
        version,
        flags,
        method,
        _,
        _,
        checksum,
        packed,
        size,
        name_size,
        extra,
        comment,
        disk,
        _,
        _,
        offset,
    ) = central
    if mark != b"PK\1\2" or local[0] != b"PK\3\4" or offset != at:
        raise ReftEdgeError("its zip's directory and entries do not agree")
    if method or packed != size:
        raise ReftEdgeError("it is a compressed zip, which torch.save never writes; not unpacked")
    if (
        flags & ~(_SIZES_FOLLOW | _UTF8)
        or extra
        or comment
        or disk
        or size == 0xFFFFFFFF
        or max(version, local[1]) > _VERSION
    ):
        raise ReftEdgeError("its zip has entries of a kind that torch.save does not write for adapters")
    follows = bool(flags & _SIZES_FOLLOW)
    stated = (checksum, size, size)
    if local[2] != flags or local[3] or local[9] != name_size:
        raise ReftEdgeError("its zip's directory and entries do not agree")
    if local[6:9] != stated and not (follows and local[6:9] == (0, 0, 0)):
        raise ReftEdgeError("its zip's directory and entries do not agree")
    name_at = at + _LOCAL.size
    name = bytes(view[entry_at + _CENTRAL.size :][:name_size])
    if name != view[name_at : name_at + name_size] or entry_at + _CENTRAL.size + name_size > end:
        raise ReftEdgeError("its zip's directory and entries do not agree")
    data_at = name_at + name_size + local[10]
    after = data_at + size
    if after + follows * _DESCRIPTOR.size > start:
        raise ReftEdgeError("an entry of its zip runs beyond its place; the file is truncated")
    data = view[data_at:after]
    if follows:
        if _DESCRIPTOR.unpack_from(view, after) != (b"PK\7\x08", *stated):
            raise ReftEdgeError("its zip's directory and entries do not agree")
        after += _DESCRIPTOR.size
    if zlib.crc32(data) != checksum:
        raise ReftEdgeError("an entry's checksum is not what its zip says; the file is damaged")
    return _text(name), data, after, entry_at + _CENTRAL.size + name_size


def _text(name: bytes) -> str:
    if not name.isascii() or b"\0" in name or b"\\" in name:
        raise ReftEdgeError("its zip has an entry whose name torch.save does not write")
    return name.decode("ascii")
