"""Compare two graphs of the same function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from zmlx.graph.nodes import Graph, Value

#: Constants of more elements are weights, which two traces of a model share.
_SMALL = 64


def difference(one: Graph, other: Graph) -> str | None:
    """Return the first thing in which two graphs differ, or None.

    Operations, arguments, what reads what, shapes, dtypes and small constants are compared, in the
    order of the nodes.
    """
    same: dict[Value, Value] = dict(zip(one.inputs, other.inputs, strict=False))
    if len(one.inputs) != len(other.inputs) or len(one.outputs) != len(other.outputs):
        return "other inputs or outputs"
    for first, second in zip(one.nodes, other.nodes, strict=False):
        if first.op != second.op or _plain(first.arguments) != _plain(second.arguments):
            return f"{first.op}{first.arguments} is {second.op}{second.arguments}"
        if len(first.inputs) != len(second.inputs):
            return f"{first.op} has other inputs"
        for a, b in zip(first.inputs, second.inputs, strict=True):
            unlike = _unlike(one, other, a, b, same)
            if unlike is not None:
                return f"{first.op}: {unlike}"
        for a, b in zip(first.outputs, second.outputs, strict=True):
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                return f"{first.op} makes {a.shape} and {b.shape}"
            same[a] = b
    if len(one.nodes) != len(other.nodes):
        return f"{len(one.nodes)} operations are {len(other.nodes)}"
    return None


def _unlike(one: Graph, other: Graph, a: Value, b: Value, same: dict[Value, Value]) -> str | None:
    first, second = one.constants.get(a), other.constants.get(b)
    if first is None or second is None:
        return None if same.get(a) is b else "it reads another value"
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return f"a constant of {first.shape} is of {second.shape}"
    if first.size <= _SMALL and not bool(mx.all(mx.equal(first, second))):
        return f"a constant {first.tolist()} is {second.tolist()}"
    return None


def _plain(arguments: Sequence[Any]) -> list[Any]:
    return [tuple(part) if isinstance(part, list) else part for part in arguments]
