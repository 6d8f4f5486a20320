"""The search itself: run the candidates, drop those that fail or are wrong, time the others.

A candidate that raises is dropped and its error kept. So is one whose outputs differ from what most
candidates give. The others are timed in turn; the fastest wins, unless the default is as fast.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from zmlx.backend.signature import dtype_name
from zmlx.tuning.arrays import arrays
from zmlx.tuning.timing import Call, batch_size, finish, in_turn
from zmlx.tuning.tracing import refused

#: Seconds that the timed rounds of one search may take, as long as three were made.
BUDGET = 2.0
#: What a candidate must save for it to be taken instead of the default, as a part of its time.
_WORTH = 0.02
#: Largest difference between equally right outputs, by dtype: sums in another order, and roundings
#: that fall to the other side. Relative to the element and to the mean magnitude.
_ROUNDING = {
    "float32": 1e-4,
    "float16": 4e-3,
    "bfloat16": 3e-2,
    "float64": 1e-12,
    "complex64": 1e-4,
}


class TuningError(RuntimeError):
    """No candidate can run; the text gives every candidate's reason."""


class TuningWarning(RuntimeWarning):
    """Candidates of one kernel gave different outputs: the kernel has a mistake."""


class TracedError(RuntimeError):
    """A candidate needs a value that does not exist while a function is being transformed."""


@dataclass
class Findings:
    """What a search found.

    Attributes:
        best: label of the fastest candidate.
        seconds: label -> seconds of one call, for every timed round, of the candidates that ran.
        dropped: label -> why a candidate was left out.
    """

    best: str = ""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)

    def medians_ms(self) -> dict[str, float]:
        """Return label -> median of one call in milliseconds."""
        return {label: statistics.median(s) * 1e3 for label, s in self.seconds.items() if s}


def search(
    name: str,
    candidates: Mapping[str, Call],
    *,
    default: str,
    warmup: int = 3,
    rounds: int = 10,
    budget: float = BUDGET,
) -> Findings:
    """Return the fastest of some candidates that compute the same.

    Args:
        name: of what is tuned, for messages.
        candidates: label -> call that returns its outputs lazily.
        default: label of the candidate that is kept unless another is faster by more than 2 %.
        warmup: calls of each candidate before it is timed, one at least.
        rounds: how often each is timed, one at least.
        budget: seconds after which no new round starts, once three were made.

    Raises:
        TuningError: every candidate failed.
        TracedError: a candidate depends on values that do not exist yet.
        ValueError: there are no candidates, or a number is too small.
    """
    if not candidates or warmup < 1 or rounds < 1:
        raise ValueError(f"{name}: tuning needs a candidate, one warm-up and one round at least")
    found = Findings()
    running = _agreeing(name, _first_calls(candidates, found), default, found)
    counts = _warmed_up(running, warmup, found)
    _timed(running, counts, rounds, budget, found)
    if not found.medians_ms():
        reasons = "\n".join(f"  {label}: {reason}" for label, reason in found.dropped.items())
        raise TuningError(f"{name}: none of {len(candidates)} candidates can run\n{reasons}")
    found.best = fastest(found.medians_ms(), default)
    return found


def _first_calls(candidates: Mapping[str, Call], found: Findings) -> Any:
    """Give (label, call, its outputs, evaluated) of the candidates that run."""
    for label, call in candidates.items():
        try:
            yield label, call, finish(call())
        except Exception as error:  # noqa: BLE001 - whatever it raises, it is dropped with that
            _drop(label, error, found)


def _agreeing(name: str, ran: Any, default: str, found: Findings) -> dict[str, Call]:
    """Return the calls whose outputs are those of most candidates; warn about the others."""
    groups: list[tuple[list[mx.array], dict[str, Call]]] = []
    for label, call, result in ran:
        outputs = arrays(result)
        # Only the first outputs of a group are kept: they can be large.
        members = next((m for first, m in groups if same(first, outputs)), None)
        if members is None:
            groups.append((outputs, {label: call}))
        else:
            members[label] = call
    if not groups:
        return {}
    _, kept = max(groups, key=lambda group: (len(group[1]), default in group[1]))
    others = [label for _, members in groups for label in members if members is not kept]
    for label in others:
        found.dropped[label] = f"its outputs differ from those of {', '.join(kept)}"
    if others:
        warnings.warn(
            f"{name}: {', '.join(others)}: outputs differ from those of {', '.join(kept)}, beyond "
            "rounding; not used, but the kernel depends on its launch, which is a mistake in it",
            TuningWarning,
            stacklevel=2,
        )
    return kept


def _warmed_up(running: dict[str, Call], warmup: int, found: Findings) -> dict[str, int]:
    """Call the candidates as often as asked; return how many calls of each to time together."""
    counts: dict[str, int] = {}
    for label, call in list(running.items()):
        try:
            for _ in range(warmup - 1):
                finish(call())
            counts[label] = batch_size(call)
        except Exception as error:  # noqa: BLE001 - as above
            _drop(label, error, found)
            del running[label]
    # The same number for all: what a batch costs by itself must not tell them apart.
    return dict.fromkeys(counts, max(counts.values(), default=1))


def _timed(
    running: dict[str, Call], counts: dict[str, int], rounds: int, budget: float, found: Findings
) -> None:
    def failed(label: str, error: Exception) -> None:
        _drop(label, error, found)
        found.seconds.pop(label, None)

    for label, seconds in in_turn(
        running, counts=counts, rounds=rounds, budget=budget, on_error=failed
    ):
        found.seconds.setdefault(label, []).append(seconds)


def fastest(medians: Mapping[str, float], default: str) -> str:
    """Return the label of the smallest time, or the default when that saves less than 2 %."""
    best = min(medians, key=lambda label: medians[label])
    if default in medians and medians[best] > medians[default] * (1 - _WORTH):
        return default
    return best


def _drop(label: str, error: Exception, found: Findings) -> None:
    if refused(error):
        raise TracedError(str(error)) from error
    found.dropped[label] = f"{type(error).__name__}: {str(error).strip()}"


def same(one: list[mx.array], other: list[mx.array]) -> bool:
    """Return whether outputs are equal but for rounding; shapes, dtypes, NaN and inf included."""
    if [(a.shape, a.dtype) for a in one] != [(b.shape, b.dtype) for b in other]:
        return False
    return all(_close(a, b) for a, b in zip(one, other, strict=True))


def _close(a: mx.array, b: mx.array) -> bool:
    if a.size == 0:
        return True
    rounding = _ROUNDING.get(dtype_name(a.dtype))
    if rounding is None:
        return bool(mx.array_equal(a, b).item())
    equal = (a == b) | (mx.isnan(a) & mx.isnan(b))
    finite = mx.isfinite(a) & mx.isfinite(b)
    wide = mx.float32 if a.dtype in (mx.float16, mx.bfloat16) else a.dtype
    a, b = (mx.where(finite, x, 0).astype(wide) for x in (a, b))
    allowed = rounding * (mx.abs(a) + mx.mean(mx.abs(a)))
    return bool(mx.all(equal | (finite & (mx.abs(a - b) <= allowed))).item())
