"""Tiny checkpoints load through mlx-lm as the models that they were written from."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from zoo.build import build
from zoo.compare import alone, run
from zoo.configs import config_of
from zoo.disk import VOCABULARY, make_checkpoint

TYPES = ["llama", "mixtral", "qwen3_moe", "qwen3_5", "deepseek_v3", "gpt_oss", "lfm2_moe", "gemma3"]
FOUR_BIT = {"bits": 4, "group_size": 32}


@pytest.mark.parametrize("quantize", [None, FOUR_BIT], ids=["dense", "4bit"])
@pytest.mark.parametrize("name", TYPES)
def test_a_checkpoint_loads_as_the_model_it_was(
    tmp_path: Path, name: str, quantize: dict[str, int] | None
) -> None:
    # Dense experts run in float32 only on CPU.
    dtype = mx.bfloat16 if quantize else mx.float32
    folder = make_checkpoint(tmp_path / name, name, quantize=quantize, dtype=dtype, seed=3)
    model, _ = mlx_lm.load(str(folder))
    config = config_of(name)
    config.get("text_config", config)["vocab_size"] = config["vocab_size"] = VOCABULARY
    built = build(name, dtype=dtype, quantize=quantize, seed=3, config=config)
    assert np.array_equal(run(alone, model).logits, run(alone, built).logits)


def test_the_tokenizer_round_trips_and_has_a_chat_template(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, hidden_size=64, num_attention_heads=2, head_dim=32)
    model, tokenizer = mlx_lm.load(str(folder))
    assert tokenizer.decode(tokenizer.encode("The capital of France, 1 + 1")) == (
        "The capital of France, 1 + 1"
    )
    chat = [{"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert prompt == "<|user|>Hi</s><|assistant|>"
    assert isinstance(mlx_lm.generate(model, tokenizer, prompt, max_tokens=4), str)
    assert model.model.embed_tokens.weight.shape == (VOCABULARY, 64)
