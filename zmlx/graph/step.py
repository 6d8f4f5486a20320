"""One step of a model as a function of arrays: the tokens and what the cache holds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from zmlx.graph.recording import kept


@dataclass(frozen=True)
class Step:
    """A model's forward with its cache, made a function that changes nothing.

    Attributes:
        model: called with tokens, shape (batch, length), and `cache`.
        cache: mlx-lm's prompt cache, as it is before the step.
    """

    model: Callable[..., Any]
    cache: Sequence[Any]

    @property
    def arrays(self) -> list[mx.array]:
        """What the cache holds, in the order in which `__call__` takes it."""
        return cache_arrays(self.cache)

    def __call__(self, tokens: mx.array, *arrays: mx.array) -> list[mx.array]:
        """Run the step on a copy of the cache that holds `arrays`.

        Returns:
            The logits, shape (batch, length, vocabulary), and what the cache then holds. A step may
            give a cache arrays that it did not have.
        """
        cache = copy.deepcopy(list(self.cache))
        # A cache is written to in place, and these are the caller's.
        fill_cache(cache, kept(arrays))
        logits = self.model(tokens, cache=cache)
        return [logits, *cache_arrays(cache)]


def cache_arrays(cache: Sequence[Any]) -> list[mx.array]:
    """Return the arrays that caches hold: in attributes, lists, tuples, dicts and inner caches."""
    found: list[mx.array] = []

    def take(array: mx.array) -> mx.array:
        found.append(array)
        return array

    _visit(list(cache), take, set())
    return found


def fill_cache(cache: Sequence[Any], arrays: Sequence[mx.array]) -> None:
    """Put arrays in place of those that caches hold, in the order of `cache_arrays`.

    Raises:
        ValueError: their number is another one.
    """
    held = len(cache_arrays(cache))
    if held != len(arrays):
        raise ValueError(f"the cache holds {held} arrays; got {len(arrays)}")
    given = iter(arrays)
    _visit(list(cache), lambda _: next(given), set())


def _visit(value: Any, change: Callable[[mx.array], mx.array], seen: set[int]) -> Any:
    """Put what `change` makes of an array in its place, in objects too; return the new value."""
    if isinstance(value, mx.array):
        return change(value)
    if isinstance(value, tuple):
        parts = [_visit(part, change, seen) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if id(value) in seen:
        return value
    held = value if isinstance(value, dict) else getattr(value, "__dict__", None)
    if isinstance(value, list):
        seen.add(id(value))
        value[:] = [_visit(part, change, seen) for part in value]
    elif isinstance(held, dict) and not isinstance(value, type):
        seen.add(id(value))
        for name in list(held):
            held[name] = _visit(held[name], change, seen)
    return value
