"""Normalisation of rows, the last axis, and its gradients.

    rmsnorm      y[i] = x[i] * r * w[i],                 r = 1 / sqrt(mean(x^2) + eps)
    layernorm    y[i] = (x[i] - u) * r * gamma[i] + beta[i],
                 u = mean(x),  r = 1 / sqrt(mean((x - u)^2) + eps)
    their backward, with the cotangent g and sums over all rows for the weights:
    rmsnorm      dx[i] = r * (g[i] w[i] - n[i] mean(g w n)),    dw = sum(g n),    n = x * r
    layernorm    dx[i] = r * (h[i] - mean(h) - n[i] mean(h n)), h = g * gamma,    n = (x - u) * r
                 dgamma = sum(g n),    dbeta = sum(g)

RMSNorm is from Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), LayerNorm from
Ba, Kiros and Hinton, "Layer Normalization" (2016). All is computed in float32 and rounded once.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from zmlx.backend.definition import Definition
from zmlx.deprecation import takes_compute_dtype
from zmlx.kernels.calling import Geometry
from zmlx.kernels.rows import (
    POSITION,
    REDUCTIONS,
    check_rows,
    check_same_shape,
    check_vectors,
    count_rows,
    row_threads,
    wide,
)
from zmlx.kernels.spec import KernelSpec, Sample, register

#: Most threadgroups of a backward, and so parts of the gradient of a weight.
_MOST_PARTS = 512


def _rms_scale(x: mx.array, eps: float) -> mx.array:
    return mx.rsqrt((x * x).mean(axis=-1, keepdims=True) + eps)


def _rmsnorm_reference(x: mx.array, weight: mx.array, *, eps: float = 1e-6) -> mx.array:
    a = wide(x)
    return (a * _rms_scale(a, eps) * wide(weight)).astype(mx.result_type(x, weight))


def _rmsnorm_grad_reference(
    x: mx.array, weight: mx.array, cotan: mx.array, *, eps: float = 1e-6
) -> tuple[mx.array, mx.array]:
    a, g = wide(x), wide(cotan)
    scale = _rms_scale(a, eps)
    normed, weighted = a * scale, g * wide(weight)
    dx = scale * (weighted - normed * (weighted * normed).mean(axis=-1, keepdims=True))
    dweight = (g * normed).reshape(-1, x.shape[-1]).sum(axis=0)
    return dx.astype(x.dtype), dweight.astype(weight.dtype)


def _layernorm_reference(
    x: mx.array, gamma: mx.array, beta: mx.array, *, eps: float = 1e-5
) -> mx.array:
    a = wide(x)
    a = a - a.mean(axis=-1, keepdims=True)
    y = a * _rms_scale(a, eps) * wide(gamma) + wide(beta)
    return y.astype(mx.result_type(x, gamma, beta))


def _layernorm_grad_reference(
    x: mx.array, gamma: mx.array, cotan: mx.array, *, eps: float = 1e-5
) -> tuple[mx.array, mx.array, mx.array]:
    a, g = wide(x), wide(cotan)
    a = a - a.mean(axis=-1, keepdims=True)
    scale = _rms_scale(a, eps)
    normed, h = a * scale, g * wide(gamma)
    along = normed * (h * normed).mean(axis=-1, keepdims=True)
    dx = scale * (h - h.mean(axis=-1, keepdims=True) - along)
    rows = (g * normed).reshape(-1, x.shape[-1]), g.reshape(-1, x.shape[-1])
    dgamma, dbeta = (part.sum(axis=0).astype(gamma.dtype) for part in rows)
    return dx.astype(x.dtype), dgamma, dbeta


# What follows stands in a threadgroup that has one row, which begins at `start`.
_ROW = """
uint length = x_shape[x_ndim - 1];
size_t start = size_t(row) * length;
"""
_RMS = """
float squares = 0.0f;
for (uint i = thread_in_row; i < length; i += threads) {
  float a = float(x[start + i]);
  squares += a * a;
}
squares = row_sum(squares, partial, lane, group, groups);
float scale = metal::precise::rsqrt(squares / float(length) + eps);
"""
_MEAN_AND_SCALE = """
float mean = 0.0f;
for (uint i = thread_in_row; i < length; i += threads) {
  mean += float(x[start + i]);
}
mean = row_sum(mean, partial, lane, group, groups) / float(length);
float squares = 0.0f;
for (uint i = thread_in_row; i < length; i += threads) {
  float a = float(x[start + i]) - mean;
  squares += a * a;
}
squares = row_sum(squares, partial, lane, group, groups);
float scale = metal::precise::rsqrt(squares / float(length) + eps);
"""
_RMSNORM = f"""{POSITION}{_ROW}{_RMS}
for (uint i = thread_in_row; i < length; i += threads) {{
  out[start + i] = O(float(x[start + i]) * scale * float(weight[i]));
}}
"""
_LAYERNORM = f"""{POSITION}{_ROW}{_MEAN_AND_SCALE}
for (uint i = thread_in_row; i < length; i += threads) {{
  float normed = (float(x[start + i]) - mean) * scale;
  out[start + i] = O(normed * float(gamma[i]) + float(beta[i]));
}}
"""
# A backward gives each threadgroup several rows; it adds them up into a part of its own of the
# weights' gradients, where each element belongs to one thread.
_ROWS = """
uint length = x_shape[x_ndim - 1];
uint rows = 1;
for (int axis = 0; axis < x_ndim - 1; ++axis) {
  rows *= x_shape[axis];
}
uint first = row;
uint step = threadgroups_per_grid.x;
for (; row < rows; row += step) {
  size_t start = size_t(row) * length;
"""
_RMSNORM_GRAD = f"""{POSITION}{_ROWS}{_RMS}
  float along = 0.0f;
  for (uint i = thread_in_row; i < length; i += threads) {{
    along += float(cotan[start + i]) * float(weight[i]) * float(x[start + i]) * scale;
  }}
  along = row_sum(along, partial, lane, group, groups) / float(length);
  for (uint i = thread_in_row; i < length; i += threads) {{
    float normed = float(x[start + i]) * scale;
    float g = float(cotan[start + i]);
    size_t part = size_t(first) * length + i;
    dx[start + i] = T(scale * (g * float(weight[i]) - normed * along));
    dweight[part] = (row == first ? 0.0f : dweight[part]) + g * normed;
  }}
}}
"""
_LAYERNORM_GRAD = f"""{POSITION}{_ROWS}{_MEAN_AND_SCALE}
  float along = 0.0f;
  float total = 0.0f;
  for (uint i = thread_in_row; i < length; i += threads) {{
    float h = float(cotan[start + i]) * float(gamma[i]);
    total += h;
    along += h * (float(x[start + i]) - mean) * scale;
  }}
  total = row_sum(total, partial, lane, group, groups) / float(length);
  along = row_sum(along, partial, lane, group, groups) / float(length);
  for (uint i = thread_in_row; i < length; i += threads) {{
    float normed = (float(x[start + i]) - mean) * scale;
    float g = float(cotan[start + i]);
    size_t part = size_t(first) * length + i;
    dx[start + i] = T(scale * (g * float(gamma[i]) - total - normed * along));
    dgamma[part] = (row == first ? 0.0f : dgamma[part]) + g * normed;
    dbeta[part] = (row == first ? 0.0f : dbeta[part]) + g;
  }}
}}
"""


def _forward_geometry(x: mx.array, weights: dict[str, mx.array], threadgroup: int) -> Geometry:
    length = check_rows(x=x)
    check_vectors(length, **weights)
    threads = row_threads(length, threadgroup)
    dtype = mx.result_type(x, *weights.values())
    return Geometry(
        grid=(count_rows(x) * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=(x.shape,),
        output_dtypes=(dtype,),
        template=(("O", dtype),),
    )


def _rmsnorm_geometry(
    x: mx.array, weight: mx.array, *, eps: float = 1e-6, threadgroup: int = 256
) -> Geometry:
    return _forward_geometry(x, {"weight": weight}, threadgroup)


def _layernorm_geometry(
    x: mx.array, gamma: mx.array, beta: mx.array, *, eps: float = 1e-5, threadgroup: int = 256
) -> Geometry:
    return _forward_geometry(x, {"gamma": gamma, "beta": beta}, threadgroup)


def _backward_geometry(
    x: mx.array, weight: mx.array, cotan: mx.array, weights: int, threadgroup: int
) -> Geometry:
    length = check_rows(x=x, cotan=cotan)
    check_vectors(length, weight=weight)
    check_same_shape(x=x, cotan=cotan)
    threads = row_threads(length, threadgroup)
    parts = min(count_rows(x), _MOST_PARTS)
    return Geometry(
        grid=(parts * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=(x.shape, *[(parts, length)] * weights),
        output_dtypes=(x.dtype, *[mx.float32] * weights),
        template=(("T", x.dtype),),
    )


def _rmsnorm_grad_geometry(
    x: mx.array, weight: mx.array, cotan: mx.array, *, eps: float = 1e-6, threadgroup: int = 256
) -> Geometry:
    return _backward_geometry(x, weight, cotan, 1, threadgroup)


def _layernorm_grad_geometry(
    x: mx.array, gamma: mx.array, cotan: mx.array, *, eps: float = 1e-5, threadgroup: int = 256
) -> Geometry:
    return _backward_geometry(x, gamma, cotan, 2, threadgroup)


def _summed(outputs: list[mx.array], arrays: tuple[mx.array, ...]) -> tuple[mx.array, ...]:
    """Add up the parts of the weights' gradients."""
    dx, *parts = outputs
    return dx, *(part.sum(axis=0).astype(arrays[1].dtype) for part in parts)


