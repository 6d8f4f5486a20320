"""Activations that lie between two products and the next: found by their operations, then computed.

    silu         g * sigmoid(g) * u             gelu        g * (1 + erf(g / sqrt(2))) / 2 * u
    gelu_tanh    0.5 * g * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 * g^3))) * u
    clipped_swiglu  min(g, 7) * sigmoid(1.702 * min(g, 7)) * (clip(u, -7, 7) + 1)       (GPT-OSS)
    relu2        max(u, 0)^2, without a gate

How a library writes one of them differs from model to model. So the operations from the products to
the result are gathered, their kinds say which activation it can be, and then it is computed on
numbers of both signs and all sizes that matter and compared with the formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from zmlx.graph.nodes import Graph, Node, Value
from zmlx.graph.operations import emit
from zmlx.graph.views import keeps_order, origin
from zmlx.kernels.vectors.plain import activated

_ELEMENTWISE = frozenset(
    {
        "Add", "Subtract", "Multiply", "Divide", "Negative", "Square", "Power", "Sigmoid", "Tanh",
        "Erf", "Maximum", "Minimum", "Exp", "Select", "AsType",
    }
)  # fmt: skip
#: What cuts; it may do so outside of all numbers that an activation is computed on.
_CUTS = frozenset({"Maximum", "Minimum", "Select"})
#: Operations of an activation at most; more of them are another one.
_LONGEST = 24
#: Largest deviation from a formula: constants of 16-bit models are rounded to 16 bits.
_TOLERANCE = {mx.float32: 1e-5, mx.float16: 1e-3, mx.bfloat16: 6e-3}


@dataclass(frozen=True)
class Gated:
    """A result that is an activation of one product, times another one.

    Attributes:
        activation: its name.
        gate: the product that is activated; None where there is none.
        up: the other one.
    """

    activation: str
    gate: Value | None
    up: Value


#: activation -> the operation that tells it from the others; the first that is there counts
_TOLD_BY = {
    "clipped_swiglu": "Minimum",
    "gelu": "Erf",
    "gelu_tanh": "Tanh",
    "silu": "Sigmoid",
}


def gated(graph: Graph, result: Value, products: Sequence[Value]) -> Gated | None:
    """Return what a value is of two products, or of one, if it is a known activation of them.

    Args:
        graph: the graph.
        result: the value.
        products: the values that products make.
    """
    region = _region(graph, origin(graph, result), frozenset(products))
    if region is None:
        return None
    nodes, leaves = region
    kinds = {node.op for node in nodes}
    gates, ups = _samples()
    if len(leaves) == 1 and kinds & _CUTS == {"Maximum"}:
        square = mx.maximum(gates, 0) ** 2
        right = _is_close(graph, nodes, result, {leaves[0]: gates}, square)
        return Gated("relu2", None, leaves[0]) if right else None
    if len(leaves) != 2:
        return None
    for activation, operation in _TOLD_BY.items():
        if operation in kinds:
            cuts = {"Maximum", "Minimum"} if activation == "clipped_swiglu" else frozenset()
            if not kinds & _CUTS <= cuts:
                return None
            truth = activated(activation, gates, ups)
            for gate, up in (leaves, leaves[::-1]):
                given = {gate: gates, up: ups}
                if _is_close(graph, nodes, result, given, truth):
                    return Gated(activation, gate, up)
            return None
    return None


def _region(
    graph: Graph, result: Value, products: frozenset[Value]
) -> tuple[list[Node], list[Value]] | None:
    """Return the elementwise operations between products and a result, and the products."""
    nodes: dict[Node, None] = {}
    leaves: dict[Value, None] = {}
    waiting = [result]
    while waiting:
        value = waiting.pop()
        if value in products:
            leaves[value] = None
            continue
        node = graph.producers.get(value)
        if (value in graph.constants and value.size == 1) or node in nodes:
            continue
        if node is None or len(nodes) == _LONGEST:
            return None
        of_number = node.op == "Broadcast" and node.inputs[0].size == 1
        if not (node.op in _ELEMENTWISE or of_number or keeps_order(node)):
            return None
        nodes[node] = None
        waiting.extend(node.inputs)
    found = set(nodes)
    return [node for node in graph.nodes if node in found], list(leaves)


@cache
def _samples() -> tuple[mx.array, mx.array]:
    """Return gates and ups to compute an activation on: every pair of some numbers."""
    ones = [-9.0, -7.5, -6.5, -3.0, -1.0, -0.3, 0.0, 0.2, 0.7, 1.5, 4.0, 6.9, 7.1, 8.0]
    numbers = mx.array([-100.0, -30.0, *ones, 20.0, 100.0])
    size = numbers.size
    gates = mx.broadcast_to(numbers[:, None], (size, size)).reshape(-1)
    return gates, mx.broadcast_to(numbers, (size, size)).reshape(-1)


def _is_close(
    graph: Graph,
    nodes: Sequence[Node],
    result: Value,
    given: dict[Value, mx.array],
    truth: mx.array,
) -> bool:
    """Return whether a region computes a formula, as far as its dtypes go."""
    value = _computed(graph, nodes, result, given)
    if value is None:
        return False
    dtypes = {v.dtype for node in nodes for v in (*node.inputs, *node.outputs)}
    tolerance = max(_TOLERANCE.get(dtype, 0.0) for dtype in dtypes)
    scale = mx.maximum(mx.abs(truth), 1.0)
    return bool(mx.all(mx.abs(value - truth) <= tolerance * scale))


def _computed(
    graph: Graph, nodes: Sequence[Node], result: Value, given: dict[Value, mx.array]
) -> mx.array | None:
    """Compute a region in float32 on other arrays than it was traced with."""
    held = dict(given)
    count = next(iter(given.values())).size
    with mx.stream(mx.cpu):
        for node in nodes:
            inputs = []
            for value in node.inputs:
                if value in graph.constants:
                    held[value] = graph.constants[value].astype(mx.float32)
                inputs.append(held[value])
            output = node.outputs[0]
            if keeps_order(node) or node.op in ("AsType", "Broadcast"):
                held[output] = inputs[0]
                continue
            shape = (count,) if any(array.size > 1 for array in inputs) else (1,)
            inputs = [mx.broadcast_to(array.reshape(-1), shape) for array in inputs]
            if node.op == "Select":
                inputs[0] = inputs[0].astype(mx.bool_)
            traced = Value(shape, mx.float32)
            held[output] = emit(Node(node.op, node.inputs, (traced,), node.arguments), inputs)[0]
        found = held.get(origin(graph, result))
        return None if found is None else mx.broadcast_to(found, (count,))
