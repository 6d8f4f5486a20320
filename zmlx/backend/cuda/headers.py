"""What stands for MLX's header and CUDA's standard library when a kernel is compiled leanly."""

from __future__ import annotations

from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).with_name("lean")
#: name by which it is included -> file
_FILES = {
    "mlx/backend/cuda/device/utils.cuh": "mlx.cuh",
    "cooperative_groups.h": "groups.cuh",
    "zmlx/standard.cuh": "standard.cuh",
}
#: Those of which `standard.cuh` holds what kernels use.
_STANDARD = ("array", "cstdint", "limits", "type_traits", "utility")


@cache
def headers() -> dict[str, str]:
    """Return texts by the names by which they are included."""
    texts = {name: (_FOLDER / file).read_text() for name, file in _FILES.items()}
    standard = '#include "zmlx/standard.cuh"\n'
    return {**texts, **{f"cuda/std/{name}": standard for name in _STANDARD}}
