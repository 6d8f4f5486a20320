"""What a model is recognised as, from its configuration, its code or what its modules hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import mlx.nn as nn
import pytest
from click.testing import CliRunner
from upstream import installed_types

from zmlx.family import detect, model_types
from zmlx.family.command import family
from zmlx.family.table import parse, table
from zmlx.toml import parse as parse_toml

ROOT = Path(__file__).parents[2]

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32,
    "head_dim": 16,
    "rope_theta": 1e4,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}


def build(name: str, **values):
    module = import_module(f"mlx_lm.models.{name}")
    config = {**SMALL, "model_type": name, **values}
    return module.Model(module.ModelArgs.from_dict(config))


@pytest.fixture(scope="module")
def moe():
    return build("qwen3_moe")


@pytest.mark.parametrize("name", model_types())
def test_every_type_is_recognised_by_its_configuration(name):
    found = detect(config={"model_type": name})
    row = model_types()[name]
    assert (found.name, found.model_type, found.facts) == (row.family, name, row)
    assert found.because == (f"config.json: model_type is {name!r}",)


@pytest.mark.parametrize("name", installed_types())
def test_every_type_is_recognised_by_its_class_alone(monkeypatch, name):
    # olmo ends the process where this package, of which it uses nothing here, is missing.
    monkeypatch.setitem(sys.modules, "hf_olmo", ModuleType("hf_olmo"))
    Model = import_module(f"mlx_lm.models.{name}").Model
    # The class renamed, and without a word about its type.
    Renamed = type("Renamed", (Model,), {"__module__": "somewhere.else"})
    model = Renamed.__new__(Renamed)
    nn.Module.__init__(model)
    found = detect(model=model)
    assert found.model_type == model_types()[name].home
    assert found.name == model_types()[found.model_type].family
    assert f"comes from mlx_lm.models.{found.model_type}" in found.because[0]


@pytest.mark.parametrize("alias", table().aliases)
def test_aliases(alias):
    target = table().aliases[alias]
    found = detect(config={"model_type": alias})
    assert (found.name, found.model_type) == (model_types()[target].family, target)
    assert found.because[0].endswith(f"(mlx-lm loads it as {target})")


def test_the_architecture_decides_where_mlx_lm_lets_it():
    config = {"model_type": "bailing_hybrid", "architectures": ["BailingMoeV3ForCausalLM"]}
    assert detect(config=config).model_type == "bailing_moe_v3"
    config["architectures"] = "BailingMoeV2_5ForCausalLM"
    assert detect(config=config).model_type == "bailing_hybrid"


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("Qwen3MoeForCausalLM", "qwen3_moe"),
        ("LlamaForCausalLM", "llama"),
        ("MistralForCausalLM", "llama"),
        ("GPT2LMHeadModel", "gpt2"),
        ("KlearForCausalLM", "Klear"),
        ("Glm4MoeLiteForCausalLM", "glm4_moe_lite"),
    ],
)
def test_an_unknown_model_type_may_name_a_known_architecture(architecture, expected):
    found = detect(config={"model_type": "mine", "architectures": [architecture]})
    assert found.model_type == expected
    assert found.because[0] == "config.json: model_type 'mine' is in no row of the table"
    assert f"the architecture is {architecture!r}" in found.because[1]


@pytest.mark.parametrize("key", ["text_config", "llm_config", "language_config"])
def test_an_unknown_multimodal_type_is_what_its_language_model_is(key):
    found = detect(config={"model_type": "mine_vl", key: {"model_type": "qwen3_moe"}})
    assert (found.name, found.model_type) == ("qwen", "qwen3_moe")
    assert found.because[1] == f"config.json: {key}.model_type is 'qwen3_moe'"


@pytest.mark.parametrize("text", ["llama", "ministral3", "mistral4"])
def test_the_facts_of_a_multimodal_type_are_its_language_models(text):
    found = detect(config={"model_type": "mistral3", "text_config": {"model_type": text}})
    assert (found.name, found.model_type, found.facts.name) == ("mistral", "mistral3", text)
    assert detect(config={"model_type": "gemma3", "text_config": {}}).facts.name == "gemma3"


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
        {"model_type": None, "architectures": None, "text_config": None},
        {"model_type": ["llama"], "architectures": [3], "text_config": []},
        {"model_type": "unknown"},
    ],
)
def test_what_is_unknown_is_called_so(config):
    found = detect(config=config)
    assert found.name == "unknown"
    assert found.facts is None
    assert found.refusals == {}
    assert "is in no row of the table" in found.because[0]


def test_nothing_at_all_is_unknown():
    assert detect().name == "unknown"
    assert detect(model=nn.Linear(2, 2)).because == (
        "none of its modules is defined by a model file of mlx-lm",
    )


def test_a_loaded_model(moe):
    found = detect(model=moe)
    assert (found.name, found.model_type) == ("qwen", "qwen3_moe")
    assert found.because == (
        "the model's model_type is 'qwen3_moe'",
        "its class Model comes from mlx_lm.models.qwen3_moe",
    )
    assert found.facts.router == "softmax_topk"


def test_a_model_under_another_name_of_its_type():
    found = detect(model=build("llama", model_type="mistral"))
    assert (found.name, found.model_type) == ("llama", "llama")
    assert "mlx-lm loads it as llama" in found.because[0]


def test_a_type_that_uses_the_class_of_another():
    Model = import_module("mlx_lm.models.solar_open").Model
    model = Model.__new__(Model)
    nn.Module.__init__(model)
    model.model_type = "solar_open"
    assert detect(model=model).model_type == "solar_open"
    assert detect(model=model, config={"model_type": "solar_open"}).model_type == "solar_open"


@pytest.mark.parametrize("config", [None, {"model_type": "llama"}])
def test_where_name_and_code_differ_the_code_counts(config):
    model = build("qwen3_moe", model_type="llama")
    found = detect(model=model, config=config)
    assert (found.name, found.model_type) == ("qwen", "qwen3_moe")
    assert found.because[-1].endswith("and the code counts")


def test_an_unknown_name_with_known_code():
    found = detect(model=build("qwen3_moe", model_type="mine"), config={"model_type": "mine"})
    assert (found.name, found.model_type) == ("qwen", "qwen3_moe")


def test_known_layers_in_a_class_of_ones_own(moe):
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = moe.layers

    found = detect(model=Mine())
    assert (found.name, found.model_type) == ("qwen", "qwen3_moe")
    assert "of its" in found.because[0]
    assert "modules come from mlx_lm.models.qwen3_moe" in found.because[0]


def test_the_language_model_of_a_loaded_multimodal_model():
    text = {**SMALL, "model_type": "llama"}
    found = detect(model=build("pixtral", text_config=text))
    assert (found.name, found.model_type, found.facts.name) == ("mistral", "pixtral", "llama")
    assert found.because[-1] == "its language model comes from mlx_lm.models.llama"


class Holder(nn.Module):
    """A module of parts with given names, of a class that nobody knows."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part if part is not None else nn.Linear(2, 2))


