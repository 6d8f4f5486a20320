"""Pieces of mlx-lm's models as tiny programs: routers, norms, activations, short convolutions.

MLX's partition on a GPU is a sort, the CPU's is not; so what is expected is computed with sorts.
"""

from __future__ import annotations

from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
from tiny_cases import agree, holds, looked_at, program_of

from zmlx.graph.nodes import Node, Value
from zmlx.graph.tiny import tiny_program as unseen_program

BF16 = mx.bfloat16


def normal(*shape, dtype=BF16, seed=0, scale=1.0):
    array = (scale * mx.random.normal(shape, key=mx.random.key(seed))).astype(dtype)
    mx.eval(array)
    return array


def sigmoid(x):
    """Return a sigmoid of which each step is rounded, as on a GPU."""
    y = 1 / (1 + mx.exp(mx.abs(x)))
    return mx.where(x < 0, y, 1 - y)


def as_on_gpu(function):
    """Return a function whose partitions sort and whose sigmoids round as they do on a GPU."""

    def called(*arrays):
        with (
            mock.patch.object(mx, "sigmoid", sigmoid),
            mock.patch.object(mx, "argpartition", lambda x, kth, axis=-1: mx.argsort(x, axis=axis)),
            mock.patch.object(mx, "topk", lambda x, k, axis=-1: mx.sort(x, axis=axis)[..., -k:]),
        ):
            return function(*arrays)

    return called


def routes(function, *arrays, tolerance=8e-3):
    """Assert that indices are equal and scores within rounding; return the program."""
    program = program_of(function, *arrays)
    wanted = as_on_gpu(function)(*arrays)
    for given, right in zip(program(*arrays), wanted, strict=True):
        agree(given, right, tolerance if mx.issubdtype(right.dtype, mx.floating) else None)
    return program


def softmax_router(k, normalise=True):
    def route(logits):
        gates = mx.softmax(logits, axis=-1, precise=True)
        indices = mx.stop_gradient(mx.argpartition(gates, kth=-k, axis=-1)[..., -k:])
        scores = mx.take_along_axis(gates, indices, axis=-1)
        if normalise:
            scores /= mx.sum(scores, axis=-1, keepdims=True)
        return indices, scores

    return route


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(("experts", "k"), [(128, 8), (60, 4), (512, 10)])
def test_qwen3_moe(tokens, experts, k):
    program = routes(softmax_router(k), normal(1, tokens, experts))
    assert program.launches == 1
    assert program.definition.source.count("threadgroup_barrier") <= 4


def test_qwen3_router_takes_two_barriers():
    program = program_of(softmax_router(8), normal(1, 1, 128))
    assert program.definition.source.count("threadgroup_barrier") == 2


@pytest.mark.parametrize("tokens", [1, 3])
def test_lfm2_moe(tokens):
    bias = normal(32, dtype=mx.float32, seed=3, scale=0.1)

    def route(logits):
        weights = mx.sigmoid(logits)
        chosen = weights.astype(mx.float32) + bias
        indices = mx.stop_gradient(mx.argpartition(chosen, kth=-4, axis=-1)[..., -4:])
        scores = mx.take_along_axis(weights, indices, axis=-1)
        scores = scores / (mx.sum(scores, axis=-1, keepdims=True) + 1e-6)
        return indices, (scores * 1.5).astype(BF16)

    routes(route, normal(1, tokens, 32))


def group_expert_select(gates, bias, top_k, n_group, topk_group, scale):
    scores = original = mx.sigmoid(gates.astype(mx.float32))
    scores = scores + bias
    if n_group > 1:
        scores = mx.unflatten(scores, axis=-1, shape=(n_group, -1))
        group_scores = mx.topk(scores, 2, axis=-1).sum(axis=-1, keepdims=True)
        k = n_group - topk_group
        group = mx.argpartition(group_scores, kth=k - 1, axis=-2)[..., :k, :]
        scores = mx.put_along_axis(scores, mx.stop_gradient(group), mx.array(0.0), axis=-2)
        scores = mx.flatten(scores, -2, -1)
    indices = mx.argpartition(-scores, kth=top_k - 1, axis=-1)[..., :top_k]
    scores = mx.take_along_axis(original, mx.stop_gradient(indices), axis=-1)
    return indices, scores / scores.sum(axis=-1, keepdims=True) * scale


