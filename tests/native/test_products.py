"""The native operations: contract, shapes, dtypes, gradients, threads.

Contract `tighter`: against the product in float64 the error is no larger than that of the stock
operation, or at the level of float32 rounding and of storing the result.
"""

from __future__ import annotations

import os
import threading

import exact
import mlx.core as mx
import numpy as np
import pytest


@pytest.mark.parametrize("bits", exact.BITS)
@pytest.mark.parametrize("group_size", exact.GROUPS)
@pytest.mark.parametrize("dtype", exact.FLOATS)
def test_matmul_is_tighter(kernels, bits, group_size, dtype):
    options = {"group_size": group_size, "bits": bits}
    inputs = 5 * group_size
    weight = exact.quantized((37, inputs), **options, dtype=dtype)
    w64 = exact.weights(*weight, **options)
    for rows in (1, 2, 3, 5, 11, 17, 31):
        x = exact.normal(rows, inputs, dtype=dtype, seed=rows)
        ours = kernels.quantized_matmul(x, *weight, **options)
        stock = mx.quantized_matmul(x, *weight, transpose=True, **options)
        assert (ours.shape, ours.dtype) == (stock.shape, stock.dtype)
        assert exact.tighter(ours, stock, exact.wide(x) @ w64.T), (rows, kernels.kernels())


@pytest.mark.parametrize("bits", exact.BITS)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("rows", [1, 4, 19])
def test_glu_is_tighter(kernels, bits, activation, rows):
    options = {"group_size": 64, "bits": bits}
    gate, up = (exact.quantized((45, 192), **options, dtype=mx.bfloat16, seed=s) for s in (1, 2))
    x = exact.normal(rows, 192, dtype=mx.bfloat16) * 0.1
    both = {f"{side}_{key}": value for side in ("gate", "up") for key, value in options.items()}
    ours = kernels.quantized_glu(x, *gate, *up, activation=activation, **both)
    g, u = (exact.wide(x) @ exact.weights(*w, **options).T for w in (gate, up))
    truth = exact_activation(activation, g) * u
    sg, su = (mx.quantized_matmul(x, *w, transpose=True, **options) for w in (gate, up))
    stock = stock_activation(activation, sg) * su
    assert (ours.shape, ours.dtype) == (stock.shape, stock.dtype)
    assert exact.tighter(ours, stock, truth)