def _rmsnorm_gradient(
    primals: tuple[mx.array, ...], cotangent: mx.array, output: mx.array, **options: Any
) -> Any:
    return RMSNORM_GRAD(*primals, cotangent, **options)


def _layernorm_gradient(
    primals: tuple[mx.array, ...], cotangent: mx.array, output: mx.array, **options: Any
) -> list[mx.array]:
    x, gamma, beta = primals
    dx, dgamma, dbeta = LAYERNORM_GRAD(x, gamma, cotangent, **options)
    return [dx, dgamma, dbeta.astype(beta.dtype)]


def _normal(*shape: int, dtype: mx.Dtype, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def _sample_of(weights: int, cotangents: int, dtype: mx.Dtype, length: int, eps: float) -> Sample:
    x = _normal(2, 5, length, dtype=dtype, seed=1)
    vectors = [1 + _normal(length, dtype=dtype, seed=2 + i) / 2 for i in range(weights)]
    rest = [_normal(2, 5, length, dtype=dtype, seed=9)] * cotangents
    return Sample((x, *vectors, *rest), {"eps": eps})


def _rmsnorm_sample(*, dtype: mx.Dtype, length: int) -> Sample:
    return _sample_of(1, 0, dtype, length, 1e-6)


def _rmsnorm_grad_sample(*, dtype: mx.Dtype, length: int) -> Sample:
    return _sample_of(1, 1, dtype, length, 0.5)


def _layernorm_sample(*, dtype: mx.Dtype, length: int) -> Sample:
    return _sample_of(2, 0, dtype, length, 0.5)


def _layernorm_grad_sample(*, dtype: mx.Dtype, length: int) -> Sample:
    return _sample_of(1, 1, dtype, length, 0.5)


def _definition(
    name: str, input_names: tuple[str, ...], output_names: tuple[str, ...], source: str
) -> Definition:
    return Definition(
        name=name,
        input_names=(*input_names, "eps"),
        output_names=output_names,
        source=source,
        header=REDUCTIONS,
    )


_CONTRACT = {"metal": "tighter", "cuda": "tighter"}
_X = "x (..., D) float32, float16 or bfloat16"

RMSNORM_GRAD = register(
    KernelSpec(
        name="rmsnorm_grad",
        domain="norms",
        formula="dx[i] = r * (g[i] w[i] - n[i] mean(g w n)), dw = sum(g n), n = x * r",
        shapes=(_X, "w (D,) float", "g like x", "dx like x", "dw like w"),
        reference=_rmsnorm_grad_reference,
        sample=_rmsnorm_grad_sample,
        contract=_CONTRACT,
        definition=_definition(
            "rmsnorm_grad", ("x", "weight", "cotan"), ("dx", "dweight"), _RMSNORM_GRAD
        ),
        geometry=_rmsnorm_grad_geometry,
        finish=_summed,
    )
)

RMSNORM = register(
    KernelSpec(
        name="rmsnorm",
        domain="norms",
        formula="y[i] = x[i] / sqrt(mean(x^2) + eps) * w[i]",
        shapes=(_X, "w (D,) float", "y (..., D), the dtype to which those of x and w promote"),
        reference=_rmsnorm_reference,
        sample=_rmsnorm_sample,
        contract=_CONTRACT,
        definition=_definition("rmsnorm", ("x", "weight"), ("out",), _RMSNORM),
        geometry=_rmsnorm_geometry,
        gradient=_rmsnorm_gradient,
        batched=(True, False),
    )
)

LAYERNORM_GRAD = register(
    KernelSpec(
        name="layernorm_grad",
        domain="norms",
        formula=(
            "dx[i] = r * (h[i] - mean(h) - n[i] mean(h n)), dgamma = sum(g n), dbeta = sum(g), "
            "h = g * gamma, n = (x - mean(x)) * r"
        ),
        shapes=(_X, "gamma (D,) float", "g like x", "dx like x", "dgamma, dbeta like gamma"),
        reference=_layernorm_grad_reference,
        sample=_layernorm_grad_sample,
        contract=_CONTRACT,
        definition=_definition(
            "layernorm_grad", ("x", "gamma", "cotan"), ("dx", "dgamma", "dbeta"), _LAYERNORM_GRAD
        ),
        geometry=_layernorm_grad_geometry,
        finish=_summed,
    )
)

LAYERNORM = register(
    KernelSpec(
        name="layernorm",
        domain="norms",
        formula="y[i] = (x[i] - mean(x)) / sqrt(var(x) + eps) * gamma[i] + beta[i]",
        shapes=(_X, "gamma, beta (D,) float", "y (..., D), the dtype to which all promote"),
        reference=_layernorm_reference,
        sample=_layernorm_sample,
        contract=_CONTRACT,
        definition=_definition("layernorm", ("x", "gamma", "beta"), ("out",), _LAYERNORM),
        geometry=_layernorm_geometry,
        gradient=_layernorm_gradient,
        batched=(True, False, False),
    )
)


@takes_compute_dtype
def rmsnorm(
    x: mx.array, weight: mx.array, *, eps: float = 1e-6, threadgroup: int = 256
) -> mx.array:
    """Divide each row by its root mean square, and multiply by a weight.

    Args:
        x: (..., D) float32, float16 or bfloat16, any D.
        weight: (D,) float32, float16 or bfloat16.
        eps: added to the mean square.
        threadgroup: threads that share a row, a multiple of 32 up to 1,024; fewer if D is small.

    Returns:
        Shape of `x`, in the dtype to which MLX promotes the two; computed in float32.

    Raises:
        TypeError: another dtype, or `threadgroup` is no int.
        ValueError: `x` has no axes, `weight` is not of shape (D,), or `threadgroup` is not such a
            multiple.
    """
    return RMSNORM(x, weight, eps=eps, threadgroup=threadgroup)  # type: ignore[no-any-return]


@takes_compute_dtype
def rmsnorm_grad(
    x: mx.array, weight: mx.array, cotan: mx.array, *, eps: float = 1e-6, threadgroup: int = 256
) -> tuple[mx.array, mx.array]:
    """Return the gradients of `rmsnorm` with respect to `x` and `weight`.

    Args:
        x: as of `rmsnorm`.
        weight: as of `rmsnorm`.
        cotan: the gradient with respect to the output, of the shape of `x`.
        eps: as of `rmsnorm`.
        threadgroup: as of `rmsnorm`.

    Returns:
        Two arrays with shapes and dtypes of `x` and `weight`; sums run in float32.

    Raises:
        TypeError: as of `rmsnorm`.
        ValueError: as of `rmsnorm`, or `cotan` has another shape than `x`.
    """
    return RMSNORM_GRAD(x, weight, cotan, eps=eps, threadgroup=threadgroup)  # type: ignore[no-any-return]


@takes_compute_dtype
def layernorm(
    x: mx.array,
    gamma: mx.array,
    beta: mx.array,
    *,
    eps: float = 1e-5,
    threadgroup: int = 256,
) -> mx.array:
    """Subtract each row's mean, divide by its standard deviation, multiply and add.

    Args:
        x: (..., D) float32, float16 or bfloat16, any D.
        gamma: (D,) float32, float16 or bfloat16; it multiplies.
        beta: (D,) float32, float16 or bfloat16; it is added.
        eps: added to the variance.
        threadgroup: threads that share a row, a multiple of 32 up to 1,024; fewer if D is small.

    Returns:
        Shape of `x`, in the dtype to which MLX promotes the three; computed in float32.

    Raises:
        TypeError: another dtype, or `threadgroup` is no int.
        ValueError: `x` has no axes, `gamma` or `beta` are not of shape (D,), or `threadgroup` is
            not such a multiple.
    """
    return LAYERNORM(x, gamma, beta, eps=eps, threadgroup=threadgroup)  # type: ignore[no-any-return]
