"""`smart_patch`: keep the patterns that are faster on the user's own input."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from zmlx.kernels.spec import relative_error
from zmlx.patch.pattern import patterns as all_patterns
from zmlx.runtime.model import RESULT, ModelT, patch, unpatch

#: Largest change of the output, relative to its largest element, that is rounding and not an error.
_ROUNDING = {mx.float32: 1e-3, mx.float16: 5e-2, mx.bfloat16: 1e-1}


def smart_patch(
    model: ModelT,
    sample: mx.array,
    *,
    patterns: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    threshold: float = 0.995,
    warmup: int = 3,
    iters: int = 5,
    threadgroup: int | str = 256,
    verbose: bool = True,
    forward_fn: Callable[[nn.Module, mx.array], Any] | None = None,
) -> ModelT:
    """Try the patterns one by one and keep those that make the model faster.

    Each pattern is added to those kept so far, its output is compared with the stock output, and
    the two states are timed in turn, so that a drift of the machine meets both.

    Args:
        model: a loaded model.
        sample: input of `forward_fn`, by default token ids (B, L).
        patterns: names of the patterns to try; None tries all.
        exclude: names of patterns not to try.
        threshold: a pattern is kept when its median time is at most this part of the time without.
        warmup: calls before timing.
        iters: timed calls of each state.
        threadgroup: threads of a GPU threadgroup, or "auto".
        verbose: print what was measured to stderr.
        forward_fn: what to time, `forward_fn(model, sample)`; default calls the model.

    Returns:
        The model with the kept patterns; its report has `benchmarks`, pattern -> time ratio.
    """
    forward = forward_fn or _call
    known = all_patterns()
    wanted = [n for n in known if (patterns is None or n in patterns) and n not in (exclude or ())]
    unknown = set(patterns or ()) | set(exclude or ())
    if unknown - set(known):
        raise ValueError(
            f"unknown pattern {sorted(unknown - set(known))[0]!r}; known: {', '.join(known)}"
        )
    unpatch(model)
    stock = _evaluated(forward, model, sample)
    kept: list[str] = []
    benchmarks: dict[str, float] = {}
    for name in wanted:
        ratio = _measured(model, sample, forward, stock, kept, name, warmup, iters, threadgroup)
        if ratio is None:
            continue
        benchmarks[name] = ratio
        if ratio <= threshold:
            kept.append(name)
        if verbose:
            verdict = "kept" if ratio <= threshold else "dropped"
            print(f"zmlx: {name}: {ratio:.3f} of the time without it: {verdict}", file=sys.stderr)
    _with(model, kept, threadgroup)
    vars(model)[RESULT].benchmarks = benchmarks
    return model


def _measured(
    model: nn.Module,
    sample: mx.array,
    forward: Callable[[nn.Module, mx.array], Any],
    stock: list[mx.array],
    kept: list[str],
    name: str,
    warmup: int,
    iters: int,
    threadgroup: int | str,
) -> float | None:
    """Return the time with a pattern over the time without; None when it replaces nothing."""
    _with(model, [*kept, name], threadgroup)
    if name not in vars(model)[RESULT].pattern_counts:
        return None
    if not _close(_evaluated(forward, model, sample), stock):
        return float("inf")
    times: dict[bool, list[float]] = {True: [], False: []}
    for with_pattern in (False, True):
        _with(model, [*kept, name] if with_pattern else kept, threadgroup)
        for _ in range(warmup):
            _evaluated(forward, model, sample)
    for _ in range(iters):
        for with_pattern in (False, True):
            _with(model, [*kept, name] if with_pattern else kept, threadgroup)
            started = time.perf_counter()
            _evaluated(forward, model, sample)
            times[with_pattern].append(time.perf_counter() - started)
    return statistics.median(times[True]) / statistics.median(times[False])


def _with(model: nn.Module, names: list[str], threadgroup: int | str) -> None:
    patch(model, exclude=[n for n in all_patterns() if n not in names], threadgroup=threadgroup)


def _call(model: nn.Module, sample: mx.array) -> Any:
    return model(sample)


def _evaluated(
    forward: Callable[[nn.Module, mx.array], Any], model: nn.Module, sample: mx.array
) -> list[mx.array]:
    result = forward(model, sample)
    arrays = [value for value in _flat(result) if isinstance(value, mx.array)]
    mx.eval(arrays)
    return arrays


def _flat(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in _flat(item)]
    return [value]


def _close(values: list[mx.array], stock: list[mx.array]) -> bool:
    """Whether outputs differ by no more than the rounding of their dtype."""
    if len(values) != len(stock):
        return False
    for value, expected in zip(values, stock, strict=True):
        if value.shape != expected.shape:
            return False
        error = relative_error(value, expected)
        if not error <= _ROUNDING.get(expected.dtype, 0.0):
            return False
    return True
