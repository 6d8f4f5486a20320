"""Put fused nodes in the place of those whose outputs they make."""

from __future__ import annotations

from collections.abc import Iterable

from zmlx.graph.nodes import Graph, Node
from zmlx.graph.trace import in_order


def taken_over(graph: Graph, nodes: Iterable[Node]) -> Graph:
    """Return the graph with nodes that make some of its values in other ways.

    What nobody reads any more is left out.

    Args:
        graph: the graph.
        nodes: each makes values of the graph; none may depend on what it makes.
    """
    producers = dict(graph.producers)
    for node in nodes:
        producers.update(dict.fromkeys(node.outputs, node))
    return graph.with_nodes(in_order(producers, graph.outputs))
