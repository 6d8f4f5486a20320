"""The verdict on a comparison: what breaks the contract, in words.

The contract is the weakest one that the plan claims for the modules that it replaced. It is broken
when any of these holds for any run:

1. a patched logit is NaN and no stock logit is;
2. `exact`: the patched logits are not stock's, bit for bit;
   `tighter`: the error of the patched logits against the reference (float64 for a float32 model,
   float32 for a 16-bit one) is larger than stock's
   (by more than a tenth, the chance between two equally good roundings) and above the level of
   float32 rounding. The largest error is held to it too, with a fifth: it is one of millions;
   `tolerant`: the error is larger than stock's by more than 1 % of the logits' spread;
3. the greedy text differs where it may not. It may differ where the reference decides for the
   patched token, or where the reference's gap between the two tokens is within twice the error
   that stock's own logits have at this position: there stock's choice is chance. Without a
   reference it may differ where stock's own gap is below the rounding of 16-bit logits. With
   `exact` it may never differ, unless stock differs from itself.

Without a reference (memory) rule 2 holds for `exact` only, and the verdict says so.
"""

from __future__ import annotations

import math

from zmlx.validate.compare import Comparison, Divergence

#: Float32 rounding of a whole forward: RMS error over the spread of the logits. A product of
#: thousands of terms in another order differs by some 1e-6, and some dozens of layers add up.
ROUNDING_RMS = 1e-5
#: The same for the largest error over the largest logit.
ROUNDING_LARGEST = 2e-5
#: Stock's gap between two logits below which rounding to 16 bits may have decided.
TIE_GAP = 0.0625

_SLACK_RMS, _SLACK_LARGEST = 1.1, 1.2
_TOLERANT_RMS = 1e-2
_ORDER = ("tolerant", "tighter", "exact")


def contract_of(comparison: Comparison) -> str:
    """Return the weakest contract of the modules that were replaced; "exact" when none was."""
    claimed = [c.contract for c in comparison.report.candidates if c.chosen]
    return min(claimed, key=_ORDER.index, default="exact")


def judge(comparison: Comparison) -> list[str]:
    """Return one sentence for each way in which the contract is broken; empty when it holds."""
    contract = contract_of(comparison)
    breaches = [*_nan(comparison), *_errors(comparison, contract)]
    for divergence in comparison.divergences:
        if not _may_differ(divergence, contract, comparison.stock_varies):
            breaches.append(_described(divergence))
    return breaches


def _nan(comparison: Comparison) -> list[str]:
    if any(run.has_nan for run in comparison.stock):
        return []
    bad = [str(n) for n, run in enumerate(comparison.patched) if run.has_nan]
    return [f"NaN in the patched logits of run {', '.join(bad)}"] if bad else []


def _errors(comparison: Comparison, contract: str) -> list[str]:
    difference = comparison.difference
    if contract == "exact" and difference is not None and difference.largest != 0:
        return [f"contract exact, but the logits differ by up to {difference.largest:.1e}"]
    stock, patched = comparison.stock_error, comparison.patched_error
    if contract == "exact" or stock is None or patched is None:
        return []
    room = _TOLERANT_RMS if contract == "tolerant" else 0.0
    limits = (
        ("root mean square", patched.rms, stock.rms, _SLACK_RMS, ROUNDING_RMS),
        ("largest", patched.largest, stock.largest, _SLACK_LARGEST, ROUNDING_LARGEST),
    )
    return [
        f"{name} error of the patched logits {ours:.2e}, stock's {theirs:.2e}: "
        f"contract {contract} allows {max(theirs * slack + room, rounding):.2e}"
        for name, ours, theirs, slack, rounding in limits
        # A NaN compares false with everything, so the condition asks for what is allowed.
        if not ours <= max(theirs * slack + room, rounding) and not math.isnan(theirs)
    ]


def _may_differ(divergence: Divergence, contract: str, stock_varies: bool) -> bool:
    if stock_varies:
        return True
    if contract == "exact":
        return False
    gap, spread = divergence.reference_gap, divergence.reference_spread
    if gap is None or spread is None:
        return divergence.stock_gap <= TIE_GAP
    return gap <= 2 * spread


def _described(divergence: Divergence) -> str:
    reference = divergence.reference_gap
    truth = "" if reference is None else f", the reference's {reference:.2e}"
    return (
        f"run {divergence.run} chose token {divergence.patched_token} at position "
        f"{divergence.position} where stock chose {divergence.stock_token}; "
        f"stock's logit gap there is {divergence.stock_gap:.2e}{truth}: not a tie"
    )
