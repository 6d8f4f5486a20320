"""LayerNorm by the catalog's kernel, on GPUs, where it is asked for.

Before   mx.fast.layer_norm(x, weight, bias, eps)     rounds the normalised value and the product
After    layernorm(x, weight, bias, eps=eps)          rounds once

Found as a call in a module's own forward. A call without a weight or without a bias, or with other
dtypes than float32, float16 and bfloat16, stays MLX's.
"""

from __future__ import annotations

import mlx.core as mx

from zmlx.kernels.norms import LAYERNORM
from zmlx.patch.calls import CallPattern, are_floats
from zmlx.patch.pattern import KernelUse

OPTIONS: dict[str, str] = {}


def _layer_norm(
    x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float
) -> mx.array:
    if weight is None or bias is None or not are_floats(x, weight, bias):
        return mx.fast.layer_norm(x, weight, bias, eps)
    return LAYERNORM(x, weight, bias, eps=eps)  # type: ignore[no-any-return]


PATTERN = CallPattern(
    "layernorm",
    mx.fast.layer_norm,
    _layer_norm,
    tuple(KernelUse(LAYERNORM, {"dtype": d, "length": 255}) for d in (mx.float32, mx.bfloat16)),
    "MLX has one kernel for it too, and a call of ours costs the host a few microseconds more",
)
