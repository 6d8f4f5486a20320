"""Every model type of mlx-lm, patched by default, against stock and against the truth.

The truth is the same model with its dequantized weights in float64. A patched model may be no
further from it than stock is (contract `tighter`): for a prompt, cached decoding, a ragged batch;
after `unpatch` the logits and the classes are the very same as before.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from upstream import NEWEST, installed_types
from zoo.build import FORMS, build, made, reference
from zoo.compare import (
    Logits,
    Verdict,
    alone,
    error,
    judge,
    long,
    ragged,
    run,
)
from zoo.configs import CONFIGS, FAILURES, NARROW, Failure, runnable

from zmlx.kernels.spec import KernelSpec
from zmlx.patch import PatchReport, patch, unpatch

RUNS: dict[str, Callable[[nn.Module], Logits]] = {"alone": alone, "long": long, "ragged": ragged}

#: Other widths and groups, on one dense, one routed and one latent-attention type.
WIDTHS = [(bits, group) for bits in (2, 3, 5, 6, 8) for group in (32, 64)]
WIDTH_TYPES = ("llama", "qwen3_moe", "deepseek_v3")

RUNNABLE = runnable()


def truth_of(name: str, model: nn.Module) -> nn.Module:
    return reference(model, mx.float32 if name in NARROW else mx.float64)


def classes(model: nn.Module) -> dict[str, type]:
    return {path: type(module) for path, module in model.named_modules()}


def report_of(model: nn.Module) -> PatchReport:
    report = model._zmlx_patch_result
    assert isinstance(report, PatchReport)
    return report


def failure_of(name: str, run_name: str, form: str) -> Failure | None:
    dtype, _, activations = FORMS[form]
    backend = "metal" if mx.metal.is_available() else "gpu" if mx.is_available(mx.gpu) else "cpu"
    for failure in FAILURES.get(name, ()):
        if (
            run_name in failure.runs
            and (not failure.dtype or failure.dtype in str(activations or dtype))
            and (not failure.backend or failure.backend == backend)
            and not ("No Metal" in failure.message and backend == "metal")
        ):
            return failure
    return None


def judged(model: nn.Module, truth: nn.Module, function: Callable[[nn.Module], Logits]) -> Verdict:
    """Patch, judge, unpatch, and see that nothing is left of it."""
    before, stock = classes(model), run(function, model)
    patch(model)
    patched = run(function, model)
    unpatch(model)
    assert classes(model) == before
    assert np.array_equal(run(function, model).logits, stock.logits)
    return judge(function, truth, stock, patched)


def test_every_installed_type_has_a_configuration() -> None:
    assert set(installed_types()) <= set(CONFIGS)
    assert set(installed_types()) == set(CONFIGS) or not NEWEST


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", RUNNABLE)
def test_patched_is_no_further_from_the_truth(name: str, form: str) -> None:
    model = made(name, form)
    truth = truth_of(name, model)
    for run_name, function in RUNS.items():
        failure = failure_of(name, run_name, form)
        if failure is None:
            assert judged(model, truth, function).complaints() == [], run_name
            continue
        for change in (lambda m: m, patch, unpatch):
            change(model)
            with pytest.raises(Exception, match=failure.message):
                run(function, model)


@pytest.mark.parametrize("form", [form for form in FORMS if FORMS[form][1]])
@pytest.mark.parametrize("name", installed_types())
def test_quantized_layers_are_replaced_or_refused_with_a_reason(name: str, form: str) -> None:
    model = made(name, form)
    parameters = {id(p) for _, p in tree_flatten(model.parameters())}
    patch(model)
    report = report_of(model)
    assert report.patched_count, report.summary()
    assert all(candidate.reason for candidate in report.candidates)
    assert {id(p) for _, p in tree_flatten(model.parameters())} == parameters


@pytest.mark.parametrize(("bits", "group_size"), WIDTHS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("name", WIDTH_TYPES)
def test_other_widths_and_groups(name: str, dtype: mx.Dtype, bits: int, group_size: int) -> None:
    model = build(name, dtype=dtype, quantize={"bits": bits, "group_size": group_size})
    assert judged(model, truth_of(name, model), alone).complaints() == []


@pytest.mark.parametrize("name", RUNNABLE)
def test_compiled_graphs_give_the_same(name: str) -> None:
    """The other tests run uncompiled, to see the choices; mlx-lm itself compiles parts."""
    if failure_of(name, "alone", "float32-4bit"):
        return
    model = patch(made(name, "float32-4bit"))
    seen = run(alone, model).logits
    assert error(alone(model), seen).worst < 1e-4


def scaled(module: nn.Module) -> None:
    """Make a module return 5 % too much, in the way in which patterns replace modules."""
    stock = type(module)

    def forward(self: nn.Module, *args: object, **kwargs: object) -> mx.array:
        return stock.__call__(self, *args, **kwargs) * 1.05

    module.__class__ = type(stock.__name__, (stock,), {"__call__": forward})


def shifted(module: nn.Module) -> None:
    """Make routed layers use the neighbour of the expert that was chosen."""
    stock = type(module)

    def forward(self: nn.Module, x: mx.array, indices: mx.array, **kwargs: object) -> mx.array:
        return stock.__call__(self, x, (indices + 1) % self.weight.shape[0], **kwargs)

    module.__class__ = type(stock.__name__, (stock,), {"__call__": forward})


def nan(module: nn.Module) -> None:
    """Make a module return NaN."""
    stock = type(module)

    def forward(self: nn.Module, *args: object, **kwargs: object) -> mx.array:
        return stock.__call__(self, *args, **kwargs) * mx.nan

    module.__class__ = type(stock.__name__, (stock,), {"__call__": forward})


@pytest.mark.parametrize("run_name", RUNS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("name", "path", "damage"),
    [
        ("llama", "lm_head", scaled),
        ("llama", "model.layers.1.mlp.gate_proj", nan),
        ("qwen3_moe", "model.layers.1.mlp.switch_mlp.up_proj", shifted),
        ("deepseek_v3", "model.layers.1.mlp.switch_mlp.down_proj", shifted),
        ("deepseek_v3", "model.layers.1.mlp.switch_mlp.down_proj", nan),
    ],
)
def test_a_wrong_layer_is_noticed(
    name: str, path: str, damage: Callable[[nn.Module], None], form: str, run_name: str
) -> None:
    model, function = made(name, form), RUNS[run_name]
    truth, stock = reference(model, mx.float64), run(function, model)
    damage(dict(model.named_modules())[path])
    assert judge(function, truth, stock, run(function, model)).complaints()


@pytest.mark.parametrize("form", [form for form in FORMS if form != "bfloat16-4bit"])
@pytest.mark.parametrize("projection", ["self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"])
def test_five_per_cent_of_one_projection_is_noticed(projection: str, form: str) -> None:
    model = made("llama", form)
    truth, stock = reference(model, mx.float64), run(alone, model)
    scaled(dict(model.named_modules())[f"model.layers.0.{projection}"])
    assert judge(alone, truth, stock, run(alone, model)).complaints()


@pytest.mark.parametrize("form", ["float32-4bit", "bfloat16-4bit-float32"])
@pytest.mark.parametrize("factor", [0.0, 1.05])
@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("quantized_matmul", "llama"),
        ("quantized_glu", "llama"),
        ("gather_quantized_matmul", "gpt_oss"),
        ("gather_quantized_glu", "qwen3_moe"),
        ("gather_quantized_combine", "qwen3_moe"),
    ],
)
def test_a_wrong_kernel_is_noticed(
    monkeypatch: pytest.MonkeyPatch, kernel: str, name: str, factor: float, form: str
) -> None:
    right = KernelSpec.implementation

    def implementation(spec: KernelSpec, backend: str) -> Callable[..., mx.array]:
        function = right(spec, backend)
        if spec.name != kernel:
            return function
        return lambda *args, **kwargs: function(*args, **kwargs) * factor

    model = made(name, form)
    truth, stock = reference(model, mx.float64), run(alone, model)
    monkeypatch.setattr(KernelSpec, "implementation", implementation)
    monkeypatch.setattr(KernelSpec, "probe", lambda *_, **__: None)
    # Classes made by other tests hold the right kernel; those made here must not outlive this test.
    monkeypatch.setattr("zmlx.patch.pattern._GENERATED", {})
    assert judge(alone, truth, stock, run(alone, patch(model))).complaints()


def test_a_choice_near_a_tie_is_forgiven_and_a_wrong_one_is_not() -> None:
    model = build("mixtral", dtype=mx.bfloat16, quantize={"bits": 4, "group_size": 32})
    truth, stock = reference(model, mx.float64), run(ragged, model)
    assert judge(ragged, truth, stock, stock).complaints() == []
    gate = model.model.layers[1].block_sparse_moe.gate
    gate.scales = gate.scales[::-1]  # the experts' scores change places
    gate.biases = gate.biases[::-1]
    verdict = judge(ragged, truth, stock, run(ragged, model))
    assert not verdict.same
    assert any("choice" in complaint for complaint in verdict.complaints())
