"""A patched model writes what stock mlx-lm writes."""

from __future__ import annotations

import mlx_lm

from zmlx.bench.text import read

PROMPT = "Bread needs only four things: flour, water, salt and"


def test_in_float32_the_text_is_stock_s(checkpoints, dense):
    model, tokenizer = dense
    wide, _ = mlx_lm.load(str(checkpoints()))
    reading = read(model, wide, tokenizer.encode(PROMPT), 48)
    assert reading.differences == ()
    assert reading.tokens == reading.stock
    assert max(reading.errors) < 1e-3
    assert "yeast" in tokenizer.decode(list(reading.tokens))
