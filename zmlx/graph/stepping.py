"""The decode steps of one module: which program runs one, and when the module's forward does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import getitem
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from zmlx.graph.lending import is_lent
from zmlx.graph.program import DecodeProgram, Layout, ProgramRefused, traced_step
from zmlx.graph.trace import TraceError

#: The weights are looked at in so many parts, one at each step.
_PARTS = 16
#: Largest deviation of the first step from the module's own, relative and squared: weights are
#: rounded to 16 bits, and a router may choose another expert where two are nearly alike.
_DEVIATION = 0.3

#: Runs a module's own forward: takes the module, tokens and caches.
Forward = Callable[[nn.Module, mx.array, list[Any]], mx.array]


class Steps:
    """The programs of a module's steps, one for each layout of caches.

    Args:
        module: what holds the layers.
        forward: its own forward.
        say: told in one sentence why steps of a layout keep the forward.
    """

    def __init__(self, module: nn.Module, forward: Forward, say: Callable[[str], None]) -> None:
        self._module = module
        self._forward = forward
        self._say = say
        self._programs: dict[Any, DecodeProgram | None] = {}
        self._weights = _Weights(module)
        self._last: tuple[Any, DecodeProgram] | None = None

    def __call__(self, tokens: mx.array, caches: list[Any]) -> mx.array | None:
        """Return what the forward would for one token, or None where the forward has to run.

        Args:
            tokens: int (1, 1).
            caches: the module's caches.
        """
        program = self._running(tokens, caches) or self._program(tokens, caches)
        return None if program is None else program(tokens, caches)

    def forget(self) -> None:
        """Look at everything anew at the next step."""
        self._last = None

    def _running(self, tokens: mx.array, caches: list[Any]) -> DecodeProgram | None:
        """Return the program of the step before, if this one goes on from it."""
        if self._last is None:
            return None
        (dtype, chain), program = self._last
        if dtype != tokens.dtype or not self._weights.unchanged_in_part():
            return None
        lent = [caches[at] for at in program.lent] if len(caches) == program.count else []
        goes_on = lent and is_lent(lent[0]) and lent[0]._zmlx_loan.chain is chain
        return program if goes_on and chain.holds(lent) else None

    def _program(self, tokens: mx.array, caches: list[Any]) -> DecodeProgram | None:
        if not self._weights.unchanged():
            self._programs.clear()
            self._weights = _Weights(self._module)
        try:
            key = (tokens.dtype, Layout.of(caches))
        except ProgramRefused as refusal:
            self._refused((type(self), str(refusal)), str(refusal))
            return None
        if key not in self._programs:
            try:
                self._programs[key] = self._made(key[1], tokens, caches)
            except (ProgramRefused, TraceError, ValueError, TypeError) as refusal:
                self._refused(key, str(refusal))
        program = self._programs[key]
        self._last = None if program is None else ((tokens.dtype, program.chain(caches)), program)
        return program

    def _refused(self, key: Any, reason: str) -> None:
        if key not in self._programs:
            self._programs[key] = None
            self._say(f"decode steps keep the model's own forward: {reason}")

    def _made(self, layout: Layout, tokens: mx.array, caches: list[Any]) -> DecodeProgram:
        """Return a program that does what the forward does, here and now.

        Raises:
            ProgramRefused: it does not.
        """

        def forward(tokens: mx.array, caches: list[Any]) -> mx.array:
            return self._forward(self._module, tokens, caches)

        program = DecodeProgram(traced_step(forward, layout, tokens.dtype), layout)
        program.check(forward, tokens, caches, _DEVIATION)
        return program

    def __deepcopy__(self, memo: dict[int, Any]) -> Steps | None:
        """Return None: a copy of the module has weights of its own, and makes its own programs."""
        return None


class _Weights:
    """What a module's tree holds, to see whether any of it was replaced."""

    def __init__(self, module: nn.Module) -> None:
        entries = list(_entries(module, set()))
        self._holders = [holder for holder, _, _ in entries]
        self._keys = [key for _, key, _ in entries]
        self._values = [value for _, _, value in entries]
        self._turn = 0

    def unchanged(self) -> bool:
        """Return whether the tree holds what it held."""
        return self._same(slice(None))

    def unchanged_in_part(self) -> bool:
        """Return the same of a part of the tree, of the next one at each call."""
        self._turn = (self._turn + 1) % _PARTS
        return self._same(slice(self._turn, None, _PARTS))

    def _same(self, part: slice) -> bool:
        try:
            found = map(getitem, self._holders[part], self._keys[part])
            return all(one is other for one, other in zip(found, self._values[part], strict=True))
        except (KeyError, IndexError):
            return False


def _entries(holder: Any, seen: set[int]) -> Iterator[tuple[Any, Any, Any]]:
    """Yield every place of a tree of modules, lists and dicts: holder, key, what is there."""
    if id(holder) in seen:
        return
    seen.add(id(holder))
    items: Sequence[tuple[Any, Any]] = []
    if isinstance(holder, dict):
        items = list(holder.items())
    elif isinstance(holder, list):
        items = list(enumerate(holder))
    for key, value in items:
        yield holder, key, value
        yield from _entries(value, seen)
