"""Weights of small floats and of plain floats: values, contract, odd sizes, refusals."""

from __future__ import annotations

import exact
import mlx.core as mx
import numpy as np
import pytest

#: mode -> group size, bits
MODES = {"mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}


def packed(shape, mode, seed=0):
    """Return a weight of small floats, how it is stored, and its values."""
    group_size, bits = MODES[mode]
    form = {"group_size": group_size, "bits": bits, "mode": mode}
    *rows, inputs = shape
    # mx.quantize takes whole 32 inputs only.
    dense = mx.random.normal((*rows, (inputs + 31) // 32 * 32), key=mx.random.key(seed))
    w, scales = mx.quantize(dense, **form)
    values = exact.wide(mx.dequantize(w, scales, **form, dtype=mx.float32))[..., :inputs]
    w, scales = w[..., : inputs * bits // 32], scales[..., : inputs // group_size]
    return mx.contiguous(w), mx.contiguous(scales), form, values


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", exact.FLOATS)
def test_small_floats_are_tighter(kernels, mode, dtype):
    for groups in (1, 3, 5, 16, 18, 33):
        inputs = groups * MODES[mode][0]
        w, scales, form, values = packed((37, inputs), mode)
        for rows in (1, 2, 5, 11, 31):
            x = exact.normal(rows, inputs, dtype=dtype, seed=rows)
            ours = kernels.quantized_matmul(x, w, scales, **form)
            stock = mx.quantized_matmul(x, w, scales, transpose=True, **form)
            assert (ours.shape, ours.dtype) == (stock.shape, stock.dtype)
            where = (groups, rows, kernels.kernels())
            assert exact.tighter(ours, stock, exact.wide(x) @ values.T), where


@pytest.mark.parametrize("mode", MODES)
def test_every_value_and_every_scale(kernels, mode):
    """One row for each scale, one group for each value."""
    group_size, bits = MODES[mode]
    form = {"group_size": group_size, "bits": bits, "mode": mode}
    codes = 1 << bits
    values = np.arange(codes, dtype=np.uint8)
    if bits == 8:
        values[[0x7F, 0xFF]] = 0  # not a number
    each = np.repeat(values, group_size // (8 // bits))
    row = each if bits == 8 else each | each << 4
    scales = np.arange(1, 0x7F) if mode == "nvfp4" else np.arange(110, 132)
    w = mx.array(np.tile(row.view(np.uint32), (len(scales), 1)))
    s = mx.array(np.repeat(scales.astype(np.uint8)[:, None], codes, axis=1))
    truth = exact.wide(mx.dequantize(w, s, **form, dtype=mx.float32))[:, ::group_size]
    for dtype in exact.FLOATS:
        x = mx.repeat(mx.eye(codes), group_size, axis=1)
        x = (x * (mx.arange(codes * group_size) % group_size == 3)).astype(dtype)
        for rows in (1, codes):
            x32 = kernels.quantized_matmul(x[:rows].astype(mx.float32), w, s, **form)
            assert np.array_equal(exact.wide(x32), truth.T[:rows])
            y = exact.wide(kernels.quantized_matmul(x[:rows], w, s, **form))
            allowed = exact.rounding(dtype) * np.abs(truth.T) + 1e-6 * np.abs(truth.T).max(axis=0)
            least = 2.0**-24 if dtype == mx.float16 else 0.0  # of halves, subnormal
            assert (np.abs(y - truth.T[:rows]) <= allowed[:rows] + least).all()


@pytest.mark.parametrize("mode", MODES)
def test_experts_of_small_floats(kernels, mode):
    gate, gate_scales, form, gate_values = packed((5, 19, 96), mode, seed=1)
    up, up_scales, _, up_values = packed((5, 19, 96), mode, seed=2)
    down, down_scales, _, down_values = packed((5, 96, 32), mode, seed=3)
    x = exact.normal(4, 96)
    indices = mx.array([[0, 4], [3, 1], [2, 2], [4, 0]], dtype=mx.uint32)
    chosen = np.array(indices)
    both = {f"{side}_{key}": value for side in ("gate", "up") for key, value in form.items()}
    ours = kernels.gather_quantized_glu(
        x, indices, gate, gate_scales, None, up, up_scales, None, activation="silu", **both
    )
    g, u = (np.einsum("tk,tjnk->tjn", exact.wide(x), v[chosen]) for v in (gate_values, up_values))
    assert exact.error(ours, g / (1 + np.exp(-g)) * u) < 1e-6
    h, shares = exact.normal(4, 2, 32), exact.normal(4, 2, seed=4)
    ours = kernels.gather_quantized_combine(h, indices, shares, down, down_scales, None, **form)
    y = np.einsum("tjk,tjnk->tjn", exact.wide(h), down_values[chosen])
    assert exact.error(ours, (y * exact.wide(shares)[..., None]).sum(axis=1)) < 1e-6
    ours = kernels.gather_quantized_matmul(
        h[:, :, None, :], down, down_scales, None, indices, **form
    )
    assert exact.error(ours, y[:, :, None, :]) < 1e-6


@pytest.mark.parametrize("dtype", exact.FLOATS)
@pytest.mark.parametrize("x_dtype", exact.FLOATS)
def test_plain_floats_are_tighter(kernels, dtype, x_dtype):
    for inputs in (1, 7, 16, 33, 64, 100, 577):
        w = exact.normal(37, inputs, dtype=dtype, seed=1)
        bias = exact.normal(37, dtype=dtype, seed=2)
        for rows in (1, 3, 9, 15, 20):
            x = exact.normal(rows, inputs, dtype=x_dtype, seed=rows)
            ours = kernels.quantized_matmul(x, w, bias=bias, group_size=0, bits=0, mode="dense")
            stock = mx.addmm(bias, x, w.T)
            assert (ours.shape, ours.dtype) == (stock.shape, stock.dtype)
            truth = exact.wide(x) @ exact.wide(w).T + exact.wide(bias)
            assert exact.tighter(ours, stock, truth), (inputs, rows, kernels.kernels())


@pytest.mark.parametrize("dtype", exact.FLOATS)
def test_experts_and_gates_of_plain_floats(kernels, dtype):
    form = {"group_size": 0, "bits": 0, "mode": "dense"}
    both = {f"{side}_{key}": value for side in ("gate", "up") for key, value in form.items()}
    w = exact.normal(5, 19, 45, dtype=dtype, seed=1)
    x = exact.normal(4, 45, dtype=dtype)
    indices = mx.array([[0, 4], [3, 1], [2, 2], [4, 0]], dtype=mx.uint32)
    each = np.einsum("tk,tjnk->tjn", exact.wide(x), exact.wide(w)[np.array(indices)])
    ours = kernels.gather_quantized_matmul(x[:, None, None, :], w, None, None, indices, **form)
    floor = exact.rounding(dtype) + 4e-7
    assert exact.error(ours, each[:, :, None, :]) < floor
    gated = each / (1 + np.exp(-each)) * each
    ours = kernels.gather_quantized_glu(
        x, indices, w, None, None, w, None, None, activation="silu", **both
    )
    assert exact.error(ours, gated) < 2 * floor
    ours = kernels.quantized_glu(x, w[0], None, None, w[0], None, None, activation="silu", **both)
    product = exact.wide(x) @ exact.wide(w[0]).T
    assert exact.error(ours, product / (1 + np.exp(-product)) * product) < 2 * floor


@pytest.mark.parametrize("dtype", exact.FLOATS)
@pytest.mark.parametrize("rows", [1, 3, 31])
@pytest.mark.parametrize("times", [30.0, 1000.0])
def test_one_value_far_above_the_others(kernels, dtype, rows, times):
    """Massive activations: a group's largest value must not cost the others their bits."""
    for bits in exact.BITS:
        options = {"group_size": 64, "bits": bits}
        weight = exact.quantized((96, 512), **options, dtype=dtype)
        x = exact.normal(rows, 512, dtype=dtype)
        x[:, 100] *= times
        ours = kernels.quantized_matmul(x, *weight, **options)
        stock = mx.quantized_matmul(x, *weight, transpose=True, **options)
        truth = exact.wide(x) @ exact.weights(*weight, **options).T
        assert exact.tighter(ours, stock, truth), (bits, kernels.kernels())


def test_gradients_of_plain_and_small_floats(library):
    x = exact.normal(3, 64)
    w = exact.normal(24, 64, seed=1)
    form = {"group_size": 0, "bits": 0, "mode": "dense"}

    def ours(x, w):
        return (library.quantized_matmul(x, w, **form) ** 2).sum()

    def stock(x, w):
        return ((x @ w.T) ** 2).sum()

    for argument in (0, 1):
        grads = [mx.grad(f, argument)(x, w) for f in (ours, stock)]
        assert mx.allclose(*grads, rtol=1e-4, atol=1e-4)
    mapped = mx.vmap(lambda row: library.quantized_matmul(row, w, **form))(x[:, None])
    assert mx.allclose(mapped, (x @ w.T)[:, None], rtol=1e-4, atol=1e-4)
    for mode in MODES:
        q, scales, form, values = packed((24, 64), mode)
        grads = [
            mx.grad(lambda x: (library.quantized_matmul(x, q, scales, **form) ** 2).sum())(x),  # noqa: B023
            mx.grad(lambda x: ((x @ mx.array(values.astype(np.float32)).T) ** 2).sum())(x),  # noqa: B023
        ]
        assert mx.allclose(*grads, rtol=1e-4, atol=1e-4)
        mapped = mx.vmap(lambda row: library.quantized_matmul(row, q, scales, **form))(x[:, None])  # noqa: B023
        assert mx.allclose(mapped[:, 0], exact.single(exact.wide(x) @ values.T), atol=1e-4)


def test_what_a_mode_has_not_is_refused(library):
    w, scales, biases = exact.quantized((8, 64), group_size=64, bits=4)
    x = exact.normal(1, 64)
    with pytest.raises(ValueError, match="expected affine, mxfp4, nvfp4, mxfp8 or dense"):
        library.quantized_matmul(x, w, scales, biases, group_size=64, bits=4, mode="int4")
    for given, mode in (
        ((w, scales), "affine"),
        ((w, scales, biases), "mxfp4"),
        ((w,), "mxfp8"),
        ((x, scales), "dense"),
    ):
        with pytest.raises(ValueError, match=f"weights of mode '{mode}': affine ones have scales"):
            library.quantized_matmul(x, *given, group_size=64, bits=4, mode=mode)
    # Sizes that do not fit are the stock operation's to word.
    with pytest.raises(ValueError, match=r"\[matmul\]"):
        library.quantized_matmul(x, x[:, :60], group_size=0, bits=0, mode="dense")
