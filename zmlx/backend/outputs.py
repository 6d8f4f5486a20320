"""One array or several: what functions of arrays return, and what MLX passes on of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx


def alone(outputs: Sequence[mx.array]) -> Any:
    """Return the one output as an array, or several as a tuple."""
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def together(value: Any) -> tuple[Any, ...]:
    """Return a tuple: MLX gives a lone argument, cotangent or output without one around it."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)
