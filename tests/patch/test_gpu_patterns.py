"""The patterns for GPUs, by name and by default: which calls they take, and which stay stock's.

Without a GPU the kernels run in the emulator.
"""

from __future__ import annotations

from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import pytest
from gpu_path import BACKENDS, on_gpu
from mlx_lm.models.cache import make_prompt_cache
from zoo.build import build, made

from zmlx.backend.cuda import library
from zmlx.kernels.spec import KernelSpec, relative_error
from zmlx.patch import patch, unpatch
from zmlx.patch.pattern import original_class, patterns
from zmlx.profile import Policy, resolve_policy

OPT_IN = ("rmsnorm", "layernorm", "softmax", "residual_norm", "deepseek_router")
TOKENS = mx.array([[3, 14, 15]])
WORDS = ("prepare", "probe")


def report(model):
    return vars(model)["_zmlx_patch_result"]


def reasons(model, pattern):
    return {c.reason for c in report(model).refused if c.pattern == pattern}


def close(value, truth):
    assert relative_error(value, truth) < 1e-5


def decoded(model, rows=1):
    """Return the logits of a prompt and of two further steps."""
    cache = make_prompt_cache(model)
    prompt = mx.broadcast_to(TOKENS, (rows, 3)) + mx.arange(rows)[:, None]
    steps = [model(prompt, cache=cache)]
    for token in (4, 77):
        steps.append(model(mx.full((rows, 1), token), cache=cache))
    return mx.concatenate(steps, axis=1)


# What is used when nobody asks


def test_nothing_that_has_to_be_asked_for_is_used_by_default():
    model = made("deepseek_v3", "float32-4bit")
    with on_gpu():
        patch(model, exclude=["decode_step"])
    assert set(report(model).pattern_counts) == {"moe_mlp", "swiglu_mlp"}
    assert not {c.pattern for c in report(model).candidates} & set(OPT_IN)


@pytest.mark.parametrize("excluded", [["decode_step"], []], ids=["layers", "all"])
@pytest.mark.parametrize("name", BACKENDS)
def test_kernels_for_cuda_are_compiled_before_the_first_is_probed(name, excluded, monkeypatch):
    noted: list[tuple[str, str]] = []

    def noting(word, method):
        def noted_call(spec, backend, **configuration):
            noted.append((word, f"{spec.name} {sorted(configuration.items(), key=str)}"))
            return method(spec, backend, **configuration)

        return noted_call

    for word in WORDS:
        monkeypatch.setattr(KernelSpec, word, noting(word, getattr(KernelSpec, word)))
    model = made("qwen3_moe", "float32-4bit")
    with on_gpu(name):
        patch(model, exclude=excluded)
    words = [word for word, _ in noted]
    prepared, probed = ({kernel for w, kernel in noted if w == word} for word in WORDS)
    if name == "cuda":
        assert prepared == probed
        assert words == sorted(words)
        assert len(probed) > 2
        assert any("argmax" in kernel for kernel in probed) == (not excluded)
    else:
        assert set(words) == {"probe"}


@pytest.mark.parametrize("name", BACKENDS)
def test_what_records_steps_is_built_from_the_patch_on(name, monkeypatch):
    begun = []
    monkeypatch.setattr(library, "begin", lambda: begun.append(name))
    with on_gpu(name):
        patch(made("llama", "float32-4bit"), exclude=["decode_step"])
        assert not begun
        patch(made("llama", "float32-4bit"))
    assert begun == (["cuda"] if name == "cuda" else [])


@pytest.mark.parametrize("name", OPT_IN)
def test_only_these_have_to_be_asked_for(name):
    assert {n for n, pattern in patterns().items() if pattern.opt_in} == set(OPT_IN)
    assert patterns()[name].opt_in


def test_a_profile_asks_by_including(tmp_path, monkeypatch):
    (tmp_path / "zmlx.toml").write_text(
        'profile = "mine"\n[profiles.mine.family.llama]\ninclude = ["rmsnorm"]\n'
    )
    monkeypatch.chdir(tmp_path)
    policy = resolve_policy("mine")
    assert policy.names("rmsnorm", "llama")
    assert not policy.names("rmsnorm", "qwen")
    assert not policy.names("layernorm", "llama")
    assert Policy("other", include=("softmax",)).names("softmax", "llama")
    model = made("llama", "float32-4bit")
    stock = decoded(model)
    with on_gpu():
        patch(model, profile="mine")
        assert report(model).pattern_counts == {"rmsnorm": 5}
        close(decoded(model), stock)


