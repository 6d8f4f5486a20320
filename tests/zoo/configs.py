"""A tiny configuration of every model type of mlx-lm.

Each shows every kind of layer that its type has: dense and routed, full and sliding, recurrent and
attention. All inner dimensions are multiples of 64, so that groups of 32 and 64 quantize every
layer, and none is a multiple of 512, so that kernels meet their tails. A type is named as its
module in `mlx_lm.models`; the name that a checkpoint of it would carry is `model_type`.

A new model type needs one entry in `CONFIGS`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from upstream import NEWEST, installed_types

Config = dict[str, Any]

#: What nearly every configuration states; a type ignores the keys that it does not know.
_BASE: Config = {
    "vocab_size": 160,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "norm_eps": 1e-5,
    "norm_epsilon": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}

#: Eight experts of which two are chosen, under the names that types use for them.
_MOE: Config = {
    "num_experts": 8,
    "n_routed_experts": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "shared_expert_intermediate_size": 64,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}

_GROUPED: Config = {"n_group": 4, "topk_group": 2, "num_expert_group": 4}
_UNGROUPED: Config = {"n_group": 1, "topk_group": 1, "num_expert_group": 1}

#: Attention over a compressed latent.
_LATENT: Config = {
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "num_key_value_heads": 4,
}

_INDEXER: Config = {"index_head_dim": 64, "index_n_heads": 4, "index_topk": 4}

#: Gated delta rule beside full attention.
_DELTA: Config = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "partial_rotary_factor": 0.5,
}

_SLIDING_FULL = ["sliding_attention", "full_attention"]


def _dense(**more: Any) -> Config:
    return {**_BASE, **more}


def _moe(**more: Any) -> Config:
    return {**_BASE, **_MOE, **_UNGROUPED, **more}


def _latent_moe(**more: Any) -> Config:
    return {**_BASE, **_MOE, **_GROUPED, **_LATENT, **more}


def _text(config: Config, model_type: str, **more: Any) -> Config:
    """Return the configuration of a multimodal model whose text part is `config`."""
    return {"text_config": {**config, "model_type": model_type}, "vocab_size": 160, **more}


def _gemma(**more: Any) -> Config:
    return _dense(query_pre_attn_scalar=32, sliding_window=8, sliding_window_pattern=2, **more)


_LLAMA = _dense(hidden_size=192, intermediate_size=320, head_dim=48, mlp_bias=True)
_QWEN3 = _dense(hidden_size=320, intermediate_size=192, head_dim=64)
_QWEN3_MOE = _moe(num_hidden_layers=2, mlp_only_layers=[0])
_DEEPSEEK_V3 = _latent_moe(topk_method="noaux_tc", scoring_func="sigmoid")
_QWEN3_5 = _dense(
    **_DELTA, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5, "type": "default"}
)
_GEMMA4 = _dense(
    global_head_dim=64,
    num_hidden_layers=4,
    num_kv_shared_layers=2,
    layer_types=_SLIDING_FULL * 2,
    sliding_window=8,
    vocab_size_per_layer_input=160,
    hidden_size_per_layer_input=64,
    use_double_wide_mlp=True,
    enable_moe_block=True,
    num_experts=8,
    top_k_experts=2,
    moe_intermediate_size=64,
    tie_word_embeddings=True,
)
_KDA = {"kda_layers": [1], "full_attn_layers": [2], "num_heads": 4, "head_dim": 32}
_KIMI_LINEAR = {
    **_latent_moe(topk_group=2, q_lora_rank=None, model_max_length=512),
    "linear_attn_config": {**_KDA, "short_conv_kernel_size": 4},
    "head_dim": 32,
}
_LONGCAT: Config = {
    **_latent_moe(),
    "attention_method": "MLA",
    "zero_expert_type": "identity",
    "ffn_hidden_size": 192,
    "expert_ffn_hidden_size": 64,
    "moe_topk": 3,
    "zero_expert_num": 4,
    "num_layers": 2,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
    "router_bias": True,
}
_BAILING = _moe(
    **{
        "use_qk_norm": True,
        "use_qkv_bias": True,
        "num_shared_experts": 1,
        "moe_router_enable_expert_bias": True,
        "score_function": "sigmoid",
        "layer_group_size": 2,
        "group_norm_size": 2,
        **_GROUPED,
    }
)

CONFIGS: dict[str, Config] = {
    "Klear": _moe(model_type="Klear", mlp_only_layers=[0]),
    "afm7": _dense(
        hidden_dim=128,
        num_layers=2,
        num_kv_reuse_layers=1,
        num_heads=4,
        num_kv_heads=2,
        hidden_dim_scale_factor=1.5,
    ),
    "afmoe": _moe(
        layer_types=_SLIDING_FULL,
        num_dense_layers=1,
        sliding_window=8,
        route_scale=1.5,
        **_GROUPED,
    ),
    "apertus": _dense(post_norm=False, qk_norm=True),
    "baichuan_m1": _dense(sliding_window=8, sliding_window_layers=[1], conv_window=2),
    "bailing_hybrid": {**_BAILING, **_LATENT, "partial_rotary_factor": 0.5, "head_dim": 32},
    "bailing_moe": _BAILING,
    "bailing_moe_linear": {**_BAILING, "num_key_value_heads": 4},
    "bailing_moe_v3": {
        **_latent_moe(),
        "moe_shared_expert_intermediate_size": 64,
        "layer_group_size": 2,
        "short_conv_kernel_size": 4,
    },
    "bitnet": _dense(tie_word_embeddings=True),
    "cohere": _dense(use_qk_norm=True, logit_scale=0.5),
    "cohere2": _dense(logit_scale=0.5, sliding_window=8, sliding_window_pattern=2),
    "dbrx": {
        "vocab_size": 160,
        "d_model": 128,
        "n_layers": 2,
        "n_heads": 4,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 192, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek": _moe(n_shared_experts=2),
    "deepseek_v2": _latent_moe(
        topk_method="group_limited_greedy", rope_scaling={"type": "yarn", "factor": 4.0}
    ),
    "deepseek_v3": _DEEPSEEK_V3,
    "deepseek_v32": {**_DEEPSEEK_V3, **_INDEXER},
    "deepseek_v41": {**_latent_moe(), **_INDEXER},
    "dots1": _moe(**_GROUPED),
    "ernie4_5": _dense(use_bias=True),
    "ernie4_5_moe": _moe(
        use_bias=False,
        moe_num_experts=8,
        moe_k=3,
        moe_layer_start_index=1,
        moe_num_shared_experts=1,
        moe_use_aux_free=True,
    ),
    "exaone": _dense(num_layers=2),
    "exaone4": _dense(rope_scaling=None, sliding_window=8, sliding_window_pattern="LG"),
    "exaone_moe": _moe(
        sliding_window=8, layer_types=_SLIDING_FULL, is_moe_layer=[False, True], **_GROUPED
    ),
    "falcon_h1": _dense(
        mamba_d_ssm=128,
        mamba_n_heads=4,
        mamba_d_head=32,
        mamba_d_state=32,
        mamba_rms_norm=True,
        lm_head_multiplier=0.5,
    ),
    "gear": _dense(
        num_hidden_layers=3,
        layer_types=["conv_mixer", "sliding_attention", "full_attention"],
        sliding_window=8,
    ),
    "gemma": _gemma(),
    "gemma2": _gemma(),
    "gemma3": _text(_gemma(), "gemma3_text"),
    "gemma3_text": _gemma(),
    "gemma3n": _text(
        _dense(
            num_hidden_layers=4,
            num_kv_shared_layers=2,
            intermediate_size=[192] * 4,
            vocab_size_per_layer_input=160,
            sliding_window=8,
            rope_local_base_freq=1e4,
            final_logit_softcapping=30.0,
            layer_types=_SLIDING_FULL * 2,
            activation_sparsity_pattern=[0.9, 0.0, 0.0, 0.0],
            hidden_size_per_layer_input=64,
            altup_num_inputs=2,
            altup_coef_clip=120.0,
            altup_correct_scale=True,
            altup_active_idx=0,
            laurel_rank=64,
        ),
        "gemma3n_text",
    ),
    "gemma4": _text(_GEMMA4, "gemma4_text"),
    "gemma4_text": _GEMMA4,
    "glm": _dense(),
    "glm4": _dense(partial_rotary_factor=0.5),
    "glm4_moe": _moe(use_qk_norm=True, partial_rotary_factor=0.5, rope_scaling=None, **_GROUPED),
    "glm4_moe_lite": _latent_moe(),
    "glm_moe_dsa": {
        **_DEEPSEEK_V3,
        **_INDEXER,
        "moe_layer_freq": 1,
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
    },
    "gpt2": {
        "n_ctx": 512,
        "n_embd": 128,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 512,
        "layer_norm_epsilon": 1e-5,
        "vocab_size": 160,
    },
    "gpt_bigcode": {
        "n_embd": 128,
        "n_layer": 2,
        "n_inner": 192,
        "n_head": 4,
        "n_positions": 512,
        "layer_norm_epsilon": 1e-5,
        "vocab_size": 160,
    },
    "gpt_neox": _dense(rotary_emb_base=10000, rotary_pct=0.5),
    "gpt_oss": _moe(layer_types=_SLIDING_FULL, sliding_window=8),
    "gptj": {"n_embd": 128, "vocab_size": 160, "n_head": 4, "rotary_dim": 16, "n_layer": 2},
    "granite": _dense(
        logits_scaling=0.5,
        attention_multiplier=0.2,
        embedding_multiplier=2.0,
        residual_multiplier=0.5,
    ),
    "granitemoe": _moe(
        logits_scaling=0.5,
        attention_multiplier=0.2,
        embedding_multiplier=2.0,
        residual_multiplier=0.5,
    ),
    "granitemoehybrid": _moe(
        logits_scaling=0.5,
        attention_multiplier=0.2,
        embedding_multiplier=2.0,
        residual_multiplier=0.5,
        layer_types=["mamba", "attention"],
        shared_intermediate_size=64,
        mamba_n_heads=8,
        mamba_d_head=32,
        mamba_proj_bias=False,
        mamba_d_state=32,
        mamba_d_conv=4,
        mamba_n_groups=2,
        mamba_conv_bias=True,
    ),
    "helium": _dense(),
    "hunyuan": _moe(
        moe_topk=2,
        num_shared_expert=1,
        use_mixed_mlp_moe=True,
        use_qk_norm=True,
        use_cla=True,
        cla_share_factor=2,
        rope_scaling={"type": "dynamic", "factor": 1.0, "alpha": 2.0},
    ),
    "hunyuan_v1_dense": _dense(),
    "internlm2": _dense(),
    "internlm3": _dense(),
    "iquestloopcoder": _dense(loop_window_size=8),
    "jamba": _moe(
        attn_layer_offset=1,
        attn_layer_period=2,
        expert_layer_offset=1,
        expert_layer_period=2,
        mamba_d_conv=4,
        mamba_d_state=16,
        mamba_expand=2,
        mamba_dt_rank=64,
    ),
    "kimi_k25": _text(_DEEPSEEK_V3, "deepseek_v3"),
    "kimi_k3": _text(_KIMI_LINEAR, "kimi_linear"),
    "kimi_linear": _KIMI_LINEAR,
    "kimi_vl": _text(_DEEPSEEK_V3, "deepseek_v3"),
    "laguna": _moe(
        layer_types=_SLIDING_FULL,
        sliding_window=8,
        moe_routed_scaling_factor=1.5,
        moe_router_logit_softcapping=3.0,
    ),
    "lfm2-vl": _text(_dense(), "lfm2"),
    "lfm2": _dense(
        conv_bias=False,
        conv_L_cache=3,
        block_dim=128,
        block_ff_dim=192,
        block_multiple_of=64,
        block_ffn_dim_multiplier=1.0,
        block_auto_adjust_ff_dim=False,
        full_attn_idxs=[1],
    ),
    "lfm2_moe": _moe(
        use_expert_bias=True,
        num_dense_layers=1,
        conv_bias=False,
        conv_L_cache=3,
        layer_types=["conv", "full_attention"],
    ),
    "lille-130m": {
        "block_size": 512,
        "layer_norm_eps": 1e-5,
        "n_embd": 128,
        "n_head": 4,
        "n_kv_heads": 2,
        "n_layer": 2,
        "rope_theta": 1e4,
        "vocab_size": 160,
    },
    "llama": _LLAMA,
    "llama4": _text(
        _moe(
            attention_chunk_size=8,
            interleave_moe_layer_step=2,
            intermediate_size_mlp=192,
            intermediate_size=64,
            num_experts_per_tok=1,
            rope_scaling=None,
            use_qk_norm=True,
            num_hidden_layers=4,
        ),
        "llama4_text",
    ),
    "llama4_text": _dense(intermediate_size_mlp=192, no_rope_layers=[1, 0], use_qk_norm=True),
    "longcat_flash": _LONGCAT,
    "longcat_flash_ngram": {
        **_LONGCAT,
        "ngram_vocab_size_ratio": 4,
        "emb_neighbor_num": 3,
        "emb_split_num": 2,
    },
    "mamba": _dense(
        intermediate_size=256,
        state_size=16,
        conv_kernel=4,
        use_bias=False,
        use_conv_bias=True,
        time_step_rank=64,
        use_bcdt_rms=True,
    ),
    "mamba2": _dense(
        num_heads=8,
        intermediate_size=256,
        state_size=32,
        conv_kernel=4,
        n_groups=2,
        use_bias=False,
        use_conv_bias=True,
        time_step_limit=[0.001, 100.0],
        time_step_rank="auto",
    ),
    "mellum": _moe(
        sliding_window=8,
        layer_types=_SLIDING_FULL,
        rope_parameters={
            name: {"rope_theta": 1e4, "rope_type": "default"} for name in _SLIDING_FULL
        },
    ),
    "mimo": _dense(),
    "mimo_v2_flash": _moe(
        hybrid_layer_pattern=[1, 0],
        moe_layer_freq=[0, 1],
        add_swa_attention_sink_bias=True,
        add_full_attention_sink_bias=False,
        sliding_window_size=8,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        layernorm_epsilon=1e-5,
        swa_rope_theta=1e4,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        v_head_dim=32,
        swa_head_dim=32,
        swa_v_head_dim=32,
        partial_rotary_factor=0.5,
    ),
    "minicpm": _dense(dim_model_base=64, scale_depth=1.4, scale_emb=4.0),
    "minicpm3": _dense(
        **{**_LATENT, "dim_model_base": 64, "scale_depth": 1.4, "scale_emb": 4.0},
        rope_scaling={
            "type": "longrope",
            "long_factor": [1.0 + 0.1 * i for i in range(16)],
            "short_factor": [1.0] * 16,
            "original_max_position_embeddings": 512,
        },
    ),
    "minimax": _moe(shared_intermediate_size=64, rotary_dim=16),
    "minimax_m3_vl": _text(
        _moe(
            dense_intermediate_size=192,
            intermediate_size=64,
            shared_intermediate_size=64,
            mlp_layer_types=["dense", "sparse"],
            layer_types=["full_attention", "sparse_attention"],
            index_n_heads=2,
            index_head_dim=32,
            index_block_size=4,
            index_topk_blocks=2,
        ),
        "minimax_m3",
    ),
    "ministral3": _dense(
        layer_types=_SLIDING_FULL,
        sliding_window=8,
        rope_parameters={
            "rope_theta": 1e4,
            "rope_type": "default",
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 4,
        },
    ),
    "mistral3": _text(_LLAMA, "llama"),
    "mistral4": _latent_moe(
        rope_parameters={
            "rope_theta": 1e4,
            "rope_type": "default",
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 4,
        },
    ),
    "mixtral": _moe(),
    "muse_glimmer": _dense(layer_types=_SLIDING_FULL, sliding_window=8, output_multiplier=1.0),
    "muse_spark": _text(
        _moe(
            num_hidden_layers=3,  # mlx-lm quantizes neither the first nor the last
            num_shared_experts=0,
            post_norm_eps=1e-8,
            rope_parameters={"rope_theta": 1e4},
            layer_rope_theta=[1e4, 0.0, 1e4],
            layer_types=[*_SLIDING_FULL, "sliding_attention"],
            sliding_window=8,
            final_logit_softcapping=20.0,
            output_multiplier=1.0,
            moe_hidden_size=64,
        ),
        "muse_spark",
    ),
    "nanbeige": _dense(num_loops=2),
    "nanochat": _dense(),
    "nemotron-nas": _dense(
        num_hidden_layers=4,
        block_configs=[
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 2.0}},
            {"attention": {"replace_with_linear": True}, "ffn": {"replace_with_linear": True}},
            {"attention": {"n_heads_in_group": 4}, "ffn": {"no_op": True}},
        ],
    ),
    "nemotron": _dense(hidden_act="relu2"),
    "nemotron_h": _moe(
        mamba_num_heads=8,
        mamba_head_dim=32,
        mamba_proj_bias=False,
        ssm_state_size=32,
        conv_kernel=4,
        n_groups=2,
        use_bias=False,
        use_conv_bias=True,
        hybrid_override_pattern=["M", "*", "-", "E"],
        moe_shared_expert_intermediate_size=64,
        moe_latent_size=64,
        num_hidden_layers=4,
    ),
    "olmo": _dense(d_model=128, n_layers=2, n_heads=4, mlp_hidden_size=384, embedding_size=160),
    "olmo2": _dense(),
    "olmo3": _dense(layer_types=_SLIDING_FULL, sliding_window=8),
    "olmo_hybrid": _dense(
        **_DELTA,
        linear_allow_neg_eigval=True,
        layer_types=["linear_attention", "full_attention"],
    ),
    "olmoe": _moe(num_key_value_heads=4),
    "openelm": _dense(
        num_transformer_layers=2,
        model_dim=128,
        ffn_dim_divisor=64,
        num_query_heads=[4, 4],
        num_kv_heads=[2, 2],
        ffn_multipliers=[1.0, 1.5],
    ),
    "phi": _dense(partial_rotary_factor=0.5),
    "phi3": _dense(),
    "phi3small": _dense(
        dense_attention_every_n_layers=2,
        ff_intermediate_size=192,
        gegelu_limit=20.0,
        blocksparse_num_local_blocks=2,
        blocksparse_vert_stride=2,
        mup_width_multiplier=2.0,
    ),
    "phimoe": _moe(
        rope_scaling={
            "type": "longrope",
            "long_factor": [1.0 + 0.1 * i for i in range(16)],
            "short_factor": [1.0] * 16,
            "long_mscale": 1.2,
            "short_mscale": 1.2,
            "original_max_position_embeddings": 512,
        },
    ),
    "phixtral": {
        "num_vocab": 160,
        "model_dim": 128,
        "num_heads": 4,
        "num_layers": 2,
        "rotary_dim": 16,
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
    },
    "pixtral": _text(_LLAMA, "llama"),
    "plamo": _dense(n_shared_head=2),
    "plamo2": _dense(
        hidden_size_per_head=32,
        attention_window_size=8,
        full_attention_idx=[1],
        mamba_d_state=16,
        mamba_d_conv=4,
        mamba_num_heads=4,
        mamba_step=2,
        tie_word_embeddings=True,
    ),
    "plamo3": _dense(window_size=8, sliding_window_pattern=2, tie_word_embeddings=True),
    "prism_hadamard_qwen35": {
        **_text({**_QWEN3_5, "hidden_size": 512, "intermediate_size": 1024}, "qwen3_5_text"),
        "schema_version": 1,
        "tensor_namespace": "mlx-lm-text",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [
            {"path": path, "block": block, "embedding": "embed" in path, "dtype": "float16"}
            for path, block in (
                ("model.embed_tokens", 512),
                ("model.layers.0.mlp.gate_proj", 512),
                ("model.layers.0.mlp.down_proj", 1024),
                ("model.layers.1.self_attn.v_proj", 0),
            )
        ],
    },
    "qwen": _dense(intermediate_size=384, num_key_value_heads=4, kv_channels=32),
    "qwen2": _dense(),
    "qwen2_moe": _moe(),
    "qwen2_vl": _text(_dense(), "qwen2"),
    "qwen3": _QWEN3,
    "qwen3_5": _text(_QWEN3_5, "qwen3_5_text"),
    "qwen3_5_moe": _text({**_moe(), **_QWEN3_5}, "qwen3_5_moe_text"),
    "qwen3_moe": _QWEN3_MOE,
    "qwen3_next": _moe(**_DELTA),
    "qwen3_vl": _text(_QWEN3, "qwen3"),
    "qwen3_vl_moe": _text(_QWEN3_MOE, "qwen3_moe"),
    "recurrent_gemma": _dense(
        conv1d_width=4,
        logits_soft_cap=30.0,
        attention_window_size=8,
        intermediate_size=384,
        block_types=["recurrent", "attention"],
        num_key_value_heads=1,
    ),
    "rwkv7": _dense(
        a_low_rank_dim=64, v_low_rank_dim=64, gate_low_rank_dim=64, decay_low_rank_dim=64
    ),
    "seed_oss": _dense(),
    "smollm3": _dense(no_rope_layers=[1, 0]),
    "solar_open": _moe(partial_rotary_factor=0.5, **_GROUPED),
    "spark2_5": _dense(
        sliding_window=8,
        layer_types=_SLIDING_FULL,
        rope_parameters={
            name: {"rope_theta": 1e4, "rope_type": "default"} for name in _SLIDING_FULL
        },
    ),
    "stablelm": _dense(use_qkv_bias=True, partial_rotary_factor=0.5, qk_layernorm=True),
    "starcoder2": _dense(),
    "step3p5": _dense(
        num_attention_groups=2,
        sliding_window=8,
        layer_types=_SLIDING_FULL,
        attention_other_setting={"num_attention_heads": 4, "num_attention_groups": 2},
        moe_num_experts=8,
        moe_top_k=2,
        moe_intermediate_size=64,
        share_expert_dim=64,
        moe_layers_enum="1",
        moe_router_scaling_factor=1.5,
        swiglu_limits=[0.0, 1.0],
        swiglu_limits_shared=[0.0, 1.0],
    ),
    "talkie": _dense(),
    "telechat3": _dense(),
    "youtu_llm": _dense(**_LATENT),
}

CONFIGS["lfm2-vl"]["text_config"] = {**CONFIGS["lfm2"], "model_type": "lfm2"}


@dataclass(frozen=True)
class Failure:
    """Where the stock model itself raises.

    Attributes:
        message: part of what it says.
        runs: the runs that raise: "alone", "long", "ragged".
        dtype: the only dtype of activations for which it does; empty for all.
        backend: the only backend on which it does; empty for all.
    """

    message: str
    runs: tuple[str, ...] = ("alone", "long", "ragged")
    dtype: str = ""
    backend: str = ""


#: Types whose stock forward raises somewhere; a patched model must then raise the same.
FAILURES: dict[str, tuple[Failure, ...]] = {
    # A Metal kernel without another way.
    "bitnet": (Failure("No Metal back-end"),),
    "muse_spark": (Failure("No Metal back-end"),),
    # Caches that have no batched form.
    "deepseek_v41": (
        Failure("LayerCache has no merge", ("ragged",)),
        Failure("Currently only supports float32", ("alone", "long"), "bfloat16", "cpu"),
    ),
    "llama4": (Failure("ChunkedKVCache has no merge", ("ragged",)),),
    # A position embedding that takes one offset for the whole batch.
    "gpt_bigcode": (Failure("Only length-1 arrays", ("ragged",)),),
    # Layers without attention keep an empty cache, which cannot be moved.
    "nemotron-nas": (Failure("'NoneType' object has no attribute 'shape'", ("ragged",)),),
    # Adds the mask, which for a lone prompt is the word "causal".
    "olmo": (Failure("Cannot perform inplace addition", ("alone", "long")),),
}
if not NEWEST:  # since repaired
    for _name in ("afm7", "gemma3n", "internlm2", "internlm3"):
        FAILURES[_name] = (Failure("too many values|Only length-1 arrays", ("ragged",)),)

#: Types whose stock forward corrupts the heap of the process on CPU (mlx 0.32.4): never run there.
CRASHES = ("phi3small",)

#: Types with operations that have no float64 form; their truth is float32.
NARROW = ("prism_hadamard_qwen35",)


def config_of(name: str) -> Config:
    """Return a fresh copy of the configuration of a type, `model_type` included."""
    return {"model_type": name, **copy.deepcopy(CONFIGS[name])}


def runnable() -> list[str]:
    """Return the installed types whose stock forward does not crash the process."""
    return [name for name in installed_types() if name not in CRASHES]
