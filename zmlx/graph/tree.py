"""What a module's tree holds, to see whether any of it was replaced."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from operator import getitem, is_
from typing import Any

import mlx.core as mx
import mlx.nn as nn

#: The tree is looked at in so many parts, one at each step: a whole look takes the host as long as
#: launching some of a layer's kernels for every layer.
_PARTS = 16


class Tree:
    """Every place of a tree of modules, lists and dicts, and what is there.

    What is compared is which object is in a place. An array that was changed in place, and numbers
    that are attributes of a module, look the same. One array that is trained is looked at in every
    part: inside of a gradient all of them are others.

    Args:
        module: the root, which is not kept alive.
    """

    def __init__(self, module: nn.Module) -> None:
        root = weakref.proxy(module)
        entries = [
            (root if holder is module else holder, key, value)
            for holder, key, value in _entries(module, set())
        ]
        self._holders = [holder for holder, _, _ in entries]
        self._keys = [key for _, key, _ in entries]
        self._values = [value for _, _, value in entries]
        counted = {id(holder): holder for holder in (root, *self._holders)}
        self._sizes = [(holder, len(holder)) for holder in counted.values()]
        trained = [n for n, entry in enumerate(entries) if _is_trained(*entry)]
        self._parts = []
        for turn in range(_PARTS):
            numbers = [*range(turn, len(entries), _PARTS), *trained[:1]]
            columns = (self._holders, self._keys, self._values)
            self._parts.append([[column[n] for n in numbers] for column in columns])
        self._turn = 0

    def unchanged(self) -> bool:
        """Return whether the tree holds what it held, and nothing else."""
        sizes = all(len(holder) == size for holder, size in self._sizes)
        return sizes and _same(self._holders, self._keys, self._values)

    def unchanged_in_part(self) -> bool:
        """Return whether a part of the tree holds what it held, of the next one at each call."""
        self._turn = (self._turn + 1) % _PARTS
        return _same(*self._parts[self._turn])

    def put_back(self) -> bool:
        """Put what the tree held in its places again; return whether anything else was there."""
        if self.unchanged():
            return False
        known = {(id(holder), key) for holder, key in zip(self._holders, self._keys, strict=True)}
        for holder, _ in self._sizes:
            keys = holder if isinstance(holder, dict) else reversed(range(len(holder)))
            for key in [key for key in keys if (id(holder), key) not in known]:
                del holder[key]
        for holder, key, value in zip(self._holders, self._keys, self._values, strict=True):
            if not isinstance(holder, tuple):
                holder[key] = value
        return True


def _same(holders: list[Any], keys: list[Any], values: list[Any]) -> bool:
    try:
        return all(map(is_, map(getitem, holders, keys), values))
    except (KeyError, IndexError):
        return False


def _is_trained(holder: Any, key: Any, value: Any) -> bool:
    return (
        isinstance(value, mx.array)
        and isinstance(holder, nn.Module)
        and key not in holder._no_grad
        and mx.issubdtype(value.dtype, mx.inexact)
    )


def _entries(holder: Any, seen: set[int]) -> Iterator[tuple[Any, Any, Any]]:
    """Yield every place of a tree of modules, lists and dicts: holder, key, what is there."""
    if id(holder) in seen:
        return
    seen.add(id(holder))
    items: list[tuple[Any, Any]] = []
    if isinstance(holder, dict):
        items = list(holder.items())
    elif isinstance(holder, list | tuple):
        items = list(enumerate(holder))
    for key, value in items:
        yield holder, key, value
        yield from _entries(value, seen)
