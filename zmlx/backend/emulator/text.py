"""The text that the emulator compiles for a launch."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from zmlx.backend.definition import Definition
from zmlx.backend.emulator.assembly import Signature, assembled


def text(definition: Definition, **launch: Any) -> str:
    """Return the C++ of one launch, without the prelude that stands in for Metal.

    Args:
        definition: the kernel.
        **launch: arguments of its `Launch`.
    """
    inputs = [a if isinstance(a, mx.array) else mx.array(a) for a in launch["inputs"]]
    signature = Signature.of(inputs, launch["output_dtypes"], launch.get("template"))
    return assembled(definition, signature).text.strip() + "\n"
