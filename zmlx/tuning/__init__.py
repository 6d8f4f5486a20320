"""Tuning: which launch of a kernel is the fastest here, searched once and remembered on disk.

The results are in ZMLX_CACHE_DIR/tuning, one line each, with the device, the backend, the versions
of mlx and zmlx and the hash of the kernel's content that they belong to; `zmlx tune` lists them.
"""

from zmlx.tuning.identity import NoContent
from zmlx.tuning.search import TuningError, TuningWarning
from zmlx.tuning.threadgroup import best_threadgroup

__all__ = ["NoContent", "TuningError", "TuningWarning", "best_threadgroup"]
