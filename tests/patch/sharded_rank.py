"""One rank of a sharded model, run by test_sharding.py: prints the errors of its patched logits."""

from __future__ import annotations

import json
import sys

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import glm4_moe

from zmlx.kernels.spec import relative_error
from zmlx.patch import patch, unpatch


def build() -> nn.Module:
    mx.random.seed(8)
    args = glm4_moe.ModelArgs(
        model_type="glm4_moe",
        vocab_size=101,
        hidden_size=128,
        intermediate_size=256,
        max_position_embeddings=512,
        moe_intermediate_size=128,
        norm_topk_prob=True,
        num_attention_heads=4,
        n_group=1,
        head_dim=32,
        topk_group=1,
        n_shared_experts=1,
        n_routed_experts=6,
        routed_scaling_factor=1.5,
        num_experts_per_tok=2,
        first_k_dense_replace=1,  # one dense layer and one of experts
        num_hidden_layers=2,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling=None,
        use_qk_norm=True,
        tie_word_embeddings=False,
        attention_bias=False,
        partial_rotary_factor=0.5,
    )
    model = glm4_moe.Model(args)
    nn.quantize(model, group_size=32, bits=4)
    model.eval()
    mx.eval(model.parameters())
    return model


def main() -> None:
    group = mx.distributed.init(strict=True, backend="ring")
    tokens = mx.array([[3, 14, 15, 92]])
    whole = build()(tokens)
    mx.eval(whole)
    model = build()
    model.shard(group)
    stock = model(tokens)
    mx.eval(stock)
    patch(model)
    report = model._zmlx_patch_result
    patched = model(tokens)
    mx.eval(patched)
    others = mx.distributed.all_gather(patched, group=group)
    mx.eval(others)
    unpatch(model)
    print(
        json.dumps(
            {
                "size": group.size(),
                "patched": report.pattern_counts,
                "refused": sorted({c.reason for c in report.refused}),
                "stock_error": relative_error(stock, whole),
                "patched_error": relative_error(patched, whole),
                "same_on_all_ranks": mx.array_equal(others[0], others[1]).item(),
                "restored": mx.array_equal(model(tokens), stock).item(),
            }
        )
    )
    sys.stdout.flush()


main()
