"""Benchmarks: `compare` for functions, timed generation for models, capsules for what was measured.

`zmlx.bench.compare` is imported when it is asked for: reading a capsule needs no MLX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zmlx.bench.comparison import Comparison, compare

__all__ = ["Comparison", "compare"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from zmlx.bench import comparison  # noqa: PLC0415 - see above

    return getattr(comparison, name)
