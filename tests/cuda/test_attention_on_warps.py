"""Attention on tensor cores, lane by lane on the CPU: what it indexes, orders and waits for."""

from __future__ import annotations

import mlx.core as mx
import pytest
from attention_on_cpu import joined_and_clustered, run_on_warps, same_bits
from kernels.test_decode_attention import arrays, check, error, normal, norms, state
from precompiled import COMPILER

from zmlx.backend import current
from zmlx.backend.cuda.launching import InForce, in_force
from zmlx.kernels import attention_launch
from zmlx.kernels import decode_attention as module
from zmlx.kernels.attention_launch import Layout
from zmlx.kernels.attention_tensor_source import PRIMITIVES
from zmlx.kernels.decode_attention import Rope, decode_attention, decode_attention_reference

pytestmark = pytest.mark.skipif(
    COMPILER is None or current() != "cpu", reason="no g++, or arrays lie in a GPU's memory"
)
F16, BF16 = mx.float16, mx.bfloat16


@pytest.fixture(params=["forwards", "backwards"], autouse=True)
def on_warps(monkeypatch, request):
    """In both orders, so that a missing barrier shows."""
    yield from run_on_warps(monkeypatch, module, backwards=request.param == "backwards")


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv", "size", "value_size", "rope"),
    [
        (8, 1, 128, 128, Rope(128)),
        (3, 1, 96, 128, Rope(64)),
        (18, 2, 64, 72, Rope(36, traditional=True, base=5e5)),
        (1, 1, 40, 32, Rope(40, traditional=True)),
        (2, 1, 192, 64, Rope(192)),
    ],
)
def test_every_size_and_dtype(heads, kv, size, value_size, rope, dtype):
    given = arrays(1, heads, kv, size, value_size, 45, dtype)
    check(given, state(36, position=1000), rope=rope, **norms(size, dtype))


@pytest.mark.parametrize(
    ("capacity", "splits"), [(601, None), (601, 1), (601, 40), (1100, None), (1100, 2)]
)
def test_every_length(capacity, splits):
    """Capacities on both sides of where tiles are read without waiting, and grow."""
    given = arrays(heads=3, kv=1, capacity=capacity, dtype=BF16)
    sinks = normal(3, seed=7, dtype=BF16)
    for length in (1, 16, 17, 129, 257, 600, capacity):
        check(given, state(length - 1), splits=splits, sinks=sinks, rope=Rope(64))


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_a_window_and_sinks_and_a_scaled_rope(dtype):
    sinks = mx.array([2.0, -1.0, 0.0, 30.0], dtype)
    given = arrays(capacity=150, dtype=dtype)
    rope = Rope(64, base=None, freqs=mx.exp(mx.arange(32) / 4), multiplier=1.3466, scale=0.25)
    found = []
    for window in (None, 64, 17):
        for length in (5, 64, 65, 149):
            out = check(given, state(length - 1), sinks=sinks, window=window, rope=rope)
            found.append(out)
            assert mx.max(mx.abs(out[:, 3])).item() < 1e-6  # all of its softmax goes to the sink
    for i, length in enumerate((5, 64, 65, 149)):
        assert mx.allclose(found[i], found[4 + i], atol=1e-2).item() == (length <= 64)


def test_what_lies_before_a_window_does_not_count():
    q, k, v, *caches = arrays(capacity=150, dtype=BF16)
    before = (mx.arange(150) < 130)[:, None]
    with_nan = [mx.where(before, mx.nan, x).astype(BF16) for x in caches]
    mx.eval(with_nan)
    options = {"scale": 0.1, "window": 17}
    out = decode_attention(q, k, v, *caches, state(147), **options)
    assert mx.array_equal(out, decode_attention(q, k, v, *with_nan, state(147), **options)).item()


def test_a_ring_is_written_in_the_middle_by_the_warp_that_reads_it():
    for capacity in (70, 2100):  # in the second, some warps reach it only with a later tile
        given = arrays(heads=10, kv=1, capacity=capacity, dtype=BF16)
        for write in range(3, capacity, 7 if capacity < 100 else 291):
            at = state(write, length=capacity, position=7)
            check(given, at, rope=Rope(64), splits=None if capacity < 100 else 2)


