"""Which kernels this process has compiled, and a table of kernels for those who keep one."""

from zmlx.kernels.registry import (
    KernelEntry,
    KernelRegistry,
    cache_size,
    clear_cache,
    list_kernels,
)

__all__ = ["KernelEntry", "KernelRegistry", "cache_size", "clear_cache", "list_kernels"]
