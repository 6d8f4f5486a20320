"""Tiny programs go through NVIDIA's compiler: one of each kind of phase."""

from __future__ import annotations

import mlx.core as mx
import pytest
from graph.tiny_cases import program_of
from nvrtc_program import assemble, compile_program, is_missing

from zmlx.backend.cuda import Variant, translated

pytestmark = pytest.mark.skipif(
    is_missing(), reason="no nvidia-cuda-nvrtc (in the extra dev, on Linux on x86_64)"
)


def router(logits):
    gates = mx.softmax(logits, axis=-1, precise=True)
    indices = mx.argpartition(gates, kth=-8, axis=-1)[..., -8:]
    scores = mx.take_along_axis(gates, indices, axis=-1)
    return indices, scores / scores.sum(axis=-1, keepdims=True)


def norm(x, offset):
    wide = x.astype(mx.float32)
    scale = mx.rsqrt(mx.mean(wide * wide) + 1e-6)
    return (wide * scale).astype(x.dtype) * mx.sigmoid(x) + offset, mx.argmax(x, axis=-1)


def mixed(x, state):
    both = mx.concatenate([state, x], axis=1)
    conv = mx.conv1d(both, mx.ones((64, 3, 1), x.dtype), groups=64)
    sums = mx.cumsum(both, axis=-1)
    return mx.erf(conv), sums, mx.pad(x, [(0, 0), (1, 0), (2, 0)]), mx.prod(x, axis=1), x % 2


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (router, [(1, 3, 128)]),
        (norm, [(1, 1, 2048), ()]),
        (mixed, [(1, 2, 64), (1, 2, 64)]),
    ],
)
def test_it_compiles(function, shapes):
    arrays = [mx.zeros(shape, mx.bfloat16) for shape in shapes]
    program = program_of(function, *arrays)
    scalars = tuple(n for n, value in enumerate(program.reads) if not value.shape)
    source = translated(program.definition, Variant(scalars=scalars))
    inputs = [(value.dtype, len(value.shape)) for value in program.reads]
    outputs = zip(program.definition.output_names, program.outputs, strict=True)
    text = assemble("tiny", source, inputs, [(name, value.dtype) for name, value in outputs])
    log = compile_program(text)
    assert log is None, f"\n{log[:3000]}"
