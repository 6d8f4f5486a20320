"""Softmax over the last axis by the catalog's kernel, on GPUs, where it is asked for.

Before   mx.softmax(x, axis=-1)             sums in the dtype of x, unless `precise=True`
After    softmax_lastdim(x)                 sums in float32

Found as a call in a module's own forward. A softmax over another axis or over several, or of other
dtypes than float32, float16 and bfloat16, stays MLX's.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from zmlx.kernels.softmax import SOFTMAX
from zmlx.patch.calls import CallPattern, are_floats
from zmlx.patch.pattern import KernelUse

OPTIONS: dict[str, str] = {}


def _softmax(a: mx.array, axis: Any = None, *, precise: bool = False) -> mx.array:
    if not are_floats(a) or not isinstance(axis, int) or axis not in (-1, a.ndim - 1):
        return mx.softmax(a, axis, precise=precise)
    return SOFTMAX(a)  # type: ignore[no-any-return]


PATTERN = CallPattern(
    "softmax",
    mx.softmax,
    _softmax,
    tuple(KernelUse(SOFTMAX, {"dtype": d, "length": 255}) for d in (mx.float32, mx.bfloat16)),
    "MLX has one kernel for it too, and a call of ours costs the host a few microseconds more",
)
