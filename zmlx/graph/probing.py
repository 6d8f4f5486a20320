"""Try fused operations of a graph on random numbers before a program relies on them.

A result that is wrong in one of many layers hides behind the residuals of the others. So each kind
of fused operation is compared by itself with what the graph did in its place: the same weights and
formats, on inputs of ordinary size. What the graph did is computed in float32: MLX sums products of
16-bit numbers in 16 bits, and the longer the rows, the less its result says.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import mlx.core as mx

from zmlx.backend import for_kernels
from zmlx.backend.cuda.side_by_side import side_by_side
from zmlx.backend.outputs import together
from zmlx.graph.nodes import Graph, Node, Value
from zmlx.graph.operations import FUSED, emit
from zmlx.graph.trace import in_order, trace

#: Largest deviation from what float32 gives, relative, root mean square: an operation rounds to its
#: dtype once or several times, and products of float32 may be of fewer bits on a GPU.
_DEVIATIONS = {mx.float32: 0.01, mx.float16: 0.01, mx.bfloat16: 0.03}
#: The same, from what MLX gives in 16 bits.
_LOOSE = {mx.float32: 0.01, mx.float16: 0.05, mx.bfloat16: 0.15}
#: How many times stock's error, against float32, a step may have that is not within its limit.
MORE = 1.5
#: Bytes that float32 may take for that: with more, memory would be short where the model just fits.
_MOST = 2**28


class WrongResult(RuntimeError):
    """A kernel does not compute what the model does."""


def probe(
    before: Graph,
    after: Graph,
    given: Mapping[Value, mx.array] | None = None,
    written: Mapping[Value, Value] | None = None,
) -> None:
    """Compare the fused operations of a graph with what they stand for, each kind once.

    Args:
        before: the graph without them.
        after: the graph with them; their inputs and outputs are values of `before`, but for what is
            constant or given.
        given: inputs that must not be random.
        written: inputs that the operations write to -> values of `before` that they are then.

    Raises:
        WrongResult: a result is another one, or depends on more than what the operation reads.
        RuntimeError: a kernel cannot run.
    """
    given, written = given or {}, written or {}
    known = {(node.op, node.arguments) for node in before.nodes if node.op.startswith(FUSED)}
    nodes = []
    for node in after.nodes:
        if node.op.startswith(FUSED) and (node.op, node.arguments) not in known:
            known.add((node.op, node.arguments))
            nodes.append(node)
    if for_kernels(has_reference=False) == "cuda":
        _compile(after, nodes, given)
    for node in nodes:
        try:
            _probe(before, after, node, given, written)
        except WrongResult as failure:
            raise WrongResult(f"{node.op[len(FUSED) :]} {failure}") from failure
        except RuntimeError as failure:
            raise RuntimeError(f"{node.op[len(FUSED) :]} cannot run: {failure}") from failure


def _compile(graph: Graph, nodes: Sequence[Node], given: Mapping[Value, mx.array]) -> None:
    """Have kernels compiled at once, which are tried one after the other."""
    with side_by_side(), suppress(RuntimeError):  # it is raised again, and then told
        for node in nodes:
            inputs = _inputs(graph, node, given)
            _launched(node, [inputs[value] for value in node.inputs])


def _inputs(graph: Graph, node: Node, given: Mapping[Value, mx.array]) -> dict[Value, mx.array]:
    """Return a fused operation's inputs: those that are known, and random ones."""
    experts = [graph.constants[v].shape[0] for v in node.inputs if v in graph.constants]
    inputs: dict[Value, mx.array] = {}
    for number, value in enumerate(node.inputs):
        held = graph.constants.get(value, given.get(value))
        inputs[value] = _random(value, number, min(experts, default=1)) if held is None else held
    return inputs


def _launched(node: Node, arrays: Sequence[mx.array]) -> list[mx.array]:
    """Return a fused operation's results, lazily."""
    return list(together(node.arguments[0](*arrays)))


def _probe(
    before: Graph,
    after: Graph,
    node: Node,
    given: Mapping[Value, mx.array],
    written: Mapping[Value, Value],
) -> None:
    inputs = _inputs(after, node, given)
    changed = [value for value in node.inputs if value in written]
    wanted = [*node.outputs, *(written[value] for value in changed)]
    truths, allowed = _truths(before, inputs, wanted)
    # Copies, for the others are read by what is compared.
    arrays = [inputs[v] + 0 if v in written else inputs[v] for v in node.inputs]
    mx.eval(arrays)
    results = _launched(node, arrays)
    buffers = [array for v, array in zip(node.inputs, arrays, strict=True) if v in written]
    if buffers:
        results += mx.depends(buffers, results)
    for result, truth, value in zip(results, truths, wanted, strict=True):
        error = deviation(result, truth) if result.dtype == value.dtype else float("inf")
        if not error <= allowed.get(value.dtype, 0.0):
            raise WrongResult(f"differs from MLX's operations by {error:.2g}")


