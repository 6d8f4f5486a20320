"""Which expressions of upstream forwards are recognised, and which must not be."""

from __future__ import annotations

import ast
import importlib

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.activations import swiglu
from upstream import newest_only

from zmlx.patch.expressions import combinations, gated_function, gated_products
from zmlx.patch.forward import own_forward


def _forward(module: str, cls: str):
    return own_forward(getattr(importlib.import_module(f"mlx_lm.models.{module}"), cls))


@pytest.mark.parametrize(
    ("module", "cls", "gate", "up", "activation"),
    [
        ("llama", "MLP", "gate_proj", "up_proj", "silu"),
        ("lfm2", "MLP", "w1", "w3", "silu"),
        ("exaone", "MLP", "c_fc_0", "c_fc_1", "silu"),
        pytest.param(  # nn.silu(a) * b, spelled out
            *("muse_glimmer", "MLP", "gate_proj", "up_proj", "silu"), marks=newest_only
        ),
        ("iquestloopcoder", "MLP", "gate_proj", "up_proj", "silu"),  # through its own function
        ("gemma", "MLP", "gate_proj", "up_proj", "gelu"),
        ("gemma2", "MLP", "gate_proj", "up_proj", "gelu_tanh"),
        ("gemma4_text", "MLP", "gate_proj", "up_proj", "gelu_tanh"),
    ],
)
def test_gated_products_are_found(module, cls, gate, up, activation):
    (site,) = gated_products(_forward(module, cls))
    assert (site.gate, site.up, site.activation) == (gate, up, activation)


def test_only_the_unclamped_branch_of_step3p5_is_a_swiglu():
    forward = _forward("step3p5", "Step3p5MLP")
    (site,) = gated_products(forward)
    lines = [n.lineno for n in forward.tree.body]
    assert site.node.lineno == lines[-1]  # the return after the clamped branch


@pytest.mark.parametrize(
    ("module", "cls"),
    [
        ("bitnet", "MLP"),
        ("nanochat", "MLP"),
        ("gemma3n", "MLP"),
        ("phi3", "MLP"),
        ("glm4", "Glm4MLP"),
    ],
)
def test_what_is_not_a_product_of_two_projections_is_not_found(module, cls):
    assert gated_products(_forward(module, cls)) == []


@pytest.mark.parametrize(
    ("module", "cls", "experts", "keeps_dtype"),
    [
        ("glm4_moe", "MoE", "switch_mlp", True),
        ("mixtral", "MixtralSparseMoeBlock", "switch_mlp", False),
        ("deepseek_v3", "DeepseekV3MoE", "switch_mlp", True),
        ("dots1", "Dots1MoE", "experts", True),
        pytest.param(  # casts to the dtype of x, and that cast stays
            *("laguna", "MoE", "switch_mlp", False), marks=newest_only
        ),
        pytest.param("kimi_k3", "KimiK3SparseMoE", "switch_mlp", False, marks=newest_only),
    ],
)
def test_weighted_sums_over_experts_are_found(module, cls, experts, keeps_dtype):
    (site,) = combinations(_forward(module, cls))
    assert (site.experts, site.keeps_dtype) == (experts, keeps_dtype)


@pytest.mark.parametrize(
    ("module", "cls"),
    [
        ("llama4", "MoE"),
        pytest.param("muse_spark", "MoE", marks=newest_only),
        pytest.param("deepseek_v41", "Experts", marks=newest_only),  # another axis
    ],
)
def test_blocks_that_combine_otherwise_are_left_alone(module, cls):
    assert combinations(_forward(module, cls)) == []


@pytest.mark.parametrize(
    ("module", "cls", "experts", "weights", "keeps_dtype"),
    [
        ("gpt_oss", "MLPBlock", "experts", "expert_weights", False),
        ("longcat_flash", "LongcatFlashMoE", "switch_mlp", "regular_weights", False),
        ("bailing_moe", "BailingMoeSparseMoeBlock", "switch_mlp", "topk_weight", True),
        ("gemma4_text", "Experts", "switch_glu", "w.squeeze(-1)", False),
        ("nemotron_h", "NemotronHMoE", "switch_mlp", "scores", True),
    ],
)
def test_other_ways_to_write_the_weighted_sum(module, cls, experts, weights, keeps_dtype):
    (site,) = combinations(_forward(module, cls))
    found = site.experts, ast.unparse(site.weights), site.keeps_dtype
    assert found == (experts, weights, keeps_dtype)


