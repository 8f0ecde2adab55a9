"""The pickle inside torch.save's files, read without unpickling: only what a dictionary of dense tensors needs is understood.

`pickletools.genops` names the operations and runs none. Of these, the ones that torch.save writes at its protocol, 2, are
followed here on values of our own; nothing is imported, called or allocated. Anything else is refused by name.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from reft_edge.errors import ReftEdgeError

MAX_PICKLE = 1 << 19
"""Bytes; 64 layers of AdapterHub take 80,000."""
_LARGEST = 1 << 40
_MAX_DIMENSIONS = 8


@dataclass(frozen=True)
class Storage:
    """One run of numbers in the file."""

    kind: str
    """torch's name for its type, such as `FloatStorage`."""
    key: str
    """Its entry is `data/KEY`."""
    count: int


@dataclass(frozen=True)
class View:
    """A tensor: which numbers of a storage it is, as `torch.as_strided` counts them. Nothing of it is checked against the file."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Name:
    """What a pickle asks to import; here it stays a name."""

    text: str


_DICTIONARY = "collections OrderedDict"
_TENSOR, _PARAMETER = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
_STORAGE = "torch {}Storage"
_KINDS = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_NAMES = (_DICTIONARY, _TENSOR, _PARAMETER, *(_STORAGE.format(kind) for kind in _KINDS))


class _Mark:
    pass


_MARK = _Mark()


def read_views(content: bytes) -> dict[str, View]:
    """The named tensors of a pickle. Raises ReftEdgeError for one that holds anything else."""
    if len(content) > MAX_PICKLE:
        raise ReftEdgeError(
            f"its pickle has {len(content):,} bytes; a few tensors need at most {MAX_PICKLE:,}"
        )
    machine = _Machine()
    position = 0
    try:
        for operation, argument, at in pickletools.genops(content):
            position = at or 0
            machine.step(operation.name, argument)
    except ValueError as error:  # pickletools' word for what is no pickle
        raise ReftEdgeError("its pickle is malformed") from error
    if position + 1 != len(content):
        raise ReftEdgeError("its pickle has bytes after its end")
    return _named(machine.result)


def _named(found: Any) -> dict[str, View]:
    if not isinstance(found, dict):
        raise ReftEdgeError(f"it holds {_kind(found)}; expected a dictionary of tensors")
    for name, value in found.items():
        if not isinstance(value, View):
            raise ReftEdgeError(f"it holds {_kind(value)} under {name!r:.80}, which is not a named tensor")
    return found


class _Machine:
    """The stack and the memo of one pickle."""

    def __init__(self) -> None:
        self.result: Any = None
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        if name in _PLAIN:
            self._stack.append(_PLAIN[name](argument))
        elif name in _STEPS:
            _STEPS[name](self, argument)
        else:
            raise ReftEdgeError(
                f"its pickle has the operation {name}, which torch.save does not write for a dictionary of tensors; not read"
            )

    def pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise ReftEdgeError("its pickle is malformed: it takes what it never made")
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        taken = []
        while self._stack and self._stack[-1] is not _MARK:
            taken.append(self._stack.pop())
        if not self._stack:
            raise ReftEdgeError("its pickle is malformed: it takes what it never made")
        self._stack.pop()
        return taken[::-1]

    def put(self, index: int) -> None:
        value = self.pop()
        self._stack.append(value)
        self._memo[index] = value

    def get(self, index: int) -> None:
        if index not in self._memo:
            raise ReftEdgeError("its pickle is malformed: it takes what it never made")
        self._stack.append(self._memo[index])

    def tuple_of(self, count: int) -> None:
        taken = [self.pop() for _ in range(count)]
        self._stack.append(tuple(taken[::-1]))

    def tuple_to_mark(self) -> None:
        self._stack.append(tuple(self._pop_to_mark()))

    def set_item(self) -> None:
        value, name = self.pop(), self.pop()
        self._fill([name, value])

    def set_items(self) -> None:
        self._fill(self._pop_to_mark())

    def _fill(self, items: list[Any]) -> None:
        target = self.pop()
        if not isinstance(target, dict) or len(items) % 2:
            raise ReftEdgeError("its pickle is malformed: it fills what is no dictionary")
        for name, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(name, str):
                raise ReftEdgeError(
                    f"it holds {_kind(value)} under {_kind(name)}, which is not a named tensor"
                )
            if name in target:
                raise ReftEdgeError(f"it holds {name!r:.80} twice")
            target[name] = value
        self._stack.append(target)

    def build(self) -> None:
        """What a state dict knows of its modules (`_metadata`) is left aside."""
        state, target = self.pop(), self.pop()
        if not isinstance(state, dict) or not isinstance(target, dict):
            raise ReftEdgeError("its pickle sets the state of something that is no dictionary; not read")
        self._stack.append(target)

    def persistent(self) -> None:
        self._stack.append(_storage(self.pop()))

    def reduce(self) -> None:
        arguments, called = self.pop(), self.pop()
        if not isinstance(called, _Name) or not isinstance(arguments, tuple):
            raise ReftEdgeError("its pickle calls something that is no function; not read")
        if called.text == _DICTIONARY and not arguments:
            self._stack.append({})
        elif called.text == _TENSOR:
            self._stack.append(_view(arguments))
        elif called.text == _PARAMETER and len(arguments) == 3 and isinstance(arguments[0], View):
            self._stack.append(arguments[0])
        else:
            raise ReftEdgeError(f"its pickle calls {called.text} otherwise than torch.save does; not read")

    def stop(self) -> None:
        self.result = self.pop()
        if self._stack:
            raise ReftEdgeError("its pickle is malformed: it leaves values behind")


def _name(argument: Any) -> _Name:
    if argument not in _NAMES:
        raise ReftEdgeError(
            f"its pickle asks for {str(argument).replace(' ', '.')!r:.80}, which no dictionary of tensors needs; not read"
        )
    return _Name(argument)


def _protocol(machine: _Machine, argument: Any) -> None:
    if argument != 2:
        raise ReftEdgeError(f"its pickle is of protocol {argument}; torch.save writes 2")


def _whole(argument: Any) -> int:
    if not -_LARGEST < argument < _LARGEST:
        raise ReftEdgeError("its pickle holds a number that is no size of a tensor")
    return int(argument)


_PLAIN: dict[str, Callable[[Any], Any]] = {
    "EMPTY_DICT": lambda argument: {},
    "EMPTY_TUPLE": lambda argument: (),
    "MARK": lambda argument: _MARK,
    "NONE": lambda argument: None,
    "NEWTRUE": lambda argument: True,
    "NEWFALSE": lambda argument: False,
    "BINUNICODE": lambda argument: argument,
    "BININT": _whole,
    "BININT1": _whole,
    "BININT2": _whole,
    "LONG1": _whole,
    "GLOBAL": _name,
}
"""Operations that put one value on the stack."""
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _protocol,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "TUPLE": lambda machine, argument: machine.tuple_to_mark(),
    "TUPLE1": lambda machine, argument: machine.tuple_of(1),
    "TUPLE2": lambda machine, argument: machine.tuple_of(2),
    "TUPLE3": lambda machine, argument: machine.tuple_of(3),
    "SETITEM": lambda machine, argument: machine.set_item(),
    "SETITEMS": lambda machine, argument: machine.set_items(),
    "BUILD": lambda machine, argument: machine.build(),
    "BINPERSID": lambda machine, argument: machine.persistent(),
    "REDUCE": lambda machine, argument: machine.reduce(),
    "STOP": lambda machine, argument: machine.stop(),
}


def _storage(identity: Any) -> Storage:
    if not isinstance(identity, tuple) or len(identity) != 5 or identity[0] != "storage":
        raise ReftEdgeError("its pickle names a storage otherwise than torch.save does; not read")
    _, kind, key, location, count = identity
    if not isinstance(kind, _Name) or not kind.text.endswith("Storage"):
        raise ReftEdgeError("its pickle names a storage otherwise than torch.save does; not read")
    if not isinstance(key, str) or not isinstance(location, str) or not _is_count(count):
        raise ReftEdgeError("its pickle names a storage otherwise than torch.save does; not read")
    return Storage(kind.text.partition(" ")[2], key, count)


def _view(arguments: tuple[Any, ...]) -> View:
    if len(arguments) not in (6, 7) or not isinstance(arguments[0], Storage):
        raise ReftEdgeError("its pickle makes a tensor otherwise than torch.save does; not read")
    storage, offset, shape, strides, _, _, *metadata = arguments
    if any(metadata):
        raise ReftEdgeError("it holds a tensor with a conjugate or negative bit; store its values themselves")
    sizes = (shape, strides)
    if not all(isinstance(part, tuple) and len(part) <= _MAX_DIMENSIONS for part in sizes):
        raise ReftEdgeError("its pickle makes a tensor otherwise than torch.save does; not read")
    if len(shape) != len(strides) or not all(_is_count(number) for number in (offset, *shape, *strides)):
        raise ReftEdgeError("its pickle makes a tensor whose sizes are no whole numbers; not read")
    return View(storage, offset, shape, strides)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _kind(value: Any) -> str:
    """What a value is, in words; never what it holds, which may be anything."""
    names = {View: "a tensor", dict: "a dictionary", tuple: "a tuple", str: "a text", int: "a number"}
    return names.get(type(value), "something else")
