"""Products with weights in a graph: what they multiply, with what, and what is added."""

from __future__ import annotations

from dataclasses import dataclass, replace

from zmlx.graph.fused import Stored
from zmlx.graph.nodes import Graph, Node, Value
from zmlx.graph.operations import MODES
from zmlx.graph.views import keeps_order, origin, repeated


@dataclass(frozen=True)
class Product:
    """A product with the transpose of a constant weight.

    Attributes:
        x: what is multiplied, (..., width).
        width: elements of a row of x.
        rows: elements of a row of the result, of one expert if there are experts.
        stored: how the weight lies in `weight`.
        weight: the weight's values, and a bias.
        result: the product.
        experts: the chosen experts, where there are several.
        sources: which row of x each product takes, where there are experts.
        heads: how many weights there are, each for one row of x; 0 if there is but one, or experts.
    """

    x: Value
    width: int
    rows: int
    stored: Stored
    weight: tuple[Value, ...]
    result: Value
    experts: Value | None = None
    sources: Value | None = None
    heads: int = 0

    def biased(self, bias: Value, result: Value) -> Product:
        """Return the product with a bias added."""
        stored = replace(self.stored, has_bias=True)
        return replace(self, stored=stored, weight=(*self.weight, bias), result=result)


def product(graph: Graph, node: Node) -> Product | None:
    """Return what a node multiplies, if it is a product with a constant weight.

    Only where MLX adds a bias in the same operation it has one.
    """
    made = _quantized(graph, node) or _dense(graph, node)
    if made is None or not all(value in graph.constants for value in made.weight):
        return None
    return made


def _whole(graph: Graph, value: Value) -> Value | None:
    """Return the array that a weight is, without the axes along which it is repeated.

    None where what is left has other rows, because it was reshaped.
    """
    held = repeated(graph, value)
    return held if value.shape[value.ndim - held.ndim :] == held.shape else None


def _quantized(graph: Graph, node: Node) -> Product | None:
    if node.op not in ("QuantizedMatmul", "GatherQMM"):
        return None
    group_size, bits, mode, transposed, *_ = node.arguments
    parts = 3 if MODES[mode] == "affine" else 2
    x, weight, rest = node.inputs[0], node.inputs[1 : 1 + parts], node.inputs[1 + parts :]
    if not transposed or len(rest) != (2 if node.op == "GatherQMM" else 0):
        return None
    stored = Stored(MODES[mode], group_size, bits)
    held = tuple(whole for value in weight if (whole := _whole(graph, value)) is not None)
    if len(held) != parts:
        return None
    lhs, rhs = rest or (None, None)
    heads = held[0].shape[0] if rhs is None and held[0].ndim == 3 else 0
    if rhs is None and held[0].ndim > 2 and (x.ndim < 3 or x.shape[-3:-1] != (heads, 1)):
        return None
    return Product(
        x, x.shape[-1], weight[0].shape[-2], stored, held, node.outputs[0], rhs, lhs, heads
    )


def _dense(graph: Graph, node: Node) -> Product | None:
    if node.op not in ("Matmul", "GatherMM", "AddMM"):
        return None
    x, turned, *rest = node.inputs
    swap = graph.producers.get(turned)
    if swap is None or swap.op != "Transpose" or turned.shape[-2] != x.shape[-1]:
        return None
    axes = list(swap.arguments[0])
    if axes[-2:] != [len(axes) - 1, len(axes) - 2] or axes[:-2] != list(range(len(axes) - 2)):
        return None
    weight = _whole(graph, swap.inputs[0])
    lhs, rhs = rest if node.op == "GatherMM" else (None, None)
    if weight is None or weight.ndim != (2 if rhs is None else 3):
        return None
    stored = Stored("dense", 0, 0)
    made = Product(x, x.shape[-1], turned.shape[-1], stored, (weight,), node.outputs[0], rhs, lhs)
    if node.op != "AddMM":
        return made
    bias = repeated(graph, rest[0])
    fits = tuple(node.arguments) == (1.0, 1.0) and bias.shape == (made.rows,)
    return made.biased(bias, node.outputs[0]) if fits else None


def added(graph: Graph, result: Value) -> tuple[Node, Value] | None:
    """Return the addition that alone reads a value, and what it adds to it."""
    node, value = sole_reader(graph, result)
    if node is None or node.op != "Add":
        return None
    first, second = node.inputs
    other = second if first is value else first
    return (node, other) if node.outputs[0].size == result.size else None


def with_bias(graph: Graph, found: Product) -> Product:
    """Return a product with the constant vector that is added to it, if one is."""
    step = added(graph, found.result)
    if step is None or found.stored.has_bias:
        return found
    node, other = step
    if node.outputs[0].dtype != found.result.dtype:
        return found
    bias = repeated(graph, other)
    if found.experts is None:
        fits = bias in graph.constants and bias.shape == (found.rows,)
        fits = fits and other.shape[-1] == found.rows
        return found.biased(bias, node.outputs[0]) if fits else found
    gather = graph.producers.get(origin(graph, other))
    if gather is None or gather.op != "Gather" or gather.arguments[0] != [0]:
        return found
    table, indices = gather.inputs
    fits = table in graph.constants and table.ndim == 2 and table.shape[1] == found.rows
    same = origin(graph, indices) is origin(graph, found.experts)
    return found.biased(table, node.outputs[0]) if fits and same else found


def sole_reader(graph: Graph, value: Value) -> tuple[Node | None, Value]:
    """Return the one node that reads a value, past views, and the view of it that it reads."""
    while True:
        readers = graph.consumers.get(value, ())
        if len(readers) != 1 or value in graph.outputs:
            return None, value
        if not keeps_order(readers[0]):
            return readers[0], value
        value = readers[0].outputs[0]
