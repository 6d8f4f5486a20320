"""Key-value caches whose buffers a program writes in place.

MLX's arrays are values: whoever holds one may rely on it. A program that writes into a buffer must
therefore be its only holder. So it takes mlx-lm's caches over: the buffers are copied once, with
room for more tokens, and stay with the program until somebody reads `keys` or `values` of the cache
(its own methods do, for a prompt, a copy, a file, a batch). At that moment the cache is an ordinary
one again, with arrays that have waited for the last write, and the program copies anew before it
goes on.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache, RotatingKVCache

from zmlx.kernels.attention_launch import new_counters

#: Tokens by which buffers grow: a program is recorded again for each size.
ROOM = 512
#: Tokens that a new buffer has room for, at least.
_LEAST = 64

#: What caches of a model have in common that are written at the same place: their class, and for
#: rotating ones how many tokens they hold and how many of the first they keep.
Kind = tuple[type, int, int]


@dataclass
class Track:
    """Where the tokens from one position on are written in caches of a kind.

    Attributes:
        base: the position of the first row.
        rows: write index, length after the write and position, for each token.
        array: the same on the device.
    """

    base: int
    rows: np.ndarray[Any, Any]
    array: mx.array


@dataclass
class Chain:
    """What the caches of one model share.

    It belongs to its caches: when they go, the buffers do.

    Attributes:
        after: an array that is there only when the step has run that was last put into the
            buffers; None before the first.
        counters: what attention counts with; of this chain alone, whose steps never run at once.
        tracks: where the next tokens go.
        caches: weak references to those that share it, as long as all of them are lent.
        arrays: their keys and values.
        others: what the step left in caches of other arrays.
    """

    after: mx.array | None = None
    counters: mx.array = field(default_factory=new_counters)
    tracks: dict[Kind, Track] = field(default_factory=dict)
    caches: tuple[weakref.ref[Any], ...] = ()
    arrays: tuple[mx.array, ...] = ()
    others: tuple[mx.array, ...] = ()

    def holds(self, caches: Sequence[Any]) -> bool:
        """Return whether these are the chain's caches, of one length, with room for a token."""
        mine = [reference() for reference in self.caches]
        if len(caches) != len(mine) or not all(map(is_, caches, mine)):
            return False
        offset = caches[0].offset
        for cache in caches:
            if cache.offset != offset:
                return False
        return all(_has_room(next(c for c in caches if kind_of(c) == kind)) for kind in self.tracks)

    def state(self, cache: KVCache | RotatingKVCache) -> mx.array:
        """Return write index, length and position, int32 (3,), of a cache's next token."""
        kind = _lendable(cache)
        track = self.tracks.get(kind)
        row = -1 if track is None else cache.offset - track.base
        if track is None or not 0 <= row < ROOM or track.rows[row, 0] != place(cache):
            track, row = _track(cache), 0
            self.tracks[kind] = track
        return track.array[row]


@dataclass
class _Loan:
    """The buffers of one cache."""

    keys: mx.array
    values: mx.array
    chain: Chain


class _Lent:
    """A cache whose buffers are with a program; reading them ends that."""

    _zmlx_class: type

    def _returned(self) -> Any:
        """Make this an ordinary cache again."""
        loan = self.__dict__.pop("_zmlx_loan")
        loan.chain.caches, loan.chain.arrays = (), ()
        keys, values = loan.keys, loan.values
        if loan.chain.after is not None:
            keys, values = mx.depends([keys, values], [loan.chain.after])
        self.__class__ = self._zmlx_class
        self.keys, self.values = keys, values
        return self

    @property
    def keys(self) -> mx.array:
        """The keys, (1, heads, capacity, head dim)."""
        return self._returned().keys  # type: ignore[no-any-return]

    @keys.setter
    def keys(self, value: mx.array | None) -> None:
        self._returned().keys = value

    @property
    def values(self) -> mx.array:
        """The values, (1, heads, capacity, value dim)."""
        return self._returned().values  # type: ignore[no-any-return]

    @values.setter
    def values(self, value: mx.array | None) -> None:
        self._returned().values = value

    def empty(self) -> bool:
        """Return False: a cache is lent when it holds something."""
        return False

    def __copy__(self) -> Any:
        """Return an ordinary cache that shares this one's arrays, as a copy does."""
        return copy.copy(self._returned())

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return an ordinary cache."""
        return copy.deepcopy(self._returned(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as an ordinary cache."""
        return self._returned().__reduce_ex__(protocol)


def _lent_class(ordinary: type) -> type:
    # Files of caches name the class.
    names = {"__qualname__": ordinary.__qualname__, "__module__": ordinary.__module__}
    return type(ordinary.__name__, (_Lent, ordinary), {**names, "_zmlx_class": ordinary})


