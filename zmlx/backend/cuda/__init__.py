"""Kernels in Metal's language on CUDA: translated once, launched by `mx.fast.cuda_kernel`."""

from __future__ import annotations

from zmlx.backend.cuda.handwritten import own_body, own_launch, own_source
from zmlx.backend.cuda.kernel import launch_of
from zmlx.backend.cuda.source import CudaSource, Translation, Variant
from zmlx.backend.cuda.text import text
from zmlx.backend.cuda.tokens import TranslationError
from zmlx.backend.definition import Definition, Launch

__all__ = ["CudaSource", "TranslationError", "Variant", "compiled", "text", "translated"]


def compiled(definition: Definition) -> Launch:
    """Return a definition as a function of arrays on CUDA.

    A body written for CUDA by hand (`definition.cuda`) is taken as it is where the device has what
    it needs.

    Raises:
        TranslationError: the source holds something that CUDA has not; the text says what, where.
        RuntimeError: this MLX has no CUDA.
    """
    body = own_body(definition)
    return launch_of(definition) if body is None else own_launch(definition, body)


def translated(definition: Definition, variant: Variant | None = None) -> CudaSource:
    """Return the text that `mx.fast.cuda_kernel` gets for a definition, for people and tests.

    Raises:
        TranslationError: as for `compiled`.
    """
    if (body := own_body(definition)) is not None:
        return own_source(definition, body)
    return Translation(definition).source(variant or Variant())
