"""The table of families against the sources of the installed mlx-lm."""

from __future__ import annotations

import ast
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from upstream import NEWEST, newest_only

from zmlx.family import family_names, model_types
from zmlx.family.table import parse, table
from zmlx.toml import TomlError
from zmlx.toml import parse as parse_toml

UPSTREAM = Path(find_spec("mlx_lm").submodule_search_locations[0])

#: Files of mlx_lm/models that hold parts of models and no model type.
PARTS = {
    "__init__",
    "activations",
    "base",
    "bitlinear_layers",
    "cache",
    "gated_delta",
    "mla",
    "pipeline",
    "rope_utils",
    "ssm",
    "switch_layers",
}
ROUTED = {name: row for name, row in model_types().items() if row.router}


@cache
def source(name: str) -> str:
    return (UPSTREAM / "models" / f"{name}.py").read_text()


@cache
def upstream_constant(name: str) -> dict:
    for node in ast.parse((UPSTREAM / "utils.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == name:
            return ast.literal_eval(node.value)
    raise LookupError(f"mlx_lm.utils has no {name}")


@cache
def closure(block: str) -> str:
    """Return the source of a class and of all that it names in the same file."""
    file, start = block.split(".")
    nodes = {
        node.name: node
        for node in ast.parse(source(file)).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.endswith("Args")
    }
    found, waiting = {}, [start]
    while waiting:
        name = waiting.pop()
        if name in nodes and name not in found:
            found[name] = ast.get_source_segment(source(file), nodes[name])
            waiting += [n.id for n in ast.walk(nodes[name]) if isinstance(n, ast.Name)]
    assert start in found, f"{block} is not in mlx_lm"
    return "\n".join(found.values())


def test_every_model_type_is_in_the_table_and_nothing_else():
    files = {file.stem for file in (UPSTREAM / "models").glob("*.py")}
    assert files - PARTS <= set(model_types())
    assert files - PARTS == set(model_types()) or not NEWEST


def test_every_part_is_a_part():
    for name in PARTS:
        assert not re.search(r"^class Model(Args)?\b", source(name), re.M), f"{name} is a model"


@newest_only
def test_names_that_mlx_lm_maps_to_others():
    assert dict(table().aliases) == upstream_constant("MODEL_REMAPPING")
    assert dict(table().architectures) == upstream_constant("MODEL_ARCHITECTURE_REMAPPING")


def test_families_that_users_know():
    known = {"lfm", "glm", "qwen", "gpt_oss", "deepseek", "mixtral", "llama"}
    assert known <= set(family_names())
    assert "unknown" not in family_names()


#: router -> what the source of the block must hold, in this order
ROUTER_SOURCE = {
    "softmax_topk": r"softmax.*argpartition",
    "topk_softmax": r"topk\(|argpartition.*softmax",
    "normed_topk_softmax": r"rms_norm.*argpartition.*softmax.*per_expert_scale\[",
    "scored_topk": r"nn\.Softmax.*nn\.Sigmoid.*gate_act\(.*argpartition",
    "sigmoid_bias": r"bias.*(sigmoid|expert_routing)",
    "scored_bias": r"sigmoid.*softplus.*e_score_correction_bias.*argpartition",
    "grouped_sigmoid_bias": r"scores = mx\.sigmoid.*bias.*n_group.*topk_group.*argpartition",
    "grouped_scored_bias": r"== .sigmoid.*softmax.*bias.*n_group.*topk_group.*argpartition",
    "grouped_softmax": r"softmax.*n_group.*topk_group.*argpartition",
    "sigmoid_blend": r"expert_bias.*sigmoid.*argpartition.*softmax\(self\.coefficient",
    "sparsemixer": r"argmax.*softmax",
    "expert_list": r"softmax.*argpartition.*norm\(.*tolist",
    "input_scaled": r"argpartition.*sigmoid.*self\.experts\(x \* scores",
    "zero_experts": r"softmax.*e_score_correction_bias.*(mask = topk_indices >=)",
}
#: routers that must not be taken for simpler ones
SIGMOID = {"sigmoid_bias", "grouped_sigmoid_bias", "sigmoid_blend", "input_scaled"}


@newest_only
@pytest.mark.parametrize("name", ROUTED)
def test_the_router_is_what_upstream_computes(name):
    row = ROUTED[name]
    text = closure(row.block) + ("self.router(h)" if row.router.startswith("normed") else "")
    if row.router == "normed_topk_softmax":
        text = closure("gemma4_text.Router")
    # Defined functions may stand before or after their callers.
    assert re.search(ROUTER_SOURCE[row.router], text + "\n" + text, re.S)
    scored_by_sigmoid = "mx.sigmoid(" in text or "expert_routing" in text
    if row.router in SIGMOID:
        assert scored_by_sigmoid
        assert not re.search(r"scores = mx\.softmax", text)
    if row.router in ("softmax_topk", "topk_softmax", "grouped_softmax", "sparsemixer"):
        assert not re.search(r"mx\.sigmoid\((gates|logits|self\.gate\()", text)
    grouped = bool(re.search(r"\bn_group\b", text))
    assert grouped == row.router.startswith("grouped")


EXPERTS_SOURCE = {
    "swiglu": r"^$",
    "swiglu_clamped": r"DeepseekV41SwiGLU|ClampedSwiGLU",
    "swiglu_oai": r"SwigluOAI",
    "swiglu_float32": r"PreciseSwiGLU",
    "geglu_tanh": r"GeGLU",
    "situ": r"SiTU",
    "relu2": r"ReLU2",
    "gelu": r"^$",
}


@newest_only
@pytest.mark.parametrize("name", [n for n in ROUTED if ROUTED[n].router != "expert_list"])
def test_the_activation_of_the_experts_is_upstreams(name):
    row = ROUTED[name]
    text = closure(row.block)
    calls = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "").startswith("Switch")
    ]
    assert len(calls) == 1
    given = [ast.unparse(k.value) for k in calls[0].keywords if k.arg == "activation"]
    activation = given[0] if given else ""
    assigned = re.search(r"activation = (.*)", text) if activation == "activation" else None
    assert re.search(EXPERTS_SOURCE[row.experts], assigned[1] if assigned else activation)
    assert (calls[0].func.id == "SwitchMLP") == (row.experts in ("gelu", "relu2"))


