"""Translated kernels go through NVIDIA's compiler, as MLX calls it, on machines without a GPU."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from metal.cases import MAKERS, Case, argument_cases, array, memory_cases, vector_cases
from nvrtc_program import assemble, compile_program, is_missing

from zmlx.backend.cuda import Variant, translated
from zmlx.backend.definition import Definition

pytestmark = pytest.mark.skipif(
    is_missing(), reason="no nvidia-cuda-nvrtc (in the extra dev, on Linux on x86_64)"
)


def kernel(case: Case, *, cut: bool = False) -> str:
    arrays = [x if isinstance(x, mx.array) else array(x, mx.float32) for x in case.inputs.values()]
    scalars = tuple(i for i, x in enumerate(arrays) if not x.ndim)
    source = translated(case.definition(), Variant(cut=cut, scalars=scalars))
    inputs = [(x.dtype, x.ndim) for x in arrays] + [(mx.int32, 1)] * cut
    outputs = [(name, dtype) for name, (_, dtype) in case.outputs.items()]
    return assemble(case.name, source, inputs, outputs, case.template)


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_kernels_compile(make):
    log = compile_program(*(kernel(case) for case in make()))
    assert log is None, f"\n{log}"


def test_kernels_compile_for_grids_that_are_cut_off():
    cases = [*memory_cases(), *vector_cases(), *argument_cases()]
    log = compile_program(*(kernel(case, cut=True) for case in cases))
    assert log is None, f"\n{log}"


def test_a_mistake_is_reported_at_its_line():
    definition = Definition(
        name="wrong",
        input_names=("x",),
        output_names=("out",),
        header="float f(float x) { return x; }\n\nfloat g(float x) { return h(x); }",
        source="uint i = thread_position_in_grid.x; // a\n/* b\n c */\nout[i] = nothing(x[i]);",
    )
    text = assemble("wrong", translated(definition), [(mx.float32, 1)], [("out", mx.float32)])
    log = compile_program(text)
    assert log is not None
    assert 'wrong header(3): error: identifier "h" is undefined' in log
    assert 'wrong(4): error: identifier "nothing" is undefined' in log


def test_constants_are_rounded_as_numpy_does():
    """16-bit constants are made by the compiler: ties, subnormal numbers, overflow, infinities."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 400, dtype=np.uint64).astype(np.uint32)
    halves = rng.integers(0, 0x7C00, 200).astype(np.uint16).view(np.float16).astype(np.float32)
    ties = np.array([1 + 2**-11, 1 + 3 * 2**-11, 65519.99, 65520, 2**-25, 3 * 2**-26, 2**-24])
    ends = np.array([0, -0.0, np.inf, -np.inf])
    parts = [bits.view(np.float32), halves, *(v.astype(np.float32) for v in (ties, ends))]
    values = np.concatenate(parts)
    values = values[~np.isnan(values)]
    with np.errstate(all="ignore"), mx.stream(mx.cpu):
        expected = {
            "half": values.astype(np.float16).view(np.uint16),
            "bfloat": np.array(mx.array(values).astype(mx.bfloat16).view(mx.uint16)),
        }
    lines = [
        f"static_assert({name}(__builtin_bit_cast(float, {v}u)).bits == {want});"
        for name, wants in expected.items()
        for v, want in zip(values.view(np.uint32), wants, strict=True)
    ]
    lines += [
        f"static_assert(__builtin_bit_cast(uint, float(half::from_bits({h}))) == {f}u);"
        for f, h in zip(
            halves.view(np.uint32), halves.astype(np.float16).view(np.uint16), strict=True
        )
    ]
    definition = Definition("constants", (), ("out",), source="\n".join(lines))
    log = compile_program(assemble("constants", translated(definition), [], [("out", mx.float32)]))
    assert log is None, f"\n{log[:3000]}"


def test_the_cases_are_of_the_sizes_they_say():
    for make in MAKERS:
        for case in make():
            for truth, (shape, _) in zip(case.truths(), case.outputs.values(), strict=True):
                assert truth.shape == shape, case.name
