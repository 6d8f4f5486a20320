"""Models of published shapes with random weights: they take time and memory as the real ones do.

The numbers are those of each model's config.json. Weights are quantized as mlx-lm's conversion to
4 bits does it: affine in groups of 64, routers as the model file asks, and what mlx-lm leaves alone
as it is. GPT-OSS is the MXFP4-Q4 conversion: experts as OpenAI published them (mxfp4), everything
else affine with 4 bits.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from zmlx.bench.filling import fill

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
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    },
    "glm-4.7-flash": {
        "model_type": "glm4_moe_lite",
        "vocab_size": 154880,
        "hidden_size": 2048,
        "intermediate_size": 10240,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 47,
        "num_attention_heads": 20,
        "num_key_value_heads": 20,
        "n_shared_experts": 1,
        "n_routed_experts": 64,
        "num_experts_per_tok": 4,
        "routed_scaling_factor": 1.8,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "q_lora_rank": 768,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 192,
        "qk_rope_head_dim": 64,
        "v_head_dim": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 202752,
        "tie_word_embeddings": False,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
    },
}

#: shape -> how its experts are quantized, where not as the rest
EXPERTS: dict[str, dict[str, Any]] = {
    "gpt-oss-20b": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
}


def random_model(
    shape: str, *, bits: int = 4, group_size: int = 64, dtype: mx.Dtype = mx.bfloat16, seed: int = 0
) -> nn.Module:
    """Return an evaluated quantized model with random weights (`zmlx.bench.filling`).

    Args:
        shape: a name in `SHAPES`.
        bits: width of the quantized weights, in mlx-lm's affine mode.
        group_size: values that share a scale.
        dtype: of scales, biases, norms and activations.
        seed: of the random numbers.

    Raises:
        ValueError: the shape is not known.
    """
    return fill(unfilled_model(shape, bits=bits, group_size=group_size, dtype=dtype), seed)


def unfilled_model(
    shape: str, *, bits: int = 4, group_size: int = 64, dtype: mx.Dtype = mx.bfloat16
) -> nn.Module:
    """Return the quantized model of a shape before anything is computed: it takes no memory.

    Its parameters have their shapes and dtypes; their values are those of mlx-lm's initialisation,
    and evaluating them takes more memory than the finished model. Arguments as for `random_model`.

    Raises:
        ValueError: the shape is not known.
    """
    if shape not in SHAPES:
        raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    config = SHAPES[shape]
    module = import_module(f"mlx_lm.models.{config['model_type']}")
    model: nn.Module = module.Model(module.ModelArgs.from_dict(config))
    _cast(model, dtype)
    chosen = getattr(model, "quant_predicate", None) or (lambda path, module: True)
    experts = EXPERTS.get(shape)

    def quantization(path: str, layer: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(layer, "to_quantized"):
            return False
        if experts is not None and type(layer).__name__ == "SwitchLinear":
            return experts
        wanted: bool | dict[str, Any] = chosen(path, layer)
        return wanted

    nn.quantize(model, group_size, bits, class_predicate=quantization)
    model.eval()
    return model


def _cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Cast parameters as mlx-lm's conversion does, which spares what a model wants in float32."""
    spared = getattr(model, "cast_predicate", None) or (lambda path: True)

    def cast(path: str, value: mx.array) -> mx.array:
        floating = mx.issubdtype(value.dtype, mx.floating)
        return value.astype(dtype) if floating and spared(path) else value

    model.update(tree_map_with_path(cast, model.parameters()))
