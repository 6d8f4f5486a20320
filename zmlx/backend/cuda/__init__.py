"""Kernels in Metal's language on CUDA: translated once, launched by `mx.fast.cuda_kernel`."""

from __future__ import annotations

from typing import cast

import mlx.core as mx

from zmlx.backend.cuda.included import shortened
from zmlx.backend.cuda.kernel import launch_of
from zmlx.backend.cuda.source import CudaSource, Translation, Variant
from zmlx.backend.cuda.text import text
from zmlx.backend.cuda.tokens import TranslationError
from zmlx.backend.definition import Definition, Launch

__all__ = ["CudaSource", "TranslationError", "Variant", "compiled", "text", "translated"]


def compiled(definition: Definition) -> Launch:
    """Return a definition as a function of arrays on CUDA.

    A body written for CUDA by hand (`definition.cuda`) is taken as it is, with `cuda_header` and
    without the prelude: it gets what `mx.fast.cuda_kernel` gives, whole blocks included.

    Raises:
        TranslationError: the source holds something that CUDA has not; the text says what, where.
        RuntimeError: this MLX has no CUDA.
    """
    if definition.cuda is None:
        return launch_of(definition)
    source = shortened(translated(definition), definition.name)
    return cast(
        Launch,
        mx.fast.cuda_kernel(
            name=definition.name,
            input_names=list(definition.input_names),
            output_names=list(definition.output_names),
            source=source.body,
            header=source.header,
            ensure_row_contiguous=definition.ensure_row_contiguous,
        ),
    )


def translated(definition: Definition, variant: Variant | None = None) -> CudaSource:
    """Return the text that `mx.fast.cuda_kernel` gets for a definition, for people and tests.

    Raises:
        TranslationError: as for `compiled`.
    """
    if definition.cuda is not None:
        return CudaSource(definition.cuda_header, definition.cuda, definition.input_names)
    return Translation(definition).source(variant or Variant())