# By name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "pattern", "count"),
    [
        ("llama", "rmsnorm", 5),
        ("gemma", "rmsnorm", 5),  # adds 1 to the weight first
        ("starcoder2", "layernorm", 5),
        ("nemotron", "layernorm", 5),  # the same
        ("mixtral", "softmax", 2),
        ("llama", "residual_norm", 2),
        ("gemma", "residual_norm", 2),
        ("gpt_oss", "residual_norm", 2),
        ("granite", "residual_norm", 2),  # what is added is scaled first
        ("jamba", "residual_norm", 2),
        ("deepseek_v3", "deepseek_router", 1),
        ("glm4_moe", "deepseek_router", 1),
        ("glm4_moe_lite", "deepseek_router", 1),
        ("bailing_moe", "deepseek_router", 1),
        ("kimi_linear", "deepseek_router", 1),
        ("mistral4", "deepseek_router", 1),
        ("nemotron_h", "deepseek_router", 1),
    ],
)
def test_asked_for_by_name(name, pattern, count, backend):
    model = made(name, "float32-4bit")
    before = {path: type(m) for path, m in model.named_modules()}
    stock = decoded(model, rows=2)
    with on_gpu(backend):
        patch(model, patterns=[pattern])
        assert report(model).pattern_counts == {pattern: count}, report(model).summary()
        launched = decoded(model, rows=2)
        assert not mx.array_equal(launched, stock) or name == "kimi_linear"  # its bits are the same
        close(launched, stock)
        model.train()
        assert mx.array_equal(decoded(model, rows=2), stock)  # stock's own operations
        model.eval()
        unpatch(model)
    assert {path: type(m) for path, m in model.named_modules()} == before
    assert mx.array_equal(decoded(model, rows=2), stock)


@pytest.mark.parametrize("name", ["cohere", "dbrx"])
def test_layer_norms_without_bias_keep_mlx_s(name):
    model = made(name, "float32")
    stock = model(TOKENS)
    with on_gpu():
        patch(model, patterns=["layernorm"])
        assert report(model).patched_count
        assert mx.array_equal(model(TOKENS), stock)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("olmo2", 0),  # norms what is added, not the sum
        ("gemma2", 2),  # adds what is normed, then norms the sum
        ("cohere", 0),  # attention and MLP side by side
        ("glm4", 2),
        ("bailing_moe_linear", 2),
        ("afmoe", 2),
        ("minicpm", 2),
        ("falcon_h1", 2),
        ("longcat_flash", 0),  # lists of norms
    ],
)
def test_layers_whose_residuals_differ(name, count):
    model = made(name, "float32-4bit")
    stock = decoded(model)
    with on_gpu():
        patch(model, patterns=["residual_norm"])
        assert report(model).pattern_counts.get("residual_norm", 0) == count
        close(decoded(model), stock)


def test_norms_that_are_no_rms_norm_refuse_the_residual():
    model = made("starcoder2", "float32-4bit")
    with on_gpu():
        patch(model, patterns=["residual_norm"])
    assert reasons(model, "residual_norm") == {
        "LayerNorm is not an RMSNorm by mx.fast.rms_norm alone"
    }


# What the kernels take


def test_prompts_and_large_batches_run_the_stock_statements():
    model = made("qwen3_moe", "float32-4bit")
    many = mx.arange(40)[None]  # 80 chosen experts, 40 rows
    stock = model(many)
    with on_gpu() as calls:
        patch(model, exclude=["decode_step"])
        calls.clear()
        assert mx.array_equal(model(many), stock)
        assert calls == {}
        close(model(many[:, :3]), model(many)[:, :3])
        assert set(calls) == {"expert_glu", "expert_combine", "quantized_glu"}


def test_a_step_is_recorded_once_and_replayed():
    model = made("gpt_oss", "float32-4bit")
    stock = decoded(model)
    with on_gpu() as calls:
        patch(model, exclude=["decode_step"])
        for _ in range(3):
            close(decoded(model), stock)
        seen = dict(calls)
        for _ in range(3):
            close(decoded(model), stock)
        assert calls == seen  # no Python of a kernel runs any more


def test_max_tokens_and_fused_swiglu_are_obeyed(tmp_path, monkeypatch):
    (tmp_path / "zmlx.toml").write_text(
        'profile = "one"\n[profiles.one.options]\nmoe_mlp.max_tokens = 2\n'
        "[profiles.off.options]\nmoe_mlp.fused_swiglu = false\n"
    )
    monkeypatch.chdir(tmp_path)
    model = made("mixtral", "float32-4bit")
    with on_gpu() as calls:
        patch(model, patterns=["moe_mlp"])
        calls.clear()
        model(TOKENS)
        assert calls == {}
        model(TOKENS[:, :2])
        assert calls["expert_glu"]
        patch(model, patterns=["moe_mlp"], profile="off")
        assert report(model).patched_count == 0
        assert any("fused_swiglu is off" in reason for reason in reasons(model, "moe_mlp"))


def test_router_options_say_that_they_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("ZMLX_QWEN_ROUTER_ARGPARTITION_LOGITS", "1")
    model = made("qwen3_moe", "float32-4bit")
    stock = decoded(model)
    with on_gpu():
        patch(model, exclude=["decode_step"])
        notes = {c.reason for c in report(model).candidates if c.pattern == "moe_mlp" and c.chosen}
        assert any("router_argpartition_logits: routing stays upstream's" in n for n in notes)
        close(decoded(model), stock)


