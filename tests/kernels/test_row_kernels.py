"""Row kernels from their sources: many rows, every threadgroup, infinities, batches, threads."""

from __future__ import annotations

import threading

import mlx.core as mx
import pytest

from zmlx.backend import current
from zmlx.kernels import calling
from zmlx.kernels.norms import LAYERNORM_GRAD, RMSNORM_GRAD, layernorm, rmsnorm
from zmlx.kernels.softmax import log_softmax_lastdim, softmax_lastdim
from zmlx.kernels.transformer import geglu2, swiglu2


@pytest.fixture(autouse=True)
def from_source(monkeypatch):
    """On the CPU, run sources in the emulator; on a GPU they run anyway."""
    if current() == "cpu":
        monkeypatch.setenv("ZMLX_BACKEND", "emulator")
    calling.forget()
    yield
    calling.forget()


def normal(*shape, seed=1, dtype=mx.float32):
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def close(found, truth, allowed=2e-6):
    assert (found.shape, found.dtype) == (truth.shape, truth.dtype)
    assert mx.max(mx.abs(found - truth)).item() <= allowed * mx.max(mx.abs(truth)).item()


@pytest.mark.parametrize("rows", [1, 511, 512, 513, 1100])
@pytest.mark.parametrize("spec", [RMSNORM_GRAD, LAYERNORM_GRAD])
def test_gradients_of_weights_sum_over_any_number_of_rows(spec, rows):
    x, weight, cotan = normal(rows, 5), normal(5, seed=2), normal(rows, 5, seed=3)
    found = spec(x, weight, cotan)
    truths = spec.reference(x, weight, cotan)
    for one, truth in zip(found, truths, strict=True):
        close(one, truth, 1e-5)


@pytest.mark.parametrize("threadgroup", [32, 96, 256, 1024])
@pytest.mark.parametrize("length", [1, 31, 97, 1500])
def test_every_threadgroup_gives_the_result(threadgroup, length):
    x, weight = normal(3, length), normal(length, seed=2)
    close(softmax_lastdim(x, threadgroup=threadgroup), mx.softmax(x, axis=-1, precise=True))
    close(rmsnorm(x, weight, threadgroup=threadgroup), mx.fast.rms_norm(x, weight, 1e-6))
    found = layernorm(x, weight, weight, eps=0.1, threadgroup=threadgroup)
    close(found, mx.fast.layer_norm(x, weight, weight, 0.1))


@pytest.mark.parametrize("shape", [(7,), (1, 7), (2, 1, 3, 7), (0, 7), (3, 0), (2, 0, 7)])
def test_any_number_of_axes_and_none_of_elements(shape):
    x, weight = normal(*shape), normal(shape[-1], seed=2)
    for found in (softmax_lastdim(x), log_softmax_lastdim(x), rmsnorm(x, weight), swiglu2(x, x)):
        assert found.shape == shape
    if x.size:
        close(softmax_lastdim(x), mx.softmax(x, axis=-1, precise=True))
    gradient = mx.grad(lambda x, w: rmsnorm(x, w).sum(), argnums=(0, 1))(x, weight)
    assert [g.shape for g in gradient] == [x.shape, weight.shape]
    if not x.size:
        assert not mx.any(gradient[1]).item()


def test_softmax_of_large_and_infinite_elements():
    inf = float("inf")
    x = mx.array([[1e4, 1e4, -inf], [-1e4, -1e4, -1e4], [88.0, -88.0, 0.0]])
    close(softmax_lastdim(x), mx.softmax(x, axis=-1, precise=True))
    assert log_softmax_lastdim(x)[0, 2].item() == -inf
    for row in ([inf, 0.0, 1.0], [float("nan"), 0.0, 1.0], [-inf, -inf, -inf]):
        assert mx.all(mx.isnan(softmax_lastdim(mx.array(row)))).item()


def test_gated_activations_do_not_overflow():
    gate = mx.array([-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4])
    up = mx.full(gate.shape, 2.0)
    for function in (swiglu2, geglu2):
        found = function(gate, up)
        assert mx.allclose(found, 2 * mx.maximum(gate, 0), atol=1e-6).item(), function
        slope = mx.grad(lambda g, function=function: function(g, up).sum())(gate)
        assert mx.allclose(slope, mx.where(gate == 0, 1.0, 2.0 * (gate > 0)), atol=1e-6).item()


def test_half_precision_sums_in_float32():
    x = mx.full((2, 4096), 64.0, mx.float16)
    assert mx.all(rmsnorm(x, mx.ones(4096, mx.float16)) == 1).item()
    assert mx.all(softmax_lastdim(x) == 1 / 4096).item()


def test_batches_and_gradients_of_batches():
    x, weight = normal(3, 4, 9), normal(9, seed=2)
    close(mx.vmap(softmax_lastdim, in_axes=1)(x), mx.softmax(x.swapaxes(0, 1), axis=-1))
    norm = mx.vmap(rmsnorm, in_axes=(0, None))
    close(norm(x, weight), rmsnorm(x, weight))
    gradient = mx.vmap(mx.grad(lambda x, w: rmsnorm(x, w).sum(), argnums=1), in_axes=(0, None))
    truth = mx.vmap(mx.grad(lambda x, w: mx.fast.rms_norm(x, w, 1e-6).sum(), argnums=1), (0, None))
    close(gradient(x, weight), truth(x, weight), 1e-5)


def test_gradients_of_gradients():
    x = normal(2, 9)

    def slope(softmax):
        return mx.grad(lambda x: (mx.grad(lambda x: (softmax(x)[..., 0] ** 2).sum())(x) ** 2).sum())

    truth = slope(lambda x: mx.softmax(x, axis=-1))(x)
    close(slope(softmax_lastdim)(x), truth, 1e-4)


def test_threads_share_kernels():
    x = normal(8, 33)
    mx.eval(x)
    found = {}

    def work(number):
        with mx.stream(mx.new_stream(mx.default_device())):
            y = softmax_lastdim(x * number)
            mx.eval(y)
            found[number] = y.tolist()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, rows in found.items():
        close(mx.array(rows), mx.softmax(x * number, axis=-1, precise=True))
    assert len(found) == 6
