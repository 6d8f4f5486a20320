"""Steps of every model type of mlx-lm, replayed as on a GPU, against the stock forward."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from stepped import PROMPT, deviation, filled, programs, recorded, step
from zoo.build import build, made
from zoo.configs import FAILURES, config_of, runnable
from zoo.devices import ON_GPU, of_stock, on_cpu

from zmlx.patch.pattern import STATE
from zmlx.patch.patterns import decode_step

#: As many on a GPU as users notice; the CPU would take minutes.
STEPS = 64 if ON_GPU else 8
READ = "a cache is read by more than the attention of its layer"
RECURRENT = "no cache with keys and values"
#: Types whose steps keep the stock forward, and what is said about it.
REFUSED = {
    # Each expert's Python looks at which tokens chose it.
    "dbrx": "the function reads what an array holds",
    # The indexer chooses among all cached keys.
    "deepseek_v32": READ,
    "glm_moe_dsa": READ,
    "minimax_m3_vl": READ,
    "deepseek_v41": "a cache of class LayerCache",
    # The scores are capped, so that it is no attention of MLX's.
    "gemma2": READ,
    # The forward clips its own weights.
    "gemma3n": "the weights change from step to step",
    "llama4": "a cache of class ChunkedKVCache",
    "mamba": RECURRENT,
    "mamba2": RECURRENT,
    "rwkv7": RECURRENT,
}
#: Types without a module that takes tokens and passes a list of caches on to a list of layers.
NOT_FOUND = {
    "afm7",  # one layer in the tiny configuration; see below
    "plamo",
    "plamo2",
    "plamo3",
}

#: Types that between them have every kind of cache, and of experts, that steps are recorded with.
WRITERS = ("llama", "gpt_oss", "glm4_moe_lite", "qwen3_moe", "qwen3_next", "gemma3")


@pytest.fixture
def said(monkeypatch):
    """Return the lines about decode steps; the first test may have to compile the library."""
    lines: list[str] = []

    def say(line, end=""):
        if "decode steps" in line:
            lines.append(line)

    monkeypatch.setattr(decode_step.speech, "say", say)
    return lines


def greedy(model: nn.Module, cache: list, tokens: list[int] | None = None, steps: int = STEPS):
    """Return logits of steps and the tokens, each the best after the one before."""
    rows, token, used = [], 71, []
    for number in range(steps if tokens is None else len(tokens)):
        token = token if tokens is None else tokens[number]
        used.append(token)
        rows.append(np.array(step(model, cache, token)[0, -1].astype(mx.float32)))
        token = int(rows[-1].argmax())
    return np.stack(rows), used


@pytest.mark.parametrize("form", ["float32", "float32-4bit"])
@pytest.mark.parametrize("name", runnable())
def test_steps_of_every_type(name, form, said):
    model = made(name, form)
    failures = [failure for failure in FAILURES.get(name, ()) if "alone" in failure.runs]
    if any(not failure.dtype and failure.backend in ("", "cpu") for failure in failures):
        with pytest.raises(Exception, match=failures[0].message):
            filled(recorded(model))
        return
    stock = filled(model)
    with on_cpu():
        truth, tokens = greedy(model, stock)
    truths = [(truth, stock)]
    refused = name in REFUSED or name in NOT_FOUND
    if ON_GPU and not refused:  # whose own operations may differ from the CPU's
        own = filled(model)
        truths.append((of_stock(lambda: greedy(model, own, tokens)[0]), own))
    cache = filled(recorded(model))
    if refused:
        with on_cpu():
            found, _ = greedy(model, cache, tokens)
        assert np.array_equal(found, truth)
        assert not programs(model)
        assert [REFUSED[name] in line for line in said] == [True] if name in REFUSED else not said
        return
    found, _ = greedy(model, cache, tokens)
    assert not said
    [program] = programs(model)
    truth, stock = min(truths, key=lambda pair: deviation(found, pair[0]))
    assert all(deviation(a, b) < 1e-5 for a, b in zip(found, truth, strict=True))
    for one, other in zip(found, truth, strict=True):  # the token is stock's, but for a tie
        assert other.max() - other[one.argmax()] < 1e-4 * np.abs(other).max()
    kernels = [node.op for node in program.traced.graph.nodes if node.op.startswith("Fused")]
    assert any(op in ("FusedDecodeAttention", "FusedLatentAttention") for op in kernels)
    same_caches(cache, stock)


@pytest.mark.parametrize("name", WRITERS)
def test_64_tokens_are_stocks(name):
    """Each is written after the own ones before."""
    model = made(name, "float32-4bit")
    with on_cpu():
        truth = greedy(model, filled(model), steps=64)[1]
    of_stock(lambda: greedy(model, filled(model), steps=1))
    found = greedy(recorded(model), filled(model), steps=64)[1]
    assert programs(model)
    assert found == truth
    assert len(set(found)) > 4


def same_caches(ours: list, theirs: list) -> None:
    """Check that caches count the same and go on from the same tokens."""
    for one, other in zip(ours, theirs, strict=True):
        if hasattr(one, "caches"):
            same_caches(one.caches, other.caches)
        elif hasattr(other, "offset"):
            assert (one.offset, one.empty()) == (other.offset, other.empty())
            if not other.empty():
                for a, b in zip(one.keys_and_values(), other.keys_and_values(), strict=True):
                    assert deviation(np.array(a), np.array(b)) < 1e-5
        else:
            for a, b in zip(one.cache, other.cache, strict=True):
                assert deviation(np.array(a), np.array(b)) < 1e-5


def test_the_tables_name_what_is_there():
    assert (set(REFUSED) | NOT_FOUND) <= set(runnable())


@pytest.mark.parametrize("form", [None, {"bits": 4, "group_size": 32}])
def test_layers_that_read_the_cache_of_another_one(form, said):
    """Apple's afm7: the last layers have no keys and values of their own."""
    config = {**config_of("afm7"), "num_layers": 5, "num_kv_reuse_layers": 2}
    model = build("afm7", config=config, quantize=form)
    truth, tokens = greedy(model, filled(model))
    found, _ = greedy(recorded(model), filled(model), tokens)
    assert (programs(model), said) != ([], [])
    assert deviation(found, truth) < 1e-5


def test_a_step_that_was_not_looked_at_says_nothing(said):
    """A prompt of one token has nothing to go on from."""
    model = recorded(made("llama", "float32"))
    filled(model, PROMPT[:, :1])
    [steps] = (vars(m)[STATE] for _, m in model.named_modules() if STATE in vars(m))
    assert not steps._programs
    assert not said


@pytest.mark.parametrize("name", ["qwen3_moe", "lfm2"])
def test_the_metal_sources_of_a_whole_step(name, said, monkeypatch):
    """All kernels of a program in the emulator, products and small operations too."""
    monkeypatch.setenv("ZMLX_BACKEND", "emulator")
    model = made(name, "float32-4bit")
    truth, tokens = greedy(model, filled(model), [71, 8, 133, 40])
    found, _ = greedy(recorded(model), filled(model), tokens)
    assert not said
    assert len(programs(model)) == 1
    assert deviation(found, truth) < 1e-5
