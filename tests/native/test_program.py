"""Programs: parts of a graph that run as one operation."""

from __future__ import annotations

import re
import threading
from collections import Counter
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from zmlx.backend.cpu import native

DTYPES = [mx.float32, mx.float16, mx.bfloat16]


@pytest.fixture(scope="module")
def library():
    return native.load()


@pytest.fixture
def operations(tmp_path):
    """Return a function that counts the operations of a graph by name."""

    def count(*arrays: mx.array) -> Counter[str]:
        file = tmp_path / "graph.dot"
        mx.export_to_dot(str(file), *arrays)
        return Counter(re.findall(r'label ?="(\w+)"', Path(file).read_text()))

    return count


def noise(*shape: int, dtype: mx.Dtype = mx.float32, seed: int = 0) -> mx.array:
    made = mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)
    mx.eval(made)
    return made


def address(array: mx.array) -> int:
    mx.eval(array)
    return np.array(array, copy=False).__array_interface__["data"][0]


#: name -> what stock computes to the very bit, from x (2, 3, 4, 10) and y (3, 1, 10)
EXACT = {
    "add": lambda x, y: x + y,
    "subtract": lambda x, y: y - x,
    "multiply a column": lambda x, y: x[..., :1] * x,
    "divide": lambda x, y: x / y,
    "divide transposed": lambda x, y: x.swapaxes(1, 3) / y.swapaxes(0, 2),
    "multiply every third": lambda x, y: x[..., ::3] * y[..., ::3],
    "multiply backwards": lambda x, y: x[..., ::-1] * y,
    "negative": lambda x, y: -x.transpose(3, 1, 0, 2),
    "scalar": lambda x, y: x * 3,
    "to float32": lambda x, y: x.astype(mx.float32) + 1,
    "to bfloat16": lambda x, y: x.swapaxes(0, 2).astype(mx.bfloat16) + 1,
    "reshape a transposed one": lambda x, y: x.transpose(0, 2, 1, 3).reshape(2, 4, 30) + 1,
    "flatten and unflatten": lambda x, y: mx.unflatten(x.flatten(1, 2), 2, (5, 2)) * 2,
    "squeeze": lambda x, y: (x[:1, None].squeeze((0, 1)) + y).squeeze(),
    "squeeze all": lambda x, y: (x[:1, :1, :1, 2:3] + 1).squeeze(),
    "expand": lambda x, y: mx.expand_dims(x.swapaxes(0, 1), (0, 3)) + 1,
    "broadcast": lambda x, y: mx.broadcast_to(y, (2, 3, 4, 10)) + x,
    "split": lambda x, y: (lambda a, b, c: a * c + b)(*mx.split(x, [3, 6, 9], axis=-1)[:3]),
    "concatenate": lambda x, y: mx.concatenate([x, x.swapaxes(0, 0) + 1, x[:, :1]], axis=1) * 1,
    "slices": lambda x, y: x[1:, ::2, 1:3, 2:9:3] + 1,
    "stop gradient": lambda x, y: mx.stop_gradient(x) + 1,
    "contiguous": lambda x, y: mx.contiguous(x.swapaxes(1, 2)) + 1,
    "partition": lambda x, y: x + mx.argpartition(x * 2, kth=4, axis=-1).astype(x.dtype),
    "partition from the end": lambda x, y: mx.argpartition(-x, kth=-2, axis=-1)[..., -2:] + 0,
    "gather": lambda x, y: mx.take_along_axis(x * 2, mx.array([3, -1, 0])[None, None, None], -1),
    "ends in a view": lambda x, y: (x + 1).transpose(3, 2, 1, 0)[1],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_the_bits_of_stock(library, name, dtype):
    x, y = noise(2, 3, 4, 10, dtype=dtype), noise(3, 1, 10, dtype=dtype, seed=1)

    def graph():
        # The sum keeps even a lone operation from being left as it is.
        z = EXACT[name](x + x, y)
        return [z, z + z]

    for fused, stock in zip(library.fuse(graph()), graph(), strict=True):
        assert fused.dtype == stock.dtype
        assert fused.shape == stock.shape
        assert mx.array_equal(fused, stock)


#: name -> what is rounded once here, and oftener or otherwise by stock
CLOSE = {
    "softmax": lambda x, w: mx.softmax(x, axis=-1),
    "precise softmax": lambda x, w: mx.softmax(x, axis=-1, precise=True),
    "sigmoid": lambda x, w: mx.sigmoid(x),
    "sum": lambda x, w: x.sum(axis=-1),
    "sum kept": lambda x, w: x.sum(axis=-1, keepdims=True),
    "depthwise convolution": lambda x, w: mx.conv1d(x, w, groups=24),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CLOSE)
def test_sums_are_no_further_from_the_truth_than_stock(library, name, dtype):
    x, w = noise(2, 7, 24, dtype=dtype), noise(24, 3, 1, dtype=dtype, seed=1)

    def graph(dtype):
        z = CLOSE[name](x.astype(dtype) * 2, w.astype(dtype))
        return [z, z + 1]

    truth = graph(mx.float32)[0]
    stock = mx.abs(graph(dtype)[0] - truth).max().item()
    ours = mx.abs(library.fuse(graph(dtype))[0] - truth).max().item()
    limit = {mx.float32: 1e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}[dtype]
    assert ours <= max(stock * 1.01, limit * mx.abs(truth).max().item())


#: rows in which the largest and the smallest are not where a plain comparison looks for them
NAN, INF = float("nan"), float("inf")
AWKWARD = [
    [1.0],
    [0.0, -0.0, 0.0],
    [2.0, 5.0, -3.0, 5.0, -3.0],
    [NAN, 9.0, -9.0],
    [1.0, NAN, -1.0, 3.0],
    [-INF, -INF, NAN],
    [INF, 1.0, -INF, INF],
]


def extremes(x: mx.array, keepdims: bool = False) -> list[mx.array]:
    found = [f(x + x, axis=-1, keepdims=keepdims) for f in (mx.argmax, mx.argmin)]
    return [*found, x * 3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", AWKWARD, ids=str)
@pytest.mark.parametrize("before", [0, 16, 37])
def test_the_first_of_the_largest(library, operations, row, dtype, before):
    """Or the first NaN, as in stock; alone and behind other numbers."""
    x = mx.array([[0.5] * before + row, [0.25] * (before + len(row))]).astype(dtype)
    mx.eval(x)
    fused, stock = library.fuse(extremes(x)), extremes(x)
    assert not operations(*fused)["ArgReduce"]
    for ours, theirs in zip(fused[:2], stock[:2], strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [15, 16, 17, 4096, 40001])
def test_the_largest_of_long_rows(library, width, dtype):
    x = noise(3, 2, width, dtype=dtype)
    for ours, theirs in zip(library.fuse(extremes(x, True)), extremes(x, True), strict=True):
        assert mx.array_equal(ours, theirs)


def test_extremes_along_other_axes_or_of_integers_are_left(library, operations):
    x = noise(6, 8)
    y = (x * 10).astype(mx.int32)
    mx.eval(y)
    fused = library.fuse([mx.argmax(x + x, axis=0), mx.argmin(y, axis=-1), (x + 1) * x])
    assert operations(*fused)["ArgReduce"] == 2
    assert mx.array_equal(fused[0], mx.argmax(x + x, axis=0))


def test_known_operations_become_one(library, operations):
    x = noise(4, 8)
    before = mx.softmax((x + 1) * x - 2, axis=-1) / 3
    (after,) = library.fuse([before])
    assert operations(after) == {"ZmlxProgram": 1}
    assert operations(before)["Multiply"] == 1  # the given graph stays


def test_unknown_operations_stay_between_programs(library, operations):
    x = noise(4, 8)

    def graph():
        a = mx.tanh((x + 1) * x)  # tanh is not known
        b = (a * 2 + x) / 3
        return [mx.cumsum(b * b, axis=0) * b - 1, a]

    fused = library.fuse(graph())
    names = operations(*fused)
    assert (names["ZmlxProgram"], names["Tanh"]) == (3, 1)
    assert not names["Multiply"]
    for ours, stock in zip(fused, graph(), strict=True):
        assert mx.array_equal(ours, stock)


def test_a_lone_operation_is_left(library, operations):
    x = noise(4, 8)
    assert operations(*library.fuse([mx.tanh(mx.tanh(x) + 1)]))["Add"] == 1


def test_what_is_computed_and_what_is_wanted_twice(library):
    x = noise(4, 8)
    y = x + x + x
    fused = library.fuse([x, y, y, y.T, y[1]])
    assert mx.array_equal(fused[0], x)
    for array in fused[1:3]:
        assert mx.array_equal(array, x + x + x)
    assert mx.array_equal(fused[3], y.T)
    assert mx.array_equal(fused[4], y[1])
    assert library.fuse([]) == []


def test_results_that_nobody_keeps(library):
    x = noise(4, 8)
    one, two = library.fuse([x + x + x, x * x * x])
    del one
    assert mx.array_equal(two, x * x * x)


def test_inside_of_transformations_the_graph_stays(library):
    x = noise(4, 8)

    def f(x):
        return library.fuse([(x * x + x).sum(axis=-1)])[0].sum()

    assert mx.allclose(mx.grad(f)(x), 2 * x + 1)
    assert mx.allclose(mx.compile(f)(x), f(x))
    assert mx.allclose(mx.vmap(f)(x), (x * x + x).sum(axis=-1))


def test_another_stream_is_left(library, operations):
    other = mx.new_stream(mx.cpu)
    x = noise(4, 8)
    y = (x + 1) * x
    z = mx.add(y, y, stream=other)
    (fused,) = library.fuse([z * 2 - 1])
    assert operations(fused)["Add"] == 1
    assert mx.array_equal(fused, ((x + 1) * x) * 2 * 2 - 1)


# Memory


def grown(rows: mx.array, at: int, value: float) -> mx.array:
    """Write into a copy of the reference only: MLX may reuse the memory."""
    rows[:, at : at + 1] = mx.full((rows.shape[0], 1, rows.shape[2]), value) + 0.5
    return rows


def stepped(library, rows: mx.array, at: int) -> list[mx.array]:
    rows = grown(rows, at, at)
    return library.fuse([rows[:, : at + 1] * 2 + 1, rows])


def test_an_update_is_made_in_place(library):
    rows = mx.zeros((2, 64, 16))
    seen, rows = stepped(library, rows, 0)
    del seen
    first = address(rows)
    for at in range(1, 20):
        seen, rows = stepped(library, rows, at)
        mx.eval(seen)
        del seen
        assert address(rows) == first
    expected = np.zeros((2, 64, 16), np.float32)
    expected[:, :20] = np.arange(20)[None, :, None] + 0.5
    assert np.array_equal(np.array(rows), expected)


def test_an_update_with_the_step_before_it_under_way(library):
    rows = mx.zeros((2, 64, 16))
    mx.eval(rows)
    sums = []
    for at in range(40):
        seen, rows = stepped(library, rows, at)
        sums.append(seen.sum())
        mx.async_eval(sums[-1])
        del seen
    for at, total in enumerate(sums):
        expected = sum((i + 0.5) * 2 + 1 for i in range(at + 1)) * 32
        assert total.item() == expected


@pytest.mark.parametrize("keep", ["the array", "a view", "numpy"])
def test_memory_that_somebody_holds_is_not_written_over(library, keep):
    rows = mx.zeros((2, 64, 16))
    for at in range(3):
        seen, rows = stepped(library, rows, at)
        mx.eval(seen)
    del seen
    kept = {
        "the array": lambda: rows[:],
        "a view": lambda: rows[1:, :5],
        "numpy": lambda: np.array(rows, copy=False),
    }[keep]()
    if keep == "a view":
        mx.eval(kept)
    before = np.array(kept, copy=True)
    seen, rows = stepped(library, rows, 3)
    mx.eval(seen)
    assert np.array_equal(np.array(kept), before)
    assert rows[0, 3, 0].item() == 3.5


def test_a_branch_from_one_state(library):
    """As speculative decoding and trimmed caches do: two steps from the same rows."""
    rows = mx.zeros((2, 64, 16))
    mx.eval(rows)
    one = library.fuse([grown(mx.array(rows), 0, 1.0) * 1, grown(mx.array(rows), 0, 2.0) * 1])
    assert one[0][0, 0, 0].item() == 1.5
    assert one[1][0, 0, 0].item() == 2.5
    assert not mx.any(rows).item()


def test_threads_with_programs_of_their_own(library):
    failures = []

    def work(seed: int) -> None:
        try:
            with mx.stream(mx.new_stream(mx.cpu)):
                rows = mx.zeros((2, 64, 16))
                for at in range(60):
                    seen, rows = stepped(library, rows, at)
                    mx.eval(seen)
                    del seen
                if rows[1, 59, 3].item() != 59.5:
                    failures.append(seed)
        except Exception as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_large_temporaries_are_given_back(library):
    x = noise(1, 1 << 22)
    for _ in range(3):
        y = x
        for _ in range(6):
            y = y * 0.5 + x
        mx.eval(library.fuse([y]))
    expected = np.array(x, np.float32)
    value = expected
    for _ in range(6):
        value = value * np.float32(0.5) + expected
    assert np.allclose(np.array(library.fuse([y])[0]), value, rtol=1e-6)
