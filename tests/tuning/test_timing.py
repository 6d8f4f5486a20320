"""Timings: batches outweigh the synchronisation, and rounds go through all calls in turn."""

from __future__ import annotations

import time

import mlx.core as mx
import pytest

from zmlx.tuning.timing import batch_size, bytes_of, finish, in_turn, seconds_per_call


def sleeping(*seconds):
    """Return a call that takes these seconds, one after the other, and then the last of them."""
    left = list(seconds)

    def call():
        time.sleep(left.pop(0) if len(left) > 1 else left[0])
        return []

    return call


@pytest.mark.parametrize(
    ("seconds", "least", "most"), [(20e-6, 50, 100), (4e-3, 1, 1), (0, 9, 512)]
)
def test_a_small_call_is_made_often_and_a_long_one_once(seconds, least, most, virtual_time):
    count = batch_size(sleeping(seconds), 2e-3)
    assert least <= count <= most


def test_real_calls_fill_a_batch():
    x = mx.ones((8,))
    finish(x)
    count = batch_size(lambda: x + 1, 2e-3)
    assert 4 <= count <= 512
    assert seconds_per_call(lambda: x + 1, count) * count >= 0.2e-3


def test_a_pause_of_the_machine_makes_no_small_call_a_long_one(virtual_time):
    # The first is the call for its bytes; one pause, then two in turn.
    assert batch_size(sleeping(0, 8e-3, 20e-6), 2e-3) >= 50
    assert batch_size(sleeping(0, 8e-3, 30e-3, 20e-6), 2e-3) >= 50


def test_long_calls_are_not_made_again(virtual_time):
    calls = []

    def call():
        calls.append(time.sleep(0.2))
        return []

    assert batch_size(call, 2e-3) == 1
    assert len(calls) == 2


def test_a_batch_holds_no_more_outputs_than_memory_allows():
    x = mx.ones((2**28,), mx.uint8)  # 256 MiB
    calls = []

    def call():
        calls.append(1)
        return mx.zeros_like(x)  # never evaluated all at once

    assert batch_size(call, 10.0) <= 4
    assert len(calls) <= 12


def test_bytes_of_containers():
    x = mx.ones((4,), mx.float32)
    assert bytes_of({"a": [x, x], "b": (x.astype(mx.float16), 3)}) == 40


def test_every_round_times_every_call_and_begins_with_another():
    names = [
        name
        for name, _ in in_turn(
            {"a": lambda: [], "b": lambda: [], "c": lambda: []},
            counts={"a": 1, "b": 2, "c": 1},
            rounds=3,
        )
    ]
    assert names == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]


def test_a_time_is_of_one_call(virtual_time):
    assert seconds_per_call(sleeping(0.002), 5) == pytest.approx(0.002)


def test_what_a_call_raises_goes_through_or_is_handed_over():
    def bad():
        raise ValueError("no")

    calls = {"bad": bad, "good": lambda: []}
    counts = {"bad": 1, "good": 1}
    with pytest.raises(ValueError, match="no"):
        list(in_turn(calls, counts=counts, rounds=1))
    seen = []
    timed = in_turn(calls, counts=counts, rounds=2, on_error=lambda *what: seen.append(what))
    assert [name for name, _ in timed] == ["good", "good"]
    assert [name for name, _ in seen] == ["bad"]
