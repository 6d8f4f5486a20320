"""Patching: what changes, what does not, and what happens when something goes wrong."""

from __future__ import annotations

import copy
import json
import pickle
import threading
import time

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama, mla, qwen3_moe
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers

from zmlx.kernels import spec
from zmlx.patch import (
    ALL_PATTERNS,
    FUSED_ACTIVATIONS,
    TRAINING_RECOMMENDED,
    PatchPattern,
    PatchReport,
    patch,
    patch_loaded,
    unpatch,
)
from zmlx.patch.pattern import original_class, patterns
from zmlx.runtime import model as patching


def classes(model):
    return {name: type(module) for name, module in model.named_modules()}


def error(a, b):
    return spec.relative_error(a, b)


@pytest.fixture(params=["dense", "moe"])
def model(request, make_llama, make_moe):
    return make_llama() if request.param == "dense" else make_moe()


def test_logits_stay_and_classes_come_back(model, tokens):
    before, stock = classes(model), model(tokens)
    parameters = dict(tree_flatten(model.parameters()))
    assert patch(model) is model
    assert error(model(tokens), stock) < 1e-5
    assert type(model) is before[""]
    for name, module in model.named_modules():
        assert isinstance(module, before[name])
        assert type(module).__name__ == before[name].__name__
    after = dict(tree_flatten(model.parameters()))
    assert after.keys() == parameters.keys()
    assert all(after[name] is parameters[name] for name in parameters)
    unpatch(model)
    assert classes(model) == before
    assert not hasattr(model, "_zmlx_patch_result")
    assert mx.array_equal(model(tokens), stock)


def test_replaced_layers_call_the_kernels_and_restored_ones_do_not(make_moe, tokens, counted):
    model = make_moe()
    patch(model)
    counted.clear()  # the probes
    mx.eval(model(tokens))
    layers = 2
    assert counted == {
        "lookup": 1,
        "quantized_matmul": 4 * layers + layers + 1,  # attention, routers, output projection
        "gather_quantized_glu": layers,
        "gather_quantized_combine": layers,
        "rms_norm": 4 * layers + 1,  # two of the layer, two of the heads, the last
        "rope": 2 * layers,
        "scaled_dot_product_attention": layers,
        "program": 1,
    }
    counted.clear()
    unpatch(model)
    mx.eval(model(tokens))
    assert counted == {}


def test_dense_model_uses_the_gated_kernel(make_llama, tokens, counted):
    model = make_llama()
    patch(model)
    counted.clear()
    mx.eval(model(tokens))
    assert counted["quantized_glu"] == 2
    assert counted["quantized_matmul"] == 2 * 5 + 1  # q, k, v, o, down; tied embedding


def test_patching_twice_changes_nothing(model, tokens):
    patch(model)
    first, report = classes(model), model._zmlx_patch_result
    patch(model)
    assert classes(model) == first
    assert model._zmlx_patch_result.candidates == report.candidates
    assert patch_loaded(model, origin="a test") is model._zmlx_patch_result
    unpatch(model)
    unpatch(model)
    assert all(original_class(m) is None for _, m in model.named_modules())


def test_a_second_patch_replaces_the_first_plan(make_llama):
    model = make_llama()
    patch(model)
    patch(model, patterns=["swiglu_mlp"])
    assert model._zmlx_patch_result.pattern_counts == {"swiglu_mlp": 2}
    assert type(model.layers[0].self_attn.q_proj) is nn.QuantizedLinear


def test_two_models_in_one_process_are_two_plans(make_llama, make_moe, tokens):
    dense, moe = make_llama(), make_moe()
    stock = moe(tokens)
    patch(dense)
    assert mx.array_equal(moe(tokens), stock)
    patch(moe, exclude=["quantized_linear"])
    unpatch(dense)
    assert set(moe._zmlx_patch_result.pattern_counts) == {"moe_mlp", "fast_ops", "decode_step"}
    assert error(moe(tokens), stock) < 1e-5


def test_decode_with_a_cache(model):
    def run():
        cache = make_prompt_cache(model)
        steps = [model(mx.array([[1, 2, 3]]), cache)]
        steps += [model(mx.array([[token]]), cache) for token in (4, 5)]
        return mx.concatenate(steps, axis=1)

    stock = run()
    patch(model)
    assert error(run(), stock) < 1e-5