@pytest.mark.parametrize(
    ("experts", "k", "groups", "chosen"), [(256, 8, 8, 4), (64, 4, 1, 1), (48, 3, 4, 2)]
)
@pytest.mark.parametrize("tokens", [1, 2])
def test_grouped_selection(experts, k, groups, chosen, tokens):
    bias = normal(experts, dtype=mx.float32, seed=5, scale=0.1)
    routes(
        lambda gates: group_expert_select(gates, bias, k, groups, chosen, 2.5),
        normal(1, tokens, experts),
        tolerance=1e-5,
    )


def test_gpt_oss():
    bias = normal(32, seed=1)

    def route(logits):
        logits = logits + bias
        indices = mx.stop_gradient(mx.argpartition(logits, kth=-4, axis=-1)[..., -4:])
        return indices, mx.softmax(
            mx.take_along_axis(logits, indices, axis=-1), axis=-1, precise=True
        )

    routes(route, normal(1, 1, 32))


def test_ernie():
    def route(gates):
        gates = mx.softmax(gates.astype(mx.float32), axis=-1)
        indices = mx.stop_gradient(mx.argpartition(-gates, kth=5, axis=-1)[..., :6])
        scores = mx.take_along_axis(gates, indices, axis=-1)
        return indices, scores / mx.maximum(scores.sum(axis=-1, keepdims=True), 1e-12)

    routes(route, normal(1, 2, 64), tolerance=1e-5)


def test_phimoe():
    def route(gates):
        masked, found, scores = gates, [], []
        for _ in range(2):
            top = masked.max(axis=-1, keepdims=True)
            index = mx.stop_gradient(mx.argmax(masked, axis=-1, keepdims=True))
            factor = mx.maximum(mx.abs(gates), top)
            band = mx.where((top - gates) / factor > 0.02, -mx.inf, masked)
            band = mx.softmax(band, axis=-1, precise=True)
            scores.append(mx.take_along_axis(band, index, axis=-1))
            found.append(index)
            masked = mx.put_along_axis(masked, index, mx.array(-mx.inf, masked.dtype), axis=-1)
        return mx.concatenate(found, axis=-1), mx.concatenate(scores, axis=-1)

    routes(route, normal(1, 3, 16))


def tiny_program(*arguments):
    return looked_at(unseen_program(*arguments))


def node(op, inputs, shape, dtype, *arguments):
    made = Value(tuple(shape), dtype)
    return Node(op, tuple(inputs), (made,), arguments), made


def rounded_rmsnorm(x, weight, eps):
    wide = x.astype(mx.float32)
    scale = mx.rsqrt(mx.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype) * weight


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, BF16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 2048), (1, 3, 96), (1, 1, 100), (2, 1, 577)], ids=str)
def test_residual_and_rmsnorm(shape, dtype):
    x, rest, out = Value(shape, dtype), Value(shape, dtype), Value(shape, dtype)
    weight = Value(shape[-1:], dtype)
    add, h = node("Add", (x, rest), shape, dtype)
    norm = Node("RMSNorm", (h, weight), (out,), (1e-5,))
    held = 1 + normal(shape[-1], dtype=dtype, seed=2) / 4
    program = tiny_program([add, norm], [x, rest], [h, out], {weight: held})
    a, b = normal(*shape, dtype=dtype, seed=3), normal(*shape, dtype=dtype, seed=4)
    summed, normed = program(a, b)
    agree(summed, a + b)
    agree(normed, rounded_rmsnorm(a + b, held, 1e-5), 1e-6 if dtype == mx.float32 else 8e-3)


@pytest.mark.parametrize("with_bias", [False, True])
def test_layernorm(with_bias):
    x, out, weight, bias = (Value(s, BF16) for s in ((2, 300), (2, 300), (300,), (300,)))
    norm = Node("LayerNorm", (x, weight, bias)[: 2 + with_bias], (out,), (1e-5,))
    held = {weight: normal(300, seed=1), bias: normal(300, seed=2)}
    array = normal(2, 300) + 3
    wide = mx.fast.layer_norm(array.astype(mx.float32), None, None, 1e-5).astype(BF16)
    right = wide * held[weight] + (held[bias] if with_bias else 0)
    agree(tiny_program([norm], [x], [out], held)(array)[0], right, 1.6e-2)


