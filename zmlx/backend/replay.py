"""Calls of functions that launch kernels, replayed from the graph of an earlier call.

MLX builds a call of `mx.custom_function` and of a custom kernel through Python each time, in 10 to
20 microseconds. A graph that `mx.compile` has recorded it builds in 1 to 2. Inside of a
transformation (`mx.grad`, `mx.vmap`, another `mx.compile`) a compiled function calls the function
itself, so that all its rules are in force there.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import mlx.core as mx

#: Graphs that are kept for each function and key: MLX looks for the right one from first to last.
_RECORDED = 64
#: Shapes and dtypes that are remembered as seen once; more than that start over.
_SEEN = 4096


class Replay:
    """A function of arrays; calls with shapes and dtypes that came before are replayed.

    The first call of a form only runs the function, so that forms which come once cost nothing
    more, and whatever has to look at values, such as tuning, can do it. When a function has too
    many forms, further ones run as they are.

    Args:
        function: takes arrays, returns an array or several. It must not look at values, and
            nothing that it depends on may change but what is in the key.
        settled: whether a form may be recorded after this call; asked with the arrays.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        settled: Callable[[Sequence[mx.array]], bool] | None = None,
    ) -> None:
        self._function = function
        self._settled = settled
        self._compiled: dict[Hashable, Callable[..., Any]] = {}
        self._recorded: dict[Hashable, set[Hashable]] = {}
        self._seen: set[Hashable] = set()

    def __call__(self, key: Hashable, arrays: Sequence[mx.array]) -> Any:
        """Call the function.

        Args:
            key: what it depends on besides its arguments, such as the backend.
            arrays: its arguments.
        """
        try:
            form = (key, *[(array.shape, array.dtype) for array in arrays])
        except AttributeError:  # no array; the function says so in its own words
            return self._function(*arrays)
        recorded = self._recorded.setdefault(key, set())
        if form not in recorded:
            if form not in self._seen:
                return self._first(form, arrays)
            if len(recorded) >= _RECORDED:
                return self._function(*arrays)
            recorded.add(form)
        compiled = self._compiled.get(key)
        if compiled is None:
            # Its own object: MLX knows compiled functions by their address.
            compiled = self._compiled[key] = mx.compile(lambda *given: self._function(*given))
        return compiled(*arrays)

    def _first(self, form: Hashable, arrays: Sequence[mx.array]) -> Any:
        result = self._function(*arrays)
        if self._settled is None or self._settled(arrays):
            if len(self._seen) >= _SEEN:
                self._seen.clear()
            self._seen.add(form)
        return result
