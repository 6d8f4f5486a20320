"""Calls that are replayed: what is run again, what is not, and that transformations see through."""

from __future__ import annotations

import subprocess
import sys
import threading

import mlx.core as mx
import pytest

from zmlx.api import elementwise, map_reduce
from zmlx.backend import replay
from zmlx.backend.replay import Replay


@pytest.fixture
def calls():
    return []


@pytest.fixture
def doubled(calls):
    def function(x: mx.array) -> mx.array:
        calls.append(x.shape)
        return x * 2

    return Replay(function, function)


def test_the_third_call_of_a_form_runs_nothing(doubled, calls):
    for number in range(5):
        x = mx.full((3,), float(number))
        assert doubled("here", [x]).tolist() == [2.0 * number] * 3
    assert calls == [(3,), (3,)]  # once as it is, once recorded


def test_forms_are_shapes_and_dtypes_and_keys(doubled, calls):
    for _ in range(3):
        for key in ("here", "there"):
            for x in (mx.ones((2,)), mx.ones((1, 2)), mx.ones((2,), mx.float16)):
                result = doubled(key, [x])
                assert (result.shape, result.dtype) == (x.shape, x.dtype)
    assert len(calls) == 12


def test_forms_beyond_a_number_are_run_as_they_are(doubled, calls, monkeypatch):
    monkeypatch.setattr(replay, "_RECORDED", 2)
    for _ in range(3):
        for length in (1, 2, 3):
            assert doubled("here", [mx.ones((length,))]).tolist() == [2.0] * length
    assert [calls.count((length,)) for length in (1, 2, 3)] == [2, 2, 3]


def test_what_is_not_settled_is_not_recorded(calls):
    settled = []

    def function(x: mx.array) -> mx.array:
        calls.append(x)
        return x + 1

    call = Replay(function, function, lambda arrays: bool(settled))
    for _ in range(3):
        call("here", [mx.ones((2,))])
    assert len(calls) == 3
    settled.append(True)
    for _ in range(4):
        call("here", [mx.ones((2,))])
    assert len(calls) == 5


def test_transformations_find_the_rules_of_the_function(calls):
    @mx.custom_function
    def function(x: mx.array) -> mx.array:
        calls.append(x)
        return x * x

    @function.vjp
    def _(primals, cotangents, outputs):
        return cotangents * 10

    def launch(x: mx.array) -> mx.array:
        launched.append(x)
        return x * x

    launched = []
    call = Replay(function, launch)
    x = mx.arange(3, dtype=mx.float32)
    for _ in range(3):
        assert call("here", [x]).tolist() == [0.0, 1.0, 4.0]
    assert (len(calls), len(launched)) == (1, 1)
    before = len(calls)
    assert mx.grad(lambda x: call("here", [x]).sum())(x).tolist() == [10.0] * 3
    assert mx.compile(mx.grad(lambda x: call("here", [x]).sum()))(x).tolist() == [10.0] * 3
    assert len(calls) == before + 2
    assert len(launched) == 1


def test_recording_inside_of_a_transformation_keeps_the_rules(calls):
    @mx.custom_function
    def function(x: mx.array) -> mx.array:
        return x * x

    @function.vjp
    def _(primals, cotangents, outputs):
        return cotangents * 10

    call = Replay(function, lambda x: x * x)
    x = mx.arange(3, dtype=mx.float32)
    for _ in range(4):  # all forms are first seen and recorded while MLX traces
        assert mx.grad(lambda x: call("here", [x]).sum())(x).tolist() == [10.0] * 3
    for _ in range(3):
        assert call("here", [x]).tolist() == [0.0, 1.0, 4.0]
        assert mx.grad(lambda x: call("here", [x]).sum())(x).tolist() == [10.0] * 3


def test_what_is_no_array_reaches_the_function(doubled):
    doubled("here", [mx.ones((2,))])
    with pytest.raises(AttributeError, match="shape"):
        doubled("here", [2.0])


def test_threads_and_streams(doubled):
    x = mx.ones((4,))
    for _ in range(3):
        doubled("here", [x])
    found = []

    def work() -> None:
        with mx.stream(mx.new_stream(mx.default_device())):
            for _ in range(3):
                found.append(doubled("here", [mx.ones((4,))]).tolist())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[2.0] * 4] * 12


def test_the_backend_in_force_decides_at_each_call(monkeypatch):
    square = elementwise("x * x")
    x = mx.array([1.0, 2.0, 3.0])
    for backend in ("emulator", "reference", "emulator", "emulator", "reference"):
        monkeypatch.setenv("ZMLX_BACKEND", backend)
        assert square(x).tolist() == [1.0, 4.0, 9.0]


def test_replayed_launches_in_transformations(monkeypatch):
    monkeypatch.setenv("ZMLX_BACKEND", "emulator")
    cube = elementwise("x * x * x")
    softmax = map_reduce(
        pass1={"init": "-INFINITY", "update": "max(acc1, x)", "reduce": "max(a, b)"},
        pass2={"init": "0.0f", "update": "acc2 + exp(x - s1)", "reduce": "a + b"},
        write="exp(x - s1) / s2",
    )
    x = mx.random.normal((3, 5))
    for _ in range(3):
        assert mx.allclose(cube(x), x * x * x, rtol=1e-5)
        assert mx.allclose(softmax(x), mx.softmax(x, axis=-1), rtol=1e-5)
        assert mx.allclose(mx.grad(lambda x: cube(x).sum())(x), 3 * x * x, rtol=1e-5)
        assert mx.allclose(mx.vmap(softmax)(x[:, None]), mx.softmax(x[:, None], -1), rtol=1e-5)
        assert mx.allclose(mx.compile(cube)(x), x * x * x, rtol=1e-5)


@pytest.mark.parametrize(
    ("made", "wrapped"),
    [
        ("import zmlx, zmlx.patch, zmlx.kernels.quantized", False),
        ("from zmlx.api import elementwise; elementwise('x + 1')", True),
        ("import zmlx.kernels.softmax", True),
    ],
)
def test_mlx_keeps_its_vmap_until_an_operation_with_a_source_is_made(made, wrapped):
    program = f"{made}\nimport mlx.core as mx\nprint(hasattr(mx.vmap, '__zmlx__'))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == str(wrapped), done.stderr
