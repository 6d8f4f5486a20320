"""Run a part of a test on the CPU, on a machine that has a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx


@contextmanager
def on_cpu() -> Iterator[None]:
    """Let MLX run on the CPU until the block ends.

    Of products of float32 and quantized weights MLX 0.32.4 has some on CUDA devices that are wrong,
    differently each time, when there are few tokens and rows are short, and lacks others.
    """
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        yield
    finally:
        mx.set_default_device(before)
