"""`smart_patch` keeps what is faster, checks what comes out, and reverts what it drops."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest

from zmlx.patch import smart_patch
from zmlx.patch.pattern import original_class
from zmlx.runtime import smart


@pytest.fixture
def clock(monkeypatch, virtual_time):
    """Let time pass only while a model with given patterns runs."""
    state = {"cost": {}}
    evaluated = smart._evaluated

    def timed(forward, model, sample):
        cost = 10.0
        for name in (
            vars(model).get(smart.RESULT).pattern_counts if smart.RESULT in vars(model) else ()
        ):
            cost += state["cost"].get(name, 0.0)
        virtual_time.sleep(cost)
        return evaluated(forward, model, sample)

    monkeypatch.setattr(smart, "_evaluated", timed)
    return state


def test_keeps_the_faster_and_reverts_the_slower(make_llama, tokens, clock, capsys):
    clock["cost"] = {"swiglu_mlp": -5.0, "quantized_linear": 1.0}
    model = smart_patch(make_llama(), tokens)
    report = model._zmlx_patch_result
    assert report.pattern_counts == {"swiglu_mlp": 2}
    assert report.benchmarks == {
        "swiglu_mlp": 0.5,
        "quantized_linear": 1.2,
        "fast_ops": 1.0,
        "decode_step": 1.0,
    }
    assert type(model.layers[0].self_attn.q_proj) is nn.QuantizedLinear
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "swiglu_mlp: 0.500 of the time without it: kept" in captured.err


def test_threshold_and_forward_fn(make_llama, tokens, clock):
    clock["cost"] = {"swiglu_mlp": -0.1}
    seen = []

    def forward(model, sample):
        seen.append(sample)
        return model(sample)[:, -1]

    model = smart_patch(
        make_llama(),
        tokens,
        patterns=["swiglu_mlp"],
        threshold=0.9,
        forward_fn=forward,
        verbose=False,
    )
    assert model._zmlx_patch_result.patched_count == 0
    assert all(original_class(m) is None for _, m in model.named_modules())
    assert seen


def test_a_pattern_that_changes_the_output_is_dropped_however_fast(
    make_llama, tokens, clock, monkeypatch
):
    clock["cost"] = {"swiglu_mlp": -9.0, "quantized_linear": -9.0}
    close = smart._close
    answers = iter([False, True, False, False])
    monkeypatch.setattr(smart, "_close", lambda *args: next(answers) and close(*args))
    model = smart_patch(make_llama(), tokens, verbose=False)
    assert model._zmlx_patch_result.benchmarks["swiglu_mlp"] == float("inf")
    assert set(model._zmlx_patch_result.pattern_counts) == {"quantized_linear"}


def test_output_check():
    a = mx.array([1.0, 2.0])
    assert smart._close([a], [a])
    assert not smart._close([a * 1.05], [a])
    assert not smart._close([a * float("nan")], [a])
    assert not smart._close([a[:1]], [a])
    assert not smart._close([a, a], [a])


def test_unknown_pattern(make_llama, tokens):
    with pytest.raises(ValueError, match="unknown pattern 'moe'"):
        smart_patch(make_llama(), tokens, patterns=["moe"])
