"""Primitives in terms of simpler ones: softmax, norms and sorts become reductions and formulas.

Two operations are ours: "SortKey" turns a number into an unsigned one with the same order, and
"Rank" gives for each row of keys the positions that sort it, stably and ascending. MLX's partitions
on a GPU are such sorts too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import mlx.core as mx

from zmlx.graph.nodes import Node, Value

#: Numbers of `Reduce`, as MLX counts them.
ALL, ANY, SUM, PRODUCT, LEAST, LARGEST = range(6)


class Lowering:
    """Nodes in terms of simpler ones, and the numbers that came with them.

    Attributes:
        nodes: what there is so far, each after those that make its inputs.
        numbers: values of one element that are known.
        sorted: value and axis -> it with the axis last, and the positions that sort it.
    """

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.nodes: list[Node] = []
        self.numbers: dict[Value, bool | int | float] = {}
        self.sorted: dict[tuple[Value, int], tuple[Value, Value]] = {}
        for node in nodes:
            lower = _LOWERED.get(node.op)
            if lower is None:
                self.nodes.append(node)
            else:
                lower(self, node)

    def make(
        self,
        op: str,
        inputs: Sequence[Value],
        shape: Sequence[int],
        dtype: mx.Dtype,
        arguments: Sequence[Any] = (),
    ) -> Value:
        """Add a node and return its output."""
        made = Value(tuple(shape), dtype)
        self.nodes.append(Node(op, tuple(inputs), (made,), tuple(arguments)))
        return made

    def finish(
        self, op: str, inputs: Sequence[Value], output: Value, arguments: Sequence[Any] = ()
    ) -> None:
        """Add the node that makes an output of the node that is lowered."""
        self.nodes.append(Node(op, tuple(inputs), (output,), tuple(arguments)))

    def number(self, value: float, like: Value) -> Value:
        """Return a number in the shape and dtype of a value."""
        known = Value((), like.dtype)
        self.numbers[known] = value
        return self.make("Broadcast", [known], like.shape, like.dtype, [like.shape])

    def cast(self, value: Value, dtype: mx.Dtype) -> Value:
        """Return a value in a dtype."""
        if value.dtype == dtype:
            return value
        return self.make("AsType", [value], value.shape, dtype, [dtype])

    def spread(self, value: Value, shape: Sequence[int]) -> Value:
        """Return a value broadcast to a shape."""
        return self.make("Broadcast", [value], shape, value.dtype, [tuple(shape)])

    def both(self, op: str, first: Value, second: Value) -> Value:
        """Return an operation on two values of one shape and dtype."""
        return self.make(op, [first, second], first.shape, first.dtype)

    def one(self, op: str, value: Value, *arguments: Any) -> Value:
        """Return an operation that keeps shape and dtype."""
        return self.make(op, [value], value.shape, value.dtype, arguments)

    def over_rows(self, kind: int, value: Value) -> Value:
        """Reduce along the last axis, which stays with length 1."""
        shape = (*value.shape[:-1], 1)
        return self.make("Reduce", [value], shape, value.dtype, [kind, [len(shape) - 1]])


def _exponentials(to: Lowering, x: Value) -> tuple[Value, Value, Value]:
    """Return each row's largest element, exp(x - it), and the sum of that, in float32."""
    wide = to.cast(x, mx.float32)
    largest = to.over_rows(LARGEST, wide)
    powers = to.one("Exp", to.both("Subtract", wide, to.spread(largest, x.shape)))
    return largest, powers, to.over_rows(SUM, powers)


def _softmax(to: Lowering, node: Node) -> None:
    x = node.inputs[0]
    _, powers, sums = _exponentials(to, x)
    _finish_cast(to, to.both("Divide", powers, to.spread(sums, x.shape)), node.outputs[0])


def _logsumexp(to: Lowering, node: Node) -> None:
    largest, _, sums = _exponentials(to, node.inputs[0])
    logarithm = to.both("Add", to.one("Log", sums, 2), largest)
    flags = to.make(
        "Equal",
        [to.one("Abs", largest), to.number(math.inf, largest)],
        largest.shape,
        mx.bool_,
        [False],
    )
    chosen = to.make("Select", [flags, largest, logarithm], largest.shape, mx.float32)
    _finish_cast(to, chosen, node.outputs[0])


