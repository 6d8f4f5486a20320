"""The launch of a kernel whose body was written for CUDA by hand, and the devices that take it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx

from zmlx.backend.capability import architecture
from zmlx.backend.cuda.addresses import Forms, current
from zmlx.backend.cuda.included import shortened
from zmlx.backend.cuda.source import CudaSource
from zmlx.backend.definition import CudaBody, Definition, Launch


def own_body(definition: Definition) -> CudaBody | None:
    """Return a definition's body for CUDA, if it has one that this device takes."""
    body = definition.cuda
    return body if body is not None and body.architecture <= architecture() else None


def own_launch(definition: Definition, body: CudaBody) -> Launch:
    """Return a kernel with a body of its own for CUDA as a function of arrays.

    Its launch is laid out as the body says, where it says it.

    Raises:
        RuntimeError: this MLX has no CUDA.
    """
    layout = {}
    if body.launch is not None:
        layout = dict(zip(("grid", "threadgroup"), body.launch, strict=True))

    def make(key: object, told: str, names: Sequence[str]) -> Any:
        del key
        given = CudaSource(body.header, body.source, definition.input_names)
        source = shortened(given, definition.name)
        return mx.fast.cuda_kernel(
            name=definition.name,
            input_names=list(names),
            output_names=list(definition.output_names),
            source=told + source.body,
            header=source.header,
            ensure_row_contiguous=definition.ensure_row_contiguous,
        )

    def asks_about(name: str) -> bool:
        return any(f"{name}_{what}" in body.source for what in ("shape", "strides", "ndim"))

    plain = make(None, "", definition.input_names)
    forms = Forms(make, asks_about)

    def launch(*, inputs: Sequence[Any], **rest: Any) -> list[mx.array]:
        rest.update(layout)
        held = current()
        if held is None:
            return plain(inputs=inputs, **rest)  # type: ignore[no-any-return]
        kernel, left = forms.choose(held, None, definition.input_names, inputs, plain)
        return kernel(inputs=left, **rest)  # type: ignore[no-any-return]

    return cast(Launch, launch)
