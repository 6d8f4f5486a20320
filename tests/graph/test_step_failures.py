"""Whatever goes wrong in a recorded step, the model's forward answers, and one line says why."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from stepped import (
    PROMPT,
    deviation,
    filled,
    lent,
    step,
    stepped,
    steps_of,
    two,
)
from zoo.build import made

from zmlx.graph import fused
from zmlx.graph.tiny import TinyProgram
from zmlx.kernels import decode_attention_probe as probe
from zmlx.kernels import spec
from zmlx.kernels.decode_attention import decode_attention_reference
from zmlx.kernels.decode_attention_probe import DECODE_ATTENTION
from zmlx.patch.pattern import STATE, PatchConfig, Proposal, Refused
from zmlx.patch.patterns.decode_step import PATTERN

TOKENS = [71, 8, 133, 40, 5]
LINE = "zmlx: decode steps keep the model's own forward: "


def lines(capsys) -> list[str]:
    """Return what was said about steps: the first test may have to compile the native library."""
    return [line for line in capsys.readouterr().err.splitlines() if "decode steps" in line]


def same(ours, theirs) -> bool:
    return deviation(ours, theirs) < 1e-5


def broken(monkeypatch, name, change):
    """Put another kernel in the place of one that fused operations launch."""
    right = getattr(fused, name)
    monkeypatch.setattr(fused, name, lambda *args, **kwargs: change(right(*args, **kwargs)))


def times(factor):
    def change(made):
        return [a * factor for a in made] if isinstance(made, list | tuple) else made * factor

    return change


def raising(error):
    def change(*_):
        raise error

    return change


#: kernel -> a type that uses it, what the line calls it
KERNELS = {
    "decode_attention": ("llama", "DecodeAttention"),
    "decode_attention_latent": ("deepseek_v3", "LatentAttention"),
    "products": ("llama", "Products"),
    "gated_product": ("llama", "GatedProduct"),
    "expert_gated_product": ("qwen3_moe", "ExpertGatedProduct"),
    "expert_combination": ("qwen3_moe", "ExpertCombination"),
    "expert_products": ("deepseek_v3", "HeadProducts"),
}


@pytest.mark.parametrize("factor", [0.0, 1.02, mx.nan, mx.inf])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_that_gives_wrong_numbers(kernel, factor, monkeypatch, capsys):
    name, called = KERNELS[kernel]
    model, apart = two(name, quantize={"bits": 4, "group_size": 32})
    broken(monkeypatch, kernel, times(factor))
    cache, theirs = filled(model), filled(apart)
    assert np.array_equal(stepped(model, cache, TOKENS), stepped(apart, theirs, TOKENS))
    said = lines(capsys)
    assert len(said) == 1
    assert said[0].startswith(f"{LINE}WrongResult: {called} differs from MLX's operations by ")
    assert not any(lent(cache))
    # It is not asked again, in another conversation either.
    traces = []
    monkeypatch.setattr("zmlx.graph.stepping.traced_step", lambda *_: traces.append(1))
    stepped(model, filled(model), TOKENS)
    assert not traces
    assert not lines(capsys)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("nvrtc: no\nin line 3"),
        ValueError("a shape"),
        KeyError("k"),
        AssertionError(),
    ],
)
def test_a_kernel_that_raises_when_it_is_built(error, monkeypatch, capsys):
    model, apart = two("llama")
    broken(monkeypatch, "decode_attention", raising(error))
    assert same(*(stepped(m, filled(m), TOKENS) for m in (model, apart)))
    said = lines(capsys)
    assert len(said) == 1
    assert said[0].startswith(LINE + type(error).__name__)
    assert "line 3" not in said[0]


def test_a_machine_without_kernels_for_float32(monkeypatch, capsys):
    """What is fused is tried all the same, against 16 bits."""
    monkeypatch.setattr("zmlx.graph.probing.in_float32", raising(RuntimeError("no resources")))
    model, _ = two("llama", dtype=mx.bfloat16)
    cache = filled(model)
    stepped(model, cache, TOKENS)
    assert all(lent(cache))
    broken(monkeypatch, "products", times(1.3))
    model, _ = two("llama", dtype=mx.bfloat16)
    stepped(model, filled(model), TOKENS)
    [line] = lines(capsys)
    assert line.startswith(f"{LINE}WrongResult: Products differs from MLX's operations by 0.3")


def test_small_operations_that_give_wrong_numbers(monkeypatch, capsys):
    """The whole step is compared, too."""
    model, apart = two("qwen3_moe")
    right = TinyProgram.__call__
    monkeypatch.setattr(TinyProgram, "__call__", lambda p, *a: [x * 2 for x in right(p, *a)])
    cache, theirs = filled(model), filled(apart)
    assert np.array_equal(stepped(model, cache, TOKENS), stepped(apart, theirs, TOKENS))
    line = f"{LINE}WrongResult: its kernels differ from the model's own step by "
    assert [found.startswith(line) for found in lines(capsys)] == [True]


def test_keys_that_are_not_written(monkeypatch, capsys):
    def unwritten(
        q, k, v, keys, values, state, *, after=None, counters=None, shape=None, **options
    ):
        out, *_ = decode_attention_reference(q, k, v, keys, values, state, **options)
        return out if shape is None else out.reshape(shape)

    model, apart = two("llama")
    monkeypatch.setattr(fused, "decode_attention", unwritten)
    cache, theirs = filled(model), filled(apart)
    assert np.array_equal(stepped(model, cache, TOKENS), stepped(apart, theirs, TOKENS))
    [line] = lines(capsys)
    assert "DecodeAttention differs from MLX's operations" in line


def test_a_rewrite_that_is_broken(monkeypatch, capsys):
    model, apart = two("llama")
    monkeypatch.setattr("zmlx.graph.program.fuse_products", raising(IndexError("out of range")))
    assert same(*(stepped(m, filled(m), TOKENS) for m in (model, apart)))
    assert lines(capsys) == [f"{LINE}IndexError: out of range"]


def test_strict_raises_what_went_wrong_once(monkeypatch):
    monkeypatch.setenv("ZMLX_STRICT", "1")
    model, apart = two("llama")
    broken(monkeypatch, "products", times(0.0))
    cache, theirs = filled(model), filled(apart)
    stepped(model, cache, TOKENS[:1])
    stepped(apart, theirs, TOKENS[:1])
    with pytest.raises(RuntimeError, match="Products differs from MLX's operations by 1"):
        step(model, cache, 3)
    # The step was not made; whoever goes on does so with the forward.
    assert [c.offset for c in cache] == [c.offset for c in theirs]
    assert same(stepped(model, cache, TOKENS), stepped(apart, theirs, TOKENS))


def test_strict_does_not_raise_for_what_is_not_taken(monkeypatch, capsys):
    monkeypatch.setenv("ZMLX_STRICT", "1")
    model, apart = two("gemma2")
    assert same(*(stepped(m, filled(m), TOKENS) for m in (model, apart)))
    [line] = lines(capsys)
    assert line.startswith(LINE + "a cache is read by more than")


def test_a_program_that_raises_later(monkeypatch, capsys):
    """For other sizes of buffers a program is built again."""
    monkeypatch.setattr("zmlx.graph.lending.ROOM", 12)
    monkeypatch.setattr("zmlx.graph.lending._LEAST", 1)
    model, apart = two("llama")
    cache, theirs = filled(model), filled(apart)
    assert same(stepped(model, cache, TOKENS[:3]), stepped(apart, theirs, TOKENS[:3]))
    assert all(lent(cache))
    broken(monkeypatch, "decode_attention", raising(RuntimeError("too large")))
    assert same(stepped(model, cache, TOKENS), stepped(apart, theirs, TOKENS))
    assert lines(capsys) == [f"{LINE}RuntimeError: too large"]
    assert not any(lent(cache))
    assert [c.offset for c in cache] == [c.offset for c in theirs]


def test_layouts_that_are_refused_one_after_the_other(capsys):
    """Every reason is said once, and after some nothing is looked at any more."""
    model, _ = two("llama")
    stepped(model, filled(model), TOKENS[:2])
    steps = steps_of(model)
    for _ in range(2):
        for number in range(12):
            cache = filled(model)
            for c in cache:
                c.__class__ = type(f"Cache{number}", (type(c),), {})
            mx.eval(step(model, cache, 3))
    said = lines(capsys)
    assert said == [f"{LINE}a cache of class Cache{n}" for n in range(8)]
    assert steps._given_up


def test_nothing_is_said_and_nothing_recorded_for_other_calls(capsys):
    model, apart = two("llama")
    embeddings = mx.random.normal((1, 1, 192))
    for each in (model, apart):
        mx.eval(each(PROMPT), each(PROMPT[:, :1]), each(PROMPT[:, :1], cache=None))
        mx.eval(each(mx.array([[1], [2]])))
        mx.eval(each(PROMPT[:, :1], cache=filled(each), input_embeddings=embeddings))
    assert all(STATE not in vars(m) for _, m in model.named_modules())
    assert not lines(capsys)


def test_tokens_and_caches_that_are_given_by_name_or_place():
    model, apart = two("llama")
    cache, theirs = filled(model), filled(apart)
    token = mx.array([[7]])
    calls = (
        lambda m, c: m.model(token, c),
        lambda m, c: m.model(token, cache=c),
        lambda m, c: m.model(inputs=token, cache=c),
        lambda m, c: m.model(cache=c, inputs=token),
        lambda m, c: m.model(token, c, None),
    )
    for call in calls:
        assert same(np.array(call(model, cache)), np.array(call(apart, theirs)))
    assert all(lent(cache))
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        model.model(token, cache, other=3)


def test_a_state_in_which_a_forward_is_given_what_a_step_does_not_know():
    model, apart = two("llama")
    results = []
    for each in (model, apart):
        cache = filled(each)
        rows = [stepped(each, cache, TOKENS)]
        given = each.model.embed_tokens(mx.array([[9]]))
        rows.append(np.array(each(mx.array([[5]]), cache=cache, input_embeddings=given))[0])
        rows.append(stepped(each, cache, TOKENS))
        results.append(np.concatenate(rows))
    assert same(*results)


@pytest.mark.parametrize("dtype", [mx.int32, mx.uint32, mx.int64])
def test_tokens_of_every_dtype(dtype):
    model, apart = two("llama")
    cache, theirs = filled(model), filled(apart)
    for token in TOKENS:
        tokens = mx.array([[token]], dtype)
        assert same(*(np.array(m(tokens, cache=c)) for m, c in ((model, cache), (apart, theirs))))
    assert all(lent(cache))


# ---- the pattern ---------------------------------------------------------------------------------


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(2, 2), nn.Linear(2, 2)]


class CacheFirst(Layers):
    def __call__(self, cache, tokens):
        return tokens


class Many(Layers):
    def __call__(self, *tokens, cache=None):
        return tokens


class Without(Layers):
    def __call__(self, tokens):
        return tokens


class Needs(Layers):
    def __call__(self, tokens, mask, cache, *, other=None, **rest):
        return tokens


def examined(module):
    return PATTERN.examine(module, "model", None, PatchConfig(backend="cuda"))


def test_modules_that_are_not_taken():
    assert examined(Without()) is None
    assert examined(nn.Linear(2, 2)) is None
    assert examined(CacheFirst()) == Refused("its forward does not take the tokens first")
    assert examined(Many()) == Refused("its forward does not take the tokens first")


def test_what_a_proposal_needs():
    found = examined(Needs())
    assert isinstance(found, Proposal)
    assert found.key == ("cuda", ("tokens", "mask", "cache"), ("mask",))
    assert {use.spec.name for use in found.kernels} == {"decode_attention"}
    assert "2 layers" in found.note


@pytest.mark.parametrize(
    ("form", "dtypes"),
    [
        ("float32", [mx.float32]),
        ("float32-4bit", [mx.float32]),
        ("bfloat16-4bit", [mx.bfloat16]),
        ("bfloat16-4bit-float32", [mx.float32, mx.bfloat16]),  # norms and scales
    ],
)
def test_attention_is_tried_in_the_dtypes_of_the_model(form, dtypes):
    found = examined(made("llama", form).model)
    assert isinstance(found, Proposal)
    assert [use.configuration["dtype"] for use in found.kernels] == dtypes


@pytest.fixture
def fresh_probe():
    spec._probe.cache_clear()
    yield
    spec._probe.cache_clear()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_probe_of_decode_attention(dtype, head_dim, fresh_probe):
    """Without a GPU it runs in the emulator."""
    assert DECODE_ATTENTION.probe("cuda", head_dim=head_dim, dtype=dtype) is None


def not_written(q, k, v, keys, values, state, **options):
    return probe.decode_attention_reference(q, k, v, keys, values, state, **options)[0]


def wrong_result(*args, right=probe.decode_attention, **options):
    return right(*args, **options) * 1.05


@pytest.mark.parametrize("wrong", [not_written, wrong_result])
def test_the_probe_notices_a_wrong_kernel(wrong, fresh_probe, monkeypatch):
    monkeypatch.setattr(probe, "decode_attention", wrong)
    failure = DECODE_ATTENTION.probe("cuda", head_dim=64, dtype=mx.float32)
    assert failure is not None
    assert failure.startswith("decode_attention failed its probe: error ")
