"""Products whose activations are rounded to 8 bits: how far they err, and where they do not."""

from __future__ import annotations

import exact
import mlx.core as mx
import numpy as np
import pytest

#: Rounding to 8 bits of a group's largest value errs by at most this share of a normal product.
LARGEST_ERROR = 1.2e-2


def rounds(library) -> bool:
    """Return whether these kernels round activations to 8 bits; the others keep them."""
    return library.kernels() == "avx512_vnni"


@pytest.mark.parametrize("bits", exact.BITS)
@pytest.mark.parametrize("group_size", exact.GROUPS)
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_the_error_is_that_of_8_bits(kernels, bits, group_size, dtype):
    options = {"group_size": group_size, "bits": bits}
    inputs = 5 * group_size
    weight = exact.quantized((37, inputs), **options, dtype=dtype)
    w64 = exact.weights(*weight, **options)
    for rows in (1, 3, 4, 6):
        x = exact.normal(rows, inputs, dtype=dtype, seed=rows)
        truth = exact.wide(x) @ w64.T
        short = kernels.quantized_matmul_a8(x, *weight, **options)
        full = kernels.quantized_matmul(x, *weight, **options)
        assert (short.shape, short.dtype) == (full.shape, full.dtype)
        assert exact.error(short, truth) < LARGEST_ERROR, rows
        # It does round: were it as close as 16 bits there would be nothing to gain from it.
        assert mx.array_equal(short, full) == (not rounds(kernels)), rows


def test_float32_results_keep_their_activations(kernels):
    options = {"group_size": 64, "bits": 4}
    weight = exact.quantized((37, 320), **options)
    x = exact.normal(2, 320)
    full = kernels.quantized_matmul(x, *weight, **options)
    assert mx.array_equal(kernels.quantized_matmul_a8(x, *weight, **options), full)


def test_one_large_value_costs_its_own_group_only(kernels):
    options = {"group_size": 32, "bits": 4}
    weight = exact.quantized((16, 96), **options, dtype=mx.bfloat16)
    x = np.array(exact.normal(1, 96))
    x[0, 5] = 1000.0
    w64 = exact.weights(*weight, **options)
    w64[:, :32] = 0  # what is left is the two groups without it
    w, scales, biases = weight
    mask = mx.array([[0.0, 1.0, 1.0]]).astype(scales.dtype)
    given = mx.array(x).astype(mx.bfloat16)
    short = kernels.quantized_matmul_a8(given, w, scales * mask, biases * mask, **options)
    assert exact.error(short, exact.wide(given) @ w64.T) < LARGEST_ERROR


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(kernels, value):
    options = {"group_size": 32, "bits": 4}
    weight = exact.quantized((16, 96), **options, dtype=mx.bfloat16)
    x = np.array(exact.normal(1, 96))
    x[0, 40] = value
    y = kernels.quantized_matmul_a8(mx.array(x).astype(mx.bfloat16), *weight, **options)
    assert not bool(mx.any(mx.isfinite(y)))


def test_zeros_give_zeros(kernels):
    options = {"group_size": 32, "bits": 8}
    weight = exact.quantized((16, 96), **options, dtype=mx.bfloat16)
    y = kernels.quantized_matmul_a8(mx.zeros((2, 96), mx.bfloat16), *weight, **options)
    assert not bool(mx.any(y))


def test_gated_and_gathered_products(kernels):
    options = {"group_size": 64, "bits": 4}
    paired = {f"{side}_{key}": value for side in ("gate", "up") for key, value in options.items()}
    gate, up, down = (
        exact.quantized((5, 45, 192), **options, dtype=mx.bfloat16, seed=seed) for seed in range(3)
    )
    x = exact.normal(3, 192, dtype=mx.bfloat16) * 0.1
    indices = mx.array([[4, 0], [1, 1], [0, 3]], mx.uint32)
    shares = mx.array([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0]]).astype(mx.bfloat16)
    calls = {
        "quantized_glu": lambda f: f(
            x, *(p[0] for p in gate), *(p[0] for p in up), activation="silu", **paired
        ),
        "gather_quantized_glu": lambda f: f(x, indices, *gate, *up, activation="silu", **paired),
        "gather_quantized_matmul": lambda f: f(x[:, None, None, :], *down, indices, **options),
        "gather_quantized_combine": lambda f: f(
            mx.stack([x, x], axis=1), indices, shares, *down, **options
        ),
    }
    for name, call in calls.items():
        full, short = (call(getattr(kernels, f"{name}{suffix}")) for suffix in ("", "_a8"))
        assert exact.error(short, exact.wide(full)) < 2 * LARGEST_ERROR, name
        assert mx.array_equal(short, full) == (not rounds(kernels)), name
