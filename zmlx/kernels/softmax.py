"""Softmax along the last axis, its logarithm, and their gradients.

    softmax        y[i] = exp(x[i] - m) / sum_j exp(x[j] - m),    m = max_j x[j]
    log_softmax    y[i] = x[i] - m - log(sum_j exp(x[j] - m))
    their backward, with the cotangent g:
    softmax        dx[i] = y[i] * (g[i] - sum_j g[j] y[j])
    log_softmax    dx[i] = g[i] - exp(y[i]) * sum_j g[j]

Subtracting the maximum changes nothing in exact arithmetic and keeps exp from overflowing. All is
computed in float32 and rounded once, at the end.
"""

from __future__ import annotations

import mlx.core as mx

from zmlx.backend.definition import Definition
from zmlx.deprecation import takes_compute_dtype
from zmlx.kernels.calling import Geometry
from zmlx.kernels.rows import (
    POSITION,
    REDUCTIONS,
    check_rows,
    check_same_shape,
    count_rows,
    row_threads,
    wide,
)
from zmlx.kernels.spec import KernelSpec, Sample, register


def _softmax_reference(x: mx.array) -> mx.array:
    return mx.softmax(wide(x), axis=-1).astype(x.dtype)


def _log_softmax_reference(x: mx.array) -> mx.array:
    return (wide(x) - mx.logsumexp(wide(x), axis=-1, keepdims=True)).astype(x.dtype)


def _softmax_grad_reference(y: mx.array, cotan: mx.array) -> mx.array:
    y_wide, g = wide(y), wide(cotan)
    return (y_wide * (g - (g * y_wide).sum(axis=-1, keepdims=True))).astype(y.dtype)


def _log_softmax_grad_reference(x: mx.array, cotan: mx.array) -> mx.array:
    g = wide(cotan)
    return (g - mx.softmax(wide(x), axis=-1) * g.sum(axis=-1, keepdims=True)).astype(x.dtype)


# Where sources begin: this thread's place in its row, and where the row starts. Sources index
# arrays and take no pointers: MLX puts inputs of fewer than 8 elements into `constant` memory.
_ROW = """
uint length = x_shape[x_ndim - 1];
size_t start = size_t(row) * length;
"""
_NORMALISE = """
float largest = -INFINITY;
for (uint i = thread_in_row; i < length; i += threads) {
  largest = metal::max(largest, float(x[start + i]));
}
largest = row_max(largest, partial, lane, group, groups);
float total = 0.0f;
for (uint i = thread_in_row; i < length; i += threads) {
  total += metal::exp(float(x[start + i]) - largest);
}
total = row_sum(total, partial, lane, group, groups);
"""
_SOFTMAX = f"""{POSITION}{_ROW}{_NORMALISE}
for (uint i = thread_in_row; i < length; i += threads) {{
  out[start + i] = T(metal::exp(float(x[start + i]) - largest) / total);
}}
"""
_LOG_SOFTMAX = f"""{POSITION}{_ROW}{_NORMALISE}
float log_total = metal::log(total);
for (uint i = thread_in_row; i < length; i += threads) {{
  out[start + i] = T(float(x[start + i]) - largest - log_total);
}}
"""
_SOFTMAX_GRAD = f"""{POSITION}{_ROW.replace("x_", "y_")}
float total = 0.0f;
for (uint i = thread_in_row; i < length; i += threads) {{
  total += float(cotan[start + i]) * float(y[start + i]);
}}
total = row_sum(total, partial, lane, group, groups);
for (uint i = thread_in_row; i < length; i += threads) {{
  out[start + i] = T(float(y[start + i]) * (float(cotan[start + i]) - total));
}}
"""
_LOG_SOFTMAX_GRAD = f"""{POSITION}{_ROW}{_NORMALISE}
float sum_of_cotan = 0.0f;
for (uint i = thread_in_row; i < length; i += threads) {{
  sum_of_cotan += float(cotan[start + i]);
}}
sum_of_cotan = row_sum(sum_of_cotan, partial, lane, group, groups);
for (uint i = thread_in_row; i < length; i += threads) {{
  float y = metal::exp(float(x[start + i]) - largest) / total;
  out[start + i] = T(float(cotan[start + i]) - y * sum_of_cotan);
}}
"""


