"""What is left between the large kernels: small operations that depend on each other, together.

Before   softmax, argpartition, slice, take_along_axis, sum, divide        six launches
After    one, of one threadgroup (zmlx.graph.tiny)

Operations are counted by how many large kernels lie before them; those with the same number never
wait for each other by way of a large one, and may run together.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from zmlx.graph.nodes import Graph, Node, Value
from zmlx.graph.operations import FUSED, emit
from zmlx.graph.rewriting import taken_over
from zmlx.graph.tiny import TooLarge, refusal, tiny_program
from zmlx.graph.views import keeps_order

#: Elements of a constant that is computed once, in place of an operation in every step.
_MOST_FOLDED = 65_536


def fold_constants(graph: Graph) -> Graph:
    """Return the graph with what follows from small constants computed."""
    held = dict(graph.constants)
    kept = []
    for node in graph.nodes:
        small = all(value.size <= _MOST_FOLDED for value in (*node.inputs, *node.outputs))
        if small and not node.op.startswith(FUSED) and all(v in held for v in node.inputs):
            held.update(zip(node.outputs, emit(node, [held[v] for v in node.inputs]), strict=True))
        else:
            kept.append(node)
    mx.eval([array for value, array in held.items() if value not in graph.constants])
    return Graph(graph.inputs, graph.outputs, held, ()).with_nodes(kept)


def fuse_small(graph: Graph) -> Graph:
    """Return the graph with small operations together."""
    segments: dict[int, list[Node]] = {}
    number: dict[Node, int] = {}
    for node in graph.nodes:
        small = refusal(node) is None
        before = [graph.producers[v] for v in node.inputs if v in graph.producers]
        depth = [number[b] + (small and refusal(b) is not None) for b in before]
        number[node] = max(depth, default=0)
        if small:
            segments.setdefault(number[node], []).append(node)
    fused = [node for nodes in segments.values() for node in _programs(graph, nodes)]
    return taken_over(graph, fused)


def _programs(graph: Graph, nodes: Sequence[Node]) -> list[Node]:
    """Return the kernels that make a segment: one if it fits, else one for what hangs together."""
    if not _gains(graph, nodes):
        return []
    whole = _program(graph, nodes)
    if whole is not None:
        return [whole]
    parts = [part for part in _connected(nodes) if _gains(graph, part)]
    made = (_program(graph, part) for part in parts if len(part) < len(nodes))
    return [node for node in made if node is not None]


def _gains(graph: Graph, nodes: Sequence[Node]) -> bool:
    """Return whether one kernel is better than what MLX makes of some nodes.

    It is so for one operation, too, if it lies between kernels of ours: with MLX's there a step
    could not be recorded.
    """
    launches = sum(map(_launches, nodes))
    return launches > 1 or (launches == 1 and _between_kernels(graph, nodes))


def _between_kernels(graph: Graph, nodes: Sequence[Node]) -> bool:
    """Return whether some of the nodes read from a fused one, and a fused one from some."""
    made_by = [graph.producers.get(value) for node in nodes for value in node.inputs]
    outputs = [value for node in nodes for value in node.outputs]
    read_by = [reader for value in outputs for reader in graph.consumers.get(value, ())]
    return any(map(_is_fused, made_by)) and any(map(_is_fused, read_by))


def _is_fused(node: Node | None) -> bool:
    return node is not None and node.op.startswith(FUSED)


def _launches(node: Node) -> int:
    """Return how many kernels a node is by itself.

    A view is one for each part that has gaps, for whoever reads it copies it first.
    """
    if keeps_order(node) or node.op == "Broadcast":
        return 0
    if node.op == "Transpose":
        return 1
    if node.op == "Split":
        return len(node.outputs) if _has_gaps(node.inputs[0], node.arguments[1]) else 0
    if node.op == "Slice":
        cut = [
            axis
            for axis, size in enumerate(node.outputs[0].shape)
            if size != node.inputs[0].shape[axis]
        ]
        return int(any(_has_gaps(node.inputs[0], axis) for axis in cut))
    return 1


def _has_gaps(value: Value, axis: int) -> bool:
    """Return whether parts of a value along an axis do not lie together."""
    return any(size != 1 for size in value.shape[:axis])


def _connected(nodes: Sequence[Node]) -> list[list[Node]]:
    """Return the nodes in groups that share no value, each in the order given."""
    groups: list[tuple[set[Value], list[Node]]] = []
    for node in nodes:
        values = {*node.inputs, *node.outputs}
        touching = [group for group in groups if group[0] & values]
        joined = (values.union(*(group[0] for group in touching)), [node])
        for group in touching:
            groups.remove(group)
            joined[1].extend(group[1])
        groups.append(joined)
    order = {node: position for position, node in enumerate(nodes)}
    return [sorted(group[1], key=order.__getitem__) for group in groups]


def _program(graph: Graph, nodes: Sequence[Node]) -> Node | None:
    """Return a node that makes what others read of some nodes, or None if it is too much."""
    made = {value for node in nodes for value in node.outputs}
    inside = set(nodes)
    outputs = [
        value
        for value in dict.fromkeys(v for node in nodes for v in node.outputs)
        if value in graph.outputs
        or any(reader not in inside for reader in graph.consumers.get(value, ()))
    ]
    read = dict.fromkeys(value for node in nodes for value in node.inputs if value not in made)
    inputs = [value for value in read if value not in graph.constants]
    held = {value: graph.constants[value] for value in read if value in graph.constants}
    try:
        program = tiny_program(nodes, inputs, outputs, held)
    except TooLarge:
        return None
    return Node(f"{FUSED}Small", tuple(inputs), tuple(outputs), (program,))
