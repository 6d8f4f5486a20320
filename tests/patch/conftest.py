"""Tiny models for the tests of patching, and fresh caches for those that break a kernel."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import llama, qwen3_moe

from zmlx.kernels import spec
from zmlx.patch import pattern


def _finished(model: nn.Module, dtype: mx.Dtype, bits: int | None) -> nn.Module:
    model.set_dtype(dtype)
    if bits is not None:
        nn.quantize(model, group_size=32, bits=bits)
    model.eval()
    mx.eval(model.parameters())
    return model


@pytest.fixture
def make_llama():
    """Return a function that builds a random dense model of two layers."""

    def make(
        *,
        layers: int = 2,
        dtype: mx.Dtype = mx.float32,
        bits: int | None = 4,
        hidden: int = 96,
    ) -> nn.Module:
        mx.random.seed(7)
        args = llama.ModelArgs(
            model_type="llama",
            hidden_size=hidden,
            num_hidden_layers=layers,
            intermediate_size=160,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            vocab_size=101,
            tie_word_embeddings=True,
        )
        return _finished(llama.Model(args), dtype, bits)

    return make


@pytest.fixture
def make_moe():
    """Return a function that builds a random mixture of experts of two layers."""

    def make(*, dtype: mx.Dtype = mx.float32, bits: int | None = 4, experts: int = 6) -> nn.Module:
        mx.random.seed(8)
        args = qwen3_moe.ModelArgs(
            model_type="qwen3_moe",
            hidden_size=128,
            num_hidden_layers=2,
            intermediate_size=192,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            num_experts=experts,
            num_experts_per_tok=2,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            moe_intermediate_size=64,
            rms_norm_eps=1e-5,
            vocab_size=101,
            rope_theta=1e4,
            tie_word_embeddings=False,
            max_position_embeddings=512,
            norm_topk_prob=True,
        )
        return _finished(qwen3_moe.Model(args), dtype, bits)

    return make


@pytest.fixture
def tokens() -> mx.array:
    """Return token ids (1, 7)."""
    return mx.array([[3, 14, 15, 92, 65, 35, 89]])


@pytest.fixture
def fresh_kernels(monkeypatch):
    """Run a test with empty caches of probes and of generated classes."""
    monkeypatch.setattr(pattern, "_GENERATED", {})
    spec._probe.cache_clear()
    yield
    spec._probe.cache_clear()


@pytest.fixture
def counted(monkeypatch, fresh_kernels):
    """Return kernel name -> number of calls made by replaced modules."""
    calls: dict[str, int] = {}
    implementation = spec.KernelSpec.implementation

    def counting(self, backend):
        kernel = implementation(self, backend)

        def call(*args, **kwargs):
            calls[self.name] = calls.get(self.name, 0) + 1
            return kernel(*args, **kwargs)

        return call

    monkeypatch.setattr(spec.KernelSpec, "implementation", counting)
    return calls
