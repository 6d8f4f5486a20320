"""Caches whose buffers a program writes keep every promise of mlx-lm's caches."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator, generate_step, speculative_generate_step
from mlx_lm.models.cache import (
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from stepped import PROMPT, deviation, filled, lent, programs, step, stepped, steps_of, two
from zoo.devices import of_stock, on_cpu

from zmlx.graph.caches import leaves
from zmlx.graph.lending import ROOM, rows_for

LONG = mx.array([[(17 * i * i + 5 * i + 3) % 151 for i in range(20)]])
TOKENS = [71, 8, 133, 40, 5, 99, 12, 64, 3, 77]
CLOSE = 1e-5
#: Types that between them have every kind of cache: growing, rotating, latents, other arrays.
TYPES = ("llama", "gpt_oss", "deepseek_v3", "lfm2", "falcon_h1")


@pytest.fixture(params=TYPES)
def pair(request):
    return two(request.param)


@pytest.fixture
def llamas():
    return two("llama", config={"head_dim": 64})


def same(ours, theirs) -> bool:
    return deviation(ours, theirs) < CLOSE


def arrays_of(cache) -> list[np.ndarray]:
    """Return the tokens that a prompt's caches hold, in order."""
    found = []
    for c in leaves(cache):
        if isinstance(c, RotatingKVCache):
            found += [np.array(c._temporal_order(a)) for a in (c.keys, c.values)]
        else:
            held = c.keys_and_values() if hasattr(c, "offset") else c.cache
            found += [np.array(a) for a in held]
    return found


def test_buffers_are_lent_while_steps_run_and_given_back_when_read(llamas):
    model, _ = llamas
    cache = filled(model)
    kind = type(cache[0])
    stepped(model, cache, TOKENS[:2])
    assert all(lent(cache))
    assert [isinstance(c, kind) and type(c).__name__ == "KVCache" for c in cache] == [True, True]
    assert [(c.offset, c.size(), c.empty(), c.is_trimmable()) for c in cache] == [
        (9, 9, False, True)
    ] * 2
    assert all(lent(cache))
    assert cache[0].keys.shape == (1, 2, ROOM, 64)
    assert lent(cache) == [False, True]
    assert type(cache[0]) is kind
    assert cache[1].nbytes == 2 * cache[1].keys.nbytes
    assert "_zmlx_loan" not in vars(cache[0])


def test_reading_a_cache_in_the_middle_changes_nothing(pair):
    model, apart = pair
    ours, theirs = filled(model), filled(apart)
    for token in TOKENS:
        found, truth = stepped(model, ours, [token]), stepped(apart, theirs, [token])
        assert same(found, truth)
        states = [c.state for c in ours]
        mx.eval(states)
        assert all(same(a, b) for a, b in zip(arrays_of(ours), arrays_of(theirs), strict=True))


def test_what_was_read_stays_what_it_was(llamas):
    """MLX's arrays are values: a program must not write into one that somebody holds."""
    model, _ = llamas
    cache = filled(model)
    stepped(model, cache, TOKENS[:3])
    held = [array for c in cache for array in (c.keys, c.values)]
    before = [np.array(array) for array in held]
    stepped(model, cache, TOKENS)
    trim_prompt_cache(cache, 8)
    stepped(model, cache, TOKENS[::-1])
    assert all(np.array_equal(a, np.array(b)) for a, b in zip(before, held, strict=True))


@pytest.mark.parametrize("number", [1, 4, 9])
@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_trimmed_and_continued(name, number):
    model, apart = two(name)
    ours, theirs = filled(model), filled(apart)
    for each, cache in ((model, ours), (apart, theirs)):
        stepped(each, cache, TOKENS[:6])
        assert trim_prompt_cache(cache, number) == number
    assert all(lent(ours))  # a trim reads nothing
    assert same(stepped(model, ours, TOKENS), stepped(apart, theirs, TOKENS))
    assert [c.offset for c in ours] == [c.offset for c in theirs] == [23 - number] * 2
    assert all(lent(ours))


