"""The choice for one subject: remembered, or searched for now, or the default when that must wait.

Only one search runs in a process at a time, so that no other disturbs its timings, and a thread
that comes second finds what the first found.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from zmlx.tuning.identity import Subject
from zmlx.tuning.search import BUDGET, Findings, TracedError, search
from zmlx.tuning.store import Memory, Result
from zmlx.tuning.timing import Call
from zmlx.tuning.tracing import traced
from zmlx_autopatch import speech

#: Held during a search; the same thread may search for another kernel inside a candidate.
_SEARCHING = threading.RLock()


def choose(
    subject: Subject,
    candidates: Mapping[str, Call],
    *,
    inputs: Sequence[Any],
    default: str,
    store: Memory,
    warmup: int = 3,
    rounds: int = 10,
    budget: float = BUDGET,
    anew: bool = False,
) -> Result | None:
    """Return the remembered result of a subject, or search and remember it.

    Args:
        subject: what is tuned; its candidates are the labels of `candidates`.
        candidates: label -> call that returns its outputs lazily.
        inputs: what the calls read; arrays among them are looked at for tracers.
        default: label that stays unless another is faster.
        store: where results are remembered.
        warmup: calls of each candidate before it is timed.
        rounds: how often each is timed.
        budget: seconds after which no new round starts.
        anew: search even when there is a result.

    Returns:
        The result, or None inside `mx.compile`, `mx.grad` or `mx.vmap` where nothing is remembered:
        nothing may be evaluated there, so a later call outside has to search.

    Raises:
        zmlx.tuning.TuningError: every candidate failed; the text gives every reason.
    """
    known = None if anew else store.find(subject)
    if known is not None:
        return known
    if traced(inputs):
        return None
    with _SEARCHING:
        known = None if anew else store.find(subject)
        if known is not None:
            return known
        # What the inputs are computed from is no part of the timings.
        mx.eval([value for value in inputs if isinstance(value, mx.array)])
        try:
            found = search(
                subject.kernel,
                candidates,
                default=default,
                warmup=warmup,
                rounds=rounds,
                budget=budget,
            )
        except TracedError:
            return None
        result = Result(subject, found.best, found.medians_ms(), found.dropped)
        store.add(result)
        _tell(subject, found)
        return result


def _tell(subject: Subject, found: Findings) -> None:
    if speech.level() == "debug":
        times = ", ".join(f"{label} {ms:.4f} ms" for label, ms in found.medians_ms().items())
        speech.say(f"zmlx: tuned {subject.kernel}, {subject.inputs}: {found.best} of {times}")
