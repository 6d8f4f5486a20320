"""One rank of a sharded model, run by test_sharding.py: prints the errors of its patched logits."""

from __future__ import annotations

import json
import sys

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3_moe

from zmlx.kernels.spec import relative_error
from zmlx.patch import patch, unpatch


def build() -> nn.Module:
    mx.random.seed(8)
    args = qwen3_moe.ModelArgs(
        model_type="qwen3_moe",
        hidden_size=128,
        num_hidden_layers=2,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=6,
        num_experts_per_tok=2,
        decoder_sparse_step=2,  # one dense layer and one of experts
        mlp_only_layers=[],
        moe_intermediate_size=128,
        rms_norm_eps=1e-5,
        vocab_size=101,
        rope_theta=1e4,
        tie_word_embeddings=False,
        max_position_embeddings=512,
        norm_topk_prob=True,
    )
    model = qwen3_moe.Model(args)
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
