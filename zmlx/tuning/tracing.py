"""Whether a call happens inside a function transformation, where nothing may be evaluated."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx

#: How MLX begins what it says when an array inside `mx.compile`, `mx.vmap` or `mx.grad` is asked
#: for its values.
_REFUSALS = ("[async_eval]", "[eval]")


def traced(inputs: Iterable[object]) -> bool:
    """Return whether one of the inputs is a tracer of `mx.compile`, `mx.vmap` or `mx.grad`.

    MLX has no call that tells. It refuses to evaluate a tracer asynchronously, before it starts
    anything, so that is asked. Inputs that are no tracers have begun to be evaluated afterwards; so
    ask only where they are about to be.

    Raises:
        Exception: whatever the operations behind the inputs raise themselves.
    """
    arrays = [value for value in inputs if isinstance(value, mx.array)]
    if not arrays:
        return False
    try:
        mx.async_eval(arrays)
    except (ValueError, RuntimeError) as error:
        if refused(error):
            return True
        raise
    return False


def refused(error: BaseException) -> bool:
    """Return whether an error is MLX's refusal to evaluate a tracer."""
    return isinstance(error, ValueError | RuntimeError) and str(error).startswith(_REFUSALS)
