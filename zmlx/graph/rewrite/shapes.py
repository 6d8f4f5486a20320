"""Fused operations that follow on each other agree on shapes, so that nothing is reshaped between.

A reshape launches no kernel, but the host builds and evaluates it for every token.
"""

from __future__ import annotations

from typing import Any

from zmlx.graph.nodes import Graph, Node, Value


def settled(graph: Graph) -> Graph:
    """Return the graph with values in the shapes that those who read them take."""
    renamed: dict[Value, Value] = {}
    nodes = []
    for node in graph.nodes:
        node = Node(
            node.op, tuple(renamed.get(v, v) for v in node.inputs), node.outputs, node.arguments
        )
        operation: Any = node.arguments[0] if node.arguments else None
        if not hasattr(operation, "makes"):
            nodes.append(node)
            continue
        shapes = _shapes(graph, node, operation)
        outputs = tuple(
            value if value.shape == shape else Value(shape, value.dtype, value.name)
            for value, shape in zip(node.outputs, shapes, strict=True)
        )
        if operation.makes is None:
            operation = operation.making(shapes)
        nodes.append(Node(node.op, node.inputs, outputs, (operation,)))
        for value, made in zip(node.outputs, outputs, strict=True):
            if _wanted(graph, value, made.shape) == made.shape:
                renamed[value] = made
            elif value is not made:
                nodes.append(Node("Reshape", (made,), (value,), (value.shape,)))
    return Graph(graph.inputs, graph.outputs, graph.constants, tuple(nodes))


def _shapes(graph: Graph, node: Node, operation: Any) -> tuple[tuple[int, ...], ...]:
    """Return the shapes in which a fused node makes its outputs: as they are read, if it can."""
    if operation.makes is not None:
        return operation.makes  # type: ignore[no-any-return]
    return tuple(_wanted(graph, value, None) or value.shape for value in node.outputs)


def _wanted(graph: Graph, value: Value, own: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Return the shape in which all readers of a value take it, if it can be made; else None."""
    if value in graph.outputs:
        return None
    found = set()
    for node in graph.consumers.get(value, ()):
        operation: Any = node.arguments[0] if node.arguments else None
        if not hasattr(operation, "makes"):
            return None
        takes = operation.takes
        for position, read in enumerate(node.inputs):
            if read is value:
                found.add(takes[position] if position < len(takes) else None)
    shape = found.pop() if len(found) == 1 else None
    return shape if own is None or shape == own else None
