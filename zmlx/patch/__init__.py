"""Recognise a model's layers, plan what to replace, replace it, and take it back.

The names below are imported on first use, so that `zmlx.patch.names` stays free of MLX.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from zmlx.patch.names import PATTERN_NAMES

if TYPE_CHECKING:
    from zmlx.patch.pattern import PatchConfig, PatchPattern
    from zmlx.patch.report import Candidate, PatchReport, PatchResult
    from zmlx.runtime import patch, patch_loaded, smart_patch, unpatch

#: Names of all patterns.
ALL_PATTERNS = list(PATTERN_NAMES)
#: The patterns that fuse an activation with the products around it.
FUSED_ACTIVATIONS = ["swiglu_mlp", "geglu_mlp", "moe_mlp"]
#: The patterns that `mode="training"` tries.
TRAINING_RECOMMENDED = list(PATTERN_NAMES)

_HOMES = {
    "patch": "zmlx.runtime",
    "patch_loaded": "zmlx.runtime",
    "unpatch": "zmlx.runtime",
    "PatchConfig": "zmlx.patch.pattern",
    "PatchPattern": "zmlx.patch.pattern",
    "Candidate": "zmlx.patch.report",
    "PatchReport": "zmlx.patch.report",
    "PatchResult": "zmlx.patch.report",
    "smart_patch": "zmlx.runtime",
}

__all__ = [
    "ALL_PATTERNS",
    "FUSED_ACTIVATIONS",
    "TRAINING_RECOMMENDED",
    "Candidate",
    "PatchConfig",
    "PatchPattern",
    "PatchReport",
    "PatchResult",
    "patch",
    "patch_loaded",
    "smart_patch",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
