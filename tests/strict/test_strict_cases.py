"""The cases that every backend runs are Metal: the strict look finds nothing wrong in them."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from metal.cases import MAKERS, Case

from zmlx.backend import strict
from zmlx.backend.definition import Definition


def look(case: Case) -> list[str]:
    call = case.arguments()
    inputs = [x if isinstance(x, mx.array) else mx.array(x) for x in call["inputs"]]
    found = strict.check(
        case.definition(),
        input_dtypes=[x.dtype for x in inputs],
        input_shapes=[x.shape for x in inputs],
        output_dtypes=call["output_dtypes"],
        template=call["template"],
    )
    return [f"{case.name}: {diagnosis}" for diagnosis in found]


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_the_cases_are_metal(make):
    found = [line for case in make() for line in look(case)]
    assert not found, "\n" + "\n".join(found)


def refused(source: str, dtype: mx.Dtype, **more: Any) -> list[strict.Diagnosis]:
    kernel = Definition("k", ("x",), ("out",), source, **more)
    return strict.check(kernel, input_dtypes=[dtype], output_dtypes=[dtype])


@pytest.mark.parametrize(
    ("source", "dtype"),
    [
        ("float m = mad(1.0f, 2.0f, 3.0f); out[0] = m;", mx.float32),
        ("packed_float3 p; out[0] = p.y;", mx.float32),
        ("threadgroup atomic<float> t; "
         "atomic_fetch_add_explicit(&t, 1.0f, memory_order_relaxed); out[0] = x[0];", mx.float32),
        ("out[0] = sign(x[0]);", mx.bfloat16),
        ("bfloat v = x[0]; v *= 2.5f; out[0] = v;", mx.bfloat16),
        ("out[0] = quad_sum(x[0]);", mx.bfloat16),
        # These would take the sum's version for bfloat, which rounds to 8 bits.
        ("out[0] = simd_sum(x[0]);", mx.int64),
        ("long n = simd_max(x[0]); out[0] = n;", mx.int64),
    ],
)  # fmt: skip
def test_what_the_cases_do_without_is_refused(source, dtype):
    assert refused(source, dtype)


@pytest.mark.parametrize("arms", ["b : 0", "0 : b", "b : 1.0f", "b : i", "b : bfloat(2)"])
def test_a_bfloat_and_a_number_have_a_common_type(arms):
    source = f"uint i = 1; const bfloat b = x[0]; out[0] = bfloat(b > 0 ? {arms});"
    assert not refused(source, mx.bfloat16)


def test_a_bfloat_becomes_whole_where_that_is_said():
    (found,) = refused("int n = x[0]; out[0] = n;", mx.bfloat16)
    assert found.advice is not None
    assert "int(x)" in found.advice
    assert not refused(
        "int n = int(x[0]); bool some = x[0]; n += x[0]; out[0] = n + some;", mx.bfloat16
    )
