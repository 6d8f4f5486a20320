"""A traced step, run from its graph, gives the very bits of the stock forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import QuantizedKVCache, RotatingKVCache, make_prompt_cache
from zoo.build import FORMS, made
from zoo.configs import FAILURES, runnable

from zmlx.graph import operations
from zmlx.graph.nodes import Graph, Node, Value
from zmlx.graph.operations import UnknownOperation, run
from zmlx.graph.step import Step
from zmlx.graph.trace import TraceError, trace

PROMPT = mx.array([[11, 95, 3, 152, 27]])
TOKEN = mx.array([[64]])

#: Types whose step cannot be traced, and the reason that `TraceError` gives.
UNTRACED = {
    # Lists the chosen experts in Python.
    "dbrx": r"reads what an array holds",
}


def same(a: mx.array, b: mx.array) -> bool:
    floats = mx.issubdtype(a.dtype, mx.floating)
    equal = mx.array_equal(a, b, equal_nan=floats) if a.shape == b.shape else mx.array(False)
    return a.dtype == b.dtype and bool(equal)


def assert_same(found: list[mx.array], expected: list[mx.array]) -> None:
    assert len(found) == len(expected)
    assert [same(a, b) for a, b in zip(found, expected, strict=True)] == [True] * len(expected)


def prefilled(name: str, form: str, cache: Callable[[int], Any] | None = None) -> Step:
    model = made(name, form)
    caches = [cache(i) for i in range(len(model.layers))] if cache else make_prompt_cache(model)
    mx.eval(model(PROMPT, cache=caches))
    return Step(model, caches)


def fails(name: str, form: str) -> bool:
    """Return whether the stock model raises for a lone sequence."""
    return any(
        "alone" in failure.runs and failure.dtype in str(FORMS[form][0])
        for failure in FAILURES.get(name, ())
    )


@pytest.mark.parametrize("form", ["float32", "bfloat16-4bit"])
@pytest.mark.parametrize("name", runnable())
def test_a_step_of_every_type_runs_bit_for_bit(name: str, form: str) -> None:
    if fails(name, form):
        with pytest.raises(Exception, match=r"No Metal|inplace addition|only supports float32"):
            prefilled(name, form)
        return
    step = prefilled(name, form)
    arrays = step.arrays
    if name in UNTRACED:
        with pytest.raises(TraceError, match=UNTRACED[name]):
            trace(step, TOKEN, *arrays)
        return
    graph = trace(step, TOKEN, *arrays)
    assert_same(run(graph, [TOKEN, *arrays]), step(TOKEN, *arrays))


@pytest.mark.parametrize("form", ["float32", "bfloat16-4bit"])
@pytest.mark.parametrize(
    "cache", [lambda _: QuantizedKVCache(32, 8), lambda _: RotatingKVCache(4, 1)]
)
def test_other_caches(cache: Callable[[int], Any], form: str) -> None:
    step = prefilled("qwen3", form, cache)
    graph = trace(step, TOKEN, *step.arrays)
    assert_same(run(graph, [TOKEN, *step.arrays]), step(TOKEN, *step.arrays))


def test_a_step_changes_neither_its_cache_nor_what_it_is_given() -> None:
    step = prefilled("llama", "float32")
    before = [array * 1 for array in step.arrays]
    mx.eval(before)
    first = step(TOKEN, *step.arrays)
    assert [cache.offset for cache in step.cache] == [5] * len(step.cache)
    assert_same(step.arrays, before)
    assert_same(step(TOKEN, *step.arrays), first)


def test_a_step_takes_as_many_arrays_as_its_cache_holds() -> None:
    step = prefilled("llama", "float32")
    with pytest.raises(ValueError, match=f"the cache holds {len(step.arrays)} arrays; got 1"):
        step(TOKEN, step.arrays[0])


def test_a_graph_runs_inside_compile() -> None:
    step = prefilled("qwen3_moe", "float32-4bit")
    graph = trace(step, TOKEN, *step.arrays)
    replayed = mx.compile(lambda *arrays: run(graph, arrays))
    assert_same(replayed(TOKEN, *step.arrays), step(TOKEN, *step.arrays))


def floats(*shape: int, seed: int = 3) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


F = floats(4, 6)
P = mx.abs(F) / 8 + 0.1
I = mx.array([[5, -3, 7], [0, 2, -9]])  # noqa: E741
B = F > 0
Q = mx.quantize(floats(64, 64), group_size=32, bits=4)
EXPERTS = mx.quantize(floats(3, 64, 64), group_size=32, bits=4)
ROWS = mx.array([2, 0, 2])
SORTED = mx.array([0, 1, 1, 2])
LEFT = mx.array([0, 0, 2])
KERNEL, DEPTHWISE, MATRICES = floats(5, 3, 6), floats(6, 3, 1), floats(3, 6, 5)
FP4 = mx.quantize(floats(3, 64, 64), mode="mxfp4")
WEIGHT = floats(6)
KEY = mx.random.key(1)
mx.eval(F, P, B, Q, EXPERTS, KERNEL, DEPTHWISE, MATRICES, FP4, WEIGHT, KEY)


def put(x: mx.array, where: Any, value: Any) -> mx.array:
    x = x * 1
    x[where] = value
    return x


#: Functions that between them have every operation with a way from Python, also with odd arguments.
FUNCTIONS: list[tuple[Callable[..., Any], tuple[mx.array, ...]]] = [
    *(
        (function, (P,))
        for function in (
            mx.abs,
            mx.arccos,
            mx.arcsin,
            mx.arcsinh,
            mx.arctan,
            mx.arctanh,
            mx.ceil,
            mx.cos,
            mx.cosh,
            mx.erf,
            mx.erfinv,
            mx.exp,
            mx.expm1,
            mx.floor,
            mx.log,
            mx.log2,
            mx.log10,
            mx.log1p,
            mx.logical_not,
            mx.negative,
            mx.round,
            mx.sigmoid,
            mx.sign,
            mx.sin,
            mx.sinh,
            mx.square,
            mx.tan,
            mx.tanh,
            mx.sqrt,
            mx.rsqrt,
            mx.softmax,
            mx.sort,
            mx.argsort,
        )
    ),
    (lambda x: mx.arccosh(x + 1), (P,)),
    *(
        (function, (F, P))
        for function in (
            mx.add,
            mx.arctan2,
            mx.divide,
            mx.divmod,
            mx.equal,
            mx.floor_divide,
            mx.greater,
            mx.greater_equal,
            mx.less,
            mx.less_equal,
            mx.logaddexp,
            mx.logical_and,
            mx.logical_or,
            mx.maximum,
            mx.minimum,
            mx.multiply,
            mx.not_equal,
            mx.remainder,
            mx.subtract,
        )
    ),
    (mx.power, (P, F)),
    (lambda x: mx.array_equal(put(x, 0, mx.nan), put(x, 0, mx.nan), equal_nan=True), (F,)),
    (lambda a: [a & 3, a | 8, a ^ 5, a << 2, a >> 1, mx.bitwise_invert(a)], (I,)),
    (lambda x: [mx.real(x), mx.imag(x), mx.conjugate(x)], (mx.array([1 + 2j, 3 - 1j]),)),
    (lambda b, x: mx.where(b, x, 2), (B, F)),
    (lambda x, p: mx.addmm(x[:, :4], x, p.T, 0.5, 2.0), (F, P)),
    (lambda x: x @ x.T, (F,)),
    (lambda x: mx.block_masked_mm(x, x, 32, mx.array([[True, False]] * 2)), (floats(64, 64),)),
    (lambda x: x + mx.arange(1, 13, 2, dtype=mx.float32), (F,)),
    (lambda x: [mx.arange(3) + x.size, mx.argpartition(x, 2, axis=0)], (F,)),
    (lambda x: mx.partition(x, 2, axis=1), (F,)),
    (lambda x: [mx.argmax(x, 1), mx.argmin(x, 0, keepdims=True), mx.argmax(x)], (F,)),
    (lambda x: mx.as_strided(x, (3, 2), (1, 6), 4), (F,)),
    (lambda x: [x.astype(mx.bfloat16), x.astype(mx.int8), x.view(mx.int32)], (F,)),
    (lambda x: [mx.concatenate([x, x], 1), mx.stack([x, x]), mx.expand_dims(x, (0, 2))], (F,)),
    (lambda x: [mx.contiguous(x.T), mx.contiguous(x.T, allow_col_major=True)], (F,)),
    (lambda x: mx.conv1d(x[None], DEPTHWISE, 1, 1, 1, 6), (F,)),
    (lambda x: mx.conv_general(x[None], KERNEL, 2, ([1], [2]), 2, 1, 1, True), (F,)),
    (lambda x: mx.conv_transpose1d(x[None], KERNEL, 2), (F,)),
    (lambda x: mx.depends([x, x + 1], [x * 2]), (F,)),
    (lambda x: [mx.flatten(x), mx.unflatten(x, 1, (2, 3)), mx.reshape(x, (3, -1))], (F,)),
    (lambda x: mx.full((2, 6), x[0], mx.float16), (F,)),
    (lambda x: [mx.zeros_like(x), mx.stop_gradient(x), mx.squeeze(x[None], 0), x.T], (F,)),
    (lambda x: mx.pad(x, ((1, 0), (0, 2)), constant_values=3), (F,)),
    (lambda x: mx.hadamard_transform(x, 0.25), (floats(3, 8),)),
    (lambda x: [mx.sum(x), mx.prod(x, 0), mx.min(x, 1), mx.max(x, (0, 1), keepdims=True)], (F,)),
    (lambda b: [mx.all(b, 0), mx.any(b, 1), mx.sum(b, 1)], (B,)),
    (lambda x: [mx.logsumexp(x, 1), mx.logsumexp(x), mx.mean(x, 0)], (F,)),
    (lambda x: mx.softmax(x.astype(mx.bfloat16), axis=-1, precise=True), (F,)),
    (lambda x: mx.cumsum(x, 1, reverse=True, inclusive=False), (F,)),
    (lambda x: [mx.cumprod(x, 0), mx.cummin(x, 1), mx.cummax(x, 1)], (F,)),
    (lambda x: [*mx.split(x, 3, axis=1), *mx.split(x, [1, 3])], (F,)),
    (lambda x: [x[1:3, ::2], x[::-1], x[2:0:-1, 5::-2], x[..., 0], x[-1:]], (F,)),
    (lambda x: [put(x, slice(1, 3), 0), put(x, (slice(None), slice(5, 0, -2)), 1)], (F,)),
    (lambda x: x.at[1:3].add(x[:2]), (F,)),
    (lambda x: [x.at[1:3].multiply(2), x.at[1:3].maximum(0), x.at[1:3].minimum(0)], (F,)),
    (lambda x, i: mx.slice(x, i, (0, 1), (2, 3)), (F, mx.array([1, 2]))),
    (lambda x, i: mx.slice_update(x, x[:2, :3] * 2, i, (0, 1)), (F, mx.array([1, 2]))),
    (lambda x, i: [x[i], mx.take(x, i, axis=1), mx.take(x, i), x[:, i]], (F, ROWS)),
    (lambda x, i: [x[i, i + 1], x[None][:, i, i], x.reshape(2, 2, 6)[:, :, i]], (F, ROWS)),
    (lambda x, i: mx.take_along_axis(x, mx.argsort(x, 1)[:, :2], 1) + i[0], (F, ROWS)),
    (lambda x: mx.put_along_axis(x, mx.argsort(x, 1)[:, :2], mx.array(7.0), 1), (F,)),
    (
        lambda x, i: [put(x, i, 5), put(x, (i, i), 1), x.at[i].add(x[:3]), x.at[:, i].add(1)],
        (F, ROWS),
    ),
    (lambda x, i: [x.at[i].multiply(2), x.at[i].maximum(0), x.at[i].minimum(0)], (F, ROWS)),
    (lambda x: mx.quantized_matmul(x, *Q, group_size=32, bits=4), (floats(2, 64),)),
    (lambda x: mx.quantized_matmul(x, *Q, False, 32, 4), (floats(2, 64),)),
    (lambda x: mx.gather_qmm(x, *EXPERTS, None, ROWS, True, 32, 4), (floats(3, 1, 64),)),
    (
        lambda x: mx.gather_qmm(x, *EXPERTS, None, SORTED, True, 32, 4, sorted_indices=True),
        (floats(4, 1, 64),),
    ),
    (
        lambda x: mx.gather_qmm(x, *FP4, rhs_indices=ROWS, mode="mxfp4"),
        (floats(3, 1, 64),),
    ),
    (lambda x: mx.gather_mm(x, MATRICES, None, SORTED, sorted_indices=True), (floats(4, 1, 6),)),
    (
        lambda x: mx.gather_mm(x, MATRICES, LEFT, None, sorted_indices=True),
        (floats(3, 1, 6),),
    ),
    (lambda x: mx.quantize(x, group_size=32, bits=8), (floats(2, 64),)),
    (lambda x: mx.quantize(x, mode="mxfp4"), (floats(2, 64),)),
    (lambda x: mx.dequantize(x, *Q[1:], group_size=32, bits=4), (Q[0],)),
    (
        lambda x: mx.dequantize(*mx.quantize(x, mode="mxfp8"), mode="mxfp8", dtype=mx.float16),
        (floats(2, 64),),
    ),
    (lambda x: mx.from_fp8(mx.to_fp8(x), mx.float32), (F,)),
    (lambda x: mx.fast.rms_norm(x, WEIGHT, 1e-5), (F,)),
    (lambda x: mx.fast.layer_norm(x, WEIGHT, WEIGHT, 1e-5), (F,)),
    (lambda x: mx.fast.rope(x, 4, traditional=True, base=10.0, scale=1.0, offset=2), (F[None],)),
    (
        lambda x: mx.fast.scaled_dot_product_attention(x, x, x, scale=1.0, mask="causal"),
        (F[None, None],),
    ),
]

#: Operations that are never traced on a CPU with shapes that are known: shapeless compilation makes
#: them, or the trace takes them out.
UNTRACED_OPERATIONS = {"BroadcastAxes", "Copy", "StopGradient"}


def arrays_of(result: Any) -> list[mx.array]:
    return list(result) if isinstance(result, list | tuple) else [result]


@pytest.mark.parametrize("number", range(len(FUNCTIONS)))
def test_a_function_runs_bit_for_bit(number: int) -> None:
    function, arrays = FUNCTIONS[number]
    graph = trace(function, *arrays)
    assert_same(run(graph, arrays), arrays_of(function(*arrays)))


def test_every_operation_is_tested() -> None:
    traced = {node.op for f, arrays in FUNCTIONS for node in trace(f, *arrays).nodes}
    assert set(operations._OPERATIONS) - traced == UNTRACED_OPERATIONS


def test_fused_nodes_are_called_and_must_make_what_they_say() -> None:
    graph = trace(lambda x: mx.sin(x) + 1, F)
    add = graph.nodes[-1]
    sine = graph.producers[add.inputs[0]]
    fused = Node("FusedSine", sine.inputs, sine.outputs, (lambda x: [mx.sin(x) * 3],))
    changed = graph.with_nodes([fused, *(node for node in graph.nodes if node is not sine)])
    assert mx.array_equal(run(changed, [F])[0], mx.sin(F) * 3 + 1)
    wrong = Node("FusedSine", sine.inputs, sine.outputs, (lambda x: x[0],))
    changed = graph.with_nodes([wrong, *(node for node in graph.nodes if node is not sine)])
    with pytest.raises(ValueError, match=r"FusedSine .* made"):
        run(changed, [F])


def test_constants_can_be_replaced() -> None:
    weight = mx.ones((6, 6))
    mx.eval(weight)
    graph = trace(lambda x: x @ weight, F)
    value = next(v for v, array in graph.constants.items() if array.shape == (6, 6))
    assert mx.array_equal(run(graph, [F], {value: 2 * weight})[0], F @ (2 * weight))


def test_an_operation_that_python_has_not_is_named() -> None:
    graph = trace(lambda x: x + mx.random.uniform(shape=x.shape, key=KEY), F)
    with pytest.raises(UnknownOperation, match="RandomBits with arguments") as caught:
        run(graph, [F])
    assert caught.value.op == "RandomBits"
    assert caught.value.arguments == ((4, 6), 4)
    other = Node("NoSuch", graph.inputs, (Value((4, 6), mx.float32),), (1,))
    with pytest.raises(UnknownOperation, match="NoSuch"):
        run(Graph(graph.inputs, other.outputs, {}, (other,)), [F])


def test_arrays_must_fit_the_inputs() -> None:
    graph = trace(lambda x: x + 1, F)
    with pytest.raises(ValueError, match="1 inputs; got 2"):
        run(graph, [F, F])
    with pytest.raises(ValueError, match=r"input 0 is mlx.core.float32 \(3,\); .* \(4, 6\)"):
        run(graph, [mx.ones((3,))])
    with pytest.raises(ValueError, match=r"input 0 is mlx\.core\.int32"):
        run(graph, [I])


def test_inputs_are_left_as_they_are() -> None:
    def function(x: mx.array) -> mx.array:
        x[1] = 5
        return x

    graph, given = trace(function, mx.zeros((4, 6))), mx.zeros((4, 6))
    assert run(graph, [given])[0].sum().item() == 30
    assert given.sum().item() == 0
