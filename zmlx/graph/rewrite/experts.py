"""Routed experts: gate, up and activation in one kernel, then down and the weighted sum in one.

Before   g, u = gather_qmm(x, gate, i), gather_qmm(x, up, i)    stock: three gathered products,
         h = swiglu(g, u)                                       an activation, a product by the
         y = gather_qmm(h, down, i)                             scores, a sum, additions
         r + (y * scores[..., None]).sum(-2) [+ shared]
After    h = expert_gated_product(x, i, gate, up)
         expert_combination(h, i, scores, down, shared, r)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from zmlx.graph.fused import ExpertCombination, ExpertGatedProduct, ExpertProducts
from zmlx.graph.nodes import Graph, Node, Value
from zmlx.graph.rewrite.gates import Gated, gated
from zmlx.graph.rewrite.norms import normed
from zmlx.graph.rewrite.weights import Product, added, product, sole_reader, with_bias
from zmlx.graph.rewriting import taken_over
from zmlx.graph.views import origin, repeated

_SUM = 2  # among MLX's reductions


@dataclass(frozen=True)
class _Sum:
    """A weighted sum over experts, and what is added to it."""

    result: Value
    scores: Value
    shared: Value | None = None
    residual: Value | None = None


def fuse_experts(graph: Graph) -> Graph:
    """Return the graph with fused experts, for one token."""
    found = (product(graph, node) for node in graph.nodes)
    gathered = [with_bias(graph, p) for p in found if p is not None and p.experts is not None]
    products = {origin(graph, p.result): p for p in gathered}
    nodes: list[Node] = []
    used: set[Value] = set()
    for down in gathered:
        gate = gated(graph, down.x, tuple(products))
        if gate is None:
            continue
        node = _gated_node(graph, down, gate, products)
        if node is not None:
            nodes.append(node)
            used.update(value for value in (gate.gate, gate.up) if value is not None)
    for one in gathered:
        if origin(graph, one.result) not in used:
            nodes += _down_nodes(graph, one)
    return taken_over(graph, nodes)


def _gated_node(
    graph: Graph, down: Product, gate: Gated, products: Mapping[Value, Product]
) -> Node | None:
    """Return the gated product that makes the input of a down projection."""
    up = products[gate.up]
    first = up if gate.gate is None else products[gate.gate]
    chosen = [origin(graph, p.experts) for p in (first, up, down) if p.experts is not None]
    x = origin(graph, up.x)
    one_row = x.size == up.width and origin(graph, first.x) is x
    if gate.gate is None or not one_row or any(choice is not chosen[0] for choice in chosen):
        return None
    if first.rows != up.rows or not first.result.dtype == up.result.dtype == down.x.dtype:
        return None
    norm = normed(graph, x)
    operation = ExpertGatedProduct(
        up.width, first.stored, up.stored, gate.activation, chosen[0].size, up.rows, norm.eps
    )
    inputs = (norm.x, chosen[0], *norm.weight, *first.weight, *up.weight)
    return Node("FusedExpertGatedProduct", inputs, (origin(graph, down.x),), (operation,))


def _down_nodes(graph: Graph, down: Product) -> list[Node]:
    """Return the nodes for a product whose every expert has a row of its own, or all share one."""
    assert down.experts is not None
    count = down.experts.size
    if down.x.size != count * down.width or not _in_turn(graph, down.sources, count):
        return []
    total = _sum(graph, down)
    indices = origin(graph, down.experts)
    if total is None:
        operation = ExpertProducts(down.width, down.stored, count, down.result.shape)
        inputs = (origin(graph, down.x), indices, *down.weight)
        return [Node("FusedExpertProducts", inputs, (down.result,), (operation,))]
    extra = [value for value in (total.shared, total.residual) if value is not None]
    combination = ExpertCombination(
        down.width,
        down.stored,
        count,
        down.rows,
        total.result.dtype,
        total.shared is not None,
        total.residual is not None,
    )
    inputs = (origin(graph, down.x), indices, total.scores, *down.weight, *extra)
    return [Node("FusedExpertCombination", inputs, (total.result,), (combination,))]


def _in_turn(graph: Graph, sources: Value | None, count: int) -> bool:
    """Return whether the products take the rows of x one after the other."""
    node = None if sources is None else graph.producers.get(origin(graph, sources))
    if count == 1:
        return True
    return node is not None and node.op == "Arange" and tuple(node.arguments) == (0.0, count, 1.0)


def _sum(graph: Graph, down: Product) -> _Sum | None:
    """Return the sum over experts of products times scores, if that is what reads them."""
    assert down.experts is not None
    count = down.experts.size
    node, value = sole_reader(graph, down.result)
    if node is not None and node.op == "AsType":
        node, value = sole_reader(graph, node.outputs[0])
    if node is None or node.op != "Multiply":
        return None
    first, second = node.inputs
    scores = _scores(graph, second if first is value else first, count)
    axis = value.ndim - 2
    weighted = node.outputs[0]
    node, value = sole_reader(graph, weighted)
    if scores is None or node is None or node.op != "Reduce" or value.ndim != axis + 2:
        return None
    if value.shape[axis:] != (count, down.rows):
        return None
    if tuple(node.arguments) != (_SUM, [axis]):
        return None
    result = node.outputs[0]
    node, value = sole_reader(graph, result)
    if node is not None and node.op == "AsType" and node.outputs[0].dtype == down.result.dtype:
        result = node.outputs[0]
    return _with_additions(graph, down, _Sum(result, scores))


def _scores(graph: Graph, value: Value, count: int) -> Value | None:
    """Return the scores that a value repeats along the rows of the experts' products."""
    node = graph.producers.get(value)
    if node is None or node.op != "Broadcast":
        return None
    source = node.inputs[0]
    fits = source.size == count and source.shape[-1] == 1 and source.shape[-2:-1] == (count,)
    return repeated(graph, source) if fits else None


def _with_additions(graph: Graph, down: Product, total: _Sum) -> _Sum:
    """Return a sum with what is added to it: an output of shared experts, a residual."""
    one = _addition(graph, down, total.result)
    if one is None:
        return total
    result, other = one
    two = _addition(graph, down, result)
    if two is None:
        return _Sum(result, total.scores, None, other)
    return _Sum(two[0], total.scores, other, two[1])


def _addition(graph: Graph, down: Product, value: Value) -> tuple[Value, Value] | None:
    step = added(graph, value)
    if step is None:
        return None
    node, other = step
    same = other.size == value.size and other.dtype == node.outputs[0].dtype == down.result.dtype
    return (node.outputs[0], other) if same and value.dtype == other.dtype else None
