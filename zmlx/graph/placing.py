"""Where the values of a graph lie if no operation copies what it can view."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zmlx.graph import layout
from zmlx.graph.layout import Layout
from zmlx.graph.nodes import Node, Value


@dataclass(frozen=True)
class Placed:
    """Where a value lies.

    Attributes:
        base: the value in whose memory it is, which lies there in row order.
        offset: elements from the beginning of that to its first one.
        at: how its elements follow each other.
    """

    base: Value
    offset: int
    at: Layout


def alone(value: Value) -> Placed:
    """Return the place of a value with memory of its own."""
    return Placed(value, 0, layout.whole(value.shape))


def views(node: Node, inputs: Sequence[Placed]) -> list[Placed] | None:
    """Return where the outputs of an operation lie that computes nothing; None for others.

    Args:
        node: the operation.
        inputs: where what it reads lies.
    """
    if node.op == "Depends":
        return list(inputs[: len(node.outputs)])
    view = _VIEWS.get(node.op)
    if view is None or not inputs or any(value.size == 0 for value in node.outputs):
        return None
    return view(node, inputs[0])


def _same(node: Node, given: Placed) -> list[Placed] | None:
    del node
    return [given]


def _contiguous(node: Node, given: Placed) -> list[Placed] | None:
    del node
    return [given] if given.at.rows else None


def _cast(node: Node, given: Placed) -> list[Placed] | None:
    return [given] if node.inputs[0].dtype == node.outputs[0].dtype else None


def _reshape(node: Node, given: Placed) -> list[Placed] | None:
    at = layout.reshaped(given.at, node.outputs[0].shape)
    return None if at is None else [Placed(given.base, given.offset, at)]


def _changed(
    change: Callable[[Node, Layout], Layout],
) -> Callable[[Node, Placed], list[Placed] | None]:
    return lambda node, given: [Placed(given.base, given.offset, change(node, given.at))]


def _slice(node: Node, given: Placed) -> list[Placed] | None:
    starts, _, steps = node.arguments
    offset = sum(start * stride for start, stride in zip(starts, given.at.strides, strict=True))
    at = layout.sliced(given.at, node.outputs[0].shape, steps)
    return [Placed(given.base, given.offset + offset, at)]


def _split(node: Node, given: Placed) -> list[Placed] | None:
    indices, axis = node.arguments
    step = given.at.strides[axis]
    return [
        Placed(given.base, given.offset + first * step, layout.split(given.at, value.shape))
        for first, value in zip((0, *indices), node.outputs, strict=True)
    ]


_VIEWS: dict[str, Callable[[Node, Placed], list[Placed] | None]] = {
    "AsType": _cast,
    "Broadcast": _changed(lambda node, at: layout.broadcast(at, node.outputs[0].shape)),
    "Contiguous": _contiguous,
    "Copy": _same,
    "ExpandDims": _changed(lambda node, at: layout.expanded(at, *node.arguments)),
    "Flatten": _reshape,
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _changed(lambda node, at: layout.squeezed(at, *node.arguments)),
    "StopGradient": _same,
    "Transpose": _changed(lambda node, at: layout.transposed(at, *node.arguments)),
    "Unflatten": _reshape,
}
