"""The launch of a kernel whose body was written for CUDA by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx

from zmlx.backend.cuda.addresses import Forms, current
from zmlx.backend.cuda.included import shortened
from zmlx.backend.cuda.source import CudaSource
from zmlx.backend.definition import Definition, Launch


def handwritten(definition: Definition) -> Launch:
    """Return a kernel with a body of its own for CUDA as a function of arrays.

    Raises:
        RuntimeError: this MLX has no CUDA.
    """
    text = definition.cuda or ""

    def make(key: object, told: str, names: Sequence[str]) -> Any:
        del key
        given = CudaSource(definition.cuda_header, text, definition.input_names)
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
        return any(f"{name}_{what}" in text for what in ("shape", "strides", "ndim"))

    plain = make(None, "", definition.input_names)
    forms = Forms(make, asks_about)

    def launch(*, inputs: Sequence[Any], **rest: Any) -> list[mx.array]:
        held = current()
        if held is None:
            return plain(inputs=inputs, **rest)  # type: ignore[no-any-return]
        kernel, left = forms.choose(held, None, definition.input_names, inputs, plain)
        return kernel(inputs=left, **rest)  # type: ignore[no-any-return]

    return cast(Launch, launch)
