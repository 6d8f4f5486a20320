"""What a GPU's own kernels of MLX cannot do, or do wrong, for the zoo's tiny models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import mlx.core as mx
import pytest

ON_GPU = mx.is_available(mx.gpu)

Result = TypeVar("Result")


@contextmanager
def on_cpu() -> Iterator[None]:
    """Let MLX run on the CPU until the block ends.

    Of products of float32 and quantized weights MLX 0.32.4 has some on CUDA devices that are wrong,
    differently each time, when there are few tokens and rows are short, and lacks others.

    Only first prompts are read here, whose caches are new. An array that a GPU has made is moved to
    the host's memory by whoever asks for it first, and that may be two threads of MLX's at once:
    the one that plans a product, and the one that copies. Then what was written to it is lost.
    """
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        yield
    finally:
        mx.set_default_device(before)


def of_stock(run: Callable[[], Result]) -> Result:
    """Return what a run of a stock model gives; on a GPU that has no kernel for it the test ends.

    What a patched model leaves to MLX cannot run there either.
    """
    try:
        return run()
    except Exception as failure:
        if ON_GPU:
            pytest.xfail(f"the stock model on this GPU: {failure}")
        raise
