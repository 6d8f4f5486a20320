"""Prompts that are read once: their caches are copied for each run that goes on from there."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from zmlx.bench.generation import PREFILL_STEP


class Prompts:
    """The caches of one model after some prompts.

    Reading 8,192 tokens can take longer than everything that is measured after them, and the caches
    are the same for stock and for a patched twin.

    Args:
        model: reads the prompts.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._read: dict[tuple[int, ...], list[Any]] = {}

    def after(self, prompt: Sequence[int]) -> list[Any]:
        """Return caches, of the caller's own, of all but the last token of a prompt."""
        key = tuple(prompt)
        if key not in self._read:
            self._read[key] = self._caches(key[:-1])
        return copy.deepcopy(self._read[key])

    @property
    def bytes(self) -> int:
        """Bytes of all that was read; MLX counts them as memory in use."""
        return sum(layer.nbytes for caches in self._read.values() for layer in caches)

    def _caches(self, tokens: Sequence[int]) -> list[Any]:
        caches = make_prompt_cache(self._model)
        for start in range(0, len(tokens), PREFILL_STEP):
            self._model(mx.array([tokens[start : start + PREFILL_STEP]]), cache=caches)
            mx.eval([layer.state for layer in caches if not layer.empty()])
        return caches