def exact_activation(name, x):
    if name == "silu":
        return x / (1 + np.exp(-x))
    if name == "gelu":
        erf = np.vectorize(__import__("math").erf)
        return x * (1 + erf(x / np.sqrt(2))) / 2
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def stock_activation(name, x):
    if name == "silu":
        return x * mx.sigmoid(x)
    if name == "gelu":
        return x * (1 + mx.erf(x / 2**0.5)) / 2
    return 0.5 * x * (1 + mx.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def test_glu_with_other_formats_for_gate_and_up_and_with_biases(kernels):
    gate = exact.quantized((33, 128), group_size=32, bits=8, seed=1)
    up = exact.quantized((33, 128), group_size=64, bits=3, seed=2)
    bias = [exact.normal(33, seed=s) for s in (3, 4)]
    x = exact.normal(2, 3, 128)
    options = {"gate_group_size": 32, "gate_bits": 8, "up_group_size": 64, "up_bits": 3}
    for gate_bias, up_bias in ((bias[0], bias[1]), (None, bias[1]), (bias[0], None)):
        ours = kernels.quantized_glu(
            x, *gate, *up, gate_bias, up_bias, activation="silu", **options
        )
        g = exact.wide(x) @ exact.weights(*gate, group_size=32, bits=8).T
        u = exact.wide(x) @ exact.weights(*up, group_size=64, bits=3).T
        g = g if gate_bias is None else g + exact.wide(gate_bias)
        u = u if up_bias is None else u + exact.wide(up_bias)
        assert exact.error(ours, exact_activation("silu", g) * u) < 1e-6


@pytest.mark.parametrize("bits", exact.BITS)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_gathered_products_are_tighter(kernels, bits, tokens):
    options = {"group_size": 32, "bits": bits}
    experts, top_k, inputs, outputs = 5, 2, 96, 37
    weight = exact.quantized((experts, outputs, inputs), **options, dtype=mx.bfloat16, seed=1)
    second = exact.quantized((experts, outputs, inputs), **options, dtype=mx.bfloat16, seed=2)
    w64, s64 = (exact.weights(*w, **options) for w in (weight, second))
    x = exact.normal(tokens, inputs, dtype=mx.bfloat16)
    rng = np.random.default_rng(tokens)
    chosen = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)])
    indices = mx.array(chosen.astype(np.uint32))

    # One row of activations for all chosen experts, as SwitchGLU calls it.
    ours = kernels.gather_quantized_matmul(x[:, None, None, :], *weight, indices, **options)
    stock = mx.gather_qmm(
        x[:, None, None, :], *weight, rhs_indices=indices, transpose=True, **options
    )
    truth = np.einsum("tk,tjnk->tjn", exact.wide(x), w64[chosen])[:, :, None, :]
    assert (ours.shape, ours.dtype) == (stock.shape, stock.dtype)
    assert exact.tighter(ours, stock, truth)

    # A row of its own for each product.
    h = exact.normal(tokens, top_k, 1, inputs, dtype=mx.bfloat16, seed=5)
    ours = kernels.gather_quantized_matmul(h, *weight, indices, **options)
    stock = mx.gather_qmm(h, *weight, rhs_indices=indices, transpose=True, **options)
    each = np.einsum("tjk,tjnk->tjn", exact.wide(h)[:, :, 0], w64[chosen])
    assert exact.tighter(ours, stock, each[:, :, None, :])

    # Gate, up and activation.
    both = {f"{side}_{key}": value for side in ("gate", "up") for key, value in options.items()}
    ours = kernels.gather_quantized_glu(x, indices, *weight, *second, activation="silu", **both)
    up = np.einsum("tk,tjnk->tjn", exact.wide(x), s64[chosen])
    assert ours.shape == (tokens, top_k, outputs)
    assert exact.error(ours, exact_activation("silu", truth[:, :, 0]) * up) < 2.0**-8

    # Down projection and weighted sum.
    shares = exact.normal(tokens, top_k, seed=6)
    ours = kernels.gather_quantized_combine(h[:, :, 0], indices, shares, *weight, **options)
    stock = (stock.squeeze(-2) * shares[..., None]).sum(axis=-2)
    assert (ours.shape, ours.dtype) == (stock.shape, stock.dtype)
    assert exact.tighter(ours, stock, (each * exact.wide(shares)[..., None]).sum(axis=1))


@pytest.mark.parametrize("x_dtype", exact.FLOATS)
@pytest.mark.parametrize("scale_dtype", exact.FLOATS)
@pytest.mark.parametrize("bias_dtype", [None, *exact.FLOATS])
def test_dtypes_are_those_of_the_stock_operation(library, x_dtype, scale_dtype, bias_dtype):
    w, scales, biases = exact.quantized((8, 64), group_size=64, bits=4)
    scales, biases = scales.astype(scale_dtype), biases.astype(scale_dtype)
    x = exact.normal(2, 64, dtype=x_dtype)
    bias = None if bias_dtype is None else exact.normal(8, dtype=bias_dtype)
    ours = library.quantized_matmul(x, w, scales, biases, bias, group_size=64, bits=4)
    stock = mx.quantized_matmul(x, w, scales, biases, transpose=True, group_size=64, bits=4)
    stock = stock if bias is None else stock + bias
    assert ours.dtype == stock.dtype
    truth = exact.wide(x) @ exact.weights(w, scales, biases, group_size=64, bits=4).T
    truth = truth if bias is None else truth + exact.wide(bias)
    assert exact.error(ours, truth) <= exact.rounding(ours.dtype) + 4e-7


def test_inputs_that_are_not_contiguous(library):
    options = {"group_size": 32, "bits": 4}
    weight = exact.quantized((2, 24, 64), **options)
    every_second = [part[:, ::2] for part in weight]
    x = exact.normal(64, 6).T[::2]
    contiguous = [mx.contiguous(part[1]) for part in every_second]
    ours = library.quantized_matmul(x, *(part[1] for part in every_second), **options)
    truth = library.quantized_matmul(mx.contiguous(x), *contiguous, **options)
    assert mx.array_equal(ours, truth)
    broadcast = mx.broadcast_to(x[:1], (3, 64))
    ours = library.quantized_matmul(broadcast, *contiguous, **options)
    assert mx.array_equal(ours, mx.concatenate([truth[:1]] * 3))


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_nan_and_infinity_reach_the_output_and_only_their_row(kernels, rows):
    weight = exact.quantized((40, 256), group_size=64, bits=4)
    for dtype in exact.FLOATS:
        for poison in (float("nan"), float("inf")):
            x = exact.normal(rows, 256, dtype=dtype)
            x[0, 77] = poison
            y = kernels.quantized_matmul(x, *weight, group_size=64, bits=4)
            assert not mx.isfinite(y[0]).any().item()
            assert mx.isfinite(y[1:]).all().item()


