"""Calls of functions that launch kernels, replayed from the graph of an earlier call.

MLX builds a call of `mx.custom_function` and of a custom kernel through Python each time, and keeps
an operation in the graph for the custom function beside the kernel's. A graph that `mx.compile` has
recorded is built again without Python, and what is recorded here is the launch alone.

That holds outside of transformations. Inside one (`mx.grad`, `mx.vmap`, another `mx.compile`) MLX
does not replay: it calls the Python function that was compiled, which then is the one with all its
rules. So one call serves for both, and nothing has to find out where it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import mlx.core as mx

from zmlx.backend import for_kernels, vmapping

#: Graphs that are kept for each function, thread and stream: MLX goes through them one by one.
_RECORDED = 64
#: Shapes and dtypes that are remembered as seen once; more than that start over.
_SEEN = 4096


class _Forms:
    """Shapes and dtypes with which a function was called on a stream: once, and more often."""

    def __init__(self, stream: mx.Stream) -> None:
        self.stream = stream
        self.recorded: set[Hashable] = set()
        self.seen: set[Hashable] = set()


class _Own(threading.local):
    """What one thread has recorded of a function; MLX, too, keeps graphs for each thread."""

    def __init__(self) -> None:
        self.recording = False
        self.compiled: dict[Hashable, Callable[..., Any]] = {}
        self.forms: list[_Forms] = []

    def here(self) -> _Forms:
        """Return the forms of the default stream, for which MLX records."""
        stream = mx.default_stream(mx.default_device())
        for forms in self.forms:
            if forms.stream == stream:
                return forms
        self.forms.append(_Forms(stream))
        return self.forms[-1]


class Replay:
    """A function of arrays; calls with shapes and dtypes that came before are replayed.

    The first call of a form only runs the function, so that forms which come once cost nothing
    more, and whatever has to look at values, such as tuning, can do it. The second is recorded.
    When a function has too many forms, further ones run as they are.

    Args:
        function: takes arrays, returns an array or several; with its rules for transformations.
        launch: the same without rules. It must not look at values, and nothing that it depends on
            may change but what is in the key.
        settled: whether a form may be recorded after this call; asked with the arrays.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        launch: Callable[..., Any],
        settled: Callable[[Sequence[mx.array]], bool] | None = None,
    ) -> None:
        vmapping.install()
        self._function = function
        self._launch = launch
        self._settled = settled
        self._own = _Own()

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
        own = self._own
        forms = own.here()
        if form not in forms.recorded:
            if form not in forms.seen:
                return self._first(forms, form, arrays)
            if len(forms.recorded) >= _RECORDED:
                return self._function(*arrays)
            self._record(key, arrays)
            forms.recorded.add(form)
        return own.compiled[key](*arrays)

    def in_force(self, arrays: Sequence[mx.array], *, has_reference: bool) -> Any:
        """Call the function where kernels run now.

        References, and what `mx.vmap` traces, are no launches and run as they are.

        Args:
            arrays: its arguments.
            has_reference: whether the function has a reference in MLX operations.
        """
        backend = for_kernels(has_reference=has_reference)
        if backend == "reference" or vmapping.inside_vmap():
            return self._function(*arrays)
        return self(backend, arrays)

    def _first(self, forms: _Forms, form: Hashable, arrays: Sequence[mx.array]) -> Any:
        result = self._function(*arrays)
        if self._settled is None or self._settled(arrays):
            if len(forms.seen) >= _SEEN:
                forms.seen.clear()
            forms.seen.add(form)
        return result

    def _record(self, key: Hashable, arrays: Sequence[mx.array]) -> None:
        own = self._own
        if key not in own.compiled:
            # Its own object: MLX knows compiled functions by their address.
            own.compiled[key] = mx.compile(lambda *given: self._compiled(*given))
        # Not with the arguments, which a transformation may be tracing.
        stand_ins = [mx.zeros(array.shape, array.dtype) for array in arrays]
        own.recording = True
        try:
            own.compiled[key](*stand_ins)
        finally:
            own.recording = False

    def _compiled(self, *given: mx.array) -> Any:
        """Run while a graph is recorded, and in place of a replay inside of a transformation."""
        return self._launch(*given) if self._own.recording else self._function(*given)
