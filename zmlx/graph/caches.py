"""What the caches of a model are: their classes and shapes, on which a recorded step depends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain as chained
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache

from zmlx.graph.lending import Kind, buffers, is_lent, kind_of, place, rows_for


class ProgramRefused(Exception):
    """A model's step cannot be made a program; the text says why."""


class NothingCached(ProgramRefused):
    """The caches hold nothing yet: the step is a prompt."""


#: Positions at which a step is traced: one near the start, one further than any context.
_NEAR, _FAR = 257, 1_000_003
#: Fewest tokens of a window: two positions before it is full, and one before these.
_SHORTEST = 4


@dataclass(frozen=True)
class Layout:
    """What the caches of a model are, in their order; those inside of lists one by one.

    Attributes:
        kinds: the kind of each that has keys and values; None for one of other arrays.
        forms: shapes and dtypes of the arrays of each; of keys and values for any capacity. There
            are none for a cache that no layer uses.
        lists: for each cache that the model gets, how many there are in it; None for one by itself.
    """

    kinds: tuple[Kind | None, ...]
    forms: tuple[tuple[tuple[tuple[int, ...], mx.Dtype], ...], ...]
    lists: tuple[int | None, ...]

    @classmethod
    def of(cls, caches: Sequence[Any]) -> Layout:
        """Return the layout of some caches.

        Raises:
            NothingCached: none holds keys and values yet.
            ProgramRefused: one is of another class, or is not as long as the others.
        """
        each = leaves(caches)
        for cache in each:
            if kind_of(cache) is None and type(cache) is not ArraysCache:
                raise ProgramRefused(f"a cache of class {type(cache).__name__}")
        _check_lengths(each)
        kinds, forms = [], []
        for cache in each:
            used = kind_of(cache) is None or is_lent(cache) or cache.keys is not None
            kind = kind_of(cache) if used else None
            held = _arrays(cache) if used else ()
            if kind is None and used:
                _check_plain(cache)
            kinds.append(kind)
            forms.append(tuple(_form(array, kind) for array in held))
        lists = (len(c.caches) if type(c) is CacheList else None for c in caches)
        return cls(tuple(kinds), tuple(forms), tuple(lists))

    def inputs(self, position: int) -> list[mx.array]:
        """Return arrays of this layout, not computed, with room for a token at a position."""
        made = []
        for kind, forms in zip(self.kinds, self.forms, strict=True):
            for shape, dtype in forms:
                if kind is not None:
                    room = _capacity(kind, position)
                    shape = (*shape[:2], room, shape[3])
                made.append(mx.zeros(shape, dtype))
        return made

    def input_kinds(self) -> list[Kind | None]:
        """Return the kind of the cache that each of these arrays belongs to."""
        return [k for k, forms in zip(self.kinds, self.forms, strict=True) for _ in forms]

    def caches(self, position: int, arrays: Sequence[mx.array]) -> list[Any]:
        """Return caches of this layout that hold some arrays, those of lists one by one."""
        given = iter(arrays)
        made: list[Any] = []
        for kind, forms in zip(self.kinds, self.forms, strict=True):
            held = [next(given) for _ in forms]
            if kind is not None:
                made.append(_filled(kind, held, position))
            elif not forms:
                made.append(_made(KVCache))
            else:
                made.append(ArraysCache(len(held)))
                made[-1].cache = held
        return made

    def listed(self, caches: Sequence[Any]) -> list[Any]:
        """Return caches as the model gets them, some of them in lists."""
        given = iter(caches)
        return [
            next(given) if count is None else _made(CacheList, *(next(given) for _ in range(count)))
            for count in self.lists
        ]

    def positions(self) -> list[int]:
        """Return positions that see every way in which a model uses these caches.

        Raises:
            ProgramRefused: a window is too short for that.
        """
        windows = [most for _, most, _ in filter(None, self.kinds) if most]
        if min(windows, default=_SHORTEST) < _SHORTEST:
            raise ProgramRefused(f"a window of {min(windows)} tokens; it takes {_SHORTEST} or more")
        near = min([_NEAR, *(most - 3 for most in windows)])
        return [near, near + 1, _FAR]


def leaves(caches: Sequence[Any]) -> list[Any]:
    """Return caches one by one, also those inside of lists."""
    parts = (c.caches if type(c) is CacheList else (c,) for c in caches)
    return list(chained.from_iterable(parts))


def is_plain(cache: Any) -> bool:
    """Return whether a cache is nothing but a list of arrays, of a sequence without padding."""
    return type(cache) is ArraysCache and cache.lengths is None and cache.left_padding is None


def held_arrays(caches: Sequence[Any]) -> list[mx.array]:
    """Return the arrays of caches in their order; buffers of those that are lent stay lent."""
    return [array for cache in caches for array in _arrays(cache) if array is not None]


def _arrays(cache: Any) -> Sequence[mx.array | None]:
    if is_lent(cache):
        return buffers(cache)
    return cache.cache if kind_of(cache) is None else (cache.keys, cache.values)


def _check_lengths(caches: Sequence[Any]) -> None:
    """Check that caches with keys and values count the same tokens, and hold them."""
    attended = [cache for cache in caches if kind_of(cache) is not None]
    if not attended:
        raise ProgramRefused("no cache with keys and values")
    used = [cache for cache in attended if is_lent(cache) or cache.keys is not None]
    if not used:
        raise NothingCached("the caches hold nothing yet")
    if len({cache.offset for cache in used}) != 1:
        raise ProgramRefused("caches of different lengths")
    if len({(kind_of(c), place(c)) for c in used}) != len(set(map(kind_of, used))):
        raise ProgramRefused("rotating caches that do not write to the same row")
    for cache in used:
        rows = _arrays(cache)[0].shape[2]  # type: ignore[union-attr]
        rotating = isinstance(cache, RotatingKVCache)
        if rows < (min(cache.offset, cache.max_size) if rotating else cache.offset):
            raise ProgramRefused(f"a cache that counts {cache.offset} tokens and has {rows} rows")


def _check_plain(cache: ArraysCache) -> None:
    if not is_plain(cache):
        raise ProgramRefused("a cache of a batch")
    if any(array is None for array in cache.cache):
        raise ProgramRefused("a cache of which a part is empty")


def _filled(kind: Kind, held: Sequence[mx.array], position: int) -> Any:
    ordinary, most, keep = kind
    cache = _made(ordinary, most, keep) if ordinary is RotatingKVCache else _made(ordinary)
    cache.keys, cache.values = held
    cache.offset = position
    if ordinary is RotatingKVCache:
        # Any row does that is not the position.
        cache._idx = position if position < most else (keep + most) // 2
    return cache


def _made(cls: Callable[..., Any], *arguments: Any) -> Any:
    """Make a cache: mlx-lm's classes have no types."""
    return cls(*arguments)


def _capacity(kind: Kind, position: int) -> int:
    """Return how many rows a lent buffer has at a position: kernels are made for that."""
    _, most, _ = kind
    return rows_for(position, most or None)


def _form(array: mx.array | None, kind: Kind | None) -> tuple[tuple[int, ...], mx.Dtype]:
    assert array is not None
    shape = array.shape
    return (shape if kind is None else (*shape[:2], 0, *shape[3:])), array.dtype