#: class of mlx-lm's -> that of a lent cache
_LENT = {ordinary: _lent_class(ordinary) for ordinary in (KVCache, RotatingKVCache)}


def is_lent(cache: Any) -> bool:
    """Return whether a program has a cache's buffers."""
    return isinstance(cache, _Lent)


def kind_of(cache: Any) -> Kind | None:
    """Return the kind of a cache that can be lent; None for others, subclasses among them."""
    ordinary = cache._zmlx_class if is_lent(cache) else type(cache)
    if ordinary is KVCache:
        return ordinary, 0, 0
    return (ordinary, cache.max_size, cache.keep) if ordinary is RotatingKVCache else None


def _lendable(cache: Any) -> Kind:
    kind = kind_of(cache)
    assert kind is not None, f"a {type(cache).__name__} cannot be lent"
    return kind


def place(cache: KVCache | RotatingKVCache) -> int:
    """Return where a cache writes its next token."""
    if not isinstance(cache, RotatingKVCache) or cache.offset < cache.max_size:
        return int(cache.offset)
    return int(cache.keep if cache._idx >= cache.max_size else cache._idx)


def advance(cache: KVCache | RotatingKVCache) -> None:
    """Count a token that a program has written to a lent cache."""
    if isinstance(cache, RotatingKVCache):
        cache._idx = place(cache) + 1
    cache.offset += 1


def buffers(cache: Any) -> tuple[mx.array, mx.array]:
    """Return the buffers of a lent cache: whoever writes to them tells its chain."""
    return cache._zmlx_loan.keys, cache._zmlx_loan.values


def lend(caches: Sequence[Any]) -> Chain:
    """Take over caches that hold something, with room for another token.

    Args:
        caches: those of a model that have `keys`, in their order.

    Returns:
        Their chain.
    """
    if is_lent(caches[0]):
        chain: Chain = caches[0]._zmlx_loan.chain
        if chain.holds(caches):
            return chain
    chain = Chain()
    mx.eval(chain.counters)  # here, for another thread may take the first step
    for cache in caches:
        keys, values = (_with_room(cache, array) for array in (cache.keys, cache.values))
        if isinstance(cache, RotatingKVCache):
            cache._idx = min(cache._idx, cache.max_size)  # as the cut leaves it
        del cache.keys, cache.values
        cache.__class__ = _LENT[type(cache)]
        cache.__dict__["_zmlx_loan"] = _Loan(keys, values, chain)
        # One after the other, so that never more than one cache is there twice.
        mx.eval(keys, values)
    chain.caches = tuple(map(weakref.ref, caches))
    chain.arrays = tuple(array for cache in caches for array in buffers(cache))
    for cache in {kind_of(cache): cache for cache in caches}.values():
        chain.state(cache)
    return chain


def _has_room(cache: Any) -> bool:
    return place(cache) < buffers(cache)[0].shape[2]


def _with_room(cache: Any, array: mx.array) -> mx.array:
    """Return the tokens of a buffer in a new one, which nobody else holds."""
    length, most = cache.offset, None
    if isinstance(cache, RotatingKVCache):
        most = cache.max_size
        # A prompt leaves more than it may hold; the next token cuts the oldest, and starts over.
        surplus = array.shape[2] - most
        trim: Callable[[int, mx.array], mx.array] = cache._trim
        array = trim(surplus, array) if surplus > 0 else array
        length = min(length, most)
    wanted = rows_for(length, most)
    batch, heads, _, dim = array.shape
    room = mx.zeros((batch, heads, wanted - length, dim), array.dtype)
    return mx.concatenate([array[..., :length, :], room], axis=2)


def rows_for(length: int, most: int | None) -> int:
    """Return how many rows a buffer has that holds some tokens and has room for others."""
    rows = -(-(length + _LEAST) // ROOM) * ROOM
    return rows if most is None else min(rows, most)


def _track(cache: KVCache | RotatingKVCache) -> Track:
    """Return where the next tokens of a cache go."""
    steps = np.arange(ROOM)
    positions = cache.offset + steps
    writes, lengths = positions, positions + 1
    if isinstance(cache, RotatingKVCache):
        most, keep = cache.max_size, cache.keep
        lengths = np.minimum(lengths, most)
        # Once full, the places after the kept ones are used in turn.
        turned = max(cache.offset, most)
        first = place(cache) if cache.offset >= most else keep
        around = keep + (first - keep + positions - turned) % max(1, most - keep)
        writes = np.where(positions < most, positions, around)
    rows = np.stack([writes, lengths, positions], axis=1).astype(np.int32)
    # A sum, so that it lies where the device's own arrays do.
    array = mx.array(rows) + mx.array(0, mx.int32)
    mx.eval(array)
    return Track(cache.offset, rows, array)
