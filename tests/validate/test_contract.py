"""The verdict: what breaks each contract, and what is chance."""

from __future__ import annotations

import math

import pytest

from zmlx.bench.generation import Generation
from zmlx.bench.logits import LogitsError
from zmlx.patch import Candidate, PatchReport
from zmlx.validate.compare import Comparison, Divergence
from zmlx.validate.contract import contract_of, judge


def made(nan=False):
    return Generation(3, (1, 2), 0.1, (0.1,), 1, nan)


def comparison(contract="tighter", **changes):
    report = PatchReport("llama", "llama", "stable", "cpu")
    report.candidates = (Candidate("a", "swiglu_mlp", True, "", contract),)
    values = {
        "stock": [made()],
        "patched": [made()],
        "stock_error": LogitsError(1e-2, 1e-2),
        "patched_error": LogitsError(5e-3, 5e-3),
        "difference": LogitsError(1e-2, 1e-2),
    }
    return Comparison(report, **{**values, **changes})


def diverging(**changes):
    values = {"stock_gap": 0.5, "reference_gap": 0.5, "reference_spread": 0.1}
    return [Divergence(1, 4, 10, 11, **{**values, **changes})]


def test_a_smaller_error_holds():
    assert judge(comparison()) == []


@pytest.mark.parametrize(("rms", "holds"), [(1.05e-2, True), (1.2e-2, False), (math.nan, False)])
def test_tighter_is_about_the_error(rms, holds):
    found = judge(comparison(patched_error=LogitsError(rms, 5e-3)))
    assert (found == []) is holds


def test_the_largest_error_counts_too():
    (breach,) = judge(comparison(patched_error=LogitsError(5e-3, 2e-2)))
    assert breach.startswith("largest error of the patched logits 2.00e-02, stock's 1.00e-02")


def test_float32_rounding_is_allowed_and_no_more():
    tiny = LogitsError(1e-7, 1e-7)
    assert judge(comparison(stock_error=tiny, patched_error=LogitsError(9e-6, 9e-6))) == []
    assert judge(comparison(stock_error=tiny, patched_error=LogitsError(3e-5, 9e-6))) != []


def test_tolerant_has_room_and_an_end():
    room = LogitsError(1.5e-2, 5e-3)
    assert judge(comparison("tolerant", patched_error=room)) == []
    assert judge(comparison("tolerant", patched_error=LogitsError(5e-2, 5e-3))) != []


def test_exact_is_bit_for_bit():
    assert judge(comparison("exact", difference=LogitsError(0.0, 0.0))) == []
    (breach,) = judge(comparison("exact", difference=LogitsError(1e-9, 1e-8)))
    assert "differ by up to 1.0e-08" in breach


def test_the_weakest_contract_counts():
    mixed = comparison("exact")
    mixed.report.candidates += (
        Candidate("b", "moe_mlp", True, "", "tighter"),
        Candidate("c", "moe_mlp", False, "", "tolerant"),
    )
    assert contract_of(mixed) == "tighter"
    mixed.report.candidates = ()
    assert contract_of(mixed) == "exact"


def test_nan_is_a_breach_in_any_run_unless_stock_has_it():
    (breach,) = judge(comparison(patched=[made(), made(nan=True)]))
    assert "run 1" in breach
    both = comparison(stock=[made(nan=True)], patched=[made(nan=True)])
    assert judge(both) == []


@pytest.mark.parametrize(
    ("change", "holds"),
    [
        ({"reference_gap": 0.5}, False),
        ({"reference_gap": 0.15}, True),  # within twice the error of stock's logits
        ({"reference_gap": -2.0}, True),  # the reference is with the patched token
        ({"reference_gap": None, "reference_spread": None, "stock_gap": 0.01}, True),
        ({"reference_gap": None, "reference_spread": None, "stock_gap": 0.5}, False),
        ({"reference_gap": math.nan}, False),
    ],
)
def test_another_token_needs_a_tie(change, holds):
    found = judge(comparison(divergences=diverging(**change)))
    assert (found == []) is holds
    if not holds:
        assert "run 1 chose token 11 at position 4 where stock chose 10" in found[0]


def test_exact_allows_no_other_token_unless_stock_varies():
    same = LogitsError(0.0, 0.0)
    tie = diverging(reference_gap=0.0)
    assert judge(comparison("exact", difference=same, divergences=tie)) != []
    assert judge(comparison(divergences=diverging(), stock_varies=True)) == []


def test_without_a_reference_only_tokens_and_nan_are_judged():
    assert judge(comparison(stock_error=None, patched_error=None)) == []
