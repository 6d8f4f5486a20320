"""Values that are the same elements in the same order, under another shape."""

from __future__ import annotations

from zmlx.graph.nodes import Graph, Node, Value

#: Operations that keep every element in its place, row by row.
_RESHAPES = frozenset({"Reshape", "Flatten", "Unflatten", "ExpandDims", "Squeeze", "Contiguous"})


def keeps_order(node: Node) -> bool:
    """Return whether a node's output has the elements of its first input in the same order."""
    if node.op in _RESHAPES:
        return True
    source = node.inputs[0] if node.inputs else None
    if source is None or len(node.outputs) != 1 or source.size != node.outputs[0].size:
        return False
    if node.op == "Transpose":
        long_axes = [axis for axis in node.arguments[0] if source.shape[axis] != 1]
        return long_axes == sorted(long_axes)
    if node.op == "AsType":
        return source.dtype == node.outputs[0].dtype
    # Of the same size, so that nothing is repeated and nothing is left out.
    return node.op == "Broadcast" or (node.op == "Slice" and all(s == 1 for s in node.arguments[2]))


def origin(graph: Graph, value: Value) -> Value:
    """Return the first value that has these elements in this order."""
    node = graph.producers.get(value)
    while node is not None and keeps_order(node):
        value = node.inputs[0]
        node = graph.producers.get(value)
    return value


def repeated(graph: Graph, value: Value) -> Value:
    """Return what a value repeats: its origin without the broadcasts on the way."""
    value = origin(graph, value)
    node = graph.producers.get(value)
    while node is not None and node.op == "Broadcast":
        value = origin(graph, node.inputs[0])
        node = graph.producers.get(value)
    return value
