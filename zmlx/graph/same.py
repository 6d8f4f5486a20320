"""Compare two graphs of the same function."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx

from zmlx.graph.nodes import Graph, Node, Value

#: Bytes of constants that are compared at once.
_AT_ONCE = 64 << 20
#: Most elements of a constant that a text shows.
_SHOWN = 8


def difference(one: Graph, other: Graph) -> str | None:
    """Return the first thing in which two graphs differ, or None.

    Operations, arguments, what reads what, what is returned, shapes, dtypes and constants are
    compared, in the order of the nodes; of constants all values, for a row of a table of positions
    is as long as a norm's weight.
    """
    if len(one.inputs) != len(other.inputs) or len(one.outputs) != len(other.outputs):
        return "other inputs or outputs"
    return _Comparison(one, other).difference()


class _Comparison:
    """Two graphs side by side."""

    def __init__(self, one: Graph, other: Graph) -> None:
        self.one, self.other = one, other
        self.same: dict[Value, Value] = dict(zip(one.inputs, other.inputs, strict=True))
        #: constant of one graph, of the other -> the operation that first reads them
        self.constants: dict[tuple[Value, Value], str] = {}

    def difference(self) -> str | None:
        for first, second in zip(self.one.nodes, self.other.nodes, strict=False):
            unlike = self.nodes(first, second)
            if unlike is not None:
                return unlike
        if len(self.one.nodes) != len(self.other.nodes):
            return f"{len(self.one.nodes)} operations are {len(self.other.nodes)}"
        for a, b in zip(self.one.outputs, self.other.outputs, strict=True):
            if self.values("the result", a, b) is not None:
                return "it returns another value"
        return self.contents()

    def nodes(self, first: Node, second: Node) -> str | None:
        """Compare two nodes; what they make is the same afterwards."""
        if first.op != second.op or _plain(first.arguments) != _plain(second.arguments):
            return f"{first.op}{first.arguments} is {second.op}{second.arguments}"
        if len(first.inputs) != len(second.inputs):
            return f"{first.op} has other inputs"
        for a, b in zip(first.inputs, second.inputs, strict=True):
            unlike = self.values(first.op, a, b)
            if unlike is not None:
                return f"{first.op}: {unlike}"
        for a, b in zip(first.outputs, second.outputs, strict=True):
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                return f"{first.op} makes {a.shape} and {b.shape}"
            self.same[a] = b
        return None

    def values(self, op: str, a: Value, b: Value) -> str | None:
        """Compare two values; the contents of constants later."""
        first, second = self.one.constants.get(a), self.other.constants.get(b)
        if first is None or second is None:
            return None if self.same.get(a) is b else "it reads another value"
        if (first.shape, first.dtype) != (second.shape, second.dtype):
            return f"a constant of {first.shape} is of {second.shape}"
        self.constants.setdefault((a, b), op)
        return None

    def contents(self) -> str | None:
        """Compare the contents of constants, some at a time: large ones take memory."""
        for part in self.parts():
            pairs = [(self.one.constants[a], self.other.constants[b]) for a, b in part]
            equal = [_equal(first, second) for first, second in pairs]
            mx.eval(equal)
            for (first, second), alike, key in zip(pairs, equal, part, strict=True):
                if not alike.item():
                    op = self.constants[key]
                    return f"{op}: a constant {_shown(first)} is {_shown(second)}"
        return None

    def parts(self) -> Iterator[list[tuple[Value, Value]]]:
        part: list[tuple[Value, Value]] = []
        size = 0
        for pair in self.constants:
            part.append(pair)
            size += self.one.constants[pair[0]].nbytes
            if size > _AT_ONCE:
                yield part
                part, size = [], 0
        yield part


def _equal(one: mx.array, other: mx.array) -> mx.array:
    return mx.array_equal(one, other, equal_nan=mx.issubdtype(one.dtype, mx.inexact))


def _shown(array: mx.array) -> str:
    return str(array.tolist()) if array.size <= _SHOWN else f"of {array.shape}"


def _plain(arguments: Sequence[Any]) -> list[Any]:
    return [tuple(part) if isinstance(part, list) else part for part in arguments]
