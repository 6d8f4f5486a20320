"""Every model type with the patterns for GPUs, layer by layer: against stock and against the truth.

Without a GPU the kernels run in the emulator. `decode_step`, which takes whole steps, has tests of
its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gpu_path import BACKENDS, on_gpu
from mlx_lm.models.cache import make_prompt_cache
from upstream import newest_only
from zoo.build import FORMS, made, reference
from zoo.compare import Logits, Run, judge, run
from zoo.configs import FAILURES, NARROW, runnable
from zoo.devices import ON_GPU, of_stock
from zoo.gains import table

from zmlx.kernels.spec import KernelSpec
from zmlx.patch import patch, unpatch

#: Types whose stock forward fails here on the CPU, whatever is replaced.
RUNNABLE = [
    name
    for name in runnable()
    if not any("alone" in f.runs and not f.dtype for f in FAILURES.get(name, ()))
]
Function = Callable[[nn.Module], Logits]

#: In batches of several: one for each kind of block, activation and input.
SEVERAL = [
    name
    for name in ("qwen3_moe", "gpt_oss", "nemotron_h", "longcat_flash", "llama4", "gemma2")
    if name in RUNNABLE
]


def batch(rows: int):
    """Return a run of as many sequences: a prompt of three tokens, then two single ones.

    On a GPU the prompt is read token by token as well (`on_cpu` says why).
    """

    def batched(model: nn.Module) -> Logits:
        cache = make_prompt_cache(model)
        prompt = mx.arange(rows * 3).reshape(rows, 3) * 7 % 151
        pieces = mx.split(prompt, 3, axis=1) if ON_GPU else [prompt]
        steps = [model(piece, cache=cache) for piece in pieces]
        for token in (5, 90):
            mx.eval(steps)
            steps.append(model(mx.full((rows, 1), token) + mx.arange(rows)[:, None], cache=cache))
        joined = mx.concatenate(steps, axis=1).astype(mx.float32)
        return np.array(joined, dtype=np.float64).reshape(-1, joined.shape[-1])

    return batched


one = batch(1)


def truth_of(name: str, model: nn.Module) -> nn.Module:
    return reference(model, mx.float32 if name in NARROW else mx.float64)


def truth_and_stock(function: Function, name: str, model: nn.Module) -> tuple[nn.Module, Run]:
    """Return the truth, and a run of the model as it is; a test ends where that is wrong."""
    truth = truth_of(name, model)
    stock = of_stock(lambda: run(function, model))
    if ON_GPU:
        error = judge(function, truth, stock, stock).stock.rms
        if not error < 0.01:  # `on_cpu` says why
            pytest.xfail(f"the stock model on this GPU is {error:.0%} from the truth")
    return truth, stock


@pytest.mark.parametrize("name", RUNNABLE)
def test_patched_for_a_gpu_is_no_further_from_the_truth(name: str) -> None:
    model = made(name, "float32-4bit")
    truth, stock = truth_and_stock(one, name, model)
    before = {path: type(module) for path, module in model.named_modules()}
    with on_gpu() as calls:
        patch(model, exclude=["decode_step"])
        counts = model._zmlx_patch_result.pattern_counts
        calls.clear()
        patched = run(one, model)
        unpatch(model)
    assert bool(calls) == bool(counts), counts  # what is replaced calls a kernel
    assert set(counts) <= {"moe_mlp", "swiglu_mlp", "geglu_mlp"}
    assert judge(one, truth, stock, patched).complaints() == []
    assert {path: type(module) for path, module in model.named_modules()} == before
    assert np.array_equal(run(one, model).logits, stock.logits)


@pytest.mark.parametrize("rows", [3, 5])
@pytest.mark.parametrize("name", SEVERAL)
def test_odd_batches(name: str, rows: int) -> None:
    function = batch(rows)
    model = made(name, "float32-4bit")
    truth, stock = truth_and_stock(function, name, model)
    with on_gpu(BACKENDS[0]) as calls:
        patch(model, exclude=["decode_step"])
        calls.clear()
        patched = run(function, model)
    assert calls
    assert judge(function, truth, stock, patched).complaints() == []


@pytest.mark.parametrize("form", [form for form in FORMS if form != "float32-4bit"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h", "gemma2"])
def test_other_forms(name: str, form: str) -> None:
    model = made(name, form)
    truth, stock = truth_and_stock(one, name, model)
    with on_gpu() as calls:
        patch(model, exclude=["decode_step"])
        calls.clear()
        patched = run(one, model)
    assert calls
    assert judge(one, truth, stock, patched).complaints() == []


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("qwen3_moe", "expert_glu"),
        ("qwen3_moe", "expert_combine"),
        ("llama4", "expert_matmul"),
        ("llama", "quantized_glu"),
    ],
)
def test_a_kernel_that_is_five_per_cent_off_is_noticed(name: str, kernel: str) -> None:
    model = made(name, "float32-4bit")
    truth, stock = truth_and_stock(one, name, model)
    with on_gpu():
        patch(model, exclude=["decode_step"])
        unpatch(model)  # probed; now it breaks
        right = KernelSpec.implementation

        def wrong(spec: KernelSpec, backend: str):
            function = right(spec, backend)
            if spec.name != kernel:
                return function
            return lambda *args, **kwargs: function(*args, **kwargs) * 1.05

        with (
            mock.patch.object(KernelSpec, "implementation", wrong),
            mock.patch("zmlx.patch.pattern._GENERATED", {}),
        ):
            patched = run(one, patch(model, exclude=["decode_step"]))
    assert judge(one, truth, stock, patched).complaints()


@newest_only
def test_the_page_of_routed_experts_is_current() -> None:
    page = Path(__file__).parents[2] / "docs" / "EXPERTS.md"
    assert page.read_text() == table()