def test_steps_that_are_computed_late_are_trimmed_in_their_order(llamas):
    model, apart = llamas
    results = []
    for each in (model, apart):
        cache = filled(each)
        late = [step(each, cache, token) for token in TOKENS[:3]]
        trim_prompt_cache(cache, 2)
        more = [step(each, cache, token) for token in TOKENS[3:6]]
        mx.eval(more[-1])  # newest first
        mx.eval(more[0], late)
        more.append(step(each, cache, TOKENS[6]))
        results.append(np.stack([np.array(row[0, -1]) for row in (*late, *more)]))
    assert same(*results)


def test_a_step_that_nobody_computes_is_in_the_cache(llamas):
    model, apart = llamas
    ours, theirs = filled(model), filled(apart)
    for each, cache in ((model, ours), (apart, theirs)):
        step(each, cache, 5)
        step(each, cache, 6)
    assert all(same(a, b) for a, b in zip(arrays_of(ours), arrays_of(theirs), strict=True))


@pytest.mark.parametrize("keep", [0, 4])
@pytest.mark.parametrize("prompt", ["short", "long"])
def test_rotating_caches_before_at_and_after_the_wrap(prompt, keep):
    model, apart = two("llama")
    tokens = PROMPT if prompt == "short" else LONG

    def rotating():
        return [RotatingKVCache(max_size=12, keep=keep) for _ in model.layers]

    ours, theirs = filled(model, tokens, rotating()), filled(apart, tokens, rotating())
    for number, token in enumerate(TOKENS * 3):
        assert same(stepped(model, ours, [token]), stepped(apart, theirs, [token])), number
        assert (ours[0].offset, ours[0]._idx) == (theirs[0].offset, theirs[0]._idx)
    assert all(lent(ours))
    assert all(same(a, b) for a, b in zip(arrays_of(ours), arrays_of(theirs), strict=True))
    # A second prompt puts the rows in order again.
    for each, cache in ((model, ours), (apart, theirs)):
        mx.eval(each(LONG, cache=cache))
    assert same(stepped(model, ours, TOKENS), stepped(apart, theirs, TOKENS))


def test_a_rotating_cache_that_is_cut_before_it_is_full():
    model, apart = two("llama")
    caches = [[RotatingKVCache(max_size=16, keep=2) for _ in m.layers] for m in (model, apart)]
    for each, cache in zip((model, apart), caches, strict=True):
        filled(each, PROMPT, cache)
        stepped(each, cache, TOKENS[:6])
        assert trim_prompt_cache(cache, 4) == 4
    assert same(*(stepped(m, c, TOKENS) for m, c in zip((model, apart), caches, strict=True)))


@pytest.mark.parametrize(("size", "runs"), [(2, False), (3, False), (4, True), (5, True)])
def test_windows_that_are_too_short_to_be_told_apart(size, runs):
    model, apart = two("llama")
    caches = [[RotatingKVCache(max_size=size) for _ in m.layers] for m in (model, apart)]
    ours, theirs = (filled(m, PROMPT, c) for m, c in zip((model, apart), caches, strict=True))
    assert same(stepped(model, ours, TOKENS), stepped(apart, theirs, TOKENS))
    assert bool(programs(model)) == runs


def test_buffers_grow(llamas, monkeypatch):
    monkeypatch.setattr("zmlx.graph.lending.ROOM", 4)
    monkeypatch.setattr("zmlx.graph.lending._LEAST", 1)
    model, apart = llamas
    ours, theirs = filled(model), filled(apart)
    assert same(stepped(model, ours, TOKENS), stepped(apart, theirs, TOKENS))
    assert ours[0].keys.shape[2] == 20
    assert len(programs(model)) == 1


def test_new_buffers_have_room_for_some_tokens():
    assert [rows_for(length, None) for length in (0, 448, 449, 511)] == [512, 512, 1024, 1024]
    assert [rows_for(length, 500) for length in (0, 499)] == [500, 500]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_go_their_own_way(pair, copied):
    results = []
    for each in pair:
        cache = filled(each)
        stepped(each, cache, TOKENS[:4])
        branch = copied(cache)
        assert not any(lent(branch))
        turns = [
            stepped(each, which, [token])
            for token in TOKENS
            for which, token in ((cache, token), (branch, 150 - token))
        ]
        results.append(np.concatenate(turns))
    assert same(*results)