def _finish_cast(to: Lowering, value: Value, output: Value) -> None:
    to.finish("AsType", [value], output, [output.dtype])


def _scales(to: Lowering, x: Value, eps: float) -> Value:
    """Return 1 / sqrt(mean(x^2) + eps) of float32 rows, in the shape of `x`."""
    squares = to.over_rows(SUM, to.one("Square", x))
    mean = to.both("Divide", squares, to.number(x.shape[-1], squares))
    root = to.one("Sqrt", to.both("Add", mean, to.number(eps, mean)), True)
    return to.spread(root, x.shape)


def _finish_norm(to: Lowering, normed: Value, node: Node) -> None:
    """Round, then multiply with the weight and add the bias, if there are: MLX rounds each time."""
    output = node.outputs[0]
    value = to.cast(normed, output.dtype)
    for op, factor in zip(("Multiply", "Add"), node.inputs[1:], strict=False):
        row = to.spread(to.cast(factor, output.dtype), output.shape)
        value = to.both(op, value, row)
    to.finish("Copy", [value], output)


def _rmsnorm(to: Lowering, node: Node) -> None:
    wide = to.cast(node.inputs[0], mx.float32)
    _finish_norm(to, to.both("Multiply", wide, _scales(to, wide, node.arguments[0])), node)


def _layernorm(to: Lowering, node: Node) -> None:
    wide = to.cast(node.inputs[0], mx.float32)
    sums = to.over_rows(SUM, wide)
    mean = to.both("Divide", sums, to.number(wide.shape[-1], sums))
    centred = to.both("Subtract", wide, to.spread(mean, wide.shape))
    _finish_norm(to, to.both("Multiply", centred, _scales(to, centred, node.arguments[0])), node)


def _with_last(axis: int, ndim: int) -> list[int]:
    """Return the order of axes that puts one last; it is its own way back only for two axes."""
    return [*(a for a in range(ndim) if a != axis), axis]


def _moved(to: Lowering, value: Value, order: Sequence[int]) -> Value:
    if list(order) == list(range(len(order))):
        return value
    shape = [value.shape[axis] for axis in order]
    return to.make("Transpose", [value], shape, value.dtype, [list(order)])


def _ranks(to: Lowering, x: Value, axis: int) -> tuple[Value, Value]:
    """Return `x` with the axis last, and the positions along it that sort it."""
    if (x, axis) in to.sorted:
        return to.sorted[x, axis]
    rows = _moved(to, x, _with_last(axis, len(x.shape)))
    keys = to.make("SortKey", [rows], rows.shape, mx.uint32)
    found = to.sorted[x, axis] = rows, to.make("Rank", [keys], rows.shape, mx.uint32)
    return found


def _finish_sorted(to: Lowering, value: Value, axis: int, output: Value) -> None:
    order = _with_last(axis, len(output.shape))
    back = [order.index(a) for a in range(len(order))]
    to.finish("Transpose", [value], output, [back])


def _argsort(to: Lowering, node: Node) -> None:
    axis = sorted_axis(node)
    _, ranks = _ranks(to, node.inputs[0], axis)
    _finish_sorted(to, ranks, axis, node.outputs[0])


def _sort(to: Lowering, node: Node) -> None:
    axis = sorted_axis(node)
    rows, ranks = _ranks(to, node.inputs[0], axis)
    last = len(rows.shape) - 1
    ordered = to.make("GatherAxis", [rows, ranks], rows.shape, rows.dtype, [last])
    _finish_sorted(to, ordered, axis, node.outputs[0])


def sorted_axis(node: Node) -> int:
    """Return the axis, not negative, along which a node sorts: its last argument."""
    axis: int = node.arguments[-1]
    return axis % len(node.inputs[0].shape)


_LOWERED: dict[str, Callable[[Lowering, Node], None]] = {
    "ArgPartition": _argsort,
    "ArgSort": _argsort,
    "LayerNorm": _layernorm,
    "LogSumExp": _logsumexp,
    "Partition": _sort,
    "RMSNorm": _rmsnorm,
    "Softmax": _softmax,
    "Sort": _sort,
}
#: Primitives that are put in terms of others.
LOWERED = frozenset(_LOWERED)
