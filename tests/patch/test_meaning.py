"""Activations are known by what they compute, not by what they are called."""

from __future__ import annotations

import importlib

import mlx.core as mx
import mlx.nn as nn
import pytest
from upstream import newest_only

from zmlx.patch.meaning import activation_of


def _made(module, cls, *args):
    return getattr(importlib.import_module(f"mlx_lm.models.{module}"), cls)(*args)


@pytest.mark.parametrize(
    ("module", "cls", "args", "meaning"),
    [
        ("switch_layers", "SwiGLU", (), "silu"),
        ("activations", "SwigluOAI", (), "clipped_swiglu"),
        ("activations", "SwigluOAI", (1.7, 7.0), None),
        ("activations", "SwigluOAI", (1.702, 8.0), None),
        ("gemma4_text", "GeGLU", (), "gelu_tanh"),
        ("step3p5", "ClampedSwiGLU", (7.0,), None),
        ("step3p5", "ClampedSwiGLU", (1e6,), None),
        pytest.param("muse_spark", "PreciseSwiGLU", (), "silu", marks=newest_only),
        pytest.param("deepseek_v41", "DeepseekV41SwiGLU", (0.0,), "silu", marks=newest_only),
        pytest.param("deepseek_v41", "DeepseekV41SwiGLU", (10.0,), None, marks=newest_only),
        pytest.param("kimi_k3", "SiTU", (1.0, None), None, marks=newest_only),
    ],
)
def test_gated_activations_of_mlx_lm(module, cls, args, meaning):
    assert activation_of(_made(module, cls, *args), gated=True) == meaning


@pytest.mark.parametrize(
    ("module", "meaning"),
    [
        (nn.ReLU2(), "relu2"),
        (nn.SiLU(), "silu"),
        (nn.GELU(), "gelu"),
        (nn.GELU("precise"), "gelu_tanh"),
        (nn.GELU("fast"), None),
        (nn.ReLU(), None),
        (nn.Softmax(), None),
        (nn.LayerNorm(8), None),
    ],
)
def test_activations_of_one_array(module, meaning):
    assert activation_of(module, gated=False) == meaning


class Exchanged(nn.Module):
    def __call__(self, x, gate):
        return nn.silu(x) * gate


class Rows(nn.Module):
    """SwiGLU, but of each row's deviation from its mean of zero: the samples' mean is zero too."""

    def __call__(self, x, gate):
        return nn.silu(gate - mx.mean(gate)) * x


class Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = mx.ones((3,))

    def __call__(self, x, gate):
        return nn.silu(gate) * x * self.scale


class ByValue(nn.Module):
    def __call__(self, x, gate):
        return nn.silu(gate) * x if mx.max(x).item() > 1 else x


class Clipped(nn.Module):
    def __call__(self, x, gate):
        return nn.silu(mx.minimum(gate, 1e8)) * x


@pytest.mark.parametrize("cls", [Exchanged, Rows, Weighted, ByValue, Clipped])
def test_what_only_looks_like_swiglu(cls):
    assert activation_of(cls(), gated=True) is None


def test_settings_that_change_are_seen():
    module = _made("activations", "SwigluOAI")
    assert activation_of(module, gated=True) == "clipped_swiglu"
    module._limit = 8.0
    assert activation_of(module, gated=True) is None


def test_a_forward_that_is_replaced_is_seen(monkeypatch):
    module = _made("switch_layers", "SwiGLU")
    assert activation_of(module, gated=True) == "silu"
    monkeypatch.setattr(type(module), "__call__", lambda self, x, gate: x * gate)
    assert activation_of(module, gated=True) is None
