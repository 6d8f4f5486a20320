"""Kernels on Metal, compiled and launched by `mx.fast.metal_kernel`.

What it returns is a `Launch` as it is, so a launch costs here what it costs in MLX, to which
template values, copies of inputs that are not row contiguous, atomic outputs and initial values
are left. MLX writes the kernel's signature anew at each call, from the dtypes of the arrays, and
has the result compiled once; under `mx.compile` it is written once.
"""

from __future__ import annotations

from typing import cast

import mlx.core as mx

from zmlx.backend.definition import Definition, Launch


def compiled(definition: Definition) -> Launch:
    """Return the kernel of a definition. It is compiled by Metal at its first evaluation."""
    kernel = mx.fast.metal_kernel(
        name=definition.name,
        input_names=list(definition.input_names),
        output_names=list(definition.output_names),
        source=definition.source,
        header=definition.header,
        ensure_row_contiguous=definition.ensure_row_contiguous,
        atomic_outputs=definition.atomic_outputs,
    )
    return cast(Launch, kernel)
