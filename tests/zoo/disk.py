"""Tiny checkpoints that `mlx_lm.load` loads, with a tokenizer of their own.

folder = make_checkpoint(tmp_path, "qwen3_moe", quantize={"bits": 4, "group_size": 32})
model, tokenizer = mlx_lm.load(str(folder))
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import save_config, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from zoo.build import build
from zoo.configs import Config, config_of

#: Tokens of the checkpoints' vocabulary.
VOCABULARY = 512

_SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
_CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_checkpoint(
    folder: Path | str,
    model_type: str = "llama",
    *,
    quantize: dict[str, int] | None = None,
    dtype: mx.Dtype = mx.float32,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write a tiny random checkpoint and return its folder.

    Args:
        folder: is made where it does not exist.
        model_type: a type of `configs.CONFIGS`.
        quantize: None, or `bits` and `group_size`.
        dtype: of the parameters (of the scales, where quantized).
        seed: of the weights.
        overrides: keys of the configuration (of its text part, where it has one).
    """
    config = config_of(model_type)
    text = config.get("text_config", config)
    text.update({"vocab_size": VOCABULARY, **overrides})
    config["vocab_size"] = VOCABULARY
    config.update({"bos_token_id": 1, "eos_token_id": 2})
    model = build(model_type, dtype=dtype, quantize=quantize, seed=seed, config=dict(config))
    if quantize:
        config["quantization"] = {**quantize, "mode": "affine", **_exceptions(model, quantize)}
    return save(model, config, Path(folder))


def save(model: nn.Module, config: Config, folder: Path) -> Path:
    """Write a model, its configuration and the tokenizer into a folder; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` of a small byte-level BPE tokenizer."""
    (folder / "tokenizer.json").write_text(_tokenizer(), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "chat_template": _CHAT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


@cache
def _tokenizer() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(topics.values(), trainer)
    return tokenizer.to_str()


def _exceptions(model: nn.Module, quantize: dict[str, int]) -> dict[str, dict[str, int]]:
    """Return the layers that are quantized otherwise, such as routers in 8 bits."""
    found = {}
    for path, m in model.named_modules():
        if hasattr(m, "bits") and (m.bits, m.group_size) != (
            quantize["bits"],
            quantize["group_size"],
        ):
            found[path] = {"bits": m.bits, "group_size": m.group_size}
    return found
