"""mlx_lm.generate with the kernel for log-probabilities, and without it again."""

from __future__ import annotations

import gc
import re
import sys
from collections import Counter

import mlx.core as mx
import mlx_lm.generate  # noqa: F401 - a function of that name hides the module
import pytest
from mlx.utils import tree_flatten

from zmlx.patch import patch, unpatch
from zmlx.runtime import sampling

GENERATE = sys.modules["mlx_lm.generate"]


@pytest.fixture(autouse=True)
def stock_before_and_after():
    gc.collect()
    sampling._USERS.clear()
    GENERATE.mx = mx
    yield
    assert GENERATE.mx is mx


def tokens_of(model):
    steps = GENERATE.generate_step(mx.array([1, 5, 9]), model, max_tokens=6)
    return [(token, logprobs) for token, logprobs in steps]


def test_the_same_tokens_and_log_probabilities(make_llama):
    model = make_llama()
    stock = tokens_of(model)
    patch(model)
    assert isinstance(GENERATE.mx, sampling.Namespace)
    ours = tokens_of(model)
    assert [token for token, _ in ours] == [token for token, _ in stock]
    for (_, one), (_, other) in zip(ours, stock, strict=True):
        assert mx.allclose(one, other, atol=1e-4)
    unpatch(model)


def test_what_follows_the_layers_is_one_operation(make_llama, tmp_path, monkeypatch):
    """The head, the log-probabilities and the choice of a token, given to async_eval."""
    model = patch(make_llama())
    graphs = []

    def note(*arrays):
        file = tmp_path / "graph.dot"
        mx.export_to_dot(str(file), *arrays)
        graphs.append(Counter(re.findall(r'label ?="(\w+)"', file.read_text())))

    stock = mx.async_eval
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: (note(*arrays), stock(*arrays)))
    assert len(tokens_of(model)) == 6
    assert graphs
    for names in graphs:
        assert not {"ZmlxQuantizedMatmul", "ZmlxLogSumExp", "Subtract", "ArgReduce"} & set(names)
    assert any(names["ZmlxProgram"] == 2 for names in graphs)
    unpatch(model)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_trees_are_evaluated(make_llama, dtype):
    model = patch(make_llama())
    x = mx.random.normal((2, 9)).astype(dtype)

    def tree():
        return [x - 1, {"largest": mx.argmax(x * 2, axis=-1)}], (x + x) * x

    ours = tree()
    assert GENERATE.mx.async_eval(*ours) is None
    GENERATE.mx.async_eval()
    for (_, one), (_, other) in zip(tree_flatten(ours), tree_flatten(tree()), strict=True):
        assert mx.array_equal(one, other)
    unpatch(model)


def test_it_stays_as_long_as_one_model_needs_it(make_llama):
    first, second = make_llama(), make_llama()
    patch(first)
    patch(second)
    unpatch(first)
    assert isinstance(GENERATE.mx, sampling.Namespace)
    del second
    gc.collect()
    assert GENERATE.mx is mx


def test_models_whose_steps_are_not_fused_do_not_need_it(make_llama):
    model = patch(make_llama(), exclude=["decode_step"])
    assert GENERATE.mx is mx
    unpatch(model)


def test_a_module_that_somebody_changed_is_left_alone(make_llama, monkeypatch):
    theirs = object()
    monkeypatch.setattr(GENERATE, "mx", theirs)
    model = patch(make_llama())
    assert GENERATE.mx is theirs
    unpatch(model)
    assert GENERATE.mx is theirs


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("size", [1, 37, 8192, 8193, 40001])
def test_values(make_llama, dtype, size):
    model = patch(make_llama())
    logsumexp = GENERATE.mx.logsumexp
    x = (mx.random.normal((3, size), key=mx.random.key(size)) * 9).astype(dtype)
    truth = mx.logsumexp(x.astype(mx.float32), axis=-1, keepdims=True)
    y = logsumexp(x, axis=-1, keepdims=True)
    assert (y.shape, y.dtype) == ((3, 1), dtype)
    rounding = {mx.float32: 2e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}[dtype]
    assert mx.allclose(y.astype(mx.float32), truth, rtol=rounding, atol=rounding)
    one = logsumexp(x[:1], keepdims=True)
    assert mx.array_equal(one, y[:1])
    for args, kwargs in (((x,), {}), ((x, 0), {}), ((x, -1), {}), ((x,), {"keepdims": True})):
        assert mx.array_equal(logsumexp(*args, **kwargs), mx.logsumexp(*args, **kwargs))
    unpatch(model)


def test_infinities_and_nan(make_llama):
    model = patch(make_llama())
    logsumexp, low, high = GENERATE.mx.logsumexp, -float("inf"), float("inf")
    rows = mx.zeros((4, 20000))
    rows[0] = low
    rows[1, 3] = high
    rows[2, 19999] = float("nan")
    rows[3, 5] = low
    y = logsumexp(rows, axis=-1, keepdims=True).flatten().tolist()
    assert y[:2] == [low, high]
    assert y[2] != y[2]
    assert y[3] == pytest.approx(mx.log(mx.array(19999.0)).item(), rel=1e-6)
    unpatch(model)


def test_gradients_and_vmap(make_llama):
    model = patch(make_llama())
    logsumexp = GENERATE.mx.logsumexp
    x = mx.random.normal((2, 50))

    def loss(function):
        return mx.grad(lambda x: function(x, axis=-1, keepdims=True).sum())(x)

    assert mx.allclose(loss(logsumexp), loss(mx.logsumexp), atol=1e-6)
    mapped = mx.vmap(lambda row: logsumexp(row, axis=-1, keepdims=True))(x)
    assert mx.allclose(mapped, mx.logsumexp(x, axis=-1, keepdims=True), atol=1e-6)
    unpatch(model)
