"""Record the choices of a model (experts, expert groups, attended tokens) and replay them.

A router near a tie may choose another expert after any rounding, and the logits then differ by far
more than rounding. So the truth that a run is compared with is the precise model on the same
choices, and a choice that differs between two runs must be one between scores that tie within their
noise.

Choices made inside a compiled function cannot be seen: run with `mx.disable_compile()`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

#: The functions by which mlx-lm's models choose.
_CHOOSING = ("argpartition", "argmax")


@dataclass(frozen=True)
class Choice:
    """One call that chose.

    Attributes:
        indices: what the call returned, as it was returned.
        scores: (rows, candidates), the larger the better.
        chosen: (rows, candidates), true for those chosen.
    """

    indices: mx.array
    scores: npt.NDArray[np.float64]
    chosen: npt.NDArray[np.bool_]


@contextlib.contextmanager
def choices(replay: list[Choice] | None = None) -> Iterator[list[Choice]]:
    """Record each choice inside the block; with `replay`, choose as was recorded there.

    Raises:
        AssertionError: the run made other calls than the replayed one.
    """
    stock = {name: getattr(mx, name) for name in _CHOOSING}
    made: list[Choice] = []

    def choosing(name: str) -> Any:
        def choose(a: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            out: mx.array = stock[name](a, *args, **kwargs)
            if replay is not None:
                assert len(made) < len(replay), "more choices than in the run to replay"
                out = replay[len(made)].indices.astype(out.dtype)
            made.append(_choice(name, a, out, *args, **kwargs))
            return out

        return choose

    try:
        for name in _CHOOSING:
            setattr(mx, name, choosing(name))
        yield made
    finally:
        for name, function in stock.items():
            setattr(mx, name, function)
    if replay is not None:
        assert len(made) == len(replay), "fewer choices than in the run to replay"


def same(one: list[Choice], other: list[Choice]) -> bool:
    """Return whether two runs chose the same, in any order within a choice."""
    return len(one) == len(other) and all(
        np.array_equal(a.chosen, b.chosen) for a, b in zip(one, other, strict=True)
    )


def slip(made: list[Choice], truth: list[Choice]) -> tuple[float, float]:
    """Return the worst wrong choice and the noise of scores, both in units of score spread.

    Args:
        made: a run's choices.
        truth: the same choices replayed in the precise model, whose scores decide.

    Returns:
        By how much a candidate that was left out is truly better than one that was chosen, and the
        largest difference of a score between the run and the truth.
    """
    wrong = noise = 0.0
    for a, b in zip(made, truth, strict=True):
        for ours, true, chosen in zip(a.scores, b.scores, b.chosen, strict=True):
            known = np.isfinite(ours) & np.isfinite(true)
            inside, outside = true[known & chosen], true[known & ~chosen]
            if not inside.size or not outside.size:
                continue
            spread = true[known].std() or 1.0
            wrong = max(wrong, float(outside.max() - inside.min()) / spread)
            noise = max(noise, float(np.abs(ours[known] - true[known]).max()) / spread)
    return wrong, noise


def _choice(
    name: str, a: mx.array, out: mx.array, kth: int = 0, axis: int = -1, **_: Any
) -> Choice:
    """Return a choice with the chosen axis last and the other axes as rows."""
    scores = np.moveaxis(np.array(a.astype(mx.float32), dtype=np.float64), axis, -1)
    order = np.array(out).astype(np.int64)
    if name == "argmax":
        order = order.reshape(*scores.shape[:-1], 1)
    else:
        order = np.moveaxis(order, axis, -1)
        order = order[..., : kth + 1] if kth >= 0 else order[..., kth:]
        scores = -scores if kth >= 0 else scores
    chosen = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(chosen, order, True, axis=-1)
    width = scores.shape[-1]
    return Choice(out, scores.reshape(-1, width), chosen.reshape(-1, width))
