"""The search: the fastest wins, failing and wrong candidates are dropped with their reasons."""

from __future__ import annotations

import time
import warnings

import mlx.core as mx
import pytest

from zmlx.tuning import TuningError, TuningWarning
from zmlx.tuning.search import TracedError, fastest, same, search

X = mx.arange(12, dtype=mx.float32)

pytestmark = pytest.mark.usefixtures("virtual_time")


def sleeping(seconds, result=None):
    def call():
        time.sleep(seconds)
        return [X * 2 if result is None else result]

    return call


def failing(message):
    def call():
        raise ValueError(message)

    return call


def test_the_fastest_wins():
    candidates = {"a": sleeping(0.004), "b": sleeping(0.001), "c": sleeping(0.008)}
    found = search("k", candidates, default="a", rounds=3)
    assert found.best == "b"
    medians = found.medians_ms()
    assert medians["b"] < medians["a"] < medians["c"]
    assert medians["b"] == pytest.approx(1.0)
    assert all(len(seconds) == 3 for seconds in found.seconds.values())


@pytest.mark.parametrize(("other", "best"), [(0.995, "b"), (0.9, "a")])
def test_the_default_stays_unless_another_is_clearly_faster(other, best):
    assert fastest({"a": other, "b": 1.0}, "b") == best


def test_a_candidate_that_fails_is_dropped_with_its_error_however_fast():
    candidates = {"64": failing("no room"), "128": sleeping(0.002), "256": sleeping(0.001)}
    found = search("k", candidates, default="64", rounds=3)
    assert found.best == "256"
    assert found.dropped == {"64": "ValueError: no room"}
    assert "64" not in found.seconds


def test_a_candidate_that_fails_later_is_dropped_too():
    calls = []

    def late():
        calls.append(1)
        if len(calls) > 6:
            raise RuntimeError("out of memory")
        return [X * 2]

    found = search("k", {"late": late, "b": sleeping(0.003)}, default="late", rounds=4)
    assert found.best == "b"
    assert found.dropped == {"late": "RuntimeError: out of memory"}


def test_when_all_fail_every_reason_is_given():
    with pytest.raises(TuningError) as raised:
        search("my_kernel", {"64": failing("too few"), "128": failing("too many")}, default="64")
    text = str(raised.value)
    assert "my_kernel: none of 2 candidates" in text
    assert "64: ValueError: too few" in text
    assert "128: ValueError: too many" in text


@pytest.mark.parametrize("wrong", [X * 2.1, X, (X * 2).astype(mx.float16), X[:6] * 2, X * mx.nan])
def test_a_candidate_with_other_outputs_is_dropped_with_a_warning(wrong):
    candidates = {
        "fast but wrong": sleeping(0, wrong),
        "a": sleeping(0.002),
        "b": sleeping(0.001),
    }
    with pytest.warns(TuningWarning, match="fast but wrong: outputs differ from those of a, b"):
        found = search("k", candidates, default="fast but wrong", rounds=3)
    assert found.best == "b"
    assert "differ" in found.dropped["fast but wrong"]


def test_of_two_that_differ_the_default_is_kept():
    with pytest.warns(TuningWarning):
        found = search("k", {"a": sleeping(0, X), "b": sleeping(0.002)}, default="b", rounds=3)
    assert found.best == "b"


def test_rounding_is_no_difference():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        candidates = {"a": sleeping(0.001), "b": sleeping(0, X * 2 * (1 + 1e-6))}
        assert not search("k", candidates, default="a", rounds=3).dropped


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16, mx.int32, mx.bool_])
def test_what_counts_as_the_same(dtype):
    value = mx.array([0, 1, 2, 3]).astype(dtype)
    assert same([value], [mx.array(value)])
    assert not same([value], [mx.zeros_like(value)])
    assert not same([value], [])
    if mx.issubdtype(dtype, mx.floating):
        special = mx.array([mx.nan, mx.inf, -mx.inf, 1.0]).astype(dtype)
        assert same([special], [mx.array(special)])
        assert not same([special], [-special])
        assert not same([value], [mx.where(value == 1, mx.nan, value)])
    assert same([value[:0]], [value[:0]])


def test_rounds_end_when_the_budget_is_spent():
    started = time.perf_counter()
    found = search("k", {"a": sleeping(0.02)}, default="a", rounds=1000, budget=0.05)
    assert 3 <= len(found.seconds["a"]) < 20
    assert time.perf_counter() - started < 5


def test_a_candidate_that_needs_a_traced_value_says_so():
    def inside(x):
        with pytest.raises(TracedError):
            search("k", {"a": lambda: [x * 2]}, default="a")
        return x

    mx.eval(mx.compile(inside)(X))


@pytest.mark.parametrize(
    "bad", [{"candidates": {}}, {"warmup": 0}, {"rounds": 0}], ids=lambda value: str(value)
)
def test_nothing_to_search(bad):
    given = {"candidates": {"a": sleeping(0)}, "warmup": 1, "rounds": 1, **bad}
    with pytest.raises(ValueError, match="at least"):
        search(
            "k", given["candidates"], default="a", warmup=given["warmup"], rounds=given["rounds"]
        )
