"""Timed generation is the model's own greedy generation."""

from __future__ import annotations

import mlx.core as mx
import mlx_lm
import pytest
from zoo.disk import make_checkpoint

from zmlx.bench import generation
from zmlx.bench.decode import measure
from zmlx.bench.generation import generate

PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = make_checkpoint(
        tmp_path_factory.mktemp("llama"), "llama", quantize={"bits": 4, "group_size": 32}
    )
    return mlx_lm.load(str(folder))[0]


def test_it_is_the_greedy_text(model):
    made = generate(model, PROMPT, 6, keep_logits=True)
    stream = mlx_lm.generate.__globals__["generate_step"](mx.array(PROMPT), model, max_tokens=6)
    assert list(made.tokens) == [int(token) for token, _ in stream]
    assert made.logits.shape == (6, 512)
    assert mx.argmax(made.logits, axis=-1).tolist() == list(made.tokens)
    assert made.prompt_tokens == 5
    assert len(made.step_seconds) == 5
    assert made.decode_rate == pytest.approx(5 / sum(made.step_seconds))
    assert made.peak_bytes > 0
    assert not made.has_nan


def test_a_long_prompt_goes_through_in_steps(model, monkeypatch):
    whole = generate(model, PROMPT, 3, keep_logits=True)
    monkeypatch.setattr(generation, "PREFILL_STEP", 2)
    stepped = generate(model, PROMPT, 3, keep_logits=True)
    assert mx.abs(whole.logits - stepped.logits).max().item() < 1e-4


def test_forced_tokens_are_the_context(model):
    free = generate(model, PROMPT, 4, keep_logits=True)
    other = [token + 1 for token in free.tokens]
    forced = generate(model, PROMPT, 4, forced=other, keep_logits=True)
    whole = model(mx.array([PROMPT + other[:3]]))[0, 4:]
    assert mx.abs(forced.logits - whole).max().item() < 1e-4


def test_nan_is_seen(model):
    norm = model.model.norm
    before = norm.weight
    norm.weight = mx.full(before.shape, mx.nan)
    try:
        assert generate(model, PROMPT, 2).has_nan
    finally:
        norm.weight = before


@pytest.mark.parametrize(
    ("prompt", "count", "forced"), [([], 3, None), ([1], 1, None), ([1], 3, [1, 2])]
)
def test_bad_input(model, prompt, count, forced):
    with pytest.raises(ValueError, match="expected at least 1 and 2"):
        generate(model, prompt, count, forced=forced)


def test_both_kinds_are_measured_in_turn_and_the_model_is_stock_again(model):
    classes = [type(m) for _, m in model.named_modules()]
    runs, report = measure(model, PROMPT, subject="s", stock_tokens=2, tokens=3, runs=2)
    assert [(r.variant, r.repeat) for r in runs] == [
        ("stock", 0),
        ("zmlx", 0),
        ("zmlx", 1),
        ("stock", 1),
    ]
    assert [len(r.samples["step_seconds"]) for r in runs] == [1, 2, 2, 1]
    assert report.patched_count > 0
    assert [type(m) for _, m in model.named_modules()] == classes