def test_every_element_is_written(kernels):
    """Fill the memory that MLX will reuse with NaN, then compute."""
    weight = exact.quantized((101, 96), group_size=32, bits=5)
    truth = exact.wide(exact.normal(13, 96)) @ exact.weights(*weight, group_size=32, bits=5).T
    for _ in range(5):
        poison = mx.full((13, 101), float("nan"))
        mx.eval(poison)
        del poison
        y = kernels.quantized_matmul(exact.normal(13, 96), *weight, group_size=32, bits=5)
        assert exact.error(y, truth) < 1e-6


def test_a_row_does_not_depend_on_threads_or_on_other_rows(kernels):
    weight = exact.quantized((300, 128), group_size=64, bits=4, dtype=mx.bfloat16)
    experts = exact.quantized((4, 300, 128), group_size=64, bits=4, dtype=mx.bfloat16)
    x = exact.normal(9, 128, dtype=mx.bfloat16)
    indices = mx.array([[0, 3], [1, 2], [3, 1]] * 3)
    options = {"group_size": 64, "bits": 4}
    before, results = kernels.num_threads(), []
    for threads in (1, 2, 3, 4):
        kernels.set_num_threads(threads)
        y = kernels.quantized_matmul(x, *weight, **options)
        z = kernels.gather_quantized_matmul(x[:, None, None, :], *experts, indices, **options)
        mx.eval(y, z)
        results.append((y, z))
    kernels.set_num_threads(before)
    for y, z in results[1:]:
        assert mx.array_equal(y, results[0][0])
        assert mx.array_equal(z, results[0][1])
    fewer = [part[:100] for part in weight]
    assert mx.array_equal(kernels.quantized_matmul(x, *fewer, **options), results[0][0][:, :100])
    assert mx.array_equal(kernels.quantized_matmul(x[:1], *weight, **options), results[0][0][:1])


def test_indices_outside_of_the_experts_do_not_read_outside(library):
    experts = exact.quantized((3, 8, 64), group_size=64, bits=4)
    x = exact.normal(1, 1, 1, 64)
    last = library.gather_quantized_matmul(x, *experts, mx.array([[2]]), group_size=64, bits=4)
    for index in (3, 2**31, -1):
        far = mx.array([[index]], dtype=mx.int64)
        y = library.gather_quantized_matmul(x, *experts, far, group_size=64, bits=4)
        assert mx.array_equal(y, last)


def test_what_the_kernels_do_not_take_is_the_stock_operation(library):
    w, scales, biases = exact.quantized((8, 64), group_size=64, bits=4)
    with pytest.raises(ValueError, match="quantized_matmul"):
        library.quantized_matmul(exact.normal(2, 32), w, scales, biases, group_size=64, bits=4)
    options = {"gate_group_size": 64, "gate_bits": 4, "up_group_size": 64, "up_bits": 4}
    weight = (w, scales, biases)
    with pytest.raises(ValueError, match="expected silu, gelu or gelu_tanh"):
        library.quantized_glu(exact.normal(2, 64), *weight, *weight, activation="relu", **options)
    empty = library.quantized_matmul(mx.zeros((0, 64)), w, scales, biases, group_size=64, bits=4)
    assert empty.shape == (0, 8)
    # A broadcast that SwitchGLU does not use.
    experts = exact.quantized((3, 8, 64), group_size=64, bits=4)
    x = exact.normal(2, 5, 64)
    indices = mx.array([0, 2])
    ours = library.gather_quantized_matmul(x, *experts, indices, group_size=64, bits=4)
    stock = mx.gather_qmm(x, *experts, rhs_indices=indices, transpose=True, group_size=64, bits=4)
    assert mx.array_equal(ours, stock)