def test_lora_on_a_patched_model(make_llama, tokens):
    model = make_llama()
    stock = model(tokens)
    patch(model)
    model.freeze()
    config = {"rank": 4, "scale": 10.0, "dropout": 0.0}
    linear_to_lora_layers(model, 2, {**config, "keys": ["self_attn.q_proj", "mlp.gate_proj"]})
    assert error(model(tokens), stock) < 1e-5  # a fresh adapter adds nothing
    adapter = model.layers[0].mlp.gate_proj
    adapter.lora_b = mx.random.normal(adapter.lora_b.shape)
    changed = model(tokens)
    unpatch(model)
    # The adapter counts: the fused product reads the weights of plain layers only.
    assert error(changed, model(tokens)) < 1e-5
    assert error(changed, stock) > 1e-2
    model.train()
    patch(model)
    grads = nn.value_and_grad(model, lambda m: m(tokens).astype(mx.float32).square().mean())(model)
    names = [name for name, _ in tree_flatten(grads[1])]
    assert names
    assert all("lora" in name for name in names)


def test_gradients_of_a_patched_model_are_those_of_the_stock_one(make_llama):
    model = make_llama()
    embedded = mx.random.normal((1, 3, 96))

    def loss(x):
        return model(None, input_embeddings=x).square().mean()

    stock = mx.grad(loss)(embedded)
    patch(model)
    assert error(mx.grad(loss)(embedded), stock) < 1e-4


def test_training_mode_runs_the_stock_operations(make_moe, tokens, counted):
    model = make_moe()
    patch(model)
    counted.clear()
    model.train()
    mx.eval(model(tokens))
    assert counted == {}


def test_save_and_load(make_llama, tokens, tmp_path):
    model = make_llama()
    stock = model(tokens)
    patch(model)
    file = str(tmp_path / "weights.safetensors")
    model.save_weights(file)
    other = make_llama()
    other.load_weights(file)
    assert mx.array_equal(other(tokens), stock)
    model.load_weights(file)
    assert error(model(tokens), stock) < 1e-5


def test_quantise_after_patching(make_llama, tokens):
    model = make_llama(bits=None)
    patch(model)
    assert "quantized_linear" not in model._zmlx_patch_result.pattern_counts
    nn.quantize(model, group_size=32, bits=8)
    stock = unpatch(model)(tokens)
    patch(model)
    assert "quantized_linear" in model._zmlx_patch_result.pattern_counts
    assert error(model(tokens), stock) < 1e-5


def test_deepcopy_and_pickle(model, tokens):
    patch(model)
    logits = model(tokens)
    duplicate = copy.deepcopy(model)
    assert classes(duplicate) == classes(model)
    assert mx.array_equal(duplicate(tokens), logits)
    unpatch(duplicate)
    assert any(original_class(m) for _, m in model.named_modules())
    block = model.layers[0].mlp
    restored = pickle.loads(pickle.dumps(block))
    assert type(restored) is original_class(block)  # readable where zmlx is not
    parameters = dict(tree_flatten(model.parameters()))
    assert pickle.loads(pickle.dumps(parameters)).keys() == parameters.keys()


def test_worker_threads(model, tokens):
    stock = model(tokens)
    mx.eval(stock)
    patch(model)
    results, failures = {}, []

    def work(number):
        try:
            with mx.stream(mx.new_stream(mx.default_device())):
                logits = model(tokens)
                mx.eval(logits)
                results[number] = error(logits, stock)
        except Exception as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(results) == 3
    assert max(results.values()) < 1e-5


def test_forty_eight_layers_in_under_a_second_and_no_memory(make_llama):
    patch(make_llama())  # the probes are cached, and the library is built
    seconds = []
    for _ in range(3):  # the quickest, so that a busy machine does not matter
        model = make_llama(layers=48)
        mx.eval(model.parameters())
        before = mx.get_active_memory()
        started = time.perf_counter()
        patch(model)
        seconds.append(time.perf_counter() - started)
        assert model._zmlx_patch_result.patched_count == 48 * 12 + 3
        assert mx.get_active_memory() <= before * 1.01
    assert min(seconds) < 1.0


@pytest.mark.parametrize("length", [1, 3])
def test_products_per_head(length, counted):
    layer = mla.QuantizedMultiLinear(64, 24, 6, 32, 4, "affine")
    layer.eval()
    x = mx.random.normal((2, 6, length, 64))
    back = mx.random.normal((2, 6, length, 24))
    stock = layer(x), layer(back, transpose=False)
    patterns()["quantized_linear"].apply(layer)
    assert error(layer(x), stock[0]) < 1e-5
    assert counted == {"gather_quantized_matmul": 1}
    assert mx.array_equal(layer(back, transpose=False), stock[1])
    assert counted == {"gather_quantized_matmul": 1}