@pytest.mark.parametrize("norm", ["q_norm", "k_norm"])
def test_one_norm_alone(norm):
    given = arrays(dtype=BF16)
    options = {norm: norms(64, BF16)[norm], "scale": 0.1, "rope": Rope(64)}
    stocks = decode_attention_reference(*given, state(40), **options)
    wide = [x.astype(mx.float32) for x in given]
    options[norm] = options[norm].astype(mx.float32)
    truths = decode_attention_reference(*wide, state(40), **options)
    mx.eval(stocks, truths)
    out = decode_attention(*given, state(40), **options)  # weights in float32 as well
    for found, truth, theirs in zip((out, *given[3:]), truths, stocks, strict=True):
        assert error(found, truth) <= max(error(theirs, truth), 8e-3)


def test_each_sequence_has_its_own_place():
    q, k, v, keys, values = arrays(batch=3, capacity=80, dtype=BF16)
    states = mx.array([[0, 1, 0], [70, 71, 9], [20, 80, 12]], mx.int32)
    truths = decode_attention_reference(q, k, v, keys, values, states, scale=0.1, rope=Rope(64))
    mx.eval(truths)
    out = decode_attention(q, k, v, keys, values, states, scale=0.1, rope=Rope(64), splits=3)
    for found, truth in zip((out, keys, values), truths, strict=True):
        assert error(found, truth) < 8e-3


@pytest.mark.parametrize("splits", [1, 3])
def test_nothing_else_is_written_and_nothing_beyond_the_length_counts(splits):
    q, k, v, keys, values = arrays(batch=2, heads=9, kv=1, capacity=100, dtype=BF16)
    beyond = (mx.arange(100) >= 71)[None, None, :, None]
    keys, values = (mx.where(beyond, mx.nan, x).astype(BF16) for x in (keys, values))
    before = [x + 0 for x in (keys, values)]
    mx.eval(keys, values, before)
    truth, _, _ = decode_attention_reference(q, k, v, *before, state(70), scale=0.1)
    out = decode_attention(q, k, v, keys, values, state(70), scale=0.1, splits=splits)
    assert error(out, truth) < 8e-3  # not if there is a NaN
    for found, was, new in ((keys, before[0], k), (values, before[1], v)):
        assert mx.array_equal(found[:, :, 70], new).item()
        rest = (mx.arange(100) != 70)[:, None]
        same = (mx.where(rest, x, 0) for x in (found, was))
        assert mx.array_equal(*same, equal_nan=True).item()


@pytest.mark.parametrize("shift", [0, 3])
def test_arrays_that_are_parts_of_larger_ones(shift):
    """With a shift nothing new lies on 16 bytes, and v has gaps."""
    size, heads, kv = 64, 4, 2
    together = normal(2, 1, (heads + 3 * kv) * size + shift, dtype=BF16)[..., shift:]
    q, k, v = (
        x.reshape(2, -1, size)
        for x in mx.split(together[:, 0], [heads * size, (heads + kv) * size], axis=-1)
    )
    v = v.reshape(2, kv, 2 * size)[..., :: 2 if shift else 1][..., :size]
    large = [normal(2, kv, 90, 2 * size, seed=s, dtype=BF16) for s in (5, 6)]
    weights = normal(2 * size + 1, seed=4)[1:] / 4 + 1
    mx.eval(q, k, v, large, weights)
    keys, values = (x[:, :, :77, size:] for x in large)
    options = {"scale": 0.125, "rope": Rope(size)}
    options |= {"q_norm": weights[:size], "k_norm": weights[size:]}
    truths = decode_attention_reference(q, k, v, keys, values, state(50), **options)
    mx.eval(truths)
    out = decode_attention(q, k, v, keys, values, state(50), **options)
    assert error(out, truths[0]) < 8e-3
    assert error(large[0][:, :, 50, size:], truths[1][:, :, 50]) < 8e-3
    assert mx.array_equal(large[1][:, :, 50, size:], v).item()


def test_rows_with_gaps_give_nan():
    q, k, v, keys, values = arrays(dtype=BF16)
    with_gaps = mx.stack([keys, keys], axis=-1)[..., 0]
    mx.eval(with_gaps)
    for splits in (1, 2):
        out = decode_attention(q, k, v, with_gaps, values, state(30), scale=1.0, splits=splits)
        assert mx.all(mx.isnan(out)).item()


