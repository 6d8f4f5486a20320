"""Calls of jit functions: shapes, numbers, transformations, threads, and what can be looked at."""

from __future__ import annotations

import inspect
import math
import threading

import mlx.core as mx
import numpy as np
import pytest
from authoring.jit_backends import BACKENDS

from zmlx.authoring.jit import kernel as kernels
from zmlx.jit_compiler import JitFunction, jit


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    monkeypatch.setenv("ZMLX_BACKEND", request.param)
    return request.param


@jit
def hard_swish(x):
    """Return x * clip(x + 3, 0, 6) / 6."""
    r = min(max(x + 3.0, 0.0), 6.0)
    return x * r / 6.0


@jit
def scaled(x, y, by=2.0, plus: float = 0):
    return x * y * by + plus


@jit
def both(x, y):
    return x + y, x < y


@jit
def counted(x, n: int):
    for _ in range(n):
        x = x * 2
    return x


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (1, 5, 1), (2, 1, 3, 5), (0,), (3, 0)])
def test_results_have_the_shape_of_the_arguments(shape, backend):
    x = mx.random.normal(shape)
    value = hard_swish(x)
    assert value.shape == shape
    assert value.dtype == mx.float32
    assert mx.allclose(value, x * mx.clip(x + 3, 0, 6) / 6).item()
    total, less = both(x, x + 1)
    assert (total.shape, less.shape) == (shape, shape)
    assert (total.dtype, less.dtype) == (mx.float32, mx.bool_)


def test_arrays_that_are_not_contiguous(backend):
    x = mx.arange(60).reshape(3, 4, 5).astype(mx.float32)
    views = [x.T, x[:, ::2], x[::-1], mx.broadcast_to(x[:1], (3, 4, 5)), x.transpose(1, 0, 2)[2:]]
    for view in views:
        assert mx.array_equal(scaled(view, view), view * view * 2).item()
    assert mx.array_equal(scaled(x.T, x.transpose(2, 1, 0) + 1), x.T * (x.T + 1) * 2).item()


def test_numbers_and_arrays_without_axes_stand_for_every_element(backend):
    x = mx.array([1.0, 2.0, 3.0], mx.bfloat16)
    for two in (2, 2.0, True + 1, mx.array(2.0, mx.bfloat16), mx.array(2)):
        value = scaled(x, two)
        assert value.dtype == mx.bfloat16
        assert value.tolist() == [4.0, 8.0, 12.0]
    assert scaled(2.0, x).tolist() == [4.0, 8.0, 12.0]
    assert scaled(mx.array(2.0), 3, 4, 5).item() == 29.0
    assert scaled(2, 3).item() == 12.0
    assert counted(mx.array([1.0, 3.0]), 4).tolist() == [16.0, 48.0]
    # An array counts in the dtype, a number does not.
    assert scaled(x, mx.array(2.0)).dtype == mx.float32


def test_defaults_and_arguments_by_name(backend):
    x = mx.array([1.0, 2.0])
    assert scaled(x, x).tolist() == [2.0, 8.0]
    assert scaled(x, x, 3).tolist() == [3.0, 12.0]
    assert scaled(x, y=x, plus=1).tolist() == [3.0, 9.0]
    assert scaled(x, plus=x, y=x).tolist() == [3.0, 10.0]
    assert scaled(y=x, x=x, by=x, plus=x).tolist() == [2.0, 10.0]


def test_compiled_functions(backend):
    x = mx.array([-4.0, -1.0, 0.5, 9.0])
    compiled = mx.compile(lambda a: hard_swish(a) + 1)
    for _ in range(2):
        assert mx.allclose(compiled(x), x * mx.clip(x + 3, 0, 6) / 6 + 1).item()
    assert compiled(x[:3]).shape == (3,)


def test_a_loop_whose_length_is_in_an_array_cannot_be_traced_by_the_reference(monkeypatch):
    monkeypatch.setenv("ZMLX_BACKEND", "reference")
    x, n = mx.array([1.0, 2.0]), mx.array([2, 3])
    with pytest.raises(ValueError, match=r"length of a loop depends on an array"):
        mx.compile(counted)(x, n)


