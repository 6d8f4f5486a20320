"""What `mx.compile` makes of a graph: elementwise operations fused into one.

mlx-lm compiles some functions (activations, routers); a trace inlines them. `trace_compiled` tells
which parts of a graph they are, and `fused` joins in these parts, or in a whole graph, what MLX
joins. The result is for counting kernels; it cannot be run.
"""

from __future__ import annotations

import gc
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType, FunctionType
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from zmlx.graph.nodes import Graph, Node, Value
from zmlx.graph.recording import Call, Recorder, kept
from zmlx.graph.trace import Region, in_order, trace_with

#: What MLX 0.32.4 fuses: operations on one element each, and broadcasts that lead to them.
_FUSABLE = frozenset(
    [
        "Abs",
        "Add",
        "ArcCos",
        "ArcSin",
        "ArcSinh",
        "ArcTan",
        "ArcTan2",
        "ArcTanh",
        "AsType",
        "BitwiseBinary",
        "BitwiseInvert",
        "Broadcast",
        "Ceil",
        "Conjugate",
        "Cos",
        "Cosh",
        "Divide",
        "Equal",
        "Erf",
        "ErfInv",
        "Exp",
        "Expm1",
        "Floor",
        "Greater",
        "GreaterEqual",
        "Imag",
        "Less",
        "LessEqual",
        "Log",
        "Log1p",
        "LogAddExp",
        "LogicalAnd",
        "LogicalNot",
        "LogicalOr",
        "Maximum",
        "Minimum",
        "Multiply",
        "Negative",
        "NotEqual",
        "Power",
        "Real",
        "Remainder",
        "Round",
        "Select",
        "Sigmoid",
        "Sign",
        "Sin",
        "Sinh",
        "Sqrt",
        "Square",
        "Subtract",
        "Tan",
        "Tanh",
    ]
)
#: How deep a fused operation may be, and how many arrays it may read.
_DEPTH = 11
_ARRAYS = 24


def trace_compiled(function: Callable[..., Any], *arrays: mx.array) -> tuple[Graph, list[Region]]:
    """Trace a function, and return which parts of the graph are compiled functions.

    Only the outermost of compiled functions that call each other counts, as for MLX. The argument
    of a region says whether its function is compiled without shapes.

    Raises:
        TraceError: as for `trace`.
    """
    return trace_with(_watched, function, *arrays)


def fused(graph: Graph, regions: Iterable[Region] | None = None) -> Graph:
    """Return a graph with nodes "Compiled" in place of what MLX fuses.

    The first argument of such a node are the names of what was fused.

    Args:
        graph: as traced.
        regions: the compiled functions; by default the whole graph is one.
    """
    if regions is None:
        regions = [Region(graph.inputs, graph.outputs, (False,))]
    producers = dict(graph.producers)
    for region in regions:
        producers.update(_joined(graph, region))
    return graph.with_nodes(in_order(producers, graph.outputs))


def _joined(graph: Graph, region: Region) -> dict[Value, Node]:
    """Return the fused nodes of a compiled function, by the values that they make."""
    inputs, outputs, (shapeless,) = region
    held = {value: node for value, node in graph.producers.items() if value not in set(inputs)}
    tape = in_order(held, outputs)
    made = {value: node for node in tape for value in node.outputs}
    readers: dict[Value, list[Node]] = {}
    for node in tape:
        for value in node.inputs:
            readers.setdefault(value, []).append(node)
    taken: set[Node] = set()
    found: dict[Value, Node] = {}
    for root in reversed(tape):
        if root in taken or root.op not in _FUSABLE or root.op == "Broadcast":
            continue
        inner = _reached(root, made, readers, set(outputs), shapeless)
        if len(inner) == 1:
            continue
        fresh = _node(root, inner, made, set(outputs))
        # A broadcast that others read, too, is copied into what reads it.
        shared = {n for n in inner if n.op == "Broadcast" and set(readers[n.outputs[0]]) - inner}
        taken.update(inner - shared)
        found.update(dict.fromkeys(fresh.outputs, fresh))
    return found


def _reached(
    root: Node,
    made: dict[Value, Node],
    readers: dict[Value, list[Node]],
    outputs: set[Value],
    shapeless: bool,
) -> set[Node]:
    """Return the nodes that are fused with the one whose value is wanted.

    Without shapes, every input of an operation of several is broadcast, which counts as depth.
    """
    inner: set[Node] = set()
    read: set[Value] = set()

    def visit(value: Value, depth: int) -> None:
        node = made.get(value)
        if node in inner:
            return
        if (
            node is None
            or depth >= _DEPTH
            or node.op not in _FUSABLE
            or (value in outputs and value.shape != root.outputs[0].shape)
        ):
            read.add(value)
            return
        inside = depth == 0 or all(reader in inner for reader in readers.get(value, ()))
        if not inside and (node.op != "Broadcast" or len(read) >= _ARRAYS):
            read.add(value)
            return
        if value in outputs:
            read.add(value)
        else:
            read.discard(value)
        if len(read) >= _ARRAYS:
            return
        inner.add(node)
        several = shapeless and len(node.inputs) > 1
        for below in node.inputs:
            bare = below not in made or made[below].op != "Broadcast"
            visit(below, depth + (2 if several and bare else 1))

    visit(root.outputs[0], 0)
    return inner or {root}


def _node(root: Node, inner: set[Node], made: dict[Value, Node], outputs: set[Value]) -> Node:
    ordered = in_order({v: n for v, n in made.items() if n in inner}, root.outputs)
    own = {value for node in ordered for value in node.outputs}
    read = dict.fromkeys(value for node in ordered for value in node.inputs if value not in own)
    returned = [v for node in ordered for v in node.outputs if v in outputs or node is root]
    return Node("Compiled", tuple(read), tuple(returned), (tuple(n.op for n in ordered),))


@contextmanager
def _watched(recorder: Recorder) -> Iterator[list[Call]]:
    """Collect the calls of compiled functions that this thread makes while it traces.

    MLX calls such a function as it is when it traces. So a profile function sees the calls: of the
    code objects that belong to what `mx.compile` returned, wherever it is kept.
    """
    del recorder
    codes = _compiled_codes()
    calls: list[Call] = []
    running: list[tuple[FrameType, tuple[mx.array, ...]]] = []

    def profile(frame: FrameType, event: str, result: Any) -> None:
        if event == "call" and not running and frame.f_code in codes:
            running.append((frame, kept(_arrays(dict(frame.f_locals)))))
        elif event == "return" and running and running[0][0] is frame:
            _, read = running.pop()
            calls.append(Call("", read, kept(_arrays(result)), (codes[frame.f_code],)))

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield calls
    finally:
        sys.setprofile(before)


def _arrays(value: Any) -> tuple[mx.array, ...]:
    named: Any = tree_flatten(value)
    return tuple(leaf for _, leaf in named if isinstance(leaf, mx.array))


def _compiled_codes() -> dict[CodeType, bool]:
    """Return the code of every Python function that is compiled now, in the whole process.

    And whether it is compiled without shapes, which MLX does not tell: its decorator is read.
    """
    wrapper = type(mx.compile(_arrays))
    found: dict[CodeType, bool] = {}
    for candidate in gc.get_objects():
        if type(candidate) is wrapper:
            # What gradients and checkpoints return has the same type; mlx-lm's steps have none.
            for inner in gc.get_referents(candidate):
                if isinstance(inner, FunctionType):
                    found[inner.__code__] = _is_shapeless(inner)
    return found


def _is_shapeless(function: FunctionType) -> bool:
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        return False
    return "shapeless=True" in source.partition("def ")[0]
