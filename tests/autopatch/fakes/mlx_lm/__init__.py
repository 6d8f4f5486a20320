"""A package of mlx-lm's shape: the loader is bound in several places before anybody calls it."""

from .convert import convert
from .generate import generate
from .utils import load

__all__ = ["convert", "generate", "load"]