# Choices


def test_presets():
    assert set(FUSED_ACTIVATIONS) <= set(ALL_PATTERNS)
    assert set(TRAINING_RECOMMENDED) <= set(ALL_PATTERNS)
    assert set(patterns()) == set(ALL_PATTERNS)
    assert [p.name() for p in patterns().values()] == list(patterns())


def test_patterns_and_exclude(make_llama):
    model = make_llama()
    patch(model, exclude=["swiglu_mlp"])
    assert set(model._zmlx_patch_result.pattern_counts) == {
        "quantized_linear",
        "fast_ops",
        "decode_step",
    }
    patch(model, patterns=["swiglu_mlp"], exclude=["swiglu_mlp"])
    assert model._zmlx_patch_result.patched_count == 0


@pytest.mark.parametrize("option", ["patterns", "exclude"])
def test_an_unknown_pattern_is_named_and_nothing_is_done(make_llama, option):
    model = make_llama()
    before = classes(model)
    with pytest.raises(ValueError, match=r"unknown pattern 'swiglu'; known: .*swiglu_mlp"):
        patch(model, **{option: ["swiglu"]})
    assert classes(model) == before


def test_modes_and_earlier_options(make_llama):
    model = make_llama()
    with pytest.raises(ValueError, match="expected one of inference, training"):
        patch(model, mode="fast")
    with pytest.raises(ValueError, match="fusion=True"):
        patch(model, fusion=True)
    with pytest.raises(TypeError, match="unknown options: speed"):
        patch(model, speed=11)
    with pytest.warns(DeprecationWarning, match="compute_dtype is ignored"):
        patch(model, compute_dtype="float32")
    patch(model, mode="training", fusion=False, fusion_rtol=1e-4, threadgroup="auto")
    assert model._zmlx_patch_result.patched_count


def test_max_tokens_leaves_large_calls_to_stock(make_moe, tokens, counted):
    model = make_moe()
    patch(model, moe_fused_swiglu_max_tokens=4)
    counted.clear()
    mx.eval(model(tokens))
    assert "gather_quantized_glu" not in counted
    mx.eval(model(tokens[:, :4]))
    assert counted["gather_quantized_glu"] == 2


def test_unknown_family_is_a_safe_no_op_unless_asked(make_llama, monkeypatch):
    model = make_llama()
    unknown = patching.Family(name="unknown", model_type="novel", because=("no row",), refusals={})
    monkeypatch.setattr(patching, "detect", lambda **_: unknown)
    patch(model)
    report = model._zmlx_patch_result
    assert report.patched_count == 0
    assert "no family that we know: no row" in report.line()
    patch(model, patterns=["quantized_linear"])
    assert report is not model._zmlx_patch_result
    assert model._zmlx_patch_result.patched_count == 15


# Refusals


def reasons(model, pattern):
    return {c.reason for c in model._zmlx_patch_result.refused if c.pattern == pattern}


@pytest.mark.parametrize(("mode", "group"), [("mxfp4", 32), ("nvfp4", 16), ("mxfp8", 32)])
@pytest.mark.parametrize("shape", ["llama", "moe"])
def test_other_quantization_modes(make_llama, make_moe, tokens, mode, group, shape):
    model = (make_llama if shape == "llama" else make_moe)(bits=None)
    nn.quantize(model, group_size=group, bits=8 if mode == "mxfp8" else 4, mode=mode)
    stock = model(tokens)
    patch(model)
    counts = model._zmlx_patch_result.pattern_counts
    assert {"quantized_linear", "moe_mlp" if shape == "moe" else "swiglu_mlp"} <= set(counts)
    assert error(model(tokens), stock) < 1e-5


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("shape", ["llama", "moe"])
def test_models_that_are_not_quantized(make_llama, make_moe, tokens, dtype, shape):
    model = (make_llama if shape == "llama" else make_moe)(bits=None)
    model.set_dtype(dtype)
    model.set_dtype(mx.float32)
    truth = model(tokens)
    model.set_dtype(dtype)
    rounded = {mx.float32: 1e-5, mx.bfloat16: 5e-2, mx.float16: 1e-2}[dtype]
    if shape == "moe" and dtype == mx.bfloat16:
        rounded = 0.5  # two experts that are nearly equal change places
    patch(model)
    counts = model._zmlx_patch_result.pattern_counts
    assert {"linear", "moe_mlp" if shape == "moe" else "swiglu_mlp"} <= set(counts)
    logits = model(tokens)
    assert logits.dtype == dtype
    assert error(logits, truth) < rounded
    cache = make_prompt_cache(model)
    steps = [model(tokens[:, i : i + 1], cache) for i in range(tokens.shape[1])]
    assert error(mx.concatenate(steps, axis=1), truth) < rounded


