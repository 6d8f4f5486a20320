"""Tuning by hand: the fastest threadgroup and template of a kernel, or of a function."""

from zmlx.tuning.config import AutotuneConfig, AutotuneResult
from zmlx.tuning.exchange import load_autotune_cache, save_autotune_cache
from zmlx.tuning.function import AutotunedFunction, autotune
from zmlx.tuning.kernel import autotune_kernel, get_autotuned_config

__all__ = [
    "AutotuneConfig",
    "AutotuneResult",
    "AutotunedFunction",
    "autotune",
    "autotune_kernel",
    "get_autotuned_config",
    "load_autotune_cache",
    "save_autotune_cache",
]