def test_shallow_copies_share_what_they_held(llamas):
    model, _ = llamas
    cache = filled(model)
    stepped(model, cache, TOKENS[:2])
    other = [copy.copy(c) for c in cache]
    before = [np.array(c.keys) for c in other]
    stepped(model, cache, TOKENS)
    assert all(np.array_equal(a, np.array(c.keys)) for a, c in zip(before, other, strict=True))
    assert [c.offset for c in other] == [9, 9]


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "lfm2"])
def test_saved_and_loaded(name, tmp_path):
    model, apart = two(name)
    ours, theirs = filled(model), filled(apart)
    results = []
    for number, (each, cache) in enumerate(((model, ours), (apart, theirs))):
        stepped(each, cache, TOKENS[:5])
        file = str(tmp_path / f"{number}.safetensors")
        save_prompt_cache(file, cache)
        loaded = load_prompt_cache(file)
        assert [type(c) for c in loaded] == [type(c) for c in make_prompt_cache(each)]
        results.append((stepped(each, cache, TOKENS), stepped(each, loaded, TOKENS)))
    assert same(results[0][0], results[1][0])
    assert same(results[0][1], results[1][1])


def test_a_second_turn(pair):
    model, apart = pair
    ours, theirs = filled(model), filled(apart)
    for _ in range(3):
        assert same(stepped(model, ours, TOKENS[:4]), stepped(apart, theirs, TOKENS[:4]))
        found, truth = (np.array(m(LONG, cache=c)) for m, c in ((model, ours), (apart, theirs)))
        assert same(found, truth)


def test_quantized_while_it_is_lent(llamas):
    model, apart = llamas
    results = []
    for each in (model, apart):
        cache = filled(each)
        stepped(each, cache, TOKENS[:4])
        cache[:] = [c.to_quantized(group_size=32, bits=8) for c in cache]
        with on_cpu():
            results.append(stepped(each, cache, TOKENS))
        assert all(type(c) is QuantizedKVCache for c in cache)
    assert same(*results)


def test_generation_with_a_quantized_cache(llamas):
    options = {"max_tokens": 12, "kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 11}

    def written(model):
        return [int(token) for token, _ in generate_step(PROMPT[0], model, **options)]

    truth = of_stock(lambda: written(llamas[1]))
    tokens = [written(llamas[0]), truth]
    assert tokens[0] == tokens[1]
    assert len(tokens[0]) == 12


def test_a_batch_of_caches_that_were_lent(llamas):
    results = []
    for each in llamas:
        caches = [filled(each, prompt) for prompt in (PROMPT, LONG)]
        for cache in caches:
            stepped(each, cache, TOKENS[:3])
        batch = [KVCache.merge(list(parts)) for parts in zip(*caches, strict=True)]
        rows = [np.array(each(mx.array([[t], [150 - t]]), cache=batch)) for t in TOKENS]
        results.append(np.stack(rows))
    assert same(*results)


def test_batch_generation(llamas):
    answers = []
    for each in llamas:
        found: dict[int, list[int]] = {}
        with mx.stream(mx.default_device()):
            batch = BatchGenerator(each, max_tokens=6)
            batch.insert([PROMPT[0].tolist(), LONG[0].tolist()])
            while responses := batch.next_generated():
                for response in responses:
                    found.setdefault(response.uid, []).append(response.token)
        answers.append(sorted(found.values()))
    assert answers[0] == answers[1]
    assert [len(answer) for answer in answers[0]] == [6, 6]


def test_a_draft_model(llamas):
    drafts = two("llama", seed=3)
    tokens = [
        [
            int(token)
            for token, *_ in speculative_generate_step(
                PROMPT[0], each, draft, max_tokens=12, num_draft_tokens=3
            )
        ]
        for each, draft in zip(llamas, drafts, strict=True)
    ]
    assert tokens[0] == tokens[1]
    assert programs(drafts[0])


def test_generation(pair):
    tokens = [[int(t) for t, _ in generate_step(PROMPT[0], m, max_tokens=12)] for m in pair]
    assert tokens[0] == tokens[1]
    assert programs(pair[0])


def test_two_models_in_one_process():
    pairs = [two("llama"), two("llama", seed=5)]
    caches = [[filled(m) for m in pair] for pair in pairs]
    for token in TOKENS:
        for pair, cache in zip(pairs, caches, strict=True):
            assert same(*(stepped(m, c, [token]) for m, c in zip(pair, cache, strict=True)))


def test_two_conversations_in_turn(llamas):
    model, apart = llamas
    ours, theirs = ([filled(m, p) for p in (PROMPT, LONG)] for m in (model, apart))
    for token in TOKENS:
        for a, b in zip(ours, theirs, strict=True):
            assert same(stepped(model, a, [token]), stepped(apart, b, [token]))
    assert all(all(lent(cache)) for cache in ours)
    assert len(programs(model)) == 1


def test_threads_with_caches_of_their_own(llamas):
    model, apart = llamas
    prompts = [PROMPT, LONG, PROMPT[:, ::-1]]
    truth = [stepped(apart, filled(apart, p), TOKENS) for p in prompts]
    found: dict[int, np.ndarray] = {}
    start = threading.Barrier(len(prompts))

    def run(number):
        with mx.stream(mx.new_stream(mx.default_device())):
            start.wait()
            found[number] = stepped(model, filled(model, prompts[number]), TOKENS)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(found[n], truth[n]) for n in range(len(prompts)))
    assert programs(model)


