"""How far logits are from the true ones."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class LogitsError:
    """Distance of some logits from the reference's.

    Attributes:
        rms: root mean square of the difference over all positions and tokens of the vocabulary,
            over the standard deviation of the reference's logits.
        largest: largest difference over the largest magnitude of the reference's logits.
    """

    rms: float
    largest: float


def logits_error(logits: mx.array, truth: mx.array) -> LogitsError:
    """Compare logits with those of a reference.

    Args:
        logits: float32, of any shape.
        truth: the reference's, of the same shape.
    """
    # A vocabulary may be masked with -inf; where both agree there is no difference.
    difference = mx.where(logits == truth, 0.0, logits - truth)
    finite = mx.where(mx.isfinite(truth), truth, 0.0)
    spread = mx.maximum(mx.std(finite), 1e-30)
    rms = mx.sqrt(mx.mean(mx.square(difference))) / spread
    largest = mx.max(mx.abs(difference)) / mx.maximum(mx.max(mx.abs(finite)), 1e-30)
    values: list[float] = mx.stack([rms, largest]).tolist()  # type: ignore[assignment]
    return LogitsError(*values)
