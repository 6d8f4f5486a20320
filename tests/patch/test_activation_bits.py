"""The option `activation_bits`: which profile asks for it, what it chooses, what it refuses."""

from __future__ import annotations

import pytest

from zmlx.patch import patch
from zmlx.patch.pattern import PatchConfig, Refused, patterns

PRODUCTS = ("quantized_linear", "swiglu_mlp", "moe_mlp")


def chosen(model):
    """Return pattern -> the notes and contracts of its replaced modules."""
    found = {}
    for candidate in vars(model)["_zmlx_patch_result"].candidates:
        if candidate.chosen:
            found.setdefault(candidate.pattern, set()).add((candidate.reason, candidate.contract))
    return found


@pytest.fixture(params=["dense", "moe"])
def quantized(request, make_llama, make_moe):
    return make_llama(bits=4) if request.param == "dense" else make_moe(bits=4)


def test_stable_keeps_all_bits_of_activations(quantized):
    found = chosen(patch(quantized, profile="stable"))
    assert found
    assert all(contract == "tighter" for notes in found.values() for _, contract in notes)


def test_fast_rounds_them_to_8(quantized):
    found = chosen(patch(quantized, profile="fast"))
    products = {name: notes for name, notes in found.items() if name in PRODUCTS}
    assert len(products) >= 2
    for name, notes in products.items():
        assert "tolerant" in {contract for _, contract in notes}, name
    assert any("quantized_matmul_a8" in note for note, _ in found["quantized_linear"])


def test_floats_have_nothing_to_round(make_llama):
    found = chosen(patch(make_llama(bits=None), profile="fast"))
    assert {contract for notes in found.values() for _, contract in notes} == {"tighter"}


def test_other_widths_are_refused(make_llama, make_moe):
    config = PatchConfig(options={"activation_bits": 7})
    layer = make_llama(bits=4).model.layers[0]
    experts = make_moe(bits=4).model.layers[0].mlp
    for name, module in (
        ("quantized_linear", layer.self_attn.q_proj),
        ("swiglu_mlp", layer.mlp),
        ("moe_mlp", experts),
        ("moe_mlp", experts.switch_mlp),
    ):
        verdict = patterns()[name].examine(module, "", None, config)
        assert isinstance(verdict, Refused), name
        assert "activation_bits = 7" in verdict.reason, name


def test_who_admits_no_rounding_keeps_the_products(make_llama, tmp_path, monkeypatch):
    (tmp_path / "zmlx.toml").write_text(
        '[profiles.mine]\nextends = "fast"\nadmits = ["exact", "tighter"]\n'
    )
    monkeypatch.chdir(tmp_path)
    found = chosen(patch(make_llama(bits=4), profile="mine"))
    assert "quantized_linear" in found
    assert "swiglu_mlp" in found
    assert {contract for notes in found.values() for _, contract in notes} == {"tighter"}
