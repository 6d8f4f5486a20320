"""mlx-lm's loops and samplers with the kernels for GPUs, in the emulator where there is none."""

from __future__ import annotations

import functools
import gc
import sys
import threading
import types

import mlx.core as mx
import mlx_lm.generate  # noqa: F401 - a function of that name hides the module
import pytest
from gpu_path import BACKENDS, on_gpu
from mlx_lm.sample_utils import make_sampler

from zmlx.patch import patch, unpatch
from zmlx.runtime import sampling
from zmlx.runtime.filtering import FILTERS, Filter

GENERATE, SAMPLERS = (sys.modules[f"mlx_lm.{name}"] for name in ("generate", "sample_utils"))
STOCK = {name: getattr(SAMPLERS, name) for name in FILTERS}
FLOATS = (mx.float32, mx.float16, mx.bfloat16)


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Kernel -> calls; rows of the models here, of 101 elements, are long ones."""
    gc.collect()
    sampling._USERS.clear()
    monkeypatch.setattr(sampling, "SHORT", 64)
    with on_gpu() as counted:
        yield counted
    assert GENERATE.mx is mx
    assert SAMPLERS.mx is mx
    assert {name: getattr(SAMPLERS, name) for name in FILTERS} == STOCK


@pytest.fixture
def model(make_llama):
    model = make_llama()
    sampling.use(model, BACKENDS[-1])
    yield model
    sampling.release(model)


def tokens_of(model, sampler=None):
    steps = GENERATE.generate_step(mx.array([1, 5, 9]), model, max_tokens=12, sampler=sampler)
    return [token for token, _ in steps]


@pytest.mark.parametrize("dtype", FLOATS)
def test_greedy_text_is_stocks(make_llama, calls, dtype):
    model = make_llama(dtype=dtype)
    stock = tokens_of(model), tokens_of(model, make_sampler(temp=0.0))
    sampling.use(model, BACKENDS[-1])
    calls.clear()
    assert (tokens_of(model), tokens_of(model, make_sampler(temp=0.0))) == stock
    assert set(calls) == {"logsumexp", "argmax"}
    sampling.release(model)


def test_a_patched_model_brings_them(make_llama, calls):
    model = make_llama(layers=2)
    stock = tokens_of(model)
    patch(model)
    assert all(isinstance(m.mx, sampling.Namespace) for m in (GENERATE, SAMPLERS))
    calls.clear()
    assert tokens_of(model) == stock
    assert {"logsumexp", "argmax"} <= set(calls)
    unpatch(model)


def test_batches_are_stocks(model, calls):
    prompts = [[1, 5, 9], [7], [3, 4]]

    def texts():
        batch = GENERATE.BatchGenerator(model, max_tokens=5, stop_tokens=[])
        found = {uid: [] for uid in batch.insert(prompts)}
        while responses := batch.next_generated():
            for response in responses:
                found[response.uid].append(response.token)
        return list(found.values())

    ours = texts()
    assert {"logsumexp", "argmax"} <= set(calls)
    sampling.release(model)
    assert texts() == ours
    assert [len(text) for text in ours] == [5, 5, 5]


@pytest.mark.parametrize("dtype", FLOATS)
def test_argmax(model, calls, dtype):
    calls.clear()
    x = mx.random.normal((2, 3, 101), key=mx.random.key(1)).astype(dtype)
    for ask in ({"axis": -1}, {"axis": 2, "keepdims": True}):
        for module in (GENERATE, SAMPLERS):
            found = module.mx.argmax(x, **ask)
            assert found.dtype == mx.uint32
            assert mx.array_equal(found, mx.argmax(x, **ask))
    assert mx.array_equal(SAMPLERS.mx.argmax(x, -1, True), mx.argmax(x, -1, True))
    assert calls["argmax"] >= 2


def test_calls_that_stay_stocks(model, calls):
    calls.clear()
    x = mx.random.normal((2, 101), key=mx.random.key(1))
    many = mx.random.normal((sampling.MOST_ROWS + 1, 101))
    for name in ("argmax", "logsumexp"):
        ours, stock = (getattr(m, name) for m in (GENERATE.mx, mx))
        for array, ask in (
            (x, {}),
            (x, {"axis": 0, "keepdims": True}),
            (x, {"axis": -1, "keepdims": True, "stream": mx.default_device()}),
            (x[:, :63], {"axis": -1, "keepdims": True}),
            (many, {"axis": -1, "keepdims": True}),
            ((x * 9).astype(mx.int32), {"axis": -1, "keepdims": True}),
        ):
            assert mx.array_equal(ours(array, **ask), stock(array, **ask))
        with pytest.raises(TypeError):
            ours(x, -1, True, nonsense=1)
    assert mx.array_equal(GENERATE.mx.logsumexp(x, axis=(0, 1)), mx.logsumexp(x))
    assert not calls


def test_only_on_the_device_of_the_model(model, calls, monkeypatch):
    calls.clear()
    x = mx.random.normal((1, 101))
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.DeviceType.gpu, 7))
    assert mx.array_equal(GENERATE.mx.argmax(x, axis=-1), mx.argmax(x, axis=-1))
    assert not calls


def test_gradients_and_vmap(model):
    x = mx.random.normal((2, 101), key=mx.random.key(2))

    def gradient(function):
        return mx.grad(lambda x: function(x, axis=-1, keepdims=True).astype(mx.float32).sum())(x)

    for name in ("logsumexp", "argmax"):
        ours, stock = (getattr(m, name) for m in (GENERATE.mx, mx))
        for _ in range(3):  # run, recorded, replayed
            assert mx.allclose(gradient(ours), gradient(stock), atol=1e-6)
            mapped = mx.vmap(lambda row, f=ours: f(row, axis=-1, keepdims=True))(x)
            assert mx.allclose(mapped, stock(x, axis=-1, keepdims=True), atol=1e-6)
            assert mx.allclose(ours(x, -1, True), stock(x, -1, True), atol=1e-6)


def test_a_module_that_somebody_changed_is_left_alone(make_llama, monkeypatch):
    theirs, model = object(), make_llama()
    with monkeypatch.context() as changed:
        changed.setattr(SAMPLERS, "mx", theirs)
        sampling.use(model, BACKENDS[-1])
        assert isinstance(GENERATE.mx, sampling.Namespace)
        assert SAMPLERS.mx is theirs
        sampling.release(model)
        assert SAMPLERS.mx is theirs
        changed.setattr(GENERATE, "mx", theirs)
        sampling.use(model, BACKENDS[-1])
        assert not sampling._USERS


def test_what_somebody_put_in_our_place_stays(make_llama, monkeypatch):
    theirs, model = object(), make_llama()
    sampling.use(model, BACKENDS[-1])
    SAMPLERS.mx = theirs
    sampling.release(model)
    assert SAMPLERS.mx is theirs
    SAMPLERS.mx = mx


def test_they_stay_as_long_as_one_model_needs_them(make_llama):
    first, second = make_llama(), make_llama()
    for one in (first, second):
        sampling.use(one, BACKENDS[-1])
    sampling.release(first)
    assert isinstance(SAMPLERS.mx, sampling.Namespace)
    del second, one
    gc.collect()
    assert SAMPLERS.mx is mx


def test_a_kernel_that_fails_its_probe_is_not_used(make_llama, monkeypatch):
    monkeypatch.setattr(sampling.KernelSpec, "probe", lambda *_, **__: "it is wrong")
    sampling.use(make_llama(), BACKENDS[-1])
    assert SAMPLERS.mx is mx


# Filters


def logprobs_of(*shape, dtype=mx.float32):
    x = mx.random.normal(shape, key=mx.random.key(4)) * 2
    return (x - mx.logsumexp(x, axis=-1, keepdims=True)).astype(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_sampled_text_is_stocks(make_llama, calls, dtype):
    model = make_llama(dtype=dtype)

    def texts():
        found = []
        for options in ({"top_p": 0.9, "top_k": 40, "min_p": 0.05}, {"top_p": 0.7}, {"top_k": 9}):
            mx.random.seed(11)
            found.append(tokens_of(model, make_sampler(temp=0.8, **options)))
        return found

    stock = texts()
    assert len(set(stock[0])) > 2  # it is not the greedy one
    sampling.use(model, BACKENDS[-1])
    calls.clear()
    assert texts() == stock
    assert {"top_k", "top_p"} <= set(calls)
    sampling.release(model)


def test_the_same_seed_draws_the_same_tokens(model):
    x = mx.broadcast_to(logprobs_of(1, 101, dtype=mx.bfloat16), (32, 101)) + 0
    sampler = make_sampler(temp=0.8, top_p=0.9, top_k=20, min_p=0.05)

    def drawn():
        mx.random.seed(2)
        return mx.concatenate([sampler(x), sampler(x)]).tolist()

    ours = drawn()
    sampling.release(model)
    assert drawn() == ours
    assert 5 < len(set(ours)) <= 20


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("name", "number"), [("apply_top_k", 7), ("apply_top_p", 0.6)])
def test_filters_are_stocks(model, calls, name, number, dtype):
    ours = getattr(SAMPLERS, name)
    assert isinstance(ours, Filter)
    for shape in ((101,), (3, 101), (2, 2, 101)):
        x = logprobs_of(*shape, dtype=dtype)
        for _ in range(3):  # run, recorded, replayed
            assert mx.array_equal(ours(x, number), STOCK[name](x, number))
    calls.clear()
    assert mx.array_equal(ours(x, number), STOCK[name](x, number))
    (keyword,) = [word for word in ("top_k", "top_p") if word in name]
    assert mx.array_equal(ours(x, **{keyword: number}), STOCK[name](x, number))
    assert not calls  # replayed
    assert mx.array_equal(ours(x + 1, number), STOCK[name](x + 1, number))


@pytest.mark.parametrize(("name", "number"), [("apply_top_k", 7), ("apply_top_p", 0.6)])
def test_calls_of_filters_that_stay_stocks(model, calls, name, number):
    ours, stock = getattr(SAMPLERS, name), STOCK[name]
    many = logprobs_of(sampling.MOST_ROWS + 1, 101)
    for x in (many, logprobs_of(2, 63)):
        assert mx.array_equal(ours(x, number), stock(x, number))
    x = logprobs_of(2, 101)
    mapped = mx.vmap(lambda row: ours(row, number))(x)
    assert mx.array_equal(mapped, stock(x, number))
    assert not set(calls) & {"top_k", "top_p"}
    for args, named in (((), {}), ((number,), {"more": 1}), ((), {"other": number})):
        with pytest.raises(TypeError):
            ours(x, *args, **named)


@pytest.mark.parametrize("k", [0, 101, 102, -1, 3.5])
def test_what_stock_refuses_is_refused(model, k):
    with pytest.raises(ValueError, match="`top_k` has to be an integer"):
        SAMPLERS.apply_top_k(logprobs_of(1, 101), k)


def test_another_function_of_that_name_stays(make_llama, monkeypatch):
    def apply_top_p(logprobs, top_p):
        return logprobs * top_p

    theirs = types.FunctionType(apply_top_p.__code__, vars(SAMPLERS))  # the module's own
    model, x = make_llama(), logprobs_of(1, 101)
    with monkeypatch.context() as changed:
        changed.setattr(SAMPLERS, "apply_top_p", theirs)
        sampling.use(model, BACKENDS[-1])
        assert isinstance(SAMPLERS.apply_top_p, Filter)
        for _ in range(3):
            assert mx.array_equal(SAMPLERS.apply_top_p(x, 0.5), x * 0.5)
        sampling.release(model)
        assert SAMPLERS.apply_top_p is theirs


def test_what_somebody_else_put_there_stays(make_llama, monkeypatch):
    def theirs(logprobs, top_k):
        return logprobs

    model = make_llama()
    with monkeypatch.context() as changed:
        changed.setattr(SAMPLERS, "apply_top_k", theirs)
        sampling.use(model, BACKENDS[-1])
        assert SAMPLERS.apply_top_k is theirs
        SAMPLERS.apply_top_p = theirs
        sampling.release(model)
        assert SAMPLERS.apply_top_p is theirs
        SAMPLERS.apply_top_p = STOCK["apply_top_p"]


def test_wrappers_of_users_are_called(make_llama, monkeypatch):
    """Before us or after us; one that has kept a filter of ours calls stock's after the release."""
    model, x, seen = make_llama(), logprobs_of(1, 101), []

    def watched(function):
        @functools.wraps(function)
        def apply_top_p(*args):
            seen.append(args)
            return function(*args)

        return apply_top_p

    wrapped = watched(STOCK["apply_top_p"])
    assert wrapped.__module__ == SAMPLERS.__name__
    with monkeypatch.context() as changed:
        changed.setattr(SAMPLERS, "apply_top_p", wrapped)
        sampling.use(model, BACKENDS[-1])
        assert SAMPLERS.apply_top_p is wrapped
        assert isinstance(SAMPLERS.apply_top_k, Filter)
        sampling.release(model)
        assert SAMPLERS.apply_top_p is wrapped
    sampling.use(model, BACKENDS[-1])
    kept = SAMPLERS.apply_top_p
    assert isinstance(kept, Filter)
    SAMPLERS.apply_top_p = watched(kept)
    y = make_sampler(temp=0.5, top_p=0.5)(x)
    assert len(seen) == 1
    assert y.shape == (1,)
    sampling.release(model)
    SAMPLERS.apply_top_p = STOCK["apply_top_p"]
    with monkeypatch.context() as changed:
        changed.setattr(kept, "_by_kernel", None)
        assert mx.array_equal(kept(x, 0.5), kept.stock(x, 0.5))


