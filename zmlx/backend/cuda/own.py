"""Bodies that were written for CUDA by hand, and the devices that take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx

from zmlx.backend.definition import Definition, Launch


def has_own_body(definition: Definition) -> bool:
    """Whether a definition has a body that this device takes; any does where there is no device."""
    return definition.cuda is not None and definition.cuda.architecture <= architecture()


def architecture() -> int:
    """Return the compute capability of the device, times ten."""
    if not mx.cuda.is_available():
        return 1000
    facts = mx.device_info(mx.Device(mx.gpu))
    return 10 * int(facts["compute_capability_major"]) + int(facts["compute_capability_minor"])


def own_launch(definition: Definition) -> Launch:
    """Return a body as it is, with its header and without the prelude, as a function of arrays.

    Its launch is laid out as the body says, where it says it.
    """
    body = definition.cuda
    assert body is not None
    kernel = cast(
        Launch,
        mx.fast.cuda_kernel(
            name=definition.name,
            input_names=list(definition.input_names),
            output_names=list(definition.output_names),
            source=body.source,
            header=body.header,
            ensure_row_contiguous=definition.ensure_row_contiguous,
        ),
    )
    if body.launch is None:
        return kernel
    own_grid, own_threadgroup = body.launch

    def launch(
        *,
        inputs: Sequence[mx.array | float | int | bool],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        **given: Any,
    ) -> list[mx.array]:
        return kernel(inputs=inputs, grid=own_grid, threadgroup=own_threadgroup, **given)

    return launch