def test_gradients_are_those_of_the_stock_operations(library):
    options = {"group_size": 32, "bits": 4}
    dense = exact.quantized((24, 64), **options)
    experts = exact.quantized((3, 24, 64), **options)
    both = {f"{side}_{key}": value for side in ("gate", "up") for key, value in options.items()}
    bias = exact.normal(24, seed=3)
    indices = mx.array([[0, 2], [1, 0]])
    shares = mx.array([[0.3, 0.7], [0.6, 0.4]])
    h = exact.normal(2, 2, 64)

    def stock_glu(x):
        gate = mx.quantized_matmul(x, *dense, transpose=True, **options) + bias
        up = mx.quantized_matmul(x, *dense, transpose=True, **options)
        return gate * mx.sigmoid(gate) * up

    def stock_gather(x):
        return mx.gather_qmm(x, *experts, rhs_indices=indices, transpose=True, **options)

    def stock_gather_glu(x):
        y = stock_gather(x[:, None, None, :]).squeeze(-2)
        return y * mx.sigmoid(y) * y

    def combined(h, shares):
        return library.gather_quantized_combine(h, indices, shares, *experts, **options)

    def stock_combined(h, shares):
        return (stock_gather(h[:, :, None, :]).squeeze(-2) * shares[..., None]).sum(axis=-2)

    x = exact.normal(2, 64)
    pairs = [
        (
            lambda x: library.quantized_matmul(x, *dense, bias, **options),
            lambda x: mx.quantized_matmul(x, *dense, transpose=True, **options) + bias,
        ),
        (
            lambda x: library.quantized_glu(x, *dense, *dense, bias, activation="silu", **both),
            stock_glu,
        ),
        (
            lambda x: library.gather_quantized_matmul(
                x[:, None, None, :], *experts, indices, **options
            ),
            lambda x: stock_gather(x[:, None, None, :]),
        ),
        (
            lambda x: library.gather_quantized_glu(
                x, indices, *experts, *experts, activation="silu", **both
            ),
            stock_gather_glu,
        ),
    ]
    for number, (ours, stock) in enumerate(pairs):
        grads = [mx.grad(lambda x, f=f: (f(x) ** 2).sum())(x) for f in (ours, stock)]
        assert mx.allclose(*grads, rtol=1e-4, atol=1e-4)
        if number > 1:  # MLX has no forward mode for gathered products
            continue
        tangents = [mx.jvp(f, [x], [mx.ones_like(x)])[1][0] for f in (ours, stock)]
        assert mx.allclose(*tangents, rtol=1e-4, atol=1e-4)
    for argument in (0, 1):
        grads = [
            mx.grad(lambda *a, f=f: (f(*a) ** 2).sum(), argument)(h, shares)
            for f in (combined, stock_combined)
        ]
        assert mx.allclose(*grads, rtol=1e-4, atol=1e-4)


def test_vmap(library):
    weight = exact.quantized((8, 64), group_size=64, bits=4)
    x = exact.normal(3, 2, 64)

    def ours(row):
        return library.quantized_matmul(row, *weight, group_size=64, bits=4)

    assert mx.allclose(mx.vmap(ours)(x), ours(x), rtol=1e-5, atol=1e-5)


def test_under_compile(library):
    weight = exact.quantized((8, 64), group_size=64, bits=4)

    def ours(x):
        return library.quantized_matmul(x, *weight, group_size=64, bits=4) * 2

    for shapeless in (False, True):
        compiled = mx.compile(ours, shapeless=shapeless)
        for rows in (2, 3):
            x = exact.normal(rows, 64)
            assert mx.allclose(compiled(x), ours(x))


def test_worker_threads_and_streams_at_once(library):
    weight = exact.quantized((256, 256), group_size=64, bits=4)
    truth = exact.wide(exact.normal(4, 256)) @ exact.weights(*weight, group_size=64, bits=4).T
    mx.eval(weight)
    failures = []

    def work():
        try:
            with mx.stream(mx.new_stream(mx.cpu)):
                for _ in range(50):
                    x = exact.normal(4, 256)
                    y = library.quantized_matmul(x, *weight, group_size=64, bits=4)
                    assert exact.error(y, truth) < 1e-6
        except Exception as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_every_set_of_kernels_that_runs_here_is_there(library):
    assert library.available_kernels() == exact.kernel_sets()


def test_thread_count(library):
    before = library.num_threads()
    library.set_num_threads(0)
    assert library.num_threads() == 1
    library.set_num_threads(before)
    assert 1 <= before <= (os.cpu_count() or 1)
    with pytest.raises(ValueError, match="no kernels named 'sse9'"):
        library.set_kernels("sse9")
