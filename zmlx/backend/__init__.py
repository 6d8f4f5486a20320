"""Where MLX runs here: Metal, CUDA or CPU."""

from __future__ import annotations

import mlx.core as mx

#: Backends in the order in which MLX prefers them.
BACKENDS = ("metal", "cuda", "cpu")


def current() -> str:
    """Return the backend of MLX's default device: "metal", "cuda" or "cpu"."""
    if mx.default_device() == mx.Device(mx.cpu):
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"