def _geometry(x: mx.array, *, threadgroup: int = 256) -> Geometry:
    """Lay out one threadgroup for each row of `x`, for an output like `x`."""
    length = check_rows(x=x)
    threads = row_threads(length, threadgroup)
    return Geometry(
        grid=(count_rows(x) * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=(x.shape,),
        output_dtypes=(x.dtype,),
        template=(("T", x.dtype),),
    )


def _grad_geometry(x: mx.array, cotan: mx.array, *, threadgroup: int = 256) -> Geometry:
    check_rows(cotan=cotan)
    check_same_shape(first=x, cotan=cotan)
    return _geometry(x, threadgroup=threadgroup)


def _softmax_gradient(
    primals: tuple[mx.array, ...], cotangent: mx.array, output: mx.array, **options: int
) -> list[mx.array]:
    return [SOFTMAX_GRAD(output, cotangent, **options)]


def _log_softmax_gradient(
    primals: tuple[mx.array, ...], cotangent: mx.array, output: mx.array, **options: int
) -> list[mx.array]:
    return [LOG_SOFTMAX_GRAD(primals[0], cotangent, **options)]


def _rows_of(dtype: mx.Dtype, length: int, seed: int) -> mx.array:
    return 3 * mx.random.normal((2, 3, length), key=mx.random.key(seed)).astype(dtype)


def _sample(*, dtype: mx.Dtype, length: int) -> Sample:
    return Sample((_rows_of(dtype, length, 1),))


def _grad_sample(*, dtype: mx.Dtype, length: int) -> Sample:
    return Sample((_rows_of(dtype, length, 1), _rows_of(dtype, length, 2)))


def _softmax_grad_sample(*, dtype: mx.Dtype, length: int) -> Sample:
    y = mx.softmax(_rows_of(dtype, length, 1), axis=-1)
    return Sample((y, _rows_of(dtype, length, 2)))


_CONTRACT = {"metal": "tighter", "cuda": "tighter"}
_ROWS = ("x (..., D) float32, float16 or bfloat16", "y like x")

SOFTMAX_GRAD = register(
    KernelSpec(
        name="softmax_grad",
        domain="softmax",
        formula="dx[i] = y[i] * (g[i] - sum_j g[j] y[j])",
        shapes=("y (..., D) float32, float16 or bfloat16", "g like y", "dx like y"),
        reference=_softmax_grad_reference,
        sample=_softmax_grad_sample,
        contract=_CONTRACT,
        definition=Definition(
            name="softmax_grad",
            input_names=("y", "cotan"),
            output_names=("out",),
            source=_SOFTMAX_GRAD,
            header=REDUCTIONS,
        ),
        geometry=_grad_geometry,
        batched=(True, True),
    )
)

SOFTMAX = register(
    KernelSpec(
        name="softmax_lastdim",
        domain="softmax",
        formula="y[i] = exp(x[i] - m) / sum_j exp(x[j] - m), m = max_j x[j]",
        shapes=_ROWS,
        reference=_softmax_reference,
        sample=_sample,
        contract=_CONTRACT,
        definition=Definition(
            name="softmax_lastdim",
            input_names=("x",),
            output_names=("out",),
            source=_SOFTMAX,
            header=REDUCTIONS,
        ),
        geometry=_geometry,
        gradient=_softmax_gradient,
        batched=(True,),
    )
)

LOG_SOFTMAX_GRAD = register(
    KernelSpec(
        name="log_softmax_grad",
        domain="softmax",
        formula="dx[i] = g[i] - softmax(x)[i] * sum_j g[j]",
        shapes=("x (..., D) float32, float16 or bfloat16", "g like x", "dx like x"),
        reference=_log_softmax_grad_reference,
        sample=_grad_sample,
        contract=_CONTRACT,
        definition=Definition(
            name="log_softmax_grad",
            input_names=("x", "cotan"),
            output_names=("out",),
            source=_LOG_SOFTMAX_GRAD,
            header=REDUCTIONS,
        ),
        geometry=_grad_geometry,
        batched=(True, True),
    )
)

LOG_SOFTMAX = register(
    KernelSpec(
        name="log_softmax_lastdim",
        domain="softmax",
        formula="y[i] = x[i] - m - log(sum_j exp(x[j] - m)), m = max_j x[j]",
        shapes=_ROWS,
        reference=_log_softmax_reference,
        sample=_sample,
        contract=_CONTRACT,
        definition=Definition(
            name="log_softmax_lastdim",
            input_names=("x",),
            output_names=("out",),
            source=_LOG_SOFTMAX,
            header=REDUCTIONS,
        ),
        geometry=_geometry,
        gradient=_log_softmax_gradient,
        batched=(True,),
    )
)


@takes_compute_dtype
def softmax_lastdim(x: mx.array, *, threadgroup: int = 256) -> mx.array:
    """Return the softmax of each row, the last axis.

    Args:
        x: (..., D) float32, float16 or bfloat16, any D.
        threadgroup: threads that share a row, a multiple of 32 up to 1,024; fewer if D is small.

    Returns:
        Shape and dtype of `x`, computed in float32.

    Raises:
        TypeError: `x` has another dtype, or `threadgroup` is no int.
        ValueError: `x` has no axes, or `threadgroup` is not such a multiple.
    """
    return SOFTMAX(x, threadgroup=threadgroup)  # type: ignore[no-any-return]


@takes_compute_dtype
def log_softmax_lastdim(x: mx.array, *, threadgroup: int = 256) -> mx.array:
    """Return the logarithm of the softmax of each row; arguments as of `softmax_lastdim`."""
    return LOG_SOFTMAX(x, threadgroup=threadgroup)  # type: ignore[no-any-return]


@takes_compute_dtype
def softmax_grad(y: mx.array, cotan: mx.array, *, threadgroup: int = 256) -> mx.array:
    """Return the gradient of a softmax with respect to its input.

    Args:
        y: (..., D) the softmax.
        cotan: the gradient with respect to `y`, of its shape.
        threadgroup: as of `softmax_lastdim`.

    Returns:
        Shape and dtype of `y`, computed in float32.

    Raises:
        TypeError: a dtype other than float32, float16 or bfloat16, or `threadgroup` is no int.
        ValueError: different shapes, no axes, or a `threadgroup` that does not fit.
    """
    return SOFTMAX_GRAD(y, cotan, threadgroup=threadgroup)  # type: ignore[no-any-return]
