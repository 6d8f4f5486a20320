"""Kernels in Metal's language on CUDA: translated once, launched by `mx.fast.cuda_kernel`."""

from __future__ import annotations

from zmlx.backend.cuda.handwritten import handwritten
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
    return launch_of(definition) if definition.cuda is None else handwritten(definition)


def translated(definition: Definition, variant: Variant | None = None) -> CudaSource:
    """Return the text that `mx.fast.cuda_kernel` gets for a definition, for people and tests.

    Raises:
        TranslationError: as for `compiled`.
    """
    if definition.cuda is not None:
        return CudaSource(definition.cuda_header, definition.cuda, definition.input_names)
    return Translation(definition).source(variant or Variant())
