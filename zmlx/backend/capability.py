"""What the CUDA device can do."""

from __future__ import annotations

from functools import cache

import mlx.core as mx


@cache
def has_tensor_cores() -> bool:
    """Whether it has tensor cores that multiply bfloat16 (`mma.sync.m16n8k16`, from 8.0 on)."""
    major = mx.device_info(mx.gpu).get("compute_capability_major", 0)
    return int(major) >= 8