@pytest.mark.parametrize("tied", [False, True])
def test_single_layers_only_where_they_are_large(tied, tmp_path, monkeypatch):
    (tmp_path / "zmlx.toml").write_text(
        "[profiles.small.options]\nquantized_linear.least_mib = 0\n"
    )
    monkeypatch.chdir(tmp_path)
    config = {
        "model_type": "llama", "hidden_size": 128, "num_hidden_layers": 2,
        "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5, "vocab_size": 160, "tie_word_embeddings": tied,
    }  # fmt: skip
    model = build("llama", quantize={"bits": 4, "group_size": 64}, config=config)
    stock = decoded(model)
    with on_gpu() as calls:
        patch(model, patterns=["quantized_linear", "linear"])
        assert report(model).patched_count == 0
        assert all("less than 32 MiB" in reason for reason in reasons(model, "quantized_linear"))
        patch(model, patterns=["quantized_linear"], profile="small")
        assert report(model).pattern_counts == {"quantized_linear": 15 if tied else 16}
        calls.clear()
        many = model(mx.arange(9)[None])
        assert calls == {}  # nine rows are too many
        unpatch(model)
        assert mx.array_equal(model(mx.arange(9)[None]), many)
        patch(model, patterns=["quantized_linear"], profile="small")
        close(decoded(model), stock)
        assert calls["quantized_matmul"] >= 15


def test_a_large_head_is_replaced_without_asking():
    model = build("llama", quantize={"bits": 4, "group_size": 64})
    head = model.lm_head
    rows = (33 << 20) * 8 // (head.weight.shape[1] * 32)
    head.weight = mx.zeros((rows, head.weight.shape[1]), mx.uint32)
    head.scales, head.biases = (mx.zeros((rows, head.scales.shape[1])) for _ in range(2))
    with on_gpu():
        patch(model, exclude=["decode_step"])
    assert [
        c.path for c in report(model).candidates if c.chosen and c.pattern == "quantized_linear"
    ] == ["lm_head"]


def test_plain_floats_and_other_layers_stay_mlx_s():
    model = made("deepseek_v3", "float32")
    with on_gpu():
        patch(model, patterns=["linear"])
    assert report(model).patched_count == 0
    assert all("MLX's own product of plain floats" in r for r in reasons(model, "linear"))
    model = made("deepseek_v3", "float32-4bit")
    with on_gpu():
        patch(model, patterns=["quantized_linear"])
    assert any("MLX's own operation stays" in r for r in reasons(model, "quantized_linear"))


# Standing aside


def test_training_gradients_and_other_dtypes_are_stock_s():
    model = made("qwen3_moe", "float32-4bit")
    embedded = mx.random.normal((1, 3, 128), key=mx.random.key(1))

    def loss(x):
        return model(None, input_embeddings=x).square().mean()

    stock, logits = mx.grad(loss)(embedded), model(TOKENS)
    with on_gpu() as calls:
        patch(model, exclude=["decode_step"])
        assert relative_error(mx.grad(loss)(embedded), stock) < 1e-4
        calls.clear()
        model.train()
        assert mx.array_equal(model(TOKENS), logits)
        assert calls == {}
        model.eval()
        with mx.stream(mx.cpu):
            model.set_dtype(mx.float64)
            model(None, input_embeddings=embedded.astype(mx.float64))
        assert calls == {}


def test_experts_that_change_after_patching_run_as_they_are():
    model = made("mixtral", "float32-4bit")
    with on_gpu() as calls:
        patch(model, patterns=["moe_mlp"])

        class Louder(nn.Module):
            def __call__(self, x, gate):
                return 2 * nn.silu(gate) * x

        for layer in model.layers:
            layer.block_sparse_moe.switch_mlp.activation = Louder()
        calls.clear()
        changed = model(TOKENS)
        assert calls == {}
        unpatch(model)
        assert mx.array_equal(model(TOKENS), changed)


def test_a_kernel_that_fails_its_probe_refuses_the_pattern():
    model = made("qwen3_moe", "float32-4bit")
    stock = decoded(model)
    with on_gpu():
        right = KernelSpec.implementation

        def broken(spec, backend):
            kernel = right(spec, backend)
            return (lambda *a, **k: kernel(*a, **k) * 1.05) if spec.name == "expert_glu" else kernel

        with mock.patch.object(KernelSpec, "implementation", broken):
            patch(model, exclude=["decode_step"])
        assert report(model).pattern_counts == {"swiglu_mlp": 1}
        assert any("expert_glu failed its probe" in r for r in reasons(model, "moe_mlp"))
        close(decoded(model), stock)


def test_by_hand():
    model = made("phixtral", "float32-4bit")
    block = model.transformer.h[0].moe
    with on_gpu():
        for name in ("rmsnorm", "residual_norm", "deepseek_router"):
            assert not patterns()[name].matches(block, "")
    assert not patterns()["moe_mlp"].matches(block, "")  # a CPU's kernels take a gate
    with pytest.raises(ValueError, match="experts without a gate"):
        patterns()["moe_mlp"].apply(block)
    assert original_class(block) is None
