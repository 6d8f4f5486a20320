"""Kernels from formulas, in one line each."""

from zmlx.authoring.elementwise import elementwise
from zmlx.authoring.reductions import map_reduce, reduce

__all__ = ["elementwise", "map_reduce", "reduce"]
