"""What a trace makes a node, what a constant, what it refuses; it leaves nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from zmlx.graph.nodes import Graph, Node
from zmlx.graph.operations import run
from zmlx.graph.recording import Attention, Norm, Rope, own_form
from zmlx.graph.trace import TraceError, in_order, trace, trace_plain

X = mx.arange(24, dtype=mx.float32).reshape(1, 3, 8)
W = mx.linspace(0.5, 1.5, 8)
HEADS = mx.sin(mx.arange(2 * 4 * 64, dtype=mx.float32)).reshape(1, 2, 4, 64)
FREQS = mx.linspace(1.0, 16.0, 16)
MASK, SINKS = mx.zeros((4, 4)), mx.ones((2,))
mx.eval(X, W, HEADS, FREQS, MASK, SINKS)


def only(graph: Graph) -> Node:
    assert len(graph.nodes) == 1, [node.op for node in graph.nodes]
    return graph.nodes[0]


def attend(**more: Any) -> Callable[[mx.array], mx.array]:
    return lambda q: mx.fast.scaled_dot_product_attention(q, q, q, scale=0.125, **more)


def rope(**more: Any) -> Callable[[mx.array], mx.array]:
    arguments = {"traditional": False, "base": 1e4, "scale": 1.0, "offset": 7, **more}
    return lambda x: mx.fast.rope(x, 32, **arguments)


@pytest.mark.parametrize(
    ("function", "array", "op", "arguments", "inputs"),
    [
        (lambda x: mx.fast.rms_norm(x, W, 1e-5), X, "RMSNorm", Norm(1e-5, True), 2),
        (lambda x: mx.fast.rms_norm(x, None, 1e-6), X, "RMSNorm", Norm(1e-6, False), 1),
        (lambda x: mx.fast.layer_norm(x, W, W, 1e-5), X, "LayerNorm", Norm(1e-5, True, True), 3),
        (lambda x: mx.fast.layer_norm(x, W, None, 1e-5), X, "LayerNorm", Norm(1e-5, True), 2),
        (
            lambda x: mx.fast.layer_norm(x, None, W, 1e-5),
            X,
            "LayerNorm",
            Norm(1e-5, False, True),
            2,
        ),
        (rope(), HEADS, "RoPE", Rope(32, False, 1e4, 1.0, False), 2),
        (rope(offset=mx.array([3])), HEADS, "RoPE", Rope(32, False, 1e4, 1.0, False), 2),
        (
            rope(base=None, freqs=FREQS, traditional=True, scale=0.5),
            HEADS,
            "RoPE",
            Rope(32, True, None, 0.5, True),
            3,
        ),
        (attend(), HEADS, "ScaledDotProductAttention", Attention(0.125, False, False, False), 3),
        (
            attend(mask="causal"),
            HEADS,
            "ScaledDotProductAttention",
            Attention(0.125, True, False, False),
            3,
        ),
        (
            attend(mask=MASK, sinks=SINKS),
            HEADS,
            "ScaledDotProductAttention",
            Attention(0.125, False, True, True),
            5,
        ),
    ],
)
def test_a_fast_function_is_one_node(
    function: Callable[[mx.array], mx.array],
    array: mx.array,
    op: str,
    arguments: tuple[Any, ...],
    inputs: int,
) -> None:
    graph = trace(function, array)
    node = only(graph)
    assert (node.op, node.arguments, len(node.inputs)) == (op, arguments, inputs)
    assert (node.outputs[0].shape, node.outputs[0].dtype) == (array.shape, array.dtype)
    assert mx.array_equal(run(graph, [array])[0], function(array))


def test_a_number_as_offset_becomes_a_constant() -> None:
    graph = trace(rope(offset=7), HEADS)
    offset = only(graph).inputs[1]
    assert graph.constants[offset].item() == 7
    moved = run(graph, [HEADS], {offset: mx.array(9, mx.int32)})
    assert mx.array_equal(moved[0], rope(offset=9)(HEADS))


def test_an_array_that_is_changed_in_place_is_recorded_as_it_was() -> None:
    def function(x: mx.array) -> mx.array:
        x = x * 2
        normed = mx.fast.rms_norm(x, W, 1e-5)
        x += normed
        normed += 1
        return x * normed

    assert mx.array_equal(run(trace(function, X), [X])[0], function(X))


def test_nodes_stand_after_what_they_read() -> None:
    layer = nn.TransformerEncoderLayer(8, 2)
    graph = trace(lambda x: layer(x, None), X)
    known = set(graph.inputs) | set(graph.constants)
    for node in graph.nodes:
        assert known.issuperset(node.inputs), node.op
        known.update(node.outputs)
    assert known.issuperset(graph.outputs)


def test_a_chain_of_thousands_of_operations() -> None:
    def chain(x: mx.array) -> mx.array:
        for _ in range(5000):
            x = mx.sin(x)
        return x

    graph = trace(chain, X)
    assert len(graph.nodes) == 5000
    assert in_order(dict(graph.producers), graph.outputs) == list(graph.nodes)


def test_outputs_may_be_inputs_constants_and_nested() -> None:
    graph = trace(lambda x, y: {"a": [y, W], "b": (x + y, x)}, X, X)
    found = run(graph, [X, 2 * X])
    assert [mx.array_equal(a, b).item() for a, b in zip(found, [2 * X, W, 3 * X, X], strict=True)]
    assert graph.outputs[0] is graph.inputs[1]
    assert graph.outputs[1] in graph.constants


def test_compiled_functions_are_inlined() -> None:
    graph = trace(nn.silu, X)
    assert [node.op for node in graph.nodes] == ["Sigmoid", "Multiply"]


@pytest.mark.parametrize("compiles", [True, False])
def test_a_compiled_function_of_constants(compiles: bool) -> None:
    if not compiles:
        mx.disable_compile()
    try:
        graph = trace(lambda x: x * nn.softplus(W), X)
        count = 0

        @mx.compile
        def counted(x: mx.array) -> mx.array:
            nonlocal count
            count += 1
            return x

        counted(X)
        counted(X)
        assert count == (1 if compiles else 2)
    finally:
        mx.enable_compile()
    assert mx.allclose(run(graph, [X])[0], X * nn.softplus(W))


def test_nothing_is_computed() -> None:
    # 4 TiB each, if they were.
    weight = mx.zeros((1 << 20, 1 << 20))
    x = mx.zeros((1, 1 << 20))
    graph = trace(lambda x: x @ weight.T, x)
    assert graph.outputs[0].shape == (1, 1 << 20)
    assert [node.op for node in graph.nodes] == ["Broadcast", "Full", "Transpose", "Matmul"]


def names() -> dict[str, Any]:
    found = {f"fast.{name}": value for name, value in vars(mx.fast).items()}
    return {**found, **vars(mx)}


def test_mlx_is_as_before_after_success_and_failure() -> None:
    before = names()
    trace(attend(), HEADS)
    with pytest.raises(TraceError):
        trace(lambda x: x.undefined, X)
    after = names()
    assert before.keys() == after.keys()
    assert all(after[name] is value for name, value in before.items())


def test_other_threads_compute_while_one_traces() -> None:
    found: list[mx.array] = []

    def compute() -> None:
        result = mx.fast.rms_norm(X, W, 1e-5)
        mx.eval(result)
        found.append(result)

    def function(x: mx.array) -> mx.array:
        thread = threading.Thread(target=compute)
        thread.start()
        thread.join()
        return mx.fast.rms_norm(x, W, 1e-5)

    assert only(trace(function, X)).op == "RMSNorm"
    assert mx.array_equal(found[0], mx.fast.rms_norm(X, W, 1e-5))


def test_inside_vmap_operations_stay_what_they_are() -> None:
    def function(x: mx.array) -> mx.array:
        return mx.vmap(lambda row: mx.fast.rms_norm(row, None, 1e-5))(x)

    rows = X[0]
    assert mx.allclose(run(trace(function, rows), [rows])[0], function(rows))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x * x.sum().item(), r"reads what an array holds.*\[eval\]"),
        (lambda x: x if x.sum() > 0 else -x, "reads what an array holds"),
        (lambda x: mx.fast.rms_norm(x, W, 1e-5).max().item() * x, "reads what an array holds"),
        (lambda x: (x, 3), "returns arrays, not a int"),
        (lambda x: None, "returns arrays, not a NoneType"),
        (lambda x: x + X, "one of the given arrays by another way"),
        (lambda x: x.undefined, "AttributeError: .*undefined"),
        (lambda x: mx.fast.rms_norm(x, mx.ones((3,)), 1e-5), "ValueError: .*rms_norm"),
        (lambda x: mx.linalg.lu(x, stream=mx.cpu), "cannot export the operation LUF"),
    ],
)
def test_what_cannot_be_traced_is_named(function: Callable[[mx.array], Any], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        trace(function, X)


def test_a_plain_trace_has_the_operations_of_a_cpu() -> None:
    with mx.stream(mx.cpu):
        graph = trace_plain(lambda x: mx.fast.rms_norm(x, W, 1e-5), X)
    assert "RMSNorm" not in {node.op for node in graph.nodes}
    assert "Square" in {node.op for node in graph.nodes}


@pytest.mark.parametrize(
    ("op", "shapes", "state", "expected", "left"),
    [
        ("RMSNorm", [(1, 8), (8,)], (1e-5,), Norm(1e-5, True), 2),
        ("RMSNorm", [(1, 8), ()], (1e-5,), Norm(1e-5, False), 1),
        ("LayerNorm", [(1, 8), (), ()], (1e-5,), Norm(1e-5, False, False), 1),
        ("LayerNorm", [(1, 8), (), (8,)], (1e-5,), Norm(1e-5, False, True), 2),
        ("RoPE", [(1, 8), ()], (8, True, 1e4, 1.0, True), Rope(8, True, 1e4, 1.0, False), 2),
        ("RoPE", [(1, 8), (), (4,)], (8, True, 1.0, 1.0, True), Rope(8, True, None, 1.0, True), 3),
        (
            "ScaledDotProductAttention",
            [(1,), (1,), (1,), (1,)],
            (0.5, False, True, False, False),
            Attention(0.5, False, False, True),
            4,
        ),
        ("Add", [(1,), (1,)], (), (), 2),
    ],
)
def test_primitives_of_a_gpu_get_the_same_form(
    op: str, shapes: list[Any], state: tuple[Any, ...], expected: tuple[Any, ...], left: int
) -> None:
    inputs, arguments = own_form(op, tuple(shapes), state, len)
    assert arguments == expected
    assert type(arguments) is type(expected)
    assert inputs == tuple(shape for shape in shapes if shape or left == len(shapes))[:left]
