"""The text that CUDA compiles for a launch, but for the signature that MLX writes around it."""

from __future__ import annotations

from typing import Any

from zmlx.backend.cuda.handwritten import own_body, own_source
from zmlx.backend.cuda.kernel import variant_of
from zmlx.backend.cuda.source import Translation
from zmlx.backend.definition import Definition


def text(definition: Definition, **launch: Any) -> str:
    """Return the header and the body of one launch.

    Args:
        definition: the kernel.
        **launch: arguments of its `Launch`.

    Raises:
        zmlx.backend.cuda.tokens.TranslationError: the source holds what CUDA has not.
    """
    if (body := own_body(definition)) is not None:
        whole = own_source(definition, body)
        return f"{whole.header}\n{whole.body}".strip() + "\n"
    translation = Translation(definition)
    grid, threadgroup = launch["grid"], launch["threadgroup"]
    variant = variant_of(translation, launch["inputs"], grid, threadgroup, launch.get("template"))
    source = translation.source(variant)
    return f"{source.header}\n{source.body}".strip() + "\n"
