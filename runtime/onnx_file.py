"""ONNX files in protobuf's wire format, field by field: a device has no package that knows them."""

from collections.abc import Iterator

BYTES = 2
"""The wire type of texts, messages and packed numbers."""


def read_text(message: bytes, field: int) -> str:
    """The first field of this number, a text. Raises StopIteration if there is none."""
    return next(
        message[start:end].decode() for number, _, start, end in read_fields(message) if number == field
    )


def read_fields(message: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Number of every field, where it begins, and where its value starts and ends. Raises ValueError or IndexError for what
    is no message."""
    at = 0
    while at < len(message):
        key, start = read_number(message, at)
        if key & 7 == BYTES:
            size, start = read_number(message, start)
            end = start + size
        elif key & 7 == 0:
            end = read_number(message, start)[1]
        else:
            end = start + {1: 8, 5: 4}[key & 7]
        if end > len(message):
            raise ValueError("a field ends after its message")
        yield key >> 3, at, start, end
        at = end


def read_numbers(packed: bytes) -> list[int]:
    """Varints, one after the other."""
    at, found = 0, []
    while at < len(packed):
        number, at = read_number(packed, at)
        found.append(number)
    return found


def read_number(data: bytes, at: int) -> tuple[int, int]:
    """A varint, and where it ends."""
    number = shift = 0
    while True:
        byte = data[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return number, at


def bytes_field(field: int, content: bytes) -> bytes:
    """A field with a text or a message."""
    return varint(field << 3 | BYTES) + varint(len(content)) + content


def number_field(field: int, number: int) -> bytes:
    """A field with a whole number from 0."""
    return varint(field << 3) + varint(number)


def varint(number: int) -> bytes:
    """A whole number from 0, seven bits a byte."""
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])