def holder(*names: str, **parts) -> Holder:
    return Holder(**dict.fromkeys(names), **parts)


@pytest.mark.parametrize(
    ("model", "expected", "said"),
    [
        (
            holder(
                layers=[holder(mlp=holder("switch_mlp", "shared_expert", "shared_expert_gate"))]
            ),
            "qwen",
            "layers.0.mlp holds shared_expert, shared_expert_gate, switch_mlp",
        ),
        (
            holder(a=holder("experts", "router"), b=holder("sinks", "q_proj", "k_proj")),
            "gpt_oss",
            "a holds experts, router",
        ),
        (
            holder(
                a=holder("operator_norm", "ffn_norm", "feed_forward"),
                b=holder("conv", "in_proj", "out_proj"),
            ),
            "lfm",
            "b holds conv, in_proj, out_proj",
        ),
        (holder(mlp=holder("gate", "switch_mlp")), "moe", "mlp holds gate, switch_mlp"),
        (holder(mlp=holder("router", "experts")), "moe", "mlp holds experts, router"),
        (
            holder(mlp=holder("gate_proj", "up_proj", "down_proj")),
            "dense",
            "mlp holds down_proj, gate_proj, up_proj",
        ),
        (holder(b=holder("sinks", "q_proj", "k_proj")), "unknown", "none of its modules"),
    ],
)
def test_a_model_is_known_by_what_it_holds(model, expected, said):
    found = detect(model=model, config={"model_type": "mine"})
    assert (found.name, found.model_type, found.facts) == (expected, "mine", None)
    assert any(said in line for line in found.because)


def test_real_blocks_hold_what_the_table_says():
    config = {**SMALL, "shared_expert_intermediate_size": 32, "model_type": "qwen2_moe"}
    module = import_module("mlx_lm.models.qwen2_moe")
    model = module.Model(module.ModelArgs.from_dict(config))

    def renamed(part):
        part.__class__ = type("Copied", (nn.Module,), {"__module__": "copied"})

    for _, part in model.named_modules():
        if type(part).__module__.startswith("mlx_lm.models.qwen2_moe"):
            renamed(part)
    del model.model_type
    found = detect(model=model)
    assert found.name == "qwen"
    assert found.model_type == ""


def test_patched_models_are_recognised_as_before(moe):
    classes = [type(part) for _, part in moe.named_modules()]
    for _, part in moe.named_modules():
        cls = type(part)
        part.__class__ = type(cls.__name__, (cls,), {"__module__": cls.__module__})
    again = detect(model=moe)
    for (_, part), cls in zip(moe.named_modules(), classes, strict=True):
        part.__class__ = cls
    assert again == detect(model=moe)


