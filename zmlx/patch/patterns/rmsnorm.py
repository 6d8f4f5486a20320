"""RMSNorm by the catalog's kernel, on GPUs, where it is asked for.

Before   mx.fast.rms_norm(x, weight, eps)         rounds the normalised value, then the product
After    rmsnorm(x, weight, eps=eps)              rounds once

Found as a call in a module's own forward, whatever it makes of its weight before. A call without a
weight, or with other dtypes than float32, float16 and bfloat16, stays MLX's.
"""

from __future__ import annotations

import mlx.core as mx

from zmlx.kernels.norms import RMSNORM
from zmlx.patch.calls import CallPattern, are_floats
from zmlx.patch.pattern import KernelUse

OPTIONS: dict[str, str] = {}


def _rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    if weight is None or not are_floats(x, weight):
        return mx.fast.rms_norm(x, weight, eps)
    return RMSNORM(x, weight, eps=eps)  # type: ignore[no-any-return]


PATTERN = CallPattern(
    "rmsnorm",
    mx.fast.rms_norm,
    _rms_norm,
    tuple(KernelUse(RMSNORM, {"dtype": d, "length": 255}) for d in (mx.float32, mx.bfloat16)),
    "MLX has one kernel for it too, and a call of ours costs the host a few microseconds more",
)
