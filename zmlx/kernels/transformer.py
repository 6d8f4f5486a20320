"""Parts of a transformer's layers that are computed element by element.

    swiglu2    y = silu(gate) * up = gate * s * up,    s = 1 / (1 + exp(-gate))
    geglu2     y = gelu(gate) * up, with the tanh form of GELU:
               gelu(a) = a / 2 * (1 + t),    t = tanh(sqrt(2 / pi) * (a + 0.044715 a^3))
    their backward, with the cotangent g:
    swiglu2    dgate = g * up * s * (1 + gate * (1 - s)),    dup = g * gate * s
    geglu2     dgate = g * up * gelu'(gate),                 dup = g * gelu(gate)
               gelu'(a) = (1 + t) / 2 + a / 2 * (1 - t^2) * sqrt(2 / pi) * (1 + 3 * 0.044715 a^2)

SwiGLU and GEGLU are from Shazeer, "GLU Variants Improve Transformer" (2020). All is computed in
float32 and rounded once, at the end.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx

from zmlx.backend.definition import Definition
from zmlx.deprecation import takes_compute_dtype
from zmlx.kernels.calling import Geometry
from zmlx.kernels.rows import check_floats, check_same_shape, wide
from zmlx.kernels.spec import KernelSpec, Sample, register

_GELU_SCALE = math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715


def _silu(gate: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate)


def _gelu(gate: mx.array) -> mx.array:
    return gate / 2 * (1 + mx.tanh(_GELU_SCALE * (gate + _GELU_CUBIC * gate * gate * gate)))


def _swiglu_reference(gate: mx.array, up: mx.array) -> mx.array:
    return (_silu(wide(gate)) * wide(up)).astype(mx.result_type(gate, up))


def _geglu_reference(gate: mx.array, up: mx.array) -> mx.array:
    return (_gelu(wide(gate)) * wide(up)).astype(mx.result_type(gate, up))


def _swiglu_grad_reference(
    gate: mx.array, up: mx.array, cotan: mx.array
) -> tuple[mx.array, mx.array]:
    a, b, g = wide(gate), wide(up), wide(cotan)
    s = mx.sigmoid(a)
    return (g * b * s * (1 + a * (1 - s))).astype(gate.dtype), (g * a * s).astype(up.dtype)


def _geglu_grad_reference(
    gate: mx.array, up: mx.array, cotan: mx.array
) -> tuple[mx.array, mx.array]:
    a, b, g = wide(gate), wide(up), wide(cotan)
    t = mx.tanh(_GELU_SCALE * (a + _GELU_CUBIC * a * a * a))
    slope = _GELU_SCALE * (1 + 3 * _GELU_CUBIC * a * a)
    derivative = (1 + t) / 2 + a / 2 * (1 - t * t) * slope
    return (g * b * derivative).astype(gate.dtype), (g * a / 2 * (1 + t)).astype(up.dtype)


_LOAD = """
uint i = thread_position_in_grid.x;
float a = float(gate[i]);
float b = float(up[i]);
"""
_SIGMOID = """
float s = 1.0f / (1.0f + metal::exp(-a));
"""
_TANH = f"""
float t = metal::precise::tanh({_GELU_SCALE!r}f * (a + {_GELU_CUBIC}f * a * a * a));
"""
_SWIGLU = f"{_LOAD}{_SIGMOID}out[i] = O(a * s * b);\n"
_GEGLU = f"{_LOAD}{_TANH}out[i] = O(0.5f * a * (1.0f + t) * b);\n"
_SWIGLU_GRAD = f"""{_LOAD}{_SIGMOID}
float g = float(cotan[i]);
dgate[i] = G(g * b * s * (1.0f + a * (1.0f - s)));
dup[i] = U(g * a * s);
"""
_GEGLU_GRAD = f"""{_LOAD}{_TANH}
float g = float(cotan[i]);
float slope = {_GELU_SCALE!r}f * (1.0f + {3 * _GELU_CUBIC!r}f * a * a);
dgate[i] = G(g * b * (0.5f * (1.0f + t) + 0.5f * a * (1.0f - t * t) * slope));
dup[i] = U(g * 0.5f * a * (1.0f + t));
"""


def _geometry(gate: mx.array, up: mx.array) -> Geometry:
    check_floats(gate=gate, up=up)
    check_same_shape(gate=gate, up=up)
    dtype = mx.result_type(gate, up)
    return Geometry(
        grid=(gate.size, 1, 1),
        threadgroup=(256, 1, 1),
        output_shapes=(gate.shape,),
        output_dtypes=(dtype,),
        template=(("O", dtype),),
    )


def _grad_geometry(gate: mx.array, up: mx.array, cotan: mx.array) -> Geometry:
    check_floats(gate=gate, up=up, cotan=cotan)
    check_same_shape(gate=gate, up=up, cotan=cotan)
    return Geometry(
        grid=(gate.size, 1, 1),
        threadgroup=(256, 1, 1),
        output_shapes=(gate.shape, up.shape),
        output_dtypes=(gate.dtype, up.dtype),
        template=(("G", gate.dtype), ("U", up.dtype)),
    )


def _normal(shape: tuple[int, ...], dtype: mx.Dtype, seed: int) -> mx.array:
    return 2 * mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def _sample(*, dtype: mx.Dtype, length: int) -> Sample:
    return Sample(tuple(_normal((3, length), dtype, seed) for seed in (1, 2)))


def _grad_sample(*, dtype: mx.Dtype, length: int) -> Sample:
    return Sample(tuple(_normal((3, length), dtype, seed) for seed in (1, 2, 3)))


def _definition(name: str, source: str) -> Definition:
    backward = name.endswith("_grad")
    return Definition(
        name=name,
        input_names=("gate", "up", "cotan") if backward else ("gate", "up"),
        output_names=("dgate", "dup") if backward else ("out",),
        source=source,
    )


def _swiglu_gradient(primals: tuple[mx.array, ...], cotangent: mx.array, output: mx.array) -> Any:
    return SWIGLU_GRAD(*primals, cotangent)


def _geglu_gradient(primals: tuple[mx.array, ...], cotangent: mx.array, output: mx.array) -> Any:
    return GEGLU_GRAD(*primals, cotangent)


_CONTRACT = {"metal": "tighter", "cuda": "tighter"}
_SHAPES = ("gate (...) float32, float16 or bfloat16", "up like gate", "y like gate")
_GRAD_SHAPES = ("gate (...) float32, float16 or bfloat16", "up, g, dgate, dup like gate")

SWIGLU_GRAD = register(
    KernelSpec(
        name="swiglu2_grad",
        domain="transformer",
        formula="dgate = g * up * s * (1 + gate * (1 - s)), dup = g * gate * s, s = sigmoid(gate)",
        shapes=_GRAD_SHAPES,
        reference=_swiglu_grad_reference,
        sample=_grad_sample,
        contract=_CONTRACT,
        definition=_definition("swiglu2_grad", _SWIGLU_GRAD),
        geometry=_grad_geometry,
        batched=(True, True, True),
    )
)

SWIGLU = register(
    KernelSpec(
        name="swiglu2",
        domain="transformer",
        formula="y = gate * sigmoid(gate) * up",
        shapes=_SHAPES,
        reference=_swiglu_reference,
        sample=_sample,
        contract=_CONTRACT,
        definition=_definition("swiglu2", _SWIGLU),
        geometry=_geometry,
        gradient=_swiglu_gradient,
        batched=(True, True),
    )
)

GEGLU_GRAD = register(
    KernelSpec(
        name="geglu2_grad",
        domain="transformer",
        formula="dgate = g * up * gelu'(gate), dup = g * gelu(gate)",
        shapes=_GRAD_SHAPES,
        reference=_geglu_grad_reference,
        sample=_grad_sample,
        contract=_CONTRACT,
        definition=_definition("geglu2_grad", _GEGLU_GRAD),
        geometry=_grad_geometry,
        batched=(True, True, True),
    )
)

GEGLU = register(
    KernelSpec(
        name="geglu2",
        domain="transformer",
        formula="y = gate / 2 * (1 + tanh(sqrt(2 / pi) * (gate + 0.044715 gate^3))) * up",
        shapes=_SHAPES,
        reference=_geglu_reference,
        sample=_sample,
        contract=_CONTRACT,
        definition=_definition("geglu2", _GEGLU),
        geometry=_geometry,
        gradient=_geglu_gradient,
        batched=(True, True),
    )
)


@takes_compute_dtype
def swiglu2(gate: mx.array, up: mx.array) -> mx.array:
    """Return silu(gate) * up.

    Args:
        gate: (...) float32, float16 or bfloat16.
        up: of the same shape; dtypes may differ.

    Returns:
        That shape, in the dtype to which MLX promotes the two; computed in float32.

    Raises:
        TypeError: another dtype.
        ValueError: different shapes.
    """
    return SWIGLU(gate, up)  # type: ignore[no-any-return]


@takes_compute_dtype
def geglu2(gate: mx.array, up: mx.array) -> mx.array:
    """Return gelu(gate) * up, with the tanh form of GELU; arguments as of `swiglu2`."""
    return GEGLU(gate, up)  # type: ignore[no-any-return]