@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("dims", [64, 32])
@pytest.mark.parametrize("with_freqs", [False, True])
def test_head_norms_and_rope(traditional, dims, with_freqs):
    shape = (2, 4, 3, 64)
    x, offset, weight = Value(shape, mx.float32), Value((2,), mx.int32), Value((64,), mx.float32)
    freqs = Value((dims // 2,), mx.float32)
    norm, normed = node("RMSNorm", (x, weight), shape, mx.float32, 1e-6)
    base = None if with_freqs else 10000.0
    inputs = (normed, offset, freqs) if with_freqs else (normed, offset)
    rope, out = node("RoPE", inputs, shape, mx.float32, dims, traditional, base, 0.5)
    held = {weight: normal(64, dtype=mx.float32, seed=1), freqs: 1 + mx.arange(dims // 2) * 2.5}
    program = tiny_program([norm, rope], [x, offset], [out], held)
    array, offsets = normal(*shape, dtype=mx.float32, seed=2), mx.array([7, 130])
    right = mx.fast.rope(
        mx.fast.rms_norm(array, held[weight], 1e-6),
        dims,
        traditional=traditional,
        base=base,
        scale=0.5,
        offset=offsets,
        freqs=held[freqs] if with_freqs else None,
    )
    agree(program(array, offsets)[0], right, 2e-5)


def test_rope_with_one_offset():
    x, offset = Value((1, 2, 1, 8), BF16), Value((), mx.int32)
    rope, out = node("RoPE", (x, offset), x.shape, BF16, 8, False, 1e4, 1.0)
    array = normal(1, 2, 1, 8)
    right = mx.fast.rope(
        array.astype(mx.float32), 8, traditional=False, base=1e4, scale=1, offset=9
    )
    agree(
        tiny_program([rope], [x, offset], [out], {})(array, mx.array(9))[0],
        right.astype(BF16),
        8e-3,
    )


def test_swiglu():
    def swiglu(gate, up):
        return gate * mx.sigmoid(gate) * up

    gate, up = normal(1, 8, 768, scale=3), normal(1, 8, 768, seed=1)
    holds(swiglu, gate, up, expected=as_on_gpu(swiglu), tolerance=8e-3)


def test_clipped_swiglu_of_gpt_oss():
    def activation(x, gate):
        gate = mx.clip(gate, a_min=None, a_max=7.0)
        x = mx.clip(x, a_min=-7.0, a_max=7.0)
        return gate * mx.sigmoid(1.702 * gate) * (x + 1)

    x, gate = normal(4, 2880 // 8, dtype=mx.float32, scale=5), normal(4, 360, dtype=mx.float32)
    holds(activation, x, gate, tolerance=2e-6)


@pytest.mark.parametrize("tokens", [1, 2])
def test_lfm2_short_convolution(tokens):
    weight = normal(256, 3, 1, seed=1)

    def step(projected, state):
        b, c, x = mx.split(projected, 3, axis=-1)
        bx = mx.concatenate([state, b * x], axis=1)
        return c * mx.conv1d(bx, weight, groups=256), bx[:, -2:, :]

    def wide(projected, state):
        b, c, x = mx.split(projected, 3, axis=-1)
        bx = mx.concatenate([state, b * x], axis=1)
        sums = mx.conv1d(bx.astype(mx.float32), weight.astype(mx.float32), groups=256)
        return c * sums.astype(BF16), bx[:, -2:, :]

    projected, state = normal(1, tokens, 768), normal(1, 2, 256, seed=2)
    program = program_of(step, projected, state)
    given, right = program(projected, state), wide(projected, state)
    agree(given[0], right[0], 8e-3)
    agree(given[1], right[1])


def test_embedding_row_of_a_large_quantized_table():
    table = mx.random.randint(0, 1 << 30, (3000, 16), key=mx.random.key(1)).astype(mx.uint32)
    scales, biases = normal(3000, 2, seed=2), normal(3000, 2, seed=3)

    def row(token, table, scales, biases):
        words = table[token]
        shifts = mx.arange(8, dtype=mx.uint32) * 4
        values = ((words[..., None] >> shifts) & 15).reshape(1, 1, 2, 64).astype(BF16)
        return (values * scales[token][..., None] + biases[token][..., None]).reshape(1, 1, 128)

    holds(row, mx.array([[2999]]), table, scales, biases)


def test_argmax_of_many_equal_scores_is_the_first():
    scores = mx.array(np.tile([1.0, 3.0, 3.0, -np.inf], 50).astype(np.float32)).reshape(1, 200)
    holds(lambda s: mx.argmax(s, axis=-1), scores)
