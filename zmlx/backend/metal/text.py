"""The text that Metal compiles for a launch, which MLX writes around a kernel's source."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import mlx.core as mx

from zmlx.backend.definition import Definition
from zmlx.backend.metal.kernel import compiled


def text(definition: Definition, **launch: Any) -> str:
    """Return the text of one launch: the header, the signature and the body.

    MLX itself writes it, on any machine: while a function is exported, kernels are recorded and
    not run. What MLX's own prelude puts before it (`bfloat16_t`, `uint`, ...) is left out.

    Args:
        definition: the kernel.
        **launch: arguments of its `Launch`.

    Raises:
        ValueError: MLX does not take these arguments.
    """
    kernel = compiled(definition)
    inputs: Sequence[Any] = launch.pop("inputs")
    positions = [i for i, value in enumerate(inputs) if isinstance(value, mx.array)]

    def recorded(*arrays: mx.array) -> list[mx.array]:
        given = dict(zip(positions, arrays, strict=True))
        values = [given.get(i, value) for i, value in enumerate(inputs)]
        return kernel(inputs=values, verbose=True, **launch)

    with tempfile.TemporaryDirectory() as folder, _stdout() as printed:
        mx.export_function(
            str(Path(folder) / "kernel.mlxfn"), recorded, *(inputs[i] for i in positions)
        )
        printed.seek(0)
        lines = printed.read().splitlines()
    fences = [number for number, line in enumerate(lines) if line == "```"]
    return "\n".join(lines[fences[0] + 1 : fences[-1]]).strip() + "\n"


@contextmanager
def _stdout() -> Iterator[TextIO]:
    """Collect what C++ prints, which does not pass through `sys.stdout`."""
    sys.stdout.flush()
    kept = os.dup(1)
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        try:
            yield file
        finally:
            os.dup2(kept, 1)
            os.close(kept)
