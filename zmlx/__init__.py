"""zmlx: a drop-in runtime for mlx-lm, and the kernel toolkit under it.

Importing this package is cheap: it loads neither MLX nor mlx-lm. Its public modules and names are
imported when they are first used, so that `import zmlx` and then `zmlx.metal.kernel(...)` works.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from zmlx.version import __version__

__all__ = ["__version__"]

#: Modules that are there as attributes of the package.
_MODULES = (
    "api",
    "autograd",
    "autotune",
    "bench",
    "elementwise",
    "jit_compiler",
    "kernels",
    "metal",
    "msl",
    "patch",
    "profile",
    "registry",
    "rowwise",
    "testing",
    "validate",
)
#: name -> module that has it
_NAMES = {"jit": "zmlx.jit_compiler"}


def __getattr__(name: str) -> Any:
    """Import what is asked for; the next time it is there."""
    if name in _MODULES:
        return import_module(f"zmlx.{name}")
    if name in _NAMES:
        value = globals()[name] = getattr(import_module(_NAMES[name]), name)
        return value
    raise AttributeError(f"module 'zmlx' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List what is there already, and what is imported on demand."""
    return sorted({*globals(), *_MODULES, *_NAMES})