@newest_only
@pytest.mark.parametrize("name", ROUTED)
def test_shared_experts_are_named_as_upstream_names_them(name):
    row = ROUTED[name]
    # One calls them in the layer and not in the block.
    file = source(row.block.split(".")[0])
    called = set(re.findall(r"self\.(shared?_(?:expert|mlp)\w*)\(", file))
    if row.router == "normed_topk_softmax":
        return
    assert {re.split(r"[ ,]", row.shared)[0]} - {""} == called - {"shared_expert_gate"}


MLP_SOURCE = {
    "swiglu": r"swiglu\(|silu",
    "swiglu_clamped": r"limit",
    "swiglu_oai": r"SwigluOAI",
    "geglu": r"nn\.gelu\(self\.gate_proj",
    "geglu_tanh": r"gelu_approx\(gate\)|gelu_approx\(self\.gate_proj",
    "geglu_sparse": r"gelu_topk",
    "gegelu": r"gegelu\(",
    "relu2_gated": r"relu2\(self\.gate_proj\(x\)\) \*",
    "situ": r"_situ\(",
    "configured": r"act_fn\(self\.gate_proj",
    "gelu": r"nn\.gelu\(self\.c_fc",
    "gelu_tanh": r"gelu_approx\(",
    "relu2": r"relu2|relu_squared",
    "xielu": r"XieLU\(",
}


@newest_only
@pytest.mark.parametrize("name", [n for n, row in model_types().items() if row.mlp])
def test_the_activation_of_the_dense_mlp_is_upstreams(name):
    row = model_types()[name]
    text = source(name)
    relatives = re.findall(r"^from \.(\w+) import|^from \. import (.*)", text, re.M)
    files = {file.strip() for pair in relatives for part in pair for file in part.split(",")}
    files = {file for file in files if file in model_types()}
    texts = [text, *map(source, files), *map(source, row.text)]
    assert any(re.search(MLP_SOURCE[row.mlp], text) for text in texts)
    # gate/up/down does not mean SiLU
    if row.mlp.startswith("geglu"):
        assert not any("swiglu(" in text for text in texts)


@newest_only
def test_types_without_a_dense_mlp_have_none():
    for name, row in model_types().items():
        if not row.mlp:
            assert not re.search(
                r"\bself\.(mlp|feed_forward) = (?!Vision)\w*MLP\(", source(name)
            ), name


@newest_only
def test_kinds_fit_the_facts():
    for name, row in model_types().items():
        routed = row.kind in ("moe", "hybrid_moe")
        assert bool(row.router) == bool(row.experts) == bool(row.block) == routed, name
        recurrent = row.kind in ("ssm", "hybrid", "hybrid_moe")
        if recurrent and not row.text and name not in ("recurrent_gemma", "rwkv7"):
            files = [name, row.block.split(".")[0]] if row.block else [name]
            texts = " ".join(map(source, files))
            assert re.search(r"Conv1d|gated_delta|ssm|[Ll]inear_attn|recurrent_gla", texts), name


