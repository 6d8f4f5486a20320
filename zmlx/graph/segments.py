"""A graph of launches in three parts: what MLX builds first, what is recorded, and the rest.

A step begins with operations of MLX's (an embedding) and ends with some (a norm). Between them
there are only launches and views, or there is no recording.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from zmlx.graph.launches import LAUNCH, NotRecordable
from zmlx.graph.nodes import Graph, Node, Value
from zmlx.graph.placing import Placed, alone, views

#: What part of the launches has to be recorded for a recording to be worth it.
_WORTH = 0.75


@dataclass(frozen=True)
class Segments:
    """The parts of a graph.

    Attributes:
        head: what MLX builds first; its inputs are some of the graph's.
        launches: the nodes that are recorded, in their order.
        places: where the values lie that they read.
        copied: what they read of the graph's inputs and the head's outputs, buffers left out.
        buffers: the graph's inputs that they read where they lie.
        results: what they make that is needed after them.
        tail: what MLX builds at last, of inputs of the graph and outputs of the other parts; its
            outputs are the graph's.
    """

    head: Graph
    launches: tuple[Node, ...]
    places: dict[Value, Placed]
    copied: tuple[Value, ...]
    buffers: tuple[Value, ...]
    results: tuple[Value, ...]
    tail: Graph

    @property
    def leaves_clusters_to_mlx(self) -> bool:
        """Whether MLX would launch clusters of blocks, which are for recordings only."""
        nodes = (*self.head.nodes, *self.tail.nodes)
        return any(node.op == LAUNCH and node.arguments[0].kernel.cluster > 1 for node in nodes)


def segments(graph: Graph, buffers: Iterable[Value]) -> Segments:
    """Divide a graph so that as many launches as possible are recorded.

    Args:
        graph: of launches and MLX's operations.
        buffers: inputs that are read, and written, where they lie.

    Raises:
        NotRecordable: too few launches can be.
    """
    places = _places(graph)
    before, recorded = _divided(graph, places)
    made = {value for node in recorded for value in node.outputs}
    first = {value for node in before for value in node.outputs}
    bases = dict.fromkeys(places[value].base for node in recorded for value in node.inputs)
    given = [base for base in bases if base not in made and base not in graph.constants]
    held = set(buffers)
    tail = _part(graph, graph.outputs, made | first)
    head = dict.fromkeys(value for value in (*given, *tail.inputs) if value in first)
    return Segments(
        head=_part(graph, tuple(head), set()),
        launches=recorded,
        places=places,
        copied=tuple(value for value in given if value not in held),
        buffers=tuple(value for value in given if value in held),
        results=tuple(value for value in tail.inputs if value in made),
        tail=tail,
    )


def _places(graph: Graph) -> dict[Value, Placed]:
    """Return where each value lies; what an operation of MLX's makes has memory of its own."""
    places = {value: alone(value) for value in (*graph.inputs, *graph.constants)}
    for node in graph.nodes:
        found = None if node.op == LAUNCH else views(node, [places[v] for v in node.inputs])
        places.update(zip(node.outputs, found or map(alone, node.outputs), strict=True))
    return places


def _divided(
    graph: Graph, places: dict[Value, Placed]
) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """Return what comes before the recording, and the launches in it.

    Of MLX's operations the first ones come before it, with all that they read from, and the others
    after it, with all that reads from them: as many first ones as leave the most launches.

    Raises:
        NotRecordable: that is too few.
    """
    launches = [node for node in graph.nodes if node.op == LAUNCH]
    others = [node for node in graph.nodes if _computes(node, places)]
    best: tuple[tuple[Node, ...], tuple[Node, ...]] = ((), ())
    for count in range(len(others) + 1):
        before = _ancestors(graph, others[:count])
        after = _descendants(graph, others[count:])
        kept = tuple(node for node in launches if node not in before and node not in after)
        if len(kept) > len(best[1]):
            computed = (node for node in before if node.op == LAUNCH or _computes(node, places))
            best = tuple(computed), kept
    if len(best[1]) < _WORTH * len(launches) or not best[1]:
        ops = ", ".join(dict.fromkeys(node.op for node in others)) or "nothing"
        raise NotRecordable(
            f"of {len(launches)} launches {len(best[1])} follow each other, between {ops}"
        )
    return best


def _computes(node: Node, places: dict[Value, Placed]) -> bool:
    """Return whether MLX would compute something for a node that is no launch of ours."""
    return node.op != LAUNCH and any(places[value].base is value for value in node.outputs)


def _ancestors(graph: Graph, nodes: Sequence[Node]) -> set[Node]:
    """Return nodes with all that they read from."""
    found = set(nodes)
    wanted = {value for node in nodes for value in node.inputs}
    for node in reversed(graph.nodes):
        if not wanted.isdisjoint(node.outputs):
            found.add(node)
            wanted.update(node.inputs)
    return found


def _descendants(graph: Graph, nodes: Sequence[Node]) -> set[Node]:
    """Return nodes with all that reads from them."""
    found = set(nodes)
    made = {value for node in nodes for value in node.outputs}
    for node in graph.nodes:
        if not made.isdisjoint(node.inputs):
            found.add(node)
            made.update(node.outputs)
    return found


def _part(graph: Graph, outputs: Sequence[Value], given: set[Value]) -> Graph:
    """Return what makes some values of a graph from given ones and its inputs."""
    kept: list[Node] = []
    wanted = dict.fromkeys(outputs)
    for node in reversed(graph.nodes):
        needed = [value for value in node.outputs if value in wanted and value not in given]
        if needed:
            kept.append(node)
            wanted.update(dict.fromkeys(node.inputs))
    made = {value for node in kept for value in node.outputs} - given
    inputs = tuple(v for v in wanted if v not in made and v not in graph.constants)
    held = {value: array for value, array in graph.constants.items() if value in wanted}
    return Graph(inputs, tuple(outputs), held, tuple(reversed(kept)))