class Combining(nn.Module):
    """Blocks that only look like those with a weighted sum."""

    def __call__(self, x, i, w):
        return x


class SumOverTokens(Combining):
    def __call__(self, x, i, w):
        y = self.experts(x, i)
        v = y * mx.expand_dims(w, axis=-1)
        return v.sum(axis=-1)


class OtherAxisOfWeights(Combining):
    def __call__(self, x, i, w):
        y = self.experts(x, i)
        v = y * mx.expand_dims(w, axis=0)
        return v.sum(axis=-2)


class ProductIsReturnedToo(Combining):
    def __call__(self, x, i, w):
        y = self.experts(x, i)
        v = y * w[..., None]
        z = v.sum(axis=-2)
        return z, v


class OutputsAreReadAgain(Combining):
    def __call__(self, x, i, w):
        y = self.experts(x, i)
        v = y * w[..., None]
        z = v.sum(axis=-2)
        return z + y[..., 0, :]


class WeightsHaveTwoMeanings(Combining):
    def __call__(self, x, i, w):
        e = mx.expand_dims(w, -1)
        if self.scaled:
            e = w
        y = self.experts(x, i)
        return (y * e).sum(axis=-2)


class KeepsTheAxis(Combining):
    def __call__(self, x, i, w):
        y = self.experts(x, i)
        return mx.sum(y * w[..., None], axis=-2, keepdims=True)


class SomethingBetween(Combining):
    def __call__(self, x, i, w):
        y = self.experts(x, i)
        y = mx.tanh(y)
        return (y * w[..., None]).sum(axis=-2)


@pytest.mark.parametrize("cls", Combining.__subclasses__())
def test_what_only_looks_like_a_weighted_sum_is_not_found(cls):
    assert combinations(own_forward(cls)) == []


def clamped(x, gate):
    return nn.silu(mx.clip(gate, -1, 1)) * x


def up_first(x, gate):
    return x * nn.silu(gate)


def same_twice(x, gate):
    return nn.silu(gate) * gate


def extended(gate, x):
    y = nn.silu(gate) * x
    return y + 1


@pytest.mark.parametrize(
    ("function", "meaning"),
    [
        (swiglu, ("silu", 0)),
        (up_first, ("silu", 1)),
        (clamped, None),
        (same_twice, None),
        (extended, None),
        (mx.multiply, None),
        (None, None),
    ],
)
def test_gated_functions(function, meaning):
    assert gated_function(function) == meaning


class Shadowed(nn.Module):
    """A parameter hides the function that the name usually means."""

    def __call__(self, x, swiglu):
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class TwoInputs(nn.Module):
    def __call__(self, x, y):
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(y)))


class ExpertsUsedTwice(nn.Module):
    def __call__(self, x, i, w):
        y = self.switch_mlp(x, i)
        z = (y * w[..., None]).sum(axis=-2)
        return z + y.mean()


class WrongAxis(nn.Module):
    def __call__(self, x, i, w):
        y = self.switch_mlp(x, i)
        return (y * w[..., None]).sum(axis=-1)


class Apart(nn.Module):
    def __call__(self, x, i, w):
        y = self.switch_mlp(x, i)
        y = y * 2
        return (y * w[..., None]).sum(axis=-2)


class Reassigned(nn.Module):
    def __call__(self, x, i, w):
        y = self.switch_mlp(x, i)
        y = (w[..., None] * y).sum(-2).astype(y.dtype)
        return y * 2


@pytest.mark.parametrize("cls", [Shadowed, TwoInputs])
def test_lookalikes_of_gated_products_are_not_found(cls):
    assert gated_products(own_forward(cls)) == []


@pytest.mark.parametrize("cls", [ExpertsUsedTwice, WrongAxis, Apart])
def test_lookalikes_of_weighted_sums_are_not_found(cls):
    assert combinations(own_forward(cls)) == []


def test_a_sum_whose_name_is_used_again_afterwards_is_found():
    (site,) = combinations(own_forward(Reassigned))
    assert site.keeps_dtype


def test_a_replaced_silu_is_not_silu(monkeypatch):
    monkeypatch.setattr(nn, "silu", lambda x: x)
    assert gated_function(up_first) is None
