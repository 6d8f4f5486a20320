"""The calls that must work as written, for formulas; each backend runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx

import zmlx


@zmlx.jit
def hard_swish(x):
    r = min(max(x + 3.0, 0.0), 6.0)
    return x * r / 6.0


def test_a_function_is_compiled_tested_and_compared(backend, capsys):
    zmlx.testing.assert_matches(
        hard_swish, lambda x: x * mx.clip(x + 3, 0, 6) / 6, shapes=[(17,), (8, 1000)]
    )
    result = zmlx.bench.compare(
        {"zmlx": hard_swish, "mlx": lambda x: x * mx.clip(x + 3, 0, 6) / 6},
        shapes=[(16, 4096) if backend == "emulator" else (1024, 4096)],
        iters=3,
    )
    assert [row.ok for row in result.rows] == [True, True]
    assert "zmlx" in capsys.readouterr().out


def test_formulas_reductions_and_two_passes(backend):
    from zmlx.api import elementwise, map_reduce, reduce

    softplus = elementwise("log(1 + exp(x))", name="softplus")
    x = mx.random.normal((1000,))
    y = softplus(x)
    assert mx.allclose(y, mx.logaddexp(x, 0), atol=1e-6)

    cube = elementwise("x * x * x", name="cube", grad_expr="g * 3 * x * x", use_output=False)
    x = mx.random.normal((64,))
    dx = mx.grad(lambda z: cube(z).sum())(x)
    assert mx.allclose(dx, 3 * x * x, rtol=1e-5)

    row_max = reduce(init="-INFINITY", update="max(acc, v)", name="row_max")
    x = mx.random.normal((8, 1000))
    m = row_max(x)
    assert m.shape == (8,)
    assert mx.array_equal(m, x.max(-1))

    softmax = map_reduce(
        pass1={"init": "-INFINITY", "update": "max(acc1, x)", "reduce": "max(a, b)"},
        pass2={"init": "0.0f", "update": "acc2 + exp(x - s1)", "reduce": "a + b"},
        write="exp(x - s1) / s2",
        name="my_softmax",
        threadgroup="auto",
    )
    assert mx.allclose(softmax(x), mx.softmax(x, axis=-1), atol=1e-6)


def test_building_blocks(backend):
    from zmlx import autograd, elementwise, msl

    exp_k = elementwise.unary(name="k_exp", expr="metal::exp(x)", header=msl.DEFAULT_HEADER)
    mul = autograd.binary_from_expr(
        name="k_mul", fwd_expr="a * b", vjp_lhs_expr="g * b", vjp_rhs_expr="g * a"
    )
    x, z = mx.random.normal((33,)), mx.random.normal((33,))
    assert mx.allclose(exp_k(x), mx.exp(x), rtol=1e-5)
    assert mx.array_equal(mul(x, z), x * z)


def test_a_launch_over_two_axes():
    from zmlx.msl import Launch2D

    launch = Launch2D.covering(100, 7, threadgroup=(32, 4))
    assert (launch.grid, launch.threadgroup) == ((100, 7, 1), (32, 4, 1))
    assert Launch2D(grid=(1, 2, 3), threadgroup=(1, 1, 1)).grid == (1, 2, 3)


def test_the_calls_of_users_run_unchanged_on_every_backend():
    """Also a script: `python tests/usage`."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "tests/usage"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(": ran") == 4