def test_refusals_of_the_family_come_with_it():
    known = parse(
        parse_toml(
            """\
[router]
[activation]
[families.qwen]
title = "Qwen"
[[families.qwen.refuse]]
pattern = "moe_mlp"
types = ["qwen3_moe"]
backends = ["metal"]
reason = "slower"
evidence = "a measurement"
[types]
qwen3 = { family = "qwen", kind = "dense" }
qwen3_moe = { family = "qwen", kind = "dense" }
""",
            "small.toml",
        )
    )
    refused = detect(config={"model_type": "qwen3_moe"}, known=known).refusals["moe_mlp"]
    assert (refused.reason, refused.backends) == ("slower", ("metal",))
    assert detect(config={"model_type": "qwen3"}, known=known).refusals == {}


def test_a_configuration_needs_no_mlx():
    code = (
        "import sys; from zmlx.family import detect; import zmlx.family.command;"
        "assert detect(config={'model_type': 'llama'}).name == 'llama';"
        "heavy = {'mlx', 'mlx_lm', 'numpy', 'transformers'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def explained(tmp_path, config, *options):
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = CliRunner().invoke(family, [str(tmp_path), *options])
    assert result.exit_code == 0, result.output
    return result.stdout


QUANTIZED = {
    "model_type": "qwen2_moe",
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "quantization": {
        "bits": 4,
        "group_size": 64,
        "model.embed_tokens": {"bits": 6, "group_size": 64},
        "lm_head": {"bits": 6, "group_size": 64},
        "model.layers.0.mlp.gate": {"bits": 8, "group_size": 32},
        "model.layers.1.mlp.gate": False,
    },
}


def test_the_command_explains_a_model(tmp_path):
    facts = json.loads(explained(tmp_path, QUANTIZED, "--json"))
    assert facts["family"] == "qwen"
    assert facts["model_type"] == "qwen2_moe"
    assert facts["because"] == ["config.json: model_type is 'qwen2_moe'"]
    assert facts["router"].startswith("softmax_topk: softmax over all experts")
    assert facts["experts"].endswith("in qwen2_moe.Qwen2MoeSparseMoeBlock; 4 of 60 per token")
    assert facts["shared_experts"] == "shared_expert times sigmoid(shared_expert_gate)"
    assert facts["mlp"] == "swiglu: silu(gate) * up"
    assert facts["quantization"] == (
        "affine, 4 bits, groups of 64; single layers: 2 x affine, 6 bits, groups of 64; "
        "1 x affine, 8 bits, groups of 32; 1 x not quantized"
    )
    assert set(facts["patterns"]) == {"quantized_linear", "linear", "swiglu_mlp", "moe_mlp"}
    assert facts["refused"] == []


def test_the_command_for_people(tmp_path):
    text = explained(tmp_path, QUANTIZED)
    rows = {line.split("  ")[0].strip(): line for line in text.splitlines()}
    assert rows["family"].split()[-1] == "qwen"
    assert "softmax_topk" in rows["router"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "none"),
        ({"quantization": "4bit"}, "none"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq, without a number of bits"),
        (
            {"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4"}},
            "mxfp4, 4 bits, groups of 32",
        ),
    ],
)
def test_quantization_in_words(tmp_path, config, expected):
    facts = json.loads(explained(tmp_path, {"model_type": "llama", **config}, "--json"))
    assert facts["quantization"] == expected


def test_experts_that_the_configuration_does_not_have_are_not_reported(tmp_path):
    facts = json.loads(explained(tmp_path, {"model_type": "qwen3_5", "num_experts": 0}, "--json"))
    assert facts["router"] == "none"
    assert "experts" not in facts
    assert "moe_mlp" not in facts["patterns"]


def test_experts_of_a_language_model_are_counted(tmp_path):
    text = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2}
    config = {"model_type": "qwen3_vl_moe", "text_config": text}
    facts = json.loads(explained(tmp_path, config, "--json"))
    assert facts["experts"].endswith("2 of 8 per token")


def test_the_command_on_an_unknown_model(tmp_path):
    facts = json.loads(explained(tmp_path, {"model_type": "bert"}, "--json"))
    assert (facts["family"], facts["model_type"]) == ("unknown", "bert")
    assert list(facts["patterns"]) == ["none"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "config.json: No such file or directory; give the folder of a model"),
        ("{", "config.json: not JSON: "),
        ("[]", "config.json: not a JSON object"),
        (b"\xff", "config.json: not JSON: "),
    ],
)
def test_no_configuration_is_one_line_and_exit_code_2(tmp_path, content, said):
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "config.json").write_bytes(data)
    result = CliRunner().invoke(family, [str(tmp_path)])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"Error: {tmp_path}/{said}")
    assert result.stderr.count("\n") == 1
