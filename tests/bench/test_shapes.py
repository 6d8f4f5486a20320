"""Random models of published shapes."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from zmlx.bench import shapes
from zmlx.bench.shapes import SHAPES, random_model, unfilled_model
from zmlx.bench.traffic import parameter_bytes, weight_bytes
from zmlx.family import detect

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.fixture
def small(monkeypatch):
    """Keep every shape's kind and number of layers, and make the rest small."""
    monkeypatch.setattr(
        shapes, "SHAPES", {name: {**config, **SMALL} for name, config in SHAPES.items()}
    )


@pytest.mark.parametrize("name", SHAPES)
def test_a_model_is_quantized_and_runs(small, name):
    model = random_model(name, bits=4, group_size=32)
    parameters = dict(tree_flatten(model.parameters()))
    assert any(p.dtype == mx.uint32 for p in parameters.values())
    # uint8: scales of mxfp4; float32: biases that mlx-lm's conversion spares.
    assert {p.dtype for p in parameters.values()} <= {mx.uint32, mx.uint8, mx.bfloat16, mx.float32}
    assert not any(mx.all(p == 0).item() for p in parameters.values() if p.ndim > 1)
    linear = [m for _, m in model.named_modules() if isinstance(m, nn.QuantizedLinear)]
    assert {(m.bits, m.group_size) for m in linear} <= {(4, 32), (8, 32), (8, 64)}
    assert linear
    logits = model(mx.array([[1, 2, 3]]))
    assert logits.shape == (1, 3, 96)
    # Rows of variance 1 / length, behind a norm: logits are about as large as what is normed.
    assert 0.2 < mx.std(logits.astype(mx.float32)).item() < 5


@pytest.mark.parametrize("name", SHAPES)
def test_equal_seeds_give_equal_models(small, name):
    one, two = (dict(tree_flatten(random_model(name, group_size=32).parameters())) for _ in "ab")
    assert all(mx.array_equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("name", SHAPES)
def test_the_configuration_is_one_that_is_recognised(name):
    assert detect(config=SHAPES[name]).model_type == SHAPES[name]["model_type"]


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [  # GB in all, and read for each token
        ("qwen3-30b-a3b", 17.18, 1.72),
        ("glm-4.7-flash", 16.85, 2.02),
        ("lfm2-8b-a1b", 4.69, 0.88),
        ("llama-3.2-1b", 0.695, 0.695),
        ("qwen3-8b", 4.61, 4.26),
        ("gpt-oss-20b", 11.18, 1.96),
    ],
)
def test_the_bytes_are_those_of_the_published_models(name, total, active):
    model = unfilled_model(name)
    classes = [type(m) for _, m in model.named_modules()]
    assert parameter_bytes(model) / 1e9 == pytest.approx(total, rel=0.005)
    assert weight_bytes(model) / 1e9 == pytest.approx(active, rel=0.005)
    assert [type(m) for _, m in model.named_modules()] == classes


def test_the_experts_of_gpt_oss_are_mxfp4_and_the_rest_is_affine():
    modes = {}
    for _, m in unfilled_model("gpt-oss-20b").named_modules():
        if hasattr(m, "bits"):
            modes.setdefault(type(m).__name__, set()).add((m.mode, m.bits, m.group_size))
    assert modes == {
        "QuantizedSwitchLinear": {("mxfp4", 4, 32)},
        "QuantizedLinear": {("affine", 4, 64), ("affine", 8, 64)},
        "QuantizedEmbedding": {("affine", 4, 64)},
    }


def test_an_unknown_shape_is_named():
    with pytest.raises(ValueError, match=r"unknown shape 'llama-9b'; known: llama-3.2-1b, lfm2"):
        random_model("llama-9b")
