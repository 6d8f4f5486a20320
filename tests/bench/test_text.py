"""Reading a patched model's text with stock in float32."""

from __future__ import annotations

import mlx.core as mx
import mlx_lm
import pytest
from zoo.disk import make_checkpoint

from zmlx.bench import text
from zmlx.bench.generation import generate
from zmlx.bench.text import read, widen

PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(
        tmp_path_factory.mktemp("llama"), "llama", quantize={"bits": 4, "group_size": 32}
    )


def loaded(folder, dtype):
    model, _ = mlx_lm.load(str(folder))
    model.set_dtype(dtype)
    return model


@pytest.mark.parametrize("piece", [1, 4, 64])
def test_stock_reads_what_it_would_write(folder, piece):
    model, wide = loaded(folder, mx.float32), widen(loaded(folder, mx.float32))
    seen = []
    reading = read(model, wide, PROMPT, 9, piece=piece, on_token=seen.append)
    assert reading.tokens == reading.stock == generate(wide, PROMPT, 9).tokens
    assert reading.differences == ()
    assert len(reading.errors) == 9
    assert max(reading.errors) < 1e-4
    assert sum(seen) == 2 * (len(PROMPT) + 8)


def test_both_choose_along_a_given_text(folder):
    model, wide = loaded(folder, mx.float32), widen(loaded(folder, mx.float32))
    given = [10, 20, 30, 40, 50, 60]
    reading = read(model, wide, PROMPT, 5, given=given)
    alone = [generate(wide, [*PROMPT, *given[:n]], 2).tokens[0] for n in range(5)]
    assert list(reading.tokens) == list(reading.stock) == alone


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_differences_are_told_in_numbers(folder, dtype):
    model, wide = loaded(folder, dtype), widen(loaded(folder, mx.bfloat16))
    # Another model: the order of its logits is turned round.
    wide.model.norm.weight = -wide.model.norm.weight
    reading = read(model, wide, PROMPT, 4)
    assert [entry.position for entry in reading.differences] == [0, 1, 2, 3]
    for entry in reading.differences:
        assert entry.ours == reading.tokens[entry.position]
        assert entry.stock == reading.stock[entry.position]
        assert entry.gap > 0
        assert entry.error == pytest.approx(reading.errors[entry.position])
        assert entry.step_error == pytest.approx(entry.error, rel=0.1)
        assert (entry.stock_step_error is None) == (dtype == mx.float32)
    assert "_zmlx_patch_result" not in vars(model)


def test_spacing_is_that_of_the_dtype():
    assert text._spacing(16.0, mx.bfloat16) == 0.125
    assert text._spacing(15.9, mx.bfloat16) == 0.0625
    assert text._spacing(1.0, mx.float16) == 2.0**-10
    assert text._spacing(1.0, mx.float32) == 2.0**-23