#: What block does what: each row of the list of known failures of others.
KNOWN_ROUTING = {
    "lfm2_moe": ("sigmoid_bias", ""),
    "mixtral": ("topk_softmax", ""),
    "jamba": ("topk_softmax", ""),
    "ernie4_5_moe": ("scored_topk", "shared_experts"),
    "kimi_linear": ("grouped_scored_bias", "shared_experts"),
    "minimax": ("sigmoid_bias", ""),
    "Klear": ("sigmoid_blend", "shared_experts"),
    "afmoe": ("grouped_scored_bias", "shared_experts"),
    "phimoe": ("sparsemixer", ""),
    "llama4": ("input_scaled", "shared_expert"),
    "hunyuan": ("softmax_topk", "shared_mlp"),
    "step3p5": ("sigmoid_bias", "share_expert"),
    "laguna": ("scored_bias", "shared_expert"),
    "longcat_flash": ("zero_experts", ""),
    "longcat_flash_ngram": ("zero_experts", ""),
    "dbrx": ("expert_list", ""),
}


@pytest.mark.parametrize("name", KNOWN_ROUTING)
def test_routing_that_others_got_wrong(name):
    router, shared = KNOWN_ROUTING[name]
    row = model_types()[name]
    assert row.router == router
    assert re.split(r"[ ,]", row.shared)[0] == shared


KNOWN_MLPS = {
    "gemma": "geglu",
    "gemma2": "geglu_tanh",
    "gemma3_text": "geglu_tanh",
    "gemma3n": "geglu_sparse",
    "gemma4": "geglu_tanh",
    "gemma4_text": "geglu_tanh",
    "recurrent_gemma": "geglu_tanh",
    "bitnet": "relu2_gated",
}


@pytest.mark.parametrize("name", KNOWN_MLPS)
def test_gated_mlps_that_are_not_silu(name):
    assert model_types()[name].mlp == KNOWN_MLPS[name]


def test_an_inner_norm_is_noted():
    assert "normalised" in table().activations[model_types()["bitnet"].mlp]
    assert "normalises its own input" in model_types()["lille-130m"].note


def test_no_refusal_without_evidence_and_none_today():
    # A pattern replaces what it finds in the upstream forward; a refusal waits for a measurement.
    assert not any(table().refusals.values())


SMALL = """\
[aliases]
other = "one"
[router]
r = "formula"
[activation]
a = "formula"
[families.f]
title = "F"
[types]
one = { family = "f", kind = "moe", router = "r", experts = "a", mlp = "a" }
two = { family = "f", kind = "dense", mlp = "a" }
"""


def small(text: str):
    return parse(parse_toml(text, "small.toml"))


def refuse(**values: str) -> str:
    lines = {"pattern": '"moe_mlp"', "reason": '"it is wrong"', "evidence": '"a file"', **values}
    rows = "\n".join(f"{key} = {value}" for key, value in lines.items() if value)
    return f"{SMALL}[[families.f.refuse]]\n{rows}\n"


def test_a_refusal_holds_where_it_says():
    everywhere = small(refuse())
    assert everywhere.refused("f", "one")["moe_mlp"].reason == "it is wrong"
    assert everywhere.refused("f", "two")["moe_mlp"].backends is None
    assert everywhere.refused("g", "two") == {}
    on_gpu = small(refuse(backends='["metal", "cuda"]', types='["one"]'))
    assert on_gpu.refused("f", "one")["moe_mlp"].backends == ("metal", "cuda")
    assert on_gpu.refused("f", "one")["moe_mlp"].evidence == "a file"
    assert on_gpu.refused("f", "two") == {}


WRONG = {
    "family": (SMALL.replace('two = { family = "f"', 'two = { family = "g"'), "unknown name 'g'"),
    "kind": (SMALL.replace("dense", "thick"), "unknown name 'thick'; allowed: dense, moe"),
    "router": (SMALL.replace('router = "r"', 'router = "s"'), "types.one.router: unknown name 's'"),
    "activation": (SMALL.replace('mlp = "a" }\ntwo', 'mlp = "b" }\ntwo'), "types.one.mlp"),
    "key": (SMALL.replace("mlp =", "mpl =", 1), "types.one.mpl: unknown key 'mpl'; allowed: fam"),
    "missing": (SMALL.replace('kind = "dense", ', ""), "types.two: the key kind is missing"),
    "alias": (SMALL.replace('other = "one"', 'other = "nine"'), "aliases.other: unknown name"),
    "pattern": (
        refuse(pattern='"moe"'),
        "unknown pattern 'moe'; allowed: decode_step, deepseek_router, fast_",
    ),
    "reason": (refuse(reason=""), "the key reason is missing: a refusal says what and why"),
    "evidence": (refuse(evidence='""'), "the key evidence is missing"),
    "backend": (refuse(backends='["gpu"]'), "unknown backend 'gpu'; allowed: cpu, metal, cuda"),
    "type": (refuse(types='["three"]'), "unknown model type 'three'; allowed: one, two"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_table_is_an_error(case):
    text, message = WRONG[case]
    with pytest.raises(TomlError, match=re.escape(message)) as raised:
        small(text)
    assert re.match(r"small\.toml:\d+: ", str(raised.value))