def test_samplers_made_before_and_after(make_llama, calls):
    """They look the filters up when they are called."""
    x, model = logprobs_of(1, 101), make_llama()
    before = make_sampler(temp=0.5, top_p=0.5)
    sampling.use(model, BACKENDS[-1])
    during = make_sampler(temp=0.5, top_k=5)
    calls.clear()
    for sampler in (before, during):
        assert sampler(x).shape == (1,)
    assert calls["top_p"] >= 1 <= calls["top_k"]
    sampling.release(model)
    calls.clear()
    for sampler in (before, during):
        assert sampler(x).shape == (1,)
    assert not calls


def test_other_modules_have_mlxs_functions(model, calls):
    """A sampler of the user's, who calls mlx.core."""
    calls.clear()
    stock = mx.argmax, mx.logsumexp
    tokens = tokens_of(model, lambda x: mx.argmax(x, axis=-1))
    assert set(calls) == {"logsumexp"}  # of the loop
    assert (mx.argmax, mx.logsumexp) == stock
    sampling.release(model)
    assert tokens_of(model) == tokens


def test_compiled_samplers(make_llama, calls):
    """The first calls of the filters, with their comparison, happen while MLX records."""
    x, model = logprobs_of(3, 101), make_llama()
    state = mx.random.state

    def drawn():
        sampler = make_sampler(temp=0.8, top_p=0.9, top_k=20)
        compiled = mx.compile(sampler, inputs=state, outputs=state)
        mx.random.seed(5)
        return [compiled(x).tolist() for _ in range(4)]

    stock = drawn()
    sampling.use(model, BACKENDS[-1])
    calls.clear()
    assert drawn() == stock
    assert {"top_k", "top_p"} <= set(calls)
    sampling.release(model)


def test_several_threads(model):
    x = logprobs_of(2, 101)
    wanted = STOCK["apply_top_k"](x, 7), STOCK["apply_top_p"](x, 0.6), mx.argmax(x, axis=-1)
    wanted = [array.tolist() for array in wanted]
    right = []

    def run():
        with mx.stream(mx.new_thread_local_stream(mx.default_device())):
            for _ in range(4):  # run, recorded, replayed
                found = (
                    SAMPLERS.apply_top_k(x, 7),
                    SAMPLERS.apply_top_p(x, 0.6),
                    SAMPLERS.mx.argmax(x, axis=-1),
                )
                right.append([array.tolist() for array in found] == wanted)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 16
