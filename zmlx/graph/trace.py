"""A function of arrays, traced once into a graph of MLX's operations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

from zmlx.graph.nodes import Graph, Node, Value
from zmlx.graph.recording import Call, Recorder, own_form, recorded

#: What the export tells of an array: name, shape, dtype.
Told = tuple[str, tuple[int, ...], mx.Dtype]


#: What MLX says before the name of an operation that it cannot export.
_UNNAMED = "Unable to get state for primitive "


class TraceError(RuntimeError):
    """A function cannot be traced; the text says what in it cannot."""


def trace(function: Callable[..., Any], *arrays: mx.array) -> Graph:
    """Run a function once, without computing anything, and return what it does as a graph.

    Nodes have the names and arguments of MLX's primitives (`Primitive::state`), whatever is inside
    `mx.compile` included, but for these, which are one node on every backend; a "?" marks inputs
    that are there only if their argument says so:

    - "RMSNorm": x, weight?; `Norm`
    - "LayerNorm": x, weight?, bias?; `Norm`
    - "RoPE": x, offset, freqs?; `Rope`. An offset that is a number becomes a constant.
    - "ScaledDotProductAttention": queries, keys, values, mask?, sinks?; `Attention`
    - "QuantizeWeights": w, global_scale?; "DequantizeWeights": packed, scales, biases?,
      global_scale?; `Packing`
    - "Contiguous": x; (allow_col_major,). "BitwiseInvert", "ToFP8": x. "FromFP8": x; (dtype,)

    Args:
        function: takes arrays; returns an array, or lists, tuples and dicts of arrays, which become
            the graph's outputs in their order. Whatever else it reads becomes a constant: arrays as
            arrays, numbers as numbers. It may be run twice, so what it changes (a cache) must be
            its own.
        arrays: one for each argument. Only shapes and dtypes matter: none is evaluated.

    Raises:
        TraceError: the function reads an array's contents (`.item()`, `mx.eval`, `if array`),
            returns what is no array, uses an operation that MLX cannot export, or raises.
    """
    return trace_with(_nothing, function, *arrays)[0]


def trace_plain(function: Callable[..., Any], *arrays: mx.array) -> Graph:
    """Trace a function with every operation as MLX makes it here; arguments as for `trace`.

    On a CPU `mx.fast` functions are then the operations that stand in for them.

    Raises:
        TraceError: as for `trace`.
    """
    told: list[dict[str, Any]] = []
    try:
        mx.export_function(told.append, lambda *inputs: _arrays(function(*inputs)), *arrays)
    except Exception as error:
        raise TraceError(_explained(error)) from error
    reader = _Reader(told)
    graph = Graph(tuple(reader.inputs), tuple(reader.outputs), reader.constants)
    return graph.with_nodes(reader.nodes)


#: See `trace_with`.
Watching = Callable[[Recorder], AbstractContextManager[list[Call]]]


class Region(NamedTuple):
    """A part of a graph: what it reads, what it returns, and what else is known of it."""

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    arguments: tuple[Any, ...] = ()


def trace_with(
    watching: Watching,
    function: Callable[..., Any],
    *arrays: mx.array,
) -> tuple[Graph, list[Region]]:
    """Trace a function while something watches it.

    Args:
        watching: makes a context in which the function runs, with a list of calls that is filled
            there; they become no nodes. It is given what records calls that do.
        function: as for `trace`.
        arrays: as for `trace`.

    Returns:
        The graph, and what each call that was watched reads and returns.

    Raises:
        TraceError: as for `trace`.
    """
    try:
        return _traced(watching, function, arrays)
    except TraceError:
        raise
    except Exception as error:
        if _UNNAMED + "Compiled" not in str(error):
            raise TraceError(_explained(error)) from error
    # A compiled function was called with constants only; MLX inlines those that read an input.
    with _uncompiled():
        try:
            return _traced(watching, function, arrays)
        except TraceError:
            raise
        except Exception as error:
            raise TraceError(_explained(error)) from error


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Call compiled functions as they are, if they are not already; in the whole process."""
    count = 0

    @mx.compile
    def counted(x: mx.array) -> mx.array:
        nonlocal count
        count += 1
        return x

    one = mx.array(1)
    counted(one)
    counted(one)
    # Compiled functions run once; MLX does not tell otherwise whether it compiles.
    compiles = count == 1
    mx.disable_compile()
    try:
        yield
    finally:
        if compiles:
            mx.enable_compile()


@contextmanager
def _nothing(recorder: Recorder) -> Iterator[list[Call]]:
    del recorder
    yield []