def test_caches_that_change_places_or_are_exchanged(llamas):
    model, apart = llamas
    results = []
    for each in (model, apart):
        cache, other = filled(each), filled(each, LONG[:, :7])
        stepped(each, cache, TOKENS[:2])
        stepped(each, other, TOKENS[:2])
        rows = [stepped(each, cache[::-1], TOKENS[:3])]
        rows.append(stepped(each, [cache[0], other[1]], TOKENS[:1]))
        rows.append(stepped(each, [other[0], cache[1]], TOKENS[:1]))
        results.append(np.concatenate(rows))
    assert same(*results)


def test_what_somebody_puts_into_a_lent_cache_is_used():
    model, apart = two("lfm2")
    results = []
    for each in (model, apart):
        cache = filled(each)
        stepped(each, cache, TOKENS[:3])
        attention = next(c for c in cache if hasattr(c, "offset"))
        attention.keys = attention.keys * 1.5
        plain = next(c for c in cache if not hasattr(c, "offset"))
        rows = [stepped(each, cache, TOKENS[:2])]
        plain[0] = plain[0] * 0.5
        rows.append(stepped(each, cache, TOKENS[:2]))
        results.append(np.concatenate(rows))
    assert same(*results)


def test_a_cache_that_is_of_a_batch_meanwhile():
    """Recurrent layers mask what is beyond a sequence's length."""
    model, apart = two("lfm2")
    results = []
    for each in (model, apart):
        cache = filled(each)
        rows = [stepped(each, cache, TOKENS[:2])]
        for c in cache:
            if not hasattr(c, "offset"):
                c.prepare(lengths=[0])
        rows.append(stepped(each, cache, TOKENS[:1]))
        results.append(np.concatenate(rows))
    assert same(*results)


@pytest.mark.parametrize("what", ["lengths", "rows", "subclass", "empty"])
def test_caches_that_are_not_as_they_should_be_keep_the_forward(llamas, what):
    model, _ = llamas
    cache = filled(model)
    if what == "lengths":
        cache[1].trim(1)
    elif what == "rows":
        cache[0].offset = cache[1].offset = cache[0].keys.shape[2] + 1
    elif what == "subclass":
        cache[0].__class__ = type("Special", (KVCache,), {})
    else:
        cache[:] = make_prompt_cache(model)
    mx.eval(step(model, cache, 3))
    assert not steps_of(model)._programs
    assert not any(lent(cache))


def test_caches_go_when_nobody_holds_them(llamas):
    """Without the garbage collector: buffers are as large as a model's layers."""
    model, _ = llamas
    cache = filled(model)
    stepped(model, cache, TOKENS[:3])
    references = [weakref.ref(c) for c in cache]
    gc.disable()
    try:
        del cache
        assert [reference() for reference in references] == [None, None]
    finally:
        gc.enable()


def test_memory_of_caches_that_went(llamas):
    model, _ = llamas
    stepped(model, filled(model), TOKENS[:3])
    mx.synchronize()
    before = mx.get_active_memory()
    for _ in range(3):
        stepped(model, filled(model), TOKENS[:3])
    mx.synchronize()
    assert mx.get_active_memory() - before < filled(model)[0].keys.nbytes
