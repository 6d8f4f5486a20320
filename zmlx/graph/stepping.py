"""The decode steps of one module: which program runs one, and when the module's forward does."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from zmlx.graph.caches import Layout, NothingCached, ProgramRefused
from zmlx.graph.lending import Chain
from zmlx.graph.operations import UnknownOperation
from zmlx.graph.program import DecodeProgram, traced_step
from zmlx.graph.trace import TraceError
from zmlx.graph.tree import Tree

#: Largest deviation of a step from the module's own, relative, by the dtype of the result. A
#: product of float32 may be of fewer bits on a GPU; with 16 bits a router chooses another expert
#: where two are nearly alike.
_DEVIATIONS = {mx.float32: 0.02, mx.float16: 0.1, mx.bfloat16: 0.3}
#: Changes of weights from step to step after which they are not looked at before the next prompt.
_MOST_CHANGES = 3
#: Reasons after which steps are not looked at any more until a weight changes.
_MOST_REFUSALS = 8

#: Runs a module's own forward: takes the module, tokens and caches.
Forward = Callable[[nn.Module, mx.array, list[Any]], Any]
#: Told why steps keep the forward, with the exception where that is a failure of ours.
Tell = Callable[[str, Exception | None], None]

#: A program and the caches' chain that it runs with.
_Running = tuple[DecodeProgram, Chain]


class Steps:
    """The programs of a module's steps, one for each layout of caches.

    It belongs to the module, and keeps neither the module nor any cache alive.

    Args:
        module: what holds the layers.
        forward: its own forward.
        tell: told once for each reason why steps keep the forward; it may raise the failure.
    """

    def __init__(self, module: nn.Module, forward: Forward, tell: Tell) -> None:
        self._module = weakref.ref(module)
        self._forward = forward
        self._tell = tell
        self._programs: dict[tuple[mx.Dtype, Layout], DecodeProgram | None] = {}
        self._reasons: set[str] = set()
        self._given_up = False
        self._changing = False
        self._tree: Tree | None = None
        self._changes = 0
        # What the step before was: dtype of the token, chain, program.
        self._last: tuple[mx.Dtype, weakref.ref[Chain], DecodeProgram] | None = None
        self._lock = threading.Lock()

    def __call__(self, tokens: mx.array, caches: list[Any]) -> mx.array | None:
        """Return what the forward would for one token, or None where the forward has to run.

        Args:
            tokens: int (1, 1).
            caches: the module's caches.
        """
        running = self._running(tokens, caches)
        if running is None:
            with self._lock:
                running = self._started(tokens, caches)
            if running is None:
                return None
        program, chain = running
        try:
            return program(tokens, caches, chain)
        except Exception as failure:  # noqa: BLE001 - whatever it is, the forward does not have it
            # Building it failed, for a size of buffers that was new; nothing was written.
            self._last = None
            self._programs[tokens.dtype, program.layout] = None
            self._refuse(_text(failure), failure)
            return None

    def forget(self) -> None:
        """Look at everything anew at the next step."""
        self._last = None
        self._changes = min(self._changes, _MOST_CHANGES - 1)

    def _running(self, tokens: mx.array, caches: list[Any]) -> _Running | None:
        """Return the program of the step before, if this one goes on from it."""
        last = self._last
        if last is None:
            return None
        dtype, reference, program = last
        chain = reference()
        if chain is None or dtype != tokens.dtype or not program.goes_on(chain, caches):
            return None
        assert self._tree is not None
        return (program, chain) if self._tree.unchanged_in_part() else None

    def _started(self, tokens: mx.array, caches: list[Any]) -> _Running | None:
        """Return the program for some caches, which are lent then; None if there is none."""
        self._last = None
        module = self._module()
        if module is None or not self._looked_at(module):
            return None
        try:
            layout = Layout.of(caches)
        except NothingCached:
            return None
        except ProgramRefused as refusal:
            self._refuse(str(refusal))
            return None
        key = tokens.dtype, layout
        if key not in self._programs:
            self._programs[key] = None  # also if this raises
            self._programs[key] = self._tried(module, layout, tokens, caches)
        program = self._programs[key]
        if program is None:
            return None
        chain = program.chain(caches)
        self._last = tokens.dtype, weakref.ref(chain), program
        return program, chain

    def _looked_at(self, module: nn.Module) -> bool:
        """Forget all programs if the module's weights are others; return whether to go on.

        Not with weights that are new: inside of a gradient they are so in every step, and must not
        become constants.
        """
        if self._changing or self._changes == _MOST_CHANGES:
            return False
        if self._tree is not None and self._tree.unchanged():
            self._changes = 0
            return not self._given_up
        if self._tree is not None:
            self._changes += 1
        self._tree = Tree(module)
        self._programs.clear()
        self._given_up = False
        if self._changes == _MOST_CHANGES:
            self._refuse("the weights change from step to step")
        else:
            self._reasons.clear()
        return False

    def _tried(
        self, module: nn.Module, layout: Layout, tokens: mx.array, caches: list[Any]
    ) -> DecodeProgram | None:
        """Return a program that does what the forward does, here and now, or None."""
        try:
            return self._made(module, layout, tokens, caches)
        except (ProgramRefused, TraceError, UnknownOperation) as refusal:
            self._refuse(str(refusal))
        except Exception as failure:  # noqa: BLE001 - as above
            self._refuse(_text(failure), failure)
        finally:
            # A trace must leave nothing of itself.
            assert self._tree is not None
            self._changing = self._tree.put_back()
        return None

    def _made(
        self, module: nn.Module, layout: Layout, tokens: mx.array, caches: list[Any]
    ) -> DecodeProgram:
        def forward(tokens: mx.array, caches: list[Any]) -> Any:
            return self._forward(module, tokens, caches)

        traced = traced_step(forward, layout, tokens.dtype)
        program = DecodeProgram(traced, layout, recorded=True)
        hidden = traced.graph.outputs[0]
        allowed = _DEVIATIONS.get(hidden.dtype)
        if allowed is None:
            raise ProgramRefused(f"the forward returns {hidden.dtype}")
        if self._tree is not None and not self._tree.unchanged():
            raise ProgramRefused("the forward changes what the module holds")
        program.check(forward, tokens, caches, allowed)
        return program

    def _refuse(self, reason: str, failure: Exception | None = None) -> None:
        if reason not in self._reasons:
            self._reasons.add(reason)
            self._given_up = self._given_up or len(self._reasons) >= _MOST_REFUSALS
            self._tell(reason, failure)


def _text(failure: Exception) -> str:
    lines = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {lines[0]}" if lines else type(failure).__name__
