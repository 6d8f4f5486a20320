"""Timings of lazy calls: synchronised, interleaved, and in batches that outweigh a synchronisation.

A kernel of a few microseconds takes less time than waiting for it. So calls are made `count` times
and evaluated together, with as many as it takes to fill some milliseconds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import mlx.core as mx

from zmlx.tuning.arrays import arrays

#: A call that returns arrays, or containers of them, lazily.
Call = Callable[[], Any]

#: Seconds that one timed batch should take at least.
BATCH_SECONDS = 2e-3
#: Calls in a batch at most; each of them costs the host some microseconds too.
_MOST_CALLS = 512
#: Bytes of outputs that a batch may hold at once.
_MOST_BYTES = 2**30
#: Seconds that a machine which does something else in between may add to a call.
_PAUSE = 0.05


def finish(result: Any) -> Any:
    """Evaluate every array in a result, wait until the device is done, and return the result."""
    mx.eval(result)
    mx.synchronize()
    return result


def seconds_per_call(call: Call, count: int = 1) -> float:
    """Return the seconds of one call, of `count` calls that are evaluated together."""
    mx.synchronize()
    started = time.perf_counter()
    finish([call() for _ in range(count)])
    return (time.perf_counter() - started) / count


def bytes_of(result: Any) -> int:
    """Return the bytes of all arrays in a result; nothing is evaluated."""
    return sum(array.nbytes for array in arrays(result))


def batch_size(call: Call, seconds: float = BATCH_SECONDS) -> int:
    """Return how many calls to evaluate together so that they take about `seconds`.

    The call must have run before. The outputs of a batch exist at once, so their bytes limit it.
    """
    by_memory = max(1, _MOST_BYTES // max(1, bytes_of(call())))
    most = min(_MOST_CALLS, by_memory)
    count = 1
    while count < most:
        taken = _batch_seconds(call, count, seconds)
        if taken >= seconds:
            break
        # What a batch costs by itself makes the first guess small; it is repeated until it fits.
        count = min(most, max(2 * count, math.ceil(count * seconds / max(taken, 1e-9) / 2)))
    return count


def _batch_seconds(call: Call, count: int, enough: float) -> float:
    """Return what a batch takes; where that is `enough`, the least of three, or it is a long one.

    One pause of the machine would else end the search for a size that outweighs such pauses.
    """
    least = math.inf
    for _ in range(3):
        least = min(least, seconds_per_call(call, count) * count)
        if not enough <= least < _PAUSE:
            break
    return least


def in_turn(
    calls: Mapping[str, Call],
    *,
    counts: Mapping[str, int],
    rounds: int,
    budget: float = math.inf,
    least_rounds: int = 3,
    on_error: Callable[[str, Exception], None] | None = None,
) -> Iterable[tuple[str, float]]:
    """Time each call once per round, so that a drift of the machine meets all of them.

    Every round begins with another call. Rounds end early when they took `budget` seconds in all,
    though not before `least_rounds`.

    Args:
        calls: name -> call; each has run before.
        counts: name -> calls that are evaluated together.
        rounds: how often each is timed.
        budget: seconds for all rounds.
        least_rounds: rounds that are made whatever they take.
        on_error: gets name and error of a call that raises, which is timed no more; without it the
            error goes through.

    Yields:
        (name, seconds of one call), as they are measured.
    """
    names = list(calls)
    started = time.perf_counter()
    for number in range(rounds):
        if number >= least_rounds and time.perf_counter() - started > budget:
            return
        shift = number % len(names) if names else 0
        for name in names[shift:] + names[:shift]:
            try:
                seconds = seconds_per_call(calls[name], counts[name])
            except Exception as error:
                if on_error is None:
                    raise
                names.remove(name)
                on_error(name, error)
                continue
            yield name, seconds
