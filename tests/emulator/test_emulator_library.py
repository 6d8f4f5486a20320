"""Kernels that are not ours: functions of the headers that mlx ships give MLX's results."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from zmlx.backend.emulator.library import Function

TYPES = {mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat16_t"}
#: one rounding of a result to a type
ROUNDING = {mx.float32: 2e-6, mx.float16: 2**-11, mx.bfloat16: 2**-8}
QUANTIZED = ("steel/gemm/gemm.h", "quantized_utils.h", "quantized.h")


def random(shape, seed, dtype=mx.float32):
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def dequantized(w, scales, biases, group_size, bits):
    """Return the weights in float32, whatever the type of their scales."""
    wide = (scales.astype(mx.float32), biases.astype(mx.float32))
    return mx.dequantize(w, *wide, group_size=group_size, bits=bits)


def assert_rounded(value, truth, magnitude, dtype):
    """Hold a value to its truth, within one rounding of it and of float32's sums."""
    error = mx.abs(value.astype(mx.float32) - truth)
    allowed = ROUNDING[dtype] * mx.abs(truth) + 1e-6 * magnitude + 1e-7
    assert mx.all(error <= allowed).item(), float(mx.max(error / allowed).item())


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("rows", "columns", "group_size"),
    [(8, 512, 64), (72, 1536, 32), (256, 512, 64), (136, 1024, 128), (512, 1024, 64)],
)
def test_affine_qmv_fast(dtype, bits, rows, columns, group_size):
    w, scales, biases = mx.quantize(
        random((rows, columns), 1, dtype), group_size=group_size, bits=bits
    )
    x = random((2, columns), 2, dtype)
    function = Function(QUANTIZED, f"affine_qmv_fast<{TYPES[dtype]}, {group_size}, {bits}, false>")
    [y] = function(
        {0: w, 1: scales, 2: biases, 3: x, 5: columns, 6: rows},
        {4: ((2, rows), dtype)},
        grid=(2 * 32, rows // 8 * 2, 1),
        threadgroup=(32, 2, 1),
    )
    dense = dequantized(w, scales, biases, group_size, bits)
    x = x.astype(mx.float32)
    assert_rounded(y, x @ dense.T, mx.abs(x) @ mx.abs(dense).T, dtype)


@pytest.mark.parametrize("bits", [2, 3, 6])
def test_affine_qmv_fast_of_other_widths(bits):
    w, scales, biases = mx.quantize(random((16, 1024), 1), group_size=64, bits=bits)
    x = random((1, 1024), 2)
    [y] = Function(QUANTIZED, f"affine_qmv_fast<float, 64, {bits}, false>")(
        {0: w, 1: scales, 2: biases, 3: x, 5: 1024, 6: 16},
        {4: ((1, 16), mx.float32)},
        grid=(32, 4, 1),
        threadgroup=(32, 2, 1),
    )
    dense = dequantized(w, scales, biases, 64, bits)
    assert_rounded(y, x @ dense.T, mx.abs(x) @ mx.abs(dense).T, mx.float32)


def batch_arguments(first, *arrays):
    """Return number -> shapes and strides as MLX sets them for batched kernels."""
    x, w, *_ = arrays
    strides = [np.array(a.shape)[::-1].cumprod()[::-1] // np.array(a.shape) for a in arrays]
    return dict(
        enumerate(
            (
                x.ndim - 2, x.shape, strides[0].tolist(),
                w.ndim - 2, w.shape, strides[1].tolist(), strides[2].tolist(), strides[3].tolist(),
            ),
            first,
        )
    )  # fmt: skip


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_affine_gather_qmv_fast(dtype, bits):
    experts, rows, columns = 5, 16, 512
    w, scales, biases = mx.quantize(random((experts, rows, columns), 3, dtype), bits=bits)
    x = random((3, 1, columns), 4, dtype)
    left = mx.array([0, 1, 2, 0], dtype=mx.uint32)
    right = mx.array([4, 0, 3, 1], dtype=mx.uint32)
    [y] = Function(QUANTIZED, f"affine_gather_qmv_fast<{TYPES[dtype]}, 64, {bits}>")(
        {
            0: w, 1: scales, 2: biases, 3: x, 4: left, 5: right, 7: columns, 8: rows,
            **batch_arguments(9, x, w, scales, biases), 17: 1, 18: [4], 19: [1], 20: [1],
        },
        {6: ((4, 1, rows), dtype)},
        grid=(32, rows // 8 * 2, 4),
        threadgroup=(32, 2, 1),
    )  # fmt: skip
    dense = dequantized(w, scales, biases, 64, bits)[right].swapaxes(-1, -2)
    x = x.astype(mx.float32)[left]
    assert_rounded(y, x @ dense, mx.abs(x) @ mx.abs(dense), dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("size", [1, 37, 1000])
def test_softmax_of_a_row_in_one_go(dtype, size):
    x = 4 * random((3, size), 5)
    threads = (size + 127) // 128 * 32
    [y] = Function("softmax.h", f"softmax_single_row<{TYPES[dtype]}, float>")(
        {0: x.astype(dtype), 2: size},
        {1: (x.shape, dtype)},
        grid=(3 * threads, 1, 1),
        threadgroup=(threads, 1, 1),
    )
    truth = mx.softmax(x.astype(dtype).astype(mx.float32), axis=-1)
    assert_rounded(y, truth, truth, dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_softmax_of_a_long_row(dtype):
    x = (4 * random((2, 4999), 6)).astype(dtype)
    [y] = Function("softmax.h", f"softmax_looped<{TYPES[dtype]}, float>")(
        {0: x, 2: 4999}, {1: (x.shape, dtype)}, grid=(2 * 1024, 1, 1), threadgroup=(1024, 1, 1)
    )
    truth = mx.softmax(x.astype(mx.float32), axis=-1)
    assert_rounded(y, truth, 4 * truth, dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float", "sinks"])
def test_sdpa_vector(dtype, mask):
    """Two batches of four heads of queries, two of keys (GQA), three queries, 45 keys."""
    q, k, v = (random((2, h, n, 64), 7 + n, dtype) for h, n in ((4, 3), (2, 45), (2, 45)))
    v = v * 0.5
    allowed = random((2, 4, 3, 45), 9) > -1
    masks = {
        "bool": allowed,
        "float": mx.where(allowed, random((2, 4, 3, 45), 8), -2).astype(dtype),
    }
    sinks = random((4,), 10, dtype)
    given = masks.get(mask)
    flags = {20: given is not None, 21: False, 22: mask == "causal", 23: mask == "bool"}
    flags |= {24: mask == "float", 25: mask == "sinks"}
    extra = {}
    if given is not None:
        extra = {12 if mask == "float" else 11: given, 13: 1, 14: 45, 15: 135}
    if mask == "sinks":
        extra = {16: sinks, 17: 4}
    scale = 0.125
    [y] = Function("sdpa_vector.h", f"sdpa_vector<{TYPES[dtype]}, 64, 64>", constants=flags)(
        {0: q, 1: k, 2: v, 4: 2, 5: 45, 6: 45 * 64, 7: 64, 8: 45 * 64, 9: 64, 10: scale, **extra},
        {3: (q.shape, dtype)},
        grid=(8 * 1024, 3, 1),
        threadgroup=(1024, 1, 1),
    )
    truth = mx.fast.scaled_dot_product_attention(
        *(a.astype(mx.float32) for a in (q, k, v)), scale=scale,
        mask=given if mask == "bool" else given.astype(mx.float32) if mask == "float"
        else "causal" if mask == "causal" else None,
        sinks=sinks.astype(mx.float32) if mask == "sinks" else None,
    )  # fmt: skip
    assert_rounded(y, truth, mx.ones_like(truth), dtype)


def test_what_cannot_be_launched():
    with pytest.raises(ValueError, match=r"softmax.h has no kernel named 'lost'"):
        Function("softmax.h", "lost<float>")
    function = Function("softmax.h", "softmax_single_row<float, float>")
    x = mx.zeros((1, 4))
    one = {"grid": (32, 1, 1), "threadgroup": (32, 1, 1)}
    with pytest.raises(ValueError, match="has no buffer 7"):
        function({0: x, 7: 4}, {1: (x.shape, x.dtype)}, **one)
    with pytest.raises(RuntimeError, match="no array"):  # axis_size is not given
        mx.eval(function({0: x}, {1: (x.shape, x.dtype)}, **one))


def test_a_kernel_of_mlx_that_reads_too_far_is_found():
    x = mx.zeros((1, 4))
    function = Function("softmax.h", "softmax_single_row<float, float>")
    with pytest.raises(RuntimeError, match=r"softmax.h \(header\):\d+.* of input 'in'"):
        mx.eval(
            function({0: x, 2: 8}, {1: ((1, 8), x.dtype)}, grid=(32, 1, 1), threadgroup=(32, 1, 1))
        )
