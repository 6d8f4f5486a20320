"""The end of one half of a transformer's layer and the beginning of the next, in one pass.

    add_rmsnorm    h = x + r,    y[i] = h[i] / sqrt(mean(h^2) + eps) * w[i]

h is rounded as MLX rounds the sum; y is made of the sum before it is rounded, in float32, and
rounded once.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from zmlx.backend.definition import Definition
from zmlx.kernels.calling import Geometry
from zmlx.kernels.rows import (
    POSITION,
    REDUCTIONS,
    check_floats,
    check_rows,
    check_same_shape,
    check_vectors,
    count_rows,
    row_threads,
    wide,
)
from zmlx.kernels.spec import KernelSpec, Sample, register

_SOURCE = f"""{POSITION}
uint length = x_shape[x_ndim - 1];
size_t start = size_t(row) * length;
float squares = 0.0f;
for (uint i = thread_in_row; i < length; i += threads) {{
  float a = float(x[start + i]) + float(r[start + i]);
  h[start + i] = H(a);
  squares += a * a;
}}
squares = row_sum(squares, partial, lane, group, groups);
float scale = metal::precise::rsqrt(squares / float(length) + eps);
for (uint i = thread_in_row; i < length; i += threads) {{
  float a = float(x[start + i]) + float(r[start + i]);
  y[start + i] = O(a * scale * float(weight[i]));
}}
"""


def _reference(
    x: mx.array, r: mx.array, weight: mx.array, *, eps: float = 1e-6
) -> tuple[mx.array, mx.array]:
    a = wide(x) + wide(r)
    scale = mx.rsqrt((a * a).mean(axis=-1, keepdims=True) + eps)
    y = (a * scale * wide(weight)).astype(mx.result_type(x, r, weight))
    return a.astype(mx.result_type(x, r)), y


def _geometry(
    x: mx.array, r: mx.array, weight: mx.array, *, eps: float = 1e-6, threadgroup: int = 256
) -> Geometry:
    length = check_rows(x=x)
    check_floats(r=r)
    check_same_shape(x=x, r=r)
    check_vectors(length, weight=weight)
    threads = row_threads(length, threadgroup)
    dtypes = mx.result_type(x, r), mx.result_type(x, r, weight)
    return Geometry(
        grid=(count_rows(x) * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=(x.shape, x.shape),
        output_dtypes=dtypes,
        template=(("H", dtypes[0]), ("O", dtypes[1])),
    )


def _normal(*shape: int, dtype: mx.Dtype, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def _sample(*, dtype: mx.Dtype, length: int) -> Sample:
    x, r = (_normal(2, 5, length, dtype=dtype, seed=seed) for seed in (1, 2))
    options: dict[str, Any] = {"eps": 1e-6}
    return Sample((x, r, 1 + _normal(length, dtype=dtype, seed=3) / 2), options)


ADD_RMSNORM = register(
    KernelSpec(
        name="add_rmsnorm",
        domain="norms",
        formula="h = x + r, y[i] = h[i] / sqrt(mean(h^2) + eps) * w[i]",
        shapes=(
            "x (..., D) float32, float16 or bfloat16",
            "r like x",
            "w (D,) float",
            "h, y (..., D), the dtypes to which x + r, and that with w, promote",
        ),
        reference=_reference,
        sample=_sample,
        contract={"metal": "tighter", "cuda": "tighter"},
        definition=Definition(
            name="add_rmsnorm",
            input_names=("x", "r", "weight", "eps"),
            output_names=("h", "y"),
            source=_SOURCE,
            header=REDUCTIONS,
        ),
        geometry=_geometry,
        batched=(True, True, False),
    )
)
