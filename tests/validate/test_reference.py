"""The reference computes what a dequantized twin computes, and leaves no trace."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from zoo.build import build
from zoo.build import reference as twin_of

from zmlx.validate import compare as comparing
from zmlx.validate.compare import compare
from zmlx.validate.reference import extra_bytes, reference, reference_dtype

TOKENS = mx.array([[3, 1, 4, 1, 5, 9, 2]])
#: dense; routed experts; latent attention; untied head and shared experts
TYPES = ("llama", "qwen3_moe", "deepseek_v3", "mixtral", "gpt_oss")


def trace(model):
    classes = [type(m) for _, m in model.named_modules()]
    return classes, [(path, id(array)) for path, array in tree_flatten(model.parameters())]


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize(
    ("dtype", "bits"), [(mx.float32, 4), (mx.bfloat16, 4), (mx.bfloat16, None)]
)
def test_it_is_the_function_of_a_wide_twin(name, dtype, bits):
    quantize = bits and {"bits": bits, "group_size": 32}
    model = build(name, dtype=dtype, quantize=quantize)
    wide = mx.float64 if dtype == mx.float32 else mx.float32
    assert reference_dtype(model) == wide
    before = trace(model)
    with reference(model, wide) as form:
        logits = form(TOKENS)
        mx.eval(logits)
    truth = twin_of(model, mx.float32)(TOKENS)
    assert logits.dtype == wide
    spread = mx.std(truth).item()
    assert mx.abs(logits.astype(mx.float32) - truth).max().item() < 2e-5 * max(spread, 1)
    assert trace(model) == before
    if dtype == mx.bfloat16 and bits:
        # The stock model is far from it, so the comparison above says something. (On a CPU stock
        # cannot run 16-bit experts that are not quantized.)
        assert mx.abs(model(TOKENS) - truth).max().item() > 1e-3 * spread


def test_an_exception_leaves_no_trace():
    model = build("qwen3_moe", dtype=mx.bfloat16, quantize={"bits": 4, "group_size": 32})
    before = trace(model)
    with pytest.raises(KeyboardInterrupt), reference(model, mx.float32):
        raise KeyboardInterrupt
    assert trace(model) == before


def test_memory_that_is_short_is_said(monkeypatch):
    model = build("llama", quantize={"bits": 4, "group_size": 32})
    assert extra_bytes(model, mx.float64) > extra_bytes(model, mx.float32) > 0
    monkeypatch.setattr(comparing, "available_bytes", lambda: 1000)
    found = compare(model, [1, 2, 3], tokens=2, runs=1)
    assert found.stock_error is None
    assert "GiB are free" in found.no_reference


def test_float32_stands_in_where_float64_fails(monkeypatch):
    original = comparing._wide_logits

    def refusing(model, context, count, dtype):
        if dtype == mx.float64:
            raise ValueError("no float64 here")
        return original(model, context, count, dtype)

    monkeypatch.setattr(comparing, "_wide_logits", refusing)
    model = build("llama", quantize={"bits": 4, "group_size": 32})
    found = compare(model, [1, 2, 3], tokens=2, runs=1)
    assert found.reference_dtype == "float32"
    assert found.reference_notes == ["no float64 reference: no float64 here"]
    assert found.patched_error is not None


def test_the_model_is_stock_afterwards_whatever_happens(monkeypatch):
    model = build("llama", quantize={"bits": 4, "group_size": 32})
    before = trace(model)

    def fail(*_):
        raise RuntimeError("late")

    monkeypatch.setattr(comparing, "_judge_logits", fail)
    with pytest.raises(RuntimeError, match="late"):
        compare(model, [1, 2], tokens=2, runs=1)
    assert trace(model) == before
    assert "_zmlx_patch_result" not in vars(model)