def test_modes_that_are_not_known_are_refused_with_the_reason(make_llama):
    model = make_llama()
    for _, module in model.named_modules():
        if isinstance(module, nn.QuantizedLinear):
            module.mode = "mxfp3"
    patch(model)
    wanted = "quantization mode mxfp3 is not known"
    assert wanted in reasons(model, "quantized_linear")
    assert reasons(model, "swiglu_mlp") == {f"gate_proj: {wanted}"}


def test_someone_elses_forward_is_left_alone(make_moe, tokens, monkeypatch):
    model = make_moe()

    def theirs(self, x):
        return x * 0

    monkeypatch.setattr(qwen3_moe.Qwen3MoeSparseMoeBlock, "__call__", theirs)
    patch(model)
    assert any("is not the one that" in reason for reason in reasons(model, "moe_mlp"))
    assert type(model.layers[0].mlp) is qwen3_moe.Qwen3MoeSparseMoeBlock


def test_a_subclass_with_its_own_forward_is_no_quantized_linear(make_llama, tokens):
    class Loud(nn.QuantizedLinear):
        def __call__(self, x):
            return super().__call__(x) * 2

    model = make_llama()
    for layer in model.layers:
        layer.self_attn.q_proj.__class__ = Loud
        layer.mlp.up_proj.__class__ = Loud
    stock = model(tokens)
    patch(model)
    assert any("Loud is not" in reason for reason in reasons(model, "quantized_linear"))
    assert any("Loud is not" in reason for reason in reasons(model, "swiglu_mlp"))
    assert error(model(tokens), stock) < 1e-5


def test_experts_with_another_activation_keep_their_forward(make_moe, tokens):
    class Square(nn.Module):
        def __call__(self, x, gate):
            return x * gate * gate

    model = make_moe()
    for layer in model.layers:
        layer.mlp.switch_mlp.activation = Square()
    stock = model(tokens)
    patch(model)
    assert "activation Square is none that the kernels compute" in reasons(model, "moe_mlp")
    assert error(model(tokens), stock) < 1e-5


@pytest.mark.parametrize("fault", ["nan", "raises", "five percent", "wrong shape"])
def test_a_kernel_that_is_wrong_is_refused_by_its_probe(
    make_llama, tokens, monkeypatch, fresh_kernels, fault
):
    implementation = spec.KernelSpec.implementation

    def broken(self, backend):
        kernel = implementation(self, backend)

        def call(*args, **kwargs):
            if fault == "raises":
                raise RuntimeError("no such device function")
            y = kernel(*args, **kwargs)
            if fault == "wrong shape":
                return y[..., :-1]
            return y * (float("nan") if fault == "nan" else 1.05)

        return call if self.name == "quantized_matmul" else kernel

    monkeypatch.setattr(spec.KernelSpec, "implementation", broken)
    model = make_llama()
    stock = model(tokens)
    patch(model)
    (reason,) = reasons(model, "quantized_linear")
    assert "quantized_matmul" in reason
    assert model._zmlx_patch_result.pattern_counts == {
        "swiglu_mlp": 2,
        "fast_ops": 9,
        "decode_step": 1,
    }
    assert error(model(tokens), stock) < 1e-5


def test_without_the_native_library_stock_stays_and_the_report_says_why(
    make_llama, tokens, monkeypatch, fresh_kernels
):
    def unavailable(self, backend):
        raise spec.KernelUnavailable("no C++ compiler found")

    monkeypatch.setattr(spec.KernelSpec, "implementation", unavailable)
    model = make_llama()
    stock = model(tokens)
    patch(model)
    line = model._zmlx_patch_result.line()
    assert "keeps its stock forward" in line
    assert "no C++ compiler found" in line
    assert mx.array_equal(model(tokens), stock)


