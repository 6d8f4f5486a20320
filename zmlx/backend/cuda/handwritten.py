"""The launch of a kernel whose body was written for CUDA by hand, and the devices that take it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx

from zmlx.backend.capability import architecture
from zmlx.backend.cuda.addresses import Forms
from zmlx.backend.cuda.ahead import Kernel
from zmlx.backend.cuda.included import shortened
from zmlx.backend.cuda.launching import current
from zmlx.backend.cuda.source import CudaSource
from zmlx.backend.definition import CudaBody, Definition, Launch, Template

#: MLX writes the kernel's signature, and has no place in it for what the compiler has to know.
_GLOBAL = "#undef __global__\n#define __global__ __attribute__((global)){}\n"


def own_body(definition: Definition) -> CudaBody | None:
    """Return a definition's body for CUDA, if it has one that this device takes."""
    body = definition.cuda
    return body if body is not None and body.architecture <= architecture() else None


def own_source(definition: Definition, body: CudaBody) -> CudaSource:
    """Return the text of a kernel with a body of its own."""
    bounds = f" __launch_bounds__({body.threads})" if body.threads else ""
    if body.cluster > 1:
        bounds += f" __cluster_dims__({body.cluster}, 1, 1)"
    header = (_GLOBAL.format(bounds) if bounds else "") + body.header
    return CudaSource(header, body.source, definition.input_names)


def own_launch(definition: Definition, body: CudaBody) -> Launch:
    """Return a kernel with a body of its own for CUDA as a function of arrays.

    Its launch is laid out as the body says, where it says it.

    Raises:
        RuntimeError: this MLX has no CUDA.
    """
    layout = {}
    if body.launch is not None:
        layout = dict(zip(("grid", "threadgroup"), body.launch, strict=True))

    def make(key: object, told: str, names: Sequence[str]) -> Kernel:
        del key
        whole = own_source(definition, body)
        source = shortened(whole, definition.name)
        return Kernel(
            definition.name,
            names,
            definition.output_names,
            source,
            ensure_row_contiguous=definition.ensure_row_contiguous,
            whole=whole,
            told=told,
            early=body.early,
            cluster=body.cluster,
        )

    def asks_about(name: str) -> bool:
        return any(f"{name}_{what}" in body.source for what in ("shape", "strides", "ndim"))

    plain = make(None, "", definition.input_names)
    forms = Forms(make, asks_about)

    def launch(
        *,
        inputs: Sequence[Any],
        output_dtypes: Sequence[mx.Dtype],
        template: Template | None = None,
        **rest: Any,
    ) -> list[mx.array]:
        rest.update(layout)
        kernel, how = plain, current()
        if how is not None and how.addresses is not None:
            names = definition.input_names
            kernel, inputs = forms.choose(how.addresses, None, names, inputs, plain)
        if output_dtypes != kernel.output_dtypes or template != kernel.template:
            kernel.notice(inputs, output_dtypes, template)
        run = kernel.run if how is None else how.run_of(kernel)
        return run(  # type: ignore[no-any-return]
            inputs=inputs, output_dtypes=output_dtypes, template=template, **rest
        )

    return cast(Launch, launch)