@pytest.mark.skipif("emulator" not in BACKENDS, reason="the emulator is not here")
def test_on_the_cpu_the_emulator_traces_it(monkeypatch):
    monkeypatch.delenv("ZMLX_BACKEND", raising=False)
    x, n = mx.array([1.0, 2.0]), mx.array([2, 3])
    assert mx.compile(counted)(x, n).tolist() == [4.0, 16.0]
    assert mx.vmap(counted)(x, n).tolist() == [4.0, 16.0]


def test_threads(backend):
    @jit
    def f(x, y):
        return math.exp(-x) * y if x > 0 else y

    x = mx.array(np.linspace(-2, 2, 101, dtype=np.float32))
    mx.eval(x)
    truth = np.where(np.array(x) > 0, np.exp(-np.array(x)) * 3, 3)
    wrong = []

    def work(stream_index):
        for dtype in (mx.float32, mx.bfloat16) * 5:
            y = mx.full((101,), 3.0, dtype)
            slope = mx.grad(lambda a: f(x, a).astype(mx.float32).sum())(y)
            value = f(x, y)
            mx.eval(value, slope)
            tolerance = 1e-5 if dtype == mx.float32 else 1e-2
            if not np.allclose(np.array(value.astype(mx.float32)), truth, rtol=tolerance):
                wrong.append((stream_index, dtype))
            if not np.allclose(np.array(slope.astype(mx.float32)), truth / 3, rtol=tolerance):
                wrong.append((stream_index, dtype, "gradient"))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_kernel_is_made_once_for_each_combination_of_dtypes(monkeypatch):
    made = []
    original = kernels.Kernel.__init__

    def counting(self, *arguments):
        made.append(self)
        original(self, *arguments)

    monkeypatch.setattr(kernels.Kernel, "__init__", counting)

    @jit
    def f(x):
        return x * x

    for shape in ((3,), (4, 5), (3,), (7,)):
        f(mx.ones(shape))
        mx.grad(lambda a: f(a).sum())(mx.ones(shape))
    assert len(made) == 2
    f(mx.ones((3,), mx.float16))
    assert len(made) == 3


def test_a_long_loop_is_no_deep_graph(backend):
    @jit
    def f(x):
        total = 0.0
        for i in range(5000):
            total += x if i % 2 == 0 else 0.5
        return total

    assert f(mx.array([1.0, 2.0])).tolist() == [3750.0, 6250.0]


def test_what_can_be_looked_at():
    assert isinstance(hard_swish, JitFunction)
    assert hard_swish.__name__ == "hard_swish"
    assert hard_swish.__doc__ == "Return x * clip(x + 3, 0, 6) / 6."
    assert hard_swish.__wrapped__(1.0) == 4.0 / 6.0
    assert list(inspect.signature(scaled).parameters) == ["x", "y", "by", "plus"]

    @jit
    def f(x, y):
        return x * y

    assert repr(f).startswith("<zmlx.jit f(x, y) at ")
    assert __file__ in repr(f)
    f(mx.ones((2,)), mx.ones((2,), mx.bfloat16))
    assert repr(f).endswith("; compiled for float32, bfloat16>")


def test_the_metal_text():
    assert "half" not in hard_swish.metal_source
    text = hard_swish.source(mx.bfloat16)
    # Metal converts bfloat16 neither from nor to float by itself.
    assert "static_cast<float>(in0[i])" in text
    assert "out0[i] = static_cast<bfloat16_t>(" in text
    assert "double" not in text
    assert "out1[i]" in scaled.source(mx.float16, gradient=True)
    assert "int32_t v_n" in counted.metal_source
    with pytest.raises(ValueError, match="2 dtypes for 4 parameters"):
        scaled.source(mx.float32, mx.float32)

    @jit
    def whole(n: int):
        return n + 1

    with pytest.raises(ValueError, match="no float parameter or no float result"):
        whole.source(gradient=True)


def test_the_grid_of_large_arrays_is_guarded():
    @jit
    def f(x, y):
        return x + y

    made = f._differentiable(tuple((kernels.Port(mx.float32, s), False) for s in (True, False)))
    text = made.kernel.text(large=True).body
    assert "uint64_t i = uint64_t(thread_position_in_grid.y) * 1073741824" in text
    assert "count *= uint64_t(in1_shape[d]);" in text
    assert "if (i >= count)" in text
