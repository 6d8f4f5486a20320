"""The step as one operation: the same bits as its operations one by one, with every cache."""

from __future__ import annotations

import copy
import re
from collections import Counter
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models.cache import (
    BatchKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

from zmlx.patch import patch, unpatch
from zmlx.patch.patterns.decode_step import cache_arrays

PROMPT = mx.array([[3, 14, 15, 92, 65, 35, 89]])
STEPS = 24


@pytest.fixture
def two(make_llama):
    """Return a model with the pattern, and one with all others."""

    def make(**options):
        model, apart = make_llama(**options), make_llama(**options)
        return patch(model), patch(apart, exclude=["decode_step"])

    return make


def decoded(model: nn.Module, cache: list, steps: int = STEPS) -> np.ndarray:
    """Return the logits of a prompt's last token and of every greedy step, one after the other."""
    logits = [model(PROMPT, cache=cache)[:, -1:]]
    for _ in range(steps):
        token = mx.argmax(logits[-1][..., -1:, :], axis=-1)
        mx.async_eval(token)
        logits.append(model(token, cache=cache))
        mx.async_eval(logits[-1])
    return np.array(mx.concatenate(logits, axis=1).astype(mx.float32))


CACHES = {
    "growing": KVCache,
    "rotating": lambda: RotatingKVCache(max_size=12, keep=2),
    "quantized": lambda: QuantizedKVCache(group_size=32, bits=8),  # heads of 32
    "batched": lambda: BatchKVCache([0]),
}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_the_same_bits_with_every_cache(two, dtype, kind):
    model, apart = two(dtype=dtype, hidden=128)
    caches = [[CACHES[kind]() for _ in m.layers] for m in (model, apart)]
    assert np.array_equal(decoded(model, caches[0]), decoded(apart, caches[1]))
    for one, other in zip(*caches, strict=True):
        assert (
            one.offset == other.offset
            if kind != "batched"
            else mx.array_equal(one.offset, other.offset)
        )
        for a, b in zip(cache_arrays(one), cache_arrays(other), strict=True):
            assert mx.array_equal(a, b)


def test_mixture_of_experts(make_moe):
    model, apart = patch(make_moe()), patch(make_moe(), exclude=["decode_step"])
    ours = decoded(model, make_prompt_cache(model))
    theirs = decoded(apart, make_prompt_cache(apart))
    # The router's softmax and sum are rounded once here.
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


def operations(tmp_path: Path, array: mx.array) -> Counter[str]:
    file = tmp_path / "graph.dot"
    mx.export_to_dot(str(file), array)
    return Counter(re.findall(r'label ?="(\w+)"', file.read_text()))


def test_the_layers_of_a_step_are_one_operation(two, tmp_path):
    model, apart = two(layers=6)
    counts = []
    for each in (model, apart):
        cache = make_prompt_cache(each)
        mx.eval(each(PROMPT, cache=cache))
        counts.append(operations(tmp_path, each(PROMPT[:, :1], cache=cache)))
    assert counts[0]["ZmlxProgram"] == 1
    assert not counts[0]["ZmlxAttention"]
    assert counts[1]["ZmlxAttention"] == 6


def test_long_calls_and_training_keep_their_graph(make_llama, tmp_path):
    model = patch(make_llama())
    long = mx.arange(33)[None]
    assert not operations(tmp_path, model(long, cache=make_prompt_cache(model)))["ZmlxProgram"]
    assert operations(tmp_path, model(long[:, :32]))["ZmlxProgram"]
    model.train()
    assert not operations(tmp_path, model(long[:, :2]))["ZmlxProgram"]


def test_the_cache_is_written_in_place(make_llama):
    model = patch(make_llama())
    cache = make_prompt_cache(model)
    mx.eval(model(PROMPT, cache=cache))

    def addresses() -> list[int]:
        arrays = list(cache_arrays(cache))
        mx.eval(arrays)
        return [np.array(a, copy=False).__array_interface__["data"][0] for a in arrays]

    token = PROMPT[:, :1]
    mx.eval(model(token, cache=cache))
    before = addresses()
    for _ in range(5):
        mx.eval(model(token, cache=cache))
    assert addresses() == before


def test_a_copied_cache_goes_its_own_way(two):
    model, apart = two()
    results = []
    for each in (model, apart):
        cache = make_prompt_cache(each)
        first = decoded(each, cache, 5)
        branch = copy.deepcopy(cache)
        views = [array[..., : cache[0].offset, :] for array in cache_arrays(cache)]
        mx.eval(views)
        before = [np.array(view) for view in views]
        on = decoded(each, cache, 5)
        assert all(map(np.array_equal, before, map(np.array, views)))
        results.append((first, on, decoded(each, branch, 5)))
        assert np.array_equal(results[-1][1], results[-1][2])
    assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))


def test_trimmed_and_saved_caches(two, tmp_path):
    model, apart = two()
    results = []
    for number, each in enumerate((model, apart)):
        cache = make_prompt_cache(each)
        decoded(each, cache, 6)
        assert trim_prompt_cache(cache, 4) == 4
        file = str(tmp_path / f"{number}.safetensors")
        save_prompt_cache(file, cache)
        results.append((decoded(each, cache, 4), decoded(each, load_prompt_cache(file), 4)))
        assert np.array_equal(*results[-1])
    assert np.array_equal(results[0][0], results[1][0])


def test_generation_and_a_draft_model(two, make_llama):
    model, apart = two()
    draft = patch(make_llama(layers=1))
    tokens = []
    for each in (model, apart):
        plain = generate_step(PROMPT[0], each, max_tokens=STEPS)
        tokens.append([int(token) for token, _ in plain])
        drafted = speculative_generate_step(PROMPT[0], each, draft, max_tokens=STEPS)
        tokens.append([int(token) for token, *_ in drafted])
    assert len({tuple(t) for t in tokens}) == 1
    assert len(tokens[0]) == STEPS


def test_gradients_of_a_replaced_model(make_llama):
    model = make_llama(bits=None)
    weight = model.layers[0].mlp.up_proj.weight

    def loss(w):
        model.layers[0].mlp.up_proj.weight = w
        return model(PROMPT).square().mean()

    stock = mx.grad(loss)(weight)
    mx.eval(stock)
    patch(model)
    assert mx.allclose(mx.grad(loss)(weight), stock, rtol=1e-3, atol=1e-7)


def test_unpatch_leaves_no_program(make_llama, tmp_path):
    model = patch(make_llama())
    unpatch(model)
    names = operations(tmp_path, model(PROMPT[:, :1]))
    assert not any(name.startswith("Zmlx") for name in names)


def test_arrays_of_caches_are_found_wherever_they_are():
    class Holder:
        def __init__(self, **members):
            vars(self).update(members)

    a, b, c, d = (mx.array(n) for n in range(4))
    caches = [Holder(keys=a, offset=3, inner=[b, None]), None, (Holder(deep={"k": c}), d)]
    found = list(cache_arrays(caches))
    assert [array.item() for array in found] == [0, 1, 2, 3]
    assert found[2] is c
    assert list(cache_arrays(None)) == []