def _traced(
    watching: Watching,
    function: Callable[..., Any],
    arrays: Sequence[mx.array],
) -> tuple[Graph, list[Region]]:
    told: list[dict[str, Any]] = []
    calls: list[Call] = []
    watched: list[Call] = []

    def traced(seed: mx.array, *inputs: mx.array) -> list[mx.array]:
        with recorded(seed) as recorder, watching(recorder) as seen:
            outputs = _arrays(function(*inputs))
        calls.extend(recorder.calls)
        watched.extend(seen)
        # What is returned gets a name: first what recorded calls read and made, in their order.
        return [*(a for c in (*calls, *watched) for a in (*c.inputs, *c.outputs)), *outputs]

    mx.export_function(told.append, traced, mx.array(0, mx.int64), *arrays)
    return _Reader(told).graph(calls, watched)


def _arrays(result: Any) -> list[mx.array]:
    named: Any = tree_flatten(result)
    leaves: list[mx.array] = [leaf for _, leaf in named]
    for leaf in leaves:
        if not isinstance(leaf, mx.array):
            raise TraceError(
                f"a traced function returns arrays, not a {type(leaf).__name__} ({leaf!r:.60})"
            )
    return leaves


def _explained(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    unnamed = text.partition(_UNNAMED)[2]
    if unnamed:
        return f"MLX cannot export the operation {unnamed}"
    if "Attempting to eval" in text:
        return (
            "the function reads what an array holds (.item(), mx.eval, or an array as a condition);"
            f" only shapes and dtypes are known while it is traced: {text}"
        )
    if "uncaptured inputs" in text:
        return "the function reads one of the given arrays by another way than its argument"
    return f"{type(error).__name__}: {text}"


class _Reader:
    """Makes a graph of what the export told."""

    def __init__(self, told: Sequence[dict[str, Any]]) -> None:
        self.values: dict[str, Value] = {}
        parts = {part["type"]: part for part in told if part["type"] != "primitive"}
        self.inputs = [self.value(*item) for item in parts["inputs"]["inputs"]]
        self.outputs = [self.value(*item) for item in parts["outputs"]["outputs"]]
        self.constants = {
            self.value(name, array.shape, array.dtype): array
            for name, array in parts["constants"]["constants"]
        }
        self.nodes = [self.node(part) for part in told if part["type"] == "primitive"]

    def node(self, part: dict[str, Any]) -> Node:
        """Return the node of a primitive."""
        op = part["name"]
        inputs, outputs = (
            tuple(self.value(*item) for item in part[key]) for key in ("inputs", "outputs")
        )
        inputs, arguments = own_form(op, inputs, tuple(part["arguments"]), lambda v: len(v.shape))
        return Node(op, inputs, outputs, arguments)

    def value(self, name: str, shape: tuple[int, ...], dtype: mx.Dtype) -> Value:
        """Return the value of a name, always the same one."""
        if name not in self.values:
            self.values[name] = Value(tuple(shape), dtype, name)
        return self.values[name]

    def graph(self, calls: Iterable[Call], watched: Iterable[Call]) -> tuple[Graph, list[Region]]:
        """Return the graph, with a node in place of each recorded call's marker."""
        named = iter(self.outputs)
        nodes = {value: node for node in self.nodes for value in node.outputs}
        order: list[Value] = []
        for call in calls:
            inputs, markers = _taken(named, call)
            node = Node(call.op, inputs, markers, call.arguments)
            nodes.update(dict.fromkeys(markers, node))
            order.extend((*inputs, *markers))
        regions = [Region(*_taken(named, call), call.arguments) for call in watched]
        outputs = tuple(named)
        ordered = in_order(nodes, [*order, *outputs])
        graph = Graph(tuple(self.inputs[1:]), outputs, self.constants)
        return graph.with_nodes(ordered), regions


def _taken(named: Iterator[Value], call: Call) -> tuple[tuple[Value, ...], tuple[Value, ...]]:
    inputs = tuple(next(named) for _ in call.inputs)
    return inputs, tuple(next(named) for _ in call.outputs)


def in_order(producers: dict[Value, Node], wanted: Iterable[Value]) -> list[Node]:
    """Return the nodes that make what is wanted, each once and after those that it reads from.

    Args:
        producers: the node that makes each value.
        wanted: values; the earlier ones' nodes come first.
    """
    ordered: dict[Node, None] = {}
    for value in wanted:
        # Not by recursion: a step of a deep model is a chain of thousands of nodes.
        path = [value]
        while path:
            node = producers.get(path[-1])
            if node is None or node in ordered:
                path.pop()
                continue
            before = [v for v in node.inputs if v in producers and producers[v] not in ordered]
            if before:
                path.extend(reversed(before))
            else:
                ordered[node] = None
                path.pop()
    return list(ordered)
