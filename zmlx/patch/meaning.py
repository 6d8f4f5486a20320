"""Which activation a module of the library computes, found by computing it.

The names do not say: a `SwiGLU` may be clamped, a `GELU` be one of three. So the module is traced
on float32 arrays; if all of its operations treat each element alone, it is computed on numbers of
both signs and all sizes and compared with the formulas that the kernels know. What differs anywhere
is not known.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from zmlx.graph.trace import TraceError, trace
from zmlx.kernels.vectors import plain

#: Those with a gate, `act(gate) * up`, and those without, `act(x)`.
GATED = ("silu", "gelu", "gelu_tanh", "clipped_swiglu")
UNGATED = ("relu2", "silu", "gelu", "gelu_tanh")

_ELEMENTWISE = frozenset(
    {
        "Abs", "Add", "AsType", "Broadcast", "Divide", "Equal", "Erf", "Exp", "Expm1", "Greater",
        "GreaterEqual", "Less", "LessEqual", "Log", "Log1p", "Maximum", "Minimum", "Multiply",
        "Negative", "Power", "Select", "Sigmoid", "Sign", "Sqrt", "Rsqrt", "Square", "Subtract",
        "Tanh",
    }
)  # fmt: skip
#: On both sides of what formulas know as limits, and so large that any other limit shows.
_NUMBERS = [0.0, 0.3, 1.0, 1.7, 3.1, 4.5, 6.9, 7.1, 9.0, 14.0, 30.0, 200.0, 3e4, 1e9, 1e18]
_CLOSE = 2e-5

#: (class, its settings, its forward, operands) -> activation; the layers of a model share one
_KNOWN: dict[Hashable, str | None] = {}


def activation_of(module: nn.Module, *, gated: bool) -> str | None:
    """Return the kernels' name of the activation that a module computes, or None.

    Args:
        module: called with (up, gate), as `SwitchGLU` does, or with one array.
        gated: which of the two.
    """
    settings = {name: v for name, v in vars(module).items() if isinstance(v, int | float | str)}
    if len(module) or set(vars(module)) - set(settings) - {"_no_grad", "_training"}:
        return _computed(module, gated)
    key = (type(module), tuple(sorted(settings.items())), type(module).__call__, gated)
    if key not in _KNOWN:
        _KNOWN[key] = _computed(module, gated)
    return _KNOWN[key]


def _computed(module: Any, gated: bool) -> str | None:
    ups, gates = _samples()
    arrays = (ups, gates) if gated else (gates,)
    try:
        graph = trace(module, *arrays)
    except TraceError:
        return None
    if any(node.op not in _ELEMENTWISE for node in graph.nodes):
        return None
    if any(value.size > 1 for value in graph.constants):
        return None
    result = module(*arrays)
    for name in GATED if gated else UNGATED:
        truth = plain.activated(name, gates if gated else None, ups if gated else gates)
        if _same(result, truth):
            return name
    return None


def _samples() -> tuple[mx.array, mx.array]:
    """Return every pair of some numbers of both signs, as ups and gates."""
    numbers = mx.array([-n for n in reversed(_NUMBERS)] + _NUMBERS)
    grid = mx.meshgrid(numbers, numbers)
    return grid[0].reshape(-1), grid[1].reshape(-1)


def _same(result: mx.array, truth: mx.array) -> bool:
    if result.shape != truth.shape or result.dtype != truth.dtype:
        return False
    close = mx.abs(result - truth) <= _CLOSE * mx.maximum(mx.abs(truth), 1.0)
    return bool(mx.all(close | (result == truth) | (mx.isnan(result) & mx.isnan(truth))).item())
