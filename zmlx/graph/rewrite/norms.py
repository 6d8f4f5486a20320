"""A norm before a product: each threadgroup of the product computes it again, without a launch."""

from __future__ import annotations

from dataclasses import dataclass

from zmlx.graph.nodes import Graph, Value
from zmlx.graph.recording import Norm
from zmlx.graph.views import origin


@dataclass(frozen=True)
class Normed:
    """What a product reads: rows, and the weight with which they are normed, if they are.

    Attributes:
        x: the rows before the norm.
        weight: the norm's weight, or nothing.
        eps: of the norm; None without one.
    """

    x: Value
    weight: tuple[Value, ...] = ()
    eps: float | None = None


def normed(graph: Graph, x: Value) -> Normed:
    """Return where the rows of a product come from."""
    source = origin(graph, x)
    node = graph.producers.get(source)
    if node is None or node.op != "RMSNorm" or node.inputs[0].dtype != source.dtype:
        return Normed(source)
    norm: Norm = node.arguments  # type: ignore[assignment]
    whole = norm.has_weight and node.inputs[0].shape[-1] == source.size
    if not whole or node.inputs[1] not in graph.constants:
        return Normed(source)
    return Normed(origin(graph, node.inputs[0]), (node.inputs[1],), norm.eps)