def _truths(
    before: Graph, inputs: Mapping[Value, mx.array], wanted: Sequence[Value]
) -> tuple[list[mx.array], Mapping[mx.Dtype, float]]:
    """Return what the results should be, computed, and how far from it they may be."""
    if _bytes_in_float32(before, inputs, wanted) <= _MOST:
        try:
            truths = in_float32(before, inputs, wanted)
            mx.eval(truths)
            return truths, _DEVIATIONS
        except WrongResult:
            raise
        except RuntimeError:  # a kernel of MLX for float32 that the device cannot run
            pass
    truths = _computed(before, inputs, wanted)
    mx.eval(truths)
    return truths, _LOOSE


def _bytes_in_float32(
    graph: Graph, inputs: Mapping[Value, mx.array], wanted: Sequence[Value]
) -> int:
    """Return what constants take in float32: MLX may need all of a quantized weight so."""
    read = {value for node in _between(graph, inputs, wanted) for value in node.inputs}
    held = [graph.constants[value] for value in read & graph.constants.keys()]
    # A word of packed weights is eight values, or some more.
    return sum(4 * array.size * (8 if array.dtype == mx.uint32 else 1) for array in held)


def _between(
    graph: Graph, inputs: Mapping[Value, mx.array], wanted: Sequence[Value]
) -> Iterable[Node]:
    """Return the nodes that make some values from others, in order."""
    producers = {value: node for value, node in graph.producers.items() if value not in inputs}
    return in_order(producers, wanted)


def _random(value: Value, seed: int, experts: int) -> mx.array:
    """Return numbers of ordinary size, or indices of experts, from a generator of their own."""
    key = mx.random.key(seed)
    if mx.issubdtype(value.dtype, mx.integer):
        return mx.random.randint(0, experts, value.shape, key=key).astype(value.dtype)
    return mx.random.normal(value.shape, key=key).astype(value.dtype)


def step_in_float32(
    forward: Callable[[mx.array, list[Any]], mx.array], tokens: mx.array, caches: Sequence[Any]
) -> mx.array:
    """Return what a forward gives for a step, lazily, computed in float32 where it has 16 bits.

    Args:
        forward: of MLX's operations; takes tokens and caches.
        tokens: of the step.
        caches: they stay as they are.

    Raises:
        zmlx.graph.trace.TraceError: it cannot be traced.
    """
    graph = trace(lambda tokens: forward(tokens, copy.deepcopy(list(caches))), tokens)
    [exact] = in_float32(graph, {graph.inputs[0]: tokens}, graph.outputs)
    return exact


def in_float32(
    graph: Graph, inputs: Mapping[Value, mx.array], wanted: Sequence[Value]
) -> list[mx.array]:
    """Build values of a graph of MLX's operations, lazily, in float32 where they have 16 bits.

    Raises:
        WrongResult: they depend on more than what is given.
    """
    return _computed(
        graph, inputs, wanted, lambda array: array.astype(_wide(array.dtype)), _widened
    )


def _computed(
    graph: Graph,
    inputs: Mapping[Value, mx.array],
    wanted: Sequence[Value],
    read: Callable[[mx.array], mx.array] = lambda array: array,
    node_of: Callable[[Node], Node] = lambda node: node,
) -> list[mx.array]:
    held = {**graph.constants, **inputs}
    for node in _between(graph, inputs, wanted):
        if not held.keys() >= set(node.inputs):
            raise WrongResult("does not read all that its result depends on")
        # Each constant anew for whoever reads it, so that no more than that is in memory at once.
        arrays = [read(held[value]) for value in node.inputs]
        held.update(zip(node.outputs, emit(node_of(node), arrays), strict=True))
    return [read(held[value]) for value in wanted]


def _widened(node: Node) -> Node:
    arguments = node.arguments
    if node.op == "AsType":
        arguments = tuple(map(_wide, arguments))
    outputs = tuple(Value(v.shape, _wide(v.dtype), v.name) for v in node.outputs)
    return Node(node.op, node.inputs, outputs, arguments)


def _wide(dtype: mx.Dtype) -> mx.Dtype:
    return mx.float32 if dtype in (mx.float16, mx.bfloat16) else dtype


def deviation(result: mx.array, truth: mx.array) -> float:
    """Return the root mean square of a difference over that of the truth; inf for other sizes."""
    if result.size != truth.size:
        return float("inf")
    found, truth = (array.astype(mx.float32).reshape(-1) for array in (result, truth))
    size = mx.maximum(mx.square(truth).mean(), 1e-30)
    return float(mx.sqrt(mx.square(found - truth).mean() / size))
