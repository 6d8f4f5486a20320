"""What the CUDA device can do."""

from __future__ import annotations

from functools import cache

import mlx.core as mx

#: More than any device has: what counts where there is none, and texts are only looked at.
_ANY = 10000


@cache
def architecture() -> int:
    """Return the compute capability of the device, times ten."""
    if not mx.cuda.is_available():
        return _ANY
    facts = mx.device_info(mx.Device(mx.gpu))
    return 10 * int(facts["compute_capability_major"]) + int(facts["compute_capability_minor"])


def has_tensor_cores() -> bool:
    """Whether there is a device that multiplies bfloat16 (`mma.sync.m16n8k16`, from 8.0 on)."""
    return mx.cuda.is_available() and architecture() >= 80