@pytest.mark.skipif(mx.metal.is_available(), reason="Metal is here, and its kernels run")
def test_other_backends_say_what_they_have_no_kernel_for(make_llama, tokens, monkeypatch):
    """Calls of mx.fast have none for Metal; products have one, whose probe fails without Metal.

    Steps are recorded on every GPU: their attention runs in the emulator where there is none.
    """
    monkeypatch.setattr(patching.backend, "current", lambda: "metal")
    model = make_llama()
    stock = model(tokens)
    patch(model)
    assert model._zmlx_patch_result.pattern_counts == {"decode_step": 1}
    assert mx.array_equal(model(tokens), stock)
    [step] = [c for c in model._zmlx_patch_result.candidates if c.chosen]
    assert (step.path, step.contract) == ("model", "tighter")
    assert step.reason == "the 2 layers of a step of one token, recorded"
    assert reasons(model, "fast_ops") == {"no kernel for metal yet"}
    (failed,) = reasons(model, "swiglu_mlp")
    assert failed.startswith("quantized_glu failed its probe")


@pytest.mark.skipif(mx.metal.is_available(), reason="Metal is here, and its kernels run")
def test_steps_are_not_recorded_when_their_attention_fails_its_probe(
    make_llama, monkeypatch, fresh_kernels
):
    def broken(*_, **__):
        raise RuntimeError("no such device")

    monkeypatch.setattr(patching.backend, "current", lambda: "cuda")
    monkeypatch.setattr("zmlx.kernels.decode_attention_probe.decode_attention", broken)
    model = patch(make_llama())
    assert model._zmlx_patch_result.patched_count == 0
    assert reasons(model, "decode_step") == {"decode_attention failed its probe: no such device"}


# Failures


@pytest.mark.parametrize("failure", [RuntimeError("detection broke"), KeyboardInterrupt()])
def test_an_exception_leaves_the_model_as_it_was(make_llama, monkeypatch, failure):
    model = make_llama()
    before = classes(model)

    def broken(**_):
        raise failure

    monkeypatch.setattr(patching, "detect", broken)
    with pytest.raises(type(failure)):
        patch_loaded(model, origin="a test")
    assert classes(model) == before
    assert not hasattr(model, "_zmlx_patch_result")


def test_an_interrupt_half_way_leaves_nothing_half_patched(
    make_llama, tokens, monkeypatch, fresh_kernels
):
    model = make_llama()
    patch(model, patterns=["swiglu_mlp"])
    before, report = classes(model), model._zmlx_patch_result
    from zmlx.patch import apply

    swap, done = apply.swap, []

    def interrupted(module, proposal, pattern):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(module)
        swap(module, proposal, pattern)

    monkeypatch.setattr(apply, "swap", interrupted)
    with pytest.raises(KeyboardInterrupt):
        patch(model)
    assert classes(model) == before
    assert model._zmlx_patch_result is report


# The report and the pattern interface


def test_report_as_data_line_and_page(make_moe):
    model = make_moe()
    patch(model)
    report = model._zmlx_patch_result
    assert isinstance(report, PatchReport)
    data = json.loads(json.dumps(report.to_json()))
    assert data["patched_count"] == report.patched_count == len(data["candidates"])
    assert data["pattern_counts"] == {
        "decode_step": 1,
        "fast_ops": 13,
        "moe_mlp": 4,
        "quantized_linear": 18,
    }
    assert report.line().startswith("zmlx: 36 modules of qwen3_moe (family qwen, profile stable)")
    assert "\n" not in report.line()
    assert "down projection and weighted sum in one pass" in report.summary()
    assert report.skipped == []
    assert (report.fusion_wrapped_count, report.fusion_skipped) == (0, [])


def test_patterns_by_hand(make_llama, tokens):
    model = make_llama()
    stock = model(tokens)
    pattern = patterns()["swiglu_mlp"]
    assert isinstance(pattern, PatchPattern)
    assert pattern.name() == "swiglu_mlp"
    assert pattern.matches(model.layers[0].mlp, "layers.0.mlp")
    assert not pattern.matches(model.layers[0].self_attn, "layers.0.self_attn")
    pattern.apply(model.layers[0].mlp)
    assert isinstance(model.layers[0].mlp, llama.MLP)
    assert error(model(tokens), stock) < 1e-5
    with pytest.raises(ValueError, match="does not apply to Attention"):
        pattern.apply(model.layers[0].self_attn)
