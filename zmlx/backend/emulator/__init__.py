"""Runs Metal kernels on the CPU, thread by thread, and reports what they do wrong."""

from __future__ import annotations

from zmlx.backend.emulator.kernel import compiled
from zmlx.backend.emulator.text import text

__all__ = ["compiled", "text"]
