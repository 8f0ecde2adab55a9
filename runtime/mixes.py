"""Adapters made ready to run, alone or several at once, and kept for the requests that come after."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reft_edge.adapter.algebra import Edit, concat, scale
from reft_edge.errors import ReftEdgeError
from reft_edge.model.manifest import Manifest
from reft_edge.runtime.binding import Bound, decode_edit, fitted, port_inputs
from reft_edge.runtime.session import GraphSession

BUDGET = 256 << 20
_MOST = 64
"""Mixes that are kept, however small they are."""


@dataclass(frozen=True)
class _Joined:
    """Adapters beside each other, whatever their scales are."""

    edit: Edit
    prompt: dict[str, Any]
    """Port inputs, on the device."""


class Mixes:
    """What is made of adapters for requests, the least recently used forgotten beyond a budget.

    Mixes of the same adapters share their weights, and an adapter alone uses those that are loaded: a scale is one number
    of each gate. Only what acts on generated tokens is scaled for each mix.
    """

    def __init__(self, graph: GraphSession, manifest: Manifest, budget: int = BUDGET) -> None:
        """`budget`: bytes of one mix at most, and of all that are kept, beyond the weights of the adapters themselves."""
        self._graph, self._manifest, self._budget = graph, manifest, budget
        self._joined: OrderedDict[tuple[str, ...], tuple[_Joined, int]] = OrderedDict()
        self._bound: OrderedDict[tuple[tuple[str, float], ...], tuple[Bound, int]] = OrderedDict()

    @property
    def size(self) -> int:
        """Bytes of what is kept, beyond the weights of the adapters themselves."""
        return sum(size for kept in (self._joined, self._bound) for _, size in kept.values())

    def bind(self, edits: Mapping[str, Edit], scales: Mapping[str, float]) -> Bound:
        """Adapters by name with their scales, ready to run. Raises ReftEdgeError for a mix that takes more
        than the budget."""
        acting = {name: factor for name, factor in scales.items() if factor != 0}
        if not acting:
            return Bound({}, {})
        key = tuple(acting.items())
        if key in self._bound:
            self._bound.move_to_end(key)
            self._joined.move_to_end(tuple(acting))
            return self._bound[key][0]
        try:
            bound, own = self._made(edits, acting)
        except Exception:
            self._drop_unused(tuple(acting))
            raise
        self._bound[key] = bound, own
        self._trim()
        return bound

    def _made(self, edits: Mapping[str, Edit], acting: Mapping[str, float]) -> tuple[Bound, int]:
        """A mix, and the bytes that it takes beyond what it shares."""
        joined = self._join({name: edits[name] for name in acting})
        gates = tuple(gate for name, factor in acting.items() for gate in scale(edits[name], factor).gates)
        edit = replace(joined.edit, gates=gates)
        factors = np.array([gate.scale for gate in gates], self._graph.dtype).reshape(1, 1, -1)
        prompt = {**joined.prompt, **self._graph.to_device({"reft.scale": factors})}
        bound = Bound(prompt, decode_edit(edit), edit)
        return bound, _own_bytes(
            (array for part in bound.decode.values() for array in part.arrays), [joined.edit]
        )

    def _join(self, edits: dict[str, Edit]) -> _Joined:
        key = tuple(edits)
        if key not in self._joined:
            if len(edits) > 1 and (size := sum(edit.nbytes for edit in edits.values())) > self._budget:
                raise ReftEdgeError(
                    f"these {len(edits)} adapters take {size / 1e6:,.0f} MB together; at most {self._budget / 1e6:,.0f} MB can be "
                    "mixed: name fewer"
                )
            edit = fitted(concat(list(edits.values())), self._manifest)
            inputs = port_inputs(edit, self._manifest, self._graph.dtype)
            loaded = edits.values() if self._graph.memory == "cpu" else ()
            own = _own_bytes(inputs.values(), loaded)
            self._joined[key] = _Joined(edit, self._graph.to_device(inputs)), own
        self._joined.move_to_end(key)
        return self._joined[key][0]

    def forget(self, name: str) -> None:
        """Nothing that an adapter is part of is used again."""
        for joined in [names for names in self._joined if name in names]:
            self._drop(joined)

    def _trim(self) -> None:
        while len(self._bound) > 1 and (self.size > self._budget or len(self._bound) > _MOST):
            oldest = _names(next(iter(self._bound)))
            self._bound.popitem(last=False)
            self._drop_unused(oldest)

    def _drop_unused(self, names: tuple[str, ...]) -> None:
        """Forget adapters beside each other that are part of no mix."""
        if not any(_names(key) == names for key in self._bound):
            self._joined.pop(names, None)

    def _drop(self, names: tuple[str, ...]) -> None:
        del self._joined[names]
        for key in [key for key in self._bound if _names(key) == names]:
            del self._bound[key]


def _names(key: tuple[tuple[str, float], ...]) -> tuple[str, ...]:
    return tuple(name for name, _ in key)


def _own_bytes(arrays: Iterable[NDArray[np.generic]], edits: Iterable[Edit]) -> int:
    """Bytes of the arrays that are not views of an edit's."""
    shared = {id(_root(array)) for edit in edits for part in edit.places.values() for array in part.arrays}
    own = {id(root): root.nbytes for array in arrays if id(root := _root(array)) not in shared}
    return sum(own.values())


def _root(array: NDArray[np.generic]) -> NDArray[np.generic]:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array
