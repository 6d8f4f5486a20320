"""zmlx: a drop-in runtime for mlx-lm, and the kernel toolkit under it.

Importing this package is cheap: it loads neither MLX nor mlx-lm.
"""

from zmlx.version import __version__

__all__ = ["__version__"]
