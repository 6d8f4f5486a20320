"""Key-value caches whose buffers a program writes in place.

MLX's arrays are values: whoever holds one may rely on it. A program that writes into a buffer must
therefore be its only holder. So it takes mlx-lm's `KVCache` over: the buffers are copied once, with
room for more tokens, and stay with the program until somebody reads `keys` or `values` of the cache
(its own methods do, for a prompt, a copy, a file, a batch). At that moment the cache is an ordinary
one again, with arrays that have waited for the last write, and the program copies anew before it
goes on.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

#: Tokens by which buffers grow: a program is recorded again for each size.
ROOM = 512


@dataclass
class Chain:
    """What the caches of one model share: the step that was last put into their buffers.

    Attributes:
        after: an array that is there only when that step has run; None before the first.
        state: int32 (3,) on the device: write index, length and position of the next step.
        position: tokens in the caches, as `state` has it.
    """

    after: mx.array | None = None
    state: mx.array | None = None
    position: int = -1


@dataclass
class _Loan:
    """The buffers of one cache."""

    keys: mx.array
    values: mx.array
    chain: Chain


class LentKVCache(KVCache):  # type: ignore[misc]
    """A cache whose buffers are with a program; reading them ends that."""

    _zmlx_loan: _Loan

    def _returned(self) -> KVCache:
        """Make this an ordinary cache again."""
        loan = self.__dict__.pop("_zmlx_loan")
        keys, values = loan.keys, loan.values
        if loan.chain.after is not None:
            keys, values = mx.depends([keys, values], [loan.chain.after])
        self.__class__ = KVCache
        self.keys, self.values = keys, values
        return self

    @property
    def keys(self) -> mx.array:
        """The keys, (1, heads, capacity, head dim)."""
        return self._returned().keys

    @keys.setter
    def keys(self, value: mx.array | None) -> None:
        self._returned().keys = value

    @property
    def values(self) -> mx.array:
        """The values, (1, heads, capacity, value dim)."""
        return self._returned().values

    @values.setter
    def values(self, value: mx.array | None) -> None:
        self._returned().values = value

    def empty(self) -> bool:
        """Return False: a cache is lent when it holds something."""
        return False

    def __copy__(self) -> KVCache:
        """Return an ordinary cache that shares this one's arrays, as a copy does."""
        return copy.copy(self._returned())

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCache:
        """Return an ordinary cache."""
        return copy.deepcopy(self._returned(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as an ordinary cache."""
        return self._returned().__reduce_ex__(protocol)


LentKVCache.__name__ = KVCache.__name__
LentKVCache.__qualname__ = KVCache.__qualname__


def is_lent(cache: Any) -> bool:
    """Return whether a program has a cache's buffers."""
    return type(cache) is LentKVCache


def capacity(cache: KVCache) -> int:
    """Return for how many tokens a cache has room, without taking it back."""
    if is_lent(cache):
        return int(cache._zmlx_loan.keys.shape[2])
    return 0 if cache.keys is None else int(cache.keys.shape[2])


def buffers(cache: LentKVCache) -> tuple[mx.array, mx.array]:
    """Return the buffers of a lent cache: whoever writes to them tells its chain."""
    return cache._zmlx_loan.keys, cache._zmlx_loan.values


def lend(caches: Sequence[KVCache]) -> Chain:
    """Take over caches of one length that hold something, with room for another token.

    Args:
        caches: those of a model that have `keys`, in their order.

    Returns:
        Their chain.
    """
    chains = {id(c._zmlx_loan.chain): c._zmlx_loan.chain for c in caches if is_lent(c)}
    if len(chains) == 1 and all(is_lent(c) and c.offset < capacity(c) for c in caches):
        return next(iter(chains.values()))
    chain = Chain()
    for cache in caches:
        keys, values = (_with_room(array, cache.offset) for array in (cache.keys, cache.values))
        del cache.keys, cache.values
        cache.__class__ = LentKVCache
        cache.__dict__["_zmlx_loan"] = _Loan(keys, values, chain)
    return chain


def _with_room(array: mx.array, length: int) -> mx.array:
    """Return the first rows of a buffer in a new one, which nobody else holds."""
    batch, heads, _, dim = array.shape
    wanted = -(-(length + 1) // ROOM) * ROOM
    room = mx.zeros((batch, heads, wanted - length, dim), array.dtype)
    return mx.concatenate([array[..., :length, :], room], axis=2)
