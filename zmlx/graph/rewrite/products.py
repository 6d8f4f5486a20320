"""Products of one token with weights: those that read the same together, with what surrounds them.

Before   q, k, v = (quantized_matmul(rms_norm(x), w) for w in (q_proj, k_proj, v_proj))
         down(silu(gate(x)) * up(x)) + residual
After    q, k, v = products(x, [q_proj, k_proj, v_proj], norm)
         products(gated_product(x, gate, up), [down], residual)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from zmlx.graph.fused import ExpertProducts, GatedProduct, Products
from zmlx.graph.nodes import Graph, Node, Value
from zmlx.graph.rewrite.gates import gated
from zmlx.graph.rewrite.norms import Normed, normed
from zmlx.graph.rewrite.weights import Product, added, product, with_bias
from zmlx.graph.rewriting import taken_over
from zmlx.graph.views import origin, repeated

#: Weights that one launch takes.
MOST_WEIGHTS = 4


@dataclass(frozen=True)
class _Step:
    """A product with what is added to it last."""

    product: Product
    residual: Value | None = None


def fuse_products(graph: Graph) -> Graph:
    """Return the graph with fused products, for one token."""
    found = [p for p in (product(graph, node) for node in graph.nodes) if p is not None]
    single = [with_bias(graph, p) for p in found if p.experts is None and not p.heads]
    single = [p for p in single if origin(graph, p.x).size == p.width]
    nodes: list[Node] = []
    inside: set[Value] = set()
    for node, used in _gated_nodes(graph, single):
        nodes.append(node)
        inside.update(used)
    rest = [p for p in single if origin(graph, p.result) not in inside]
    nodes += [_node(graph, group) for group in _groups(graph, [_step(graph, p) for p in rest])]
    return _with_heads(taken_over(graph, nodes), found)


def _gated_nodes(
    graph: Graph, single: Sequence[Product]
) -> Iterable[tuple[Node, tuple[Value, Value]]]:
    """Yield the gated products that make inputs of products, and the two products inside each."""
    results = {origin(graph, p.result): p for p in single}
    for down in {origin(graph, p.x): p for p in single}.values():
        gate = gated(graph, down.x, tuple(results))
        if gate is None or gate.gate is None:
            continue
        first, second = results[gate.gate], results[gate.up]
        same = origin(graph, first.x) is origin(graph, second.x)
        if not same or first.rows != second.rows or first.result.dtype != down.x.dtype:
            continue
        norm = normed(graph, first.x)
        operation = GatedProduct(
            first.width, first.stored, second.stored, gate.activation, first.rows, norm.eps
        )
        inputs = (norm.x, *norm.weight, *first.weight, *second.weight)
        node = Node("FusedGatedProduct", inputs, (origin(graph, down.x),), (operation,))
        yield node, (gate.gate, gate.up)


def _step(graph: Graph, found: Product) -> _Step:
    """Return a product with the residual that is added to it, if one is."""
    addition = added(graph, found.result)
    if addition is None:
        return _Step(found)
    node, other = addition
    result = node.outputs[0]
    same = found.result.dtype == other.dtype == result.dtype and other.size == result.size
    if not same or repeated(graph, other) in graph.constants or _is_product(graph, other):
        return _Step(found)
    return _Step(replace(found, result=result), other)


def _is_product(graph: Graph, value: Value) -> bool:
    """Return whether a value is itself a product, to which this one could be added as well."""
    node = graph.producers.get(origin(graph, value))
    return node is not None and product(graph, node) is not None


def _groups(graph: Graph, steps: Sequence[_Step]) -> list[list[_Step]]:
    """Return the products, those together that read the same and are stored alike."""
    alone = [[step] for step in steps if step.residual is not None]
    together: dict[tuple[object, ...], list[_Step]] = {}
    for step in steps:
        if step.residual is None:
            found = step.product
            key = (origin(graph, found.x), replace(found.stored, has_bias=False))
            together.setdefault(key, []).append(step)
    for steps_of_x in together.values():
        for first in range(0, len(steps_of_x), MOST_WEIGHTS):
            alone.append(steps_of_x[first : first + MOST_WEIGHTS])
    return alone


def _node(graph: Graph, group: Sequence[_Step]) -> Node:
    products = [step.product for step in group]
    norm: Normed = normed(graph, products[0].x)
    residual = group[0].residual
    operation = Products(
        products[0].width,
        tuple(p.stored for p in products),
        tuple(p.result.shape for p in products),
        norm.eps,
        residual is not None,
    )
    weights = [value for p in products for value in p.weight]
    inputs = (norm.x, *norm.weight, *weights, *(() if residual is None else (residual,)))
    return Node("FusedProducts", inputs, tuple(p.result for p in products), (operation,))


def _with_heads(graph: Graph, found: Sequence[Product]) -> Graph:
    """Return the graph with fused products of each head with a weight of its own."""
    constants = dict(graph.constants)
    nodes = []
    for one in found:
        if one.heads and one.x.size == one.heads * one.width:
            order = Value((1, 1, one.heads), mx.uint32)
            constants[order] = mx.arange(one.heads, dtype=mx.uint32).reshape(order.shape)
            operation = ExpertProducts(one.width, one.stored, one.heads, one.result.shape)
            inputs = (one.x, order, *one.weight)
            nodes.append(Node("FusedHeadProducts", inputs, (one.result,), (operation,)))
    whole = Graph(graph.inputs, graph.outputs, constants, graph.nodes)
    return taken_over(whole, nodes) if nodes else graph
