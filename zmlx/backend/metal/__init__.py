"""Kernels on Metal: compiled, launched, and shown as they are compiled."""

from zmlx.backend.metal.kernel import compiled
from zmlx.backend.metal.text import text

__all__ = ["compiled", "text"]
