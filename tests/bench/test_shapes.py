"""Random models of published shapes."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from zmlx.bench import shapes
from zmlx.bench.shapes import SHAPES, random_model
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
    assert {p.dtype for p in parameters.values()} <= {mx.uint32, mx.bfloat16, mx.float32}
    assert not any(mx.all(p == 0).item() for p in parameters.values() if p.ndim > 1)
    linear = [m for _, m in model.named_modules() if isinstance(m, nn.QuantizedLinear)]
    assert {(m.bits, m.group_size) for m in linear} <= {(4, 32), (8, 32), (8, 64)}
    assert linear
    logits = model(mx.array([[1, 2, 3]]))
    assert logits.shape == (1, 3, 96)
    assert not mx.any(mx.isnan(logits)).item()


@pytest.mark.parametrize("name", SHAPES)
def test_equal_seeds_give_equal_models(small, name):
    one, two = (dict(tree_flatten(random_model(name, group_size=32).parameters())) for _ in "ab")
    assert all(mx.array_equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("name", SHAPES)
def test_the_configuration_is_one_that_is_recognised(name):
    assert detect(config=SHAPES[name]).model_type == SHAPES[name]["model_type"]


def test_an_unknown_shape_is_named():
    with pytest.raises(ValueError, match=r"unknown shape 'llama-9b'; known: llama-3.2-1b, lfm2"):
        random_model("llama-9b")
