"""The Metal text of jit functions passes the strict look: values and gradients, every dtype."""

from __future__ import annotations

import math

import mlx.core as mx
import pytest
from authoring.jit_random import Programs

from zmlx.authoring.jit.kernel import Kernel
from zmlx.authoring.jit.metal import Port
from zmlx.backend import strict
from zmlx.jit_compiler import JitFunction, jit


@jit
def whole(a, b):
    rest = 0
    for i in range(a, b, 3):
        if i % 5 == 2:
            continue
        rest += abs(i * b) // 4
        if not rest < 1000:
            break
    power = a**3 if a < b <= 9 else -b
    return rest, power, a & b | ~a, a > 0, min(a, b, 2), a / (b + 0.5)


@jit
def wide(x):
    return int(x) * 2, math.floor(x) // 0.3, x % 2.5, x**7, x**-0.5, bool(x)


def kernels(function: JitFunction, dtypes: list[mx.Dtype]) -> list[Kernel]:
    """Return the kernel for arrays of these dtypes, and that of its gradients if it has them."""
    made = function._differentiable(tuple((Port(dtype, False), False) for dtype in dtypes))
    return [each.kernel for each in (made, made.gradients) if each is not None]


def assert_passes(kernel: Kernel) -> None:
    for large in (False, True):
        found = strict.check(
            kernel.definition(large=large),
            input_dtypes=[port.dtype for port in kernel.inputs],
            output_dtypes=list(kernel.outputs),
        )
        assert found == []


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16, mx.int8], ids=str)
def test_floats(dtype):
    for kernel in kernels(wide, [dtype]):
        assert_passes(kernel)


@pytest.mark.parametrize(
    "dtype", [mx.bool_, mx.int8, mx.uint8, mx.int16, mx.int32, mx.uint32, mx.int64], ids=str
)
def test_whole_numbers(dtype):
    for kernel in kernels(whole, [dtype, dtype]):
        assert_passes(kernel)


@pytest.mark.parametrize("seed", [3, 4])
def test_random_programs(seed, tmp_path):
    path = tmp_path / "programs.py"
    path.write_text(Programs(seed).module(6))
    names = {"jit": jit}
    exec(compile(path.read_text(), str(path), "exec"), names)
    for kernel in kernels(names["every"], [mx.bfloat16, mx.float32, mx.int32]):
        assert_passes(kernel)


def test_a_number_for_all_elements():
    made = wide._differentiable(((Port(mx.bfloat16, True), False),))
    assert (
        strict.check(
            made.kernel.definition(large=False),
            input_dtypes=[mx.bfloat16],
            output_dtypes=list(made.kernel.outputs),
            input_shapes=[()],
        )
        == []
    )