FREQS = Rope(64, base=None, freqs=mx.exp(mx.arange(32) / 4), multiplier=1.3466, scale=0.25)
#: batch, query heads, kv heads, size, size of values, capacity; options; blocks of the cluster
CLUSTERED = {
    "norms": ((1, 8, 1, 128, 128, 512), {"rope": Rope(128), **norms(128, F16)}, 8),
    "uneven": ((1, 3, 1, 96, 72, 200), {"rope": Rope(64), "k_norm": norms(96, F16)["k_norm"]}, 4),
    "sinks": ((2, 18, 1, 64, 64, 200), {"rope": FREQS, "sinks": normal(18, dtype=F16)}, 4),
    "window": ((1, 4, 2, 64, 64, 512), {"rope": Rope(64), "window": 99}, 2),
    "all": ((3, 5, 1, 64, 64, 150), {"sinks": normal(5), "window": 50, "splits": 4}, 4),
    "rows": ((5, 8, 4, 64, 64, 400), {}, 4),
    "long": ((1, 2, 1, 64, 64, 1500), {"splits": 8}, 8),
}


@pytest.mark.parametrize("case", CLUSTERED)
def test_clusters_give_what_joined_blocks_give(case, monkeypatch):
    """Of lengths with fewer tiles than there are blocks, and of rings, too.

    Results of float16 tell more of what float32 had been than those of bfloat16.
    """
    shapes, options, cluster = CLUSTERED[case]
    batch, capacity = shapes[0], shapes[-1]
    *new, keys, values = arrays(*shapes, dtype=F16)
    for length in (1, 19, 53, capacity // 2 + 1, capacity):
        at = state(length // 2, length=length, position=length)
        if batch > 1:
            more = [state(max(0, n - 1), length=n) for n in (length // 3 + 1, 1, 16, 33)]
            at = mx.stack([at, *more[: batch - 1]])

        def call(keys, values, at=at):
            return decode_attention(*new, keys, values, at, scale=0.1, **options)

        blocks, joined, clustered = joined_and_clustered(monkeypatch, call, (keys, values))
        assert blocks == cluster
        assert same_bits(joined, clustered)


def test_a_recording_launches_clusters(monkeypatch):
    """With nothing but what it is told of the device."""
    given, launched = arrays(capacity=200, dtype=BF16), []
    right = attention_launch._definition
    monkeypatch.setattr(attention_launch, "_definition", lambda v: launched.append(v) or right(v))
    monkeypatch.setattr(attention_launch, "architecture", lambda: 90)
    decode_attention(*given, state(3), scale=1.0)
    with in_force(InForce(clusters=True)):
        decode_attention(*given, state(3), scale=1.0)
    assert [(v.form, v.cluster) for v in launched] == [("joined", 1), ("whole", 4)]


@pytest.mark.parametrize(("architecture", "may"), [(89, False), (90, True)])
def test_only_recordings_have_clusters(architecture, may, monkeypatch):
    monkeypatch.setattr(attention_launch, "architecture", lambda: architecture)
    with in_force(InForce(clusters=True)):
        assert attention_launch.may_cluster() == may
        with in_force(InForce()):
            assert not attention_launch.may_cluster()
    with in_force(InForce(through=lambda kernel: kernel.run)):
        assert not attention_launch.may_cluster()
    assert not attention_launch.may_cluster()


@pytest.mark.parametrize(
    ("shape", "options", "older", "splits", "cluster"),
    [
        ((1, 4, 128, 512), {}, 8, 8, 8),
        ((1, 4, 128, 320), {}, 8, 8, 8),  # a kernel for capacities of 257 to 512
        ((1, 8, 64, 512), {"window": 128}, 2, 2, 2),
        ((1, 8, 64, 512), {"window": 180}, 3, 2, 2),
        ((1, 8, 64, 60), {}, 1, 1, 1),
        ((5, 4, 64, 512), {}, 6, 4, 4),
        ((11, 4, 64, 512), {}, 3, 2, 2),
        ((40, 4, 64, 512), {}, 1, 1, 1),
        ((1, 4, 128, 513), {}, 16, 8, 8),
        ((5, 4, 64, 1024), {}, 6, 6, 1),
        ((1, 4, 128, 8704), {}, 33, 33, 1),
        ((4, 8, 128, 8704), {}, 4, 4, 1),
        ((1, 4, 128, 8704), {"splits": 8}, 8, 8, 8),
        ((1, 4, 128, 8704), {"splits": 12}, 12, 12, 1),
        ((1, 4, 128, 512), {"splits": 2}, 2, 2, 2),
        ((1, 4, 128, 512), {"splits": 3}, 3, 3, 1),
        ((1, 4, 128, 30), {"splits": 3}, 2, 2, 2),  # there are no more tiles
        ((1, 4, 192, 512), {}, 8, 8, 1),
        ((11, 4, 192, 512), {}, 3, 3, 1),
        ((1, 4, 512, 512), {"rope_size": 64}, 8, 8, 8),
        ((5, 4, 512, 512), {"rope_size": 64}, 6, 4, 4),
        ((1, 1, 512, 1024), {"rope_size": 64}, 16, 8, 8),
        ((5, 4, 512, 1024), {"rope_size": 64}, 6, 6, 1),
    ],
)
def test_which_blocks_are_clusters(shape, options, older, splits, cluster, monkeypatch):
    batch, kv, size, capacity = shape
    q, keys = (mx.zeros(s, BF16) for s in ((batch, 2 * kv, size), (batch, kv, capacity, size)))

    def found(tensor=True):
        layout = Layout.of(q, keys, size // 2, state(0), **options, tensor=tensor)
        return layout.splits, layout.cluster, layout.form("cuda")

    monkeypatch.setattr(attention_launch, "architecture", lambda: 90)
    without = found(tensor=False)
    joined = (splits, 1, "joined" if splits > 1 else "whole")
    assert found() == joined
    monkeypatch.setattr(attention_launch, "takes_clusters", lambda: True)
    assert found() == ((splits, cluster, "whole") if cluster > 1 else joined)
    assert found(tensor=False) == without
    monkeypatch.setattr(attention_launch, "architecture", lambda: 89)
    assert found() == (older, 1, "joined" if older > 1 else "whole")


def test_up_to_how_many_positions_blocks_are_clusters(monkeypatch):
    monkeypatch.setattr(attention_launch, "architecture", lambda: 90)
    monkeypatch.setattr(attention_launch, "takes_clusters", lambda: True)
    for capacity, found in ((2048, (8, 8)), (2049, (33, 1))):
        q, keys = (mx.zeros(s, BF16) for s in ((1, 8, 128), (1, 4, capacity, 128)))
        layout = Layout.of(q, keys, 128, state(0), tensor=True)
        assert (layout.splits, layout.cluster) == found
    for capacity, found in ((1024, (8, 8)), (1025, (32, 1))):
        q, keys = (mx.zeros(s, BF16) for s in ((1, 20, 512), (1, 1, capacity, 512)))
        layout = Layout.of(q, keys, 512, state(0), rope_size=64, tensor=True)
        assert (layout.splits, layout.cluster) == found


def test_scores_that_overflow_an_exponential():
    q, k, v, keys, values = arrays(capacity=300, dtype=BF16)
    check((30 * q, k, v, 30 * keys, values), state(280), scale=1.0)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_it_is_as_exact_as_the_heads_that_it_gets(dtype):
    """Beyond the rounding of what goes in and comes out, nothing of 16 bits is lost."""
    given = arrays(heads=8, kv=1, size=128, capacity=600, dtype=dtype)
    truth, _, _ = decode_attention_reference(*(x.astype(mx.float32) for x in given), state(590),
                                             scale=0.1)  # fmt: skip
    out = decode_attention(*given, state(590), scale=0.1)
    off = mx.abs(out.astype(mx.float32) - truth)
    half_a_unit = mx.abs(truth) * {F16: 2.0**-11, BF16: 2.0**-8}[dtype]
    assert mx.all(off <= 1.01 * half_a_unit + 1e-5).item()


@pytest.mark.parametrize(
    ("case", "takes"),
    [
        ({}, True),
        ({"dtype": mx.float32}, False),
        ({"size": 256}, False),
        ({"rope": Rope(48)}, False),
        ({"rope": Rope(48, traditional=True)}, True),
        ({"rope": Rope(64, base=0.5)}, False),
        ({"q_norm": mx.ones(64), "k_norm": mx.ones(64, BF16)}, False),
    ],
    ids=str,
)
def test_what_it_takes(case, takes, monkeypatch):
    """What it does not take runs from the Metal text."""
    headers = []

    def cuda_kernel(*, header, **_):
        headers.append(header)
        return lambda *, output_shapes, output_dtypes, **_: [
            mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)
        ]

    monkeypatch.setattr(mx.fast, "cuda_kernel", cuda_kernel)
    options = dict(case)
    given = arrays(dtype=options.pop("dtype", BF16), size=options.pop("size", 64))
    decode_attention(*given, state(3), scale=1.0, **options)
    assert {PRIMITIVES in header for header in headers} == {takes}
