"""Calls in a module's forward that go to another function outside of training.

Before   y = mx.fast.rms_norm(x, self["weight"], self.eps)
After    y = (mx.fast.rms_norm if self._training else self._zmlx_rms_norm)(x, ...)

The function is found by what its name means in that forward, and gets the arguments that stand
there: what it does not take, it hands to the library's.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from zmlx.kernels.rows import FLOATS
from zmlx.patch.forward import Forward, ForwardRefused, expression, own_forward, rewritten
from zmlx.patch.pattern import KernelUse, PatchConfig, PatchPattern, Proposal, Refused


def plain_calls(forward: Forward) -> Iterator[tuple[ast.Call, Any]]:
    """Yield the calls of a forward that name their arguments and no stream, with the function."""
    for node in ast.walk(forward.tree):
        if not isinstance(node, ast.Call) or any(k.arg in (None, "stream") for k in node.keywords):
            continue
        function = forward.resolve(node.func)
        if function is not None:
            yield node, function


def redirected(
    forward: Forward, calls: Sequence[tuple[ast.Call, str, Callable[..., Any]]]
) -> dict[str, Any]:
    """Return the members of a class whose forward calls other functions outside of training.

    Args:
        forward: what `own_forward` returned.
        calls: the calls in it, for each a name and the function that it goes to.
    """
    members: dict[str, Any] = {}
    substitutions: dict[ast.AST, ast.AST] = {}
    own = forward.parameters[0]
    for call, name, function in calls:
        members[f"_zmlx_{name}"] = staticmethod(function)
        substitutions[call.func] = expression(
            f"stock if {own}._training else {own}._zmlx_{name}", stock=call.func
        )
    members["__call__"] = rewritten(forward, substitutions)
    return members


class CallPattern(PatchPattern):
    """Modules whose forward calls one function of MLX that a kernel of the catalog computes.

    Args:
        name: of the pattern.
        function: the function of MLX.
        replacement: takes its arguments; hands to it what the kernel does not take.
        uses: the kernels that it calls, as they are probed.
        opt_in: why it is used only where it is asked for.
    """

    order = 3

    def __init__(
        self,
        name: str,
        function: Callable[..., mx.array],
        replacement: Callable[..., mx.array],
        uses: tuple[KernelUse, ...],
        opt_in: str,
    ) -> None:
        self._name, self._function = name, function
        self._replacement, self._uses = replacement, uses
        self.opt_in = opt_in

    def name(self) -> str:
        """Return the pattern's name."""
        return self._name

    def examine(
        self, module: nn.Module, path: str, parent: nn.Module | None, config: PatchConfig
    ) -> Proposal | Refused | None:
        """Accept a forward that holds such a call."""
        try:
            found = self._calls(own_forward(type(module)))
        except ForwardRefused:
            return None
        if not found:
            return None

        def members(base: type) -> dict[str, Any]:
            forward = own_forward(base)
            calls = [(call, self._name, self._replacement) for call in self._calls(forward)]
            return redirected(forward, calls)

        return Proposal((config.backend,), members, self._uses, self._uses[0].spec.name)

    def _calls(self, forward: Forward) -> list[ast.Call]:
        return [call for call, function in plain_calls(forward) if function is self._function]


def are_floats(*values: Any) -> bool:
    """Return whether arguments are arrays that the kernels take."""
    return all(isinstance(v, mx.array) and v.dtype in FLOATS and v.ndim > 0 for v in values)
