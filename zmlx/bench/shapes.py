"""Models of published shapes with random weights: they take time and memory as the real ones do.

The numbers are those of each model's config.json.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "lfm2-8b-a1b": {
        "model_type": "lfm2_moe",
        "vocab_size": 65536,
        "hidden_size": 2048,
        "intermediate_size": 7168,
        "moe_intermediate_size": 1792,
        "num_hidden_layers": 24,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "num_dense_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "norm_topk_prob": True,
        "use_expert_bias": True,
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 128000,
        "full_attn_idxs": [2, 6, 10, 14, 18, 21],
    },
}


def random_model(
    shape: str, *, bits: int = 4, group_size: int = 64, dtype: mx.Dtype = mx.bfloat16, seed: int = 0
) -> nn.Module:
    """Return an evaluated quantized model with random weights; see `unfilled_model`.

    Args:
        shape: a name in `SHAPES`.
        bits: width of the quantized weights, in mlx-lm's affine mode.
        group_size: values that share a scale.
        dtype: of scales, biases, norms and activations.
        seed: of the random numbers.

    Raises:
        ValueError: the shape is not known.
    """
    model = unfilled_model(shape, bits=bits, group_size=group_size, dtype=dtype)
    mx.random.seed(seed)

    def filled(parameter: mx.array) -> mx.array:
        if parameter.dtype == mx.uint32:
            value = mx.random.randint(0, 2**31 - 1, parameter.shape).astype(mx.uint32)
        elif parameter.ndim < 2:
            value = mx.ones(parameter.shape, parameter.dtype)
        else:
            value = (0.01 * mx.random.normal(parameter.shape)).astype(parameter.dtype)
        mx.eval(value)
        return value

    model.update(tree_map(filled, model.parameters()))
    model.eval()
    return model


def unfilled_model(
    shape: str, *, bits: int = 4, group_size: int = 64, dtype: mx.Dtype = mx.bfloat16
) -> nn.Module:
    """Return the quantized model of a shape before anything is computed: it takes no memory.

    Its parameters have their shapes and dtypes; evaluating them takes more memory than the finished
    model. Arguments as for `random_model`.

    Raises:
        ValueError: the shape is not known.
    """
    if shape not in SHAPES:
        raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    config = SHAPES[shape]
    module = import_module(f"mlx_lm.models.{config['model_type']}")
    model: nn.Module = module.Model(module.ModelArgs.from_dict(config))
    model.set_dtype(dtype)
    chosen = getattr(model, "quant_predicate", None) or (lambda path, module: True)
    nn.quantize(
        model,
        group_size,
        bits,
        class_predicate=lambda path, m: hasattr(m, "to_quantized") and chosen(path, m),
    )
    model.eval()
    return model
