"""Decode attention from its Metal source: against MLX's own operations, and what it may write."""

from __future__ import annotations

import mlx.core as mx
import pytest

from zmlx.backend import current, launch, strict
from zmlx.backend.strict import launch as strict_launch
from zmlx.kernels.decode_attention import Rope, decode_attention, decode_attention_reference
from zmlx_autopatch.variables import VariableError

F32, F16, BF16 = mx.float32, mx.float16, mx.bfloat16


@pytest.fixture(autouse=True)
def from_source(monkeypatch):
    """On the CPU, run sources in the emulator; on a GPU they run anyway."""
    if current() == "cpu":
        monkeypatch.setenv("ZMLX_BACKEND", "emulator")


def normal(*shape, seed=1, dtype=F32):
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def arrays(batch=1, heads=4, kv=2, size=64, value_size=None, capacity=50, dtype=F32, seed=1):
    """Return q, k, v, keys, values."""
    value_size = value_size or size
    found = (
        normal(batch, heads, size, seed=seed, dtype=dtype),
        normal(batch, kv, size, seed=seed + 1, dtype=dtype),
        normal(batch, kv, value_size, seed=seed + 2, dtype=dtype),
        normal(batch, kv, capacity, size, seed=seed + 3, dtype=dtype),
        normal(batch, kv, capacity, value_size, seed=seed + 4, dtype=dtype),
    )
    mx.eval(found)
    return found


def state(write, length=None, position=None):
    length = write + 1 if length is None else length
    return mx.array([write, length, length - 1 if position is None else position], mx.int32)


def stock(q, k, v, keys, values, at, *, scale, q_norm=None, k_norm=None, eps=1e-6, rope=None,
          sinks=None, window=None):  # fmt: skip
    """Compute one sequence's token with the operations that models call, in the arrays' dtype."""
    write, length, position = at.tolist()
    q, k = q[:, :, None], k[:, :, None]
    if q_norm is not None:
        q, k = mx.fast.rms_norm(q, q_norm, eps), mx.fast.rms_norm(k, k_norm, eps)
    if rope is not None:
        if rope.multiplier != 1.0:
            q, k = q[...], k[...]
            q[..., : rope.dims] = rope.multiplier * q[..., : rope.dims]
            k[..., : rope.dims] = rope.multiplier * k[..., : rope.dims]
        q, k = (
            mx.fast.rope(x, rope.dims, traditional=rope.traditional, base=rope.base,
                         scale=rope.scale, offset=position, freqs=rope.freqs)
            for x in (q, k)
        )  # fmt: skip
    keys, values = keys[...], values[...]
    keys[:, :, write] = k[:, :, 0]
    values[:, :, write] = v
    start = max(0, length - window) if window else 0
    out = mx.fast.scaled_dot_product_attention(
        q, keys[:, :, start:length], values[:, :, start:length], scale=scale, sinks=sinks
    )
    return out[:, :, 0], keys, values


def error(found, truth):
    truth = truth.astype(F32)
    return mx.max(mx.abs(found.astype(F32) - truth)).item() / mx.max(mx.abs(truth)).item()


def check(given, at, *, splits=None, after=None, **options):
    """Hold a call to stock's results in float32, and in 16 bits to be no farther from them."""
    options.setdefault("scale", given[0].shape[-1] ** -0.5)
    wide = {name: x.astype(F32) if isinstance(x, mx.array) else x for name, x in options.items()}
    truths = stock(*(x.astype(F32) for x in given), at, **wide)
    stocks = stock(*given, at, **options)
    mx.eval(truths, stocks)
    out = decode_attention(*given, at, splits=splits, after=after, **options)
    mx.eval(out)
    # One rounding of heads, of the kind that stock's may happen to avoid.
    least = {F32: 2e-6, F16: 1e-3, BF16: 8e-3}[out.dtype]
    for found, truth, theirs in zip((out, *given[3:]), truths, stocks, strict=True):
        assert (found.shape, found.dtype) == (theirs.shape, theirs.dtype)
        assert error(found, truth) <= max(error(theirs, truth), least)
    return out


def norms(size, dtype=F32):
    return {
        "q_norm": 1 + normal(size, seed=8, dtype=dtype) / 4,
        "k_norm": 1 + normal(size, seed=9, dtype=dtype) / 4,
    }


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv", "size", "value_size"),
    [
        (1, 1, 32, 32),
        (8, 2, 64, 64),
        (3, 1, 80, 80),
        (5, 1, 96, 128),
        (8, 1, 128, 128),
        (6, 2, 192, 128),
        (2, 1, 256, 256),
        (12, 1, 64, 96),
        (17, 1, 32, 64),
    ],
)
def test_every_size_and_dtype(heads, kv, size, value_size, dtype):
    given = arrays(1, heads, kv, size, value_size, 45, dtype)
    check(given, state(36), rope=Rope(size), **norms(size, dtype))


@pytest.mark.parametrize("splits", [None, 1, 2])
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 97, 256, 257, 600])
def test_every_length(length, splits):
    check(arrays(capacity=601), state(length - 1), splits=splits, sinks=normal(4, seed=7))


@pytest.mark.parametrize(
    "rope",
    [
        Rope(64),
        Rope(32, traditional=True, base=500000.0),
        Rope(48, scale=0.25),
        Rope(64, base=None, freqs=mx.exp(mx.arange(32) / 4)),
        Rope(16, base=None, freqs=1 + mx.arange(8.0), multiplier=1.3466, traditional=True),
    ],
    ids=["whole", "traditional", "scaled", "freqs", "multiplied"],
)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_every_rope(rope, dtype):
    # MLX's angles on the CPU and on GPUs differ by float32 rounding times the position.
    check(arrays(dtype=dtype), state(40, position=17), rope=rope)


@pytest.mark.parametrize("length", [5, 64, 65, 149])
def test_a_window_and_sinks(length):
    sinks = mx.array([2.0, -1.0, 0.0, 30.0])
    given = arrays(capacity=150)
    full = check(given, state(length - 1), sinks=sinks)
    windowed = check(given, state(length - 1), sinks=sinks, window=64)
    assert mx.array_equal(full, windowed).item() == (length <= 64)
    assert mx.max(mx.abs(full[:, 3])).item() < 1e-6  # all of its softmax goes to the sink


def test_a_ring_is_written_in_the_middle():
    given = arrays(capacity=70)
    check(given, state(33, length=70, position=7), rope=Rope(64))


def test_each_sequence_has_its_own_place():
    q, k, v, keys, values = arrays(batch=3, capacity=80)
    states = mx.array([[0, 1, 0], [70, 71, 9], [20, 80, 12]], mx.int32)
    whole = decode_attention(q, k, v, keys[...] + 0, values + 0, states, scale=0.1, rope=Rope(64))
    truth, _, _ = decode_attention_reference(
        q, k, v, keys, values, states, scale=0.1, rope=Rope(64)
    )
    assert error(whole, truth) < 2e-6
    for i in range(3):
        one = [x[i : i + 1] + 0 for x in (q, k, v, keys, values)]
        mx.eval(one)
        alone = check(one, states[i], scale=0.1, rope=Rope(64))
        assert error(whole[i : i + 1], alone) < 2e-6


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_nothing_else_is_written_and_nothing_beyond_the_length_read(dtype):
    q, k, v, keys, values = arrays(batch=2, heads=9, kv=1, capacity=100, dtype=dtype)
    beyond = (mx.arange(100) >= 71)[None, None, :, None]
    keys, values = (mx.where(beyond, mx.nan, x).astype(dtype) for x in (keys, values))
    before = [x + 0 for x in (keys, values)]
    mx.eval(keys, values, before)
    out = decode_attention(q, k, v, keys, values, state(70), scale=0.1)
    assert not mx.any(mx.isnan(out)).item()
    for found, was, new in ((keys, before[0], k), (values, before[1], v)):
        assert mx.array_equal(found[:, :, 70], new).item()
        rest = mx.arange(100) != 70
        same = mx.array_equal(
            mx.where(rest[:, None], found, 0), mx.where(rest[:, None], was, 0), equal_nan=True
        )
        assert same.item()


def test_arrays_that_are_parts_of_larger_ones():
    size, heads, kv = 64, 4, 2
    together = normal(2, 1, (heads + 2 * kv) * size, dtype=BF16)
    q, k, v = (
        x.reshape(2, -1, size)
        for x in mx.split(together, [heads * size, (heads + kv) * size], axis=-1)
    )
    large = [normal(2, kv, 90, 2 * size, seed=s, dtype=BF16) for s in (5, 6)]
    mx.eval(q, k, v, large)
    keys, values = (x[:, :, :77, size:] for x in large)
    options = {"scale": 0.125, "rope": Rope(size), **norms(size, BF16)}
    truth, new_keys, new_values = decode_attention_reference(
        q, k, v, keys, values, state(50), **options
    )
    mx.eval(truth, new_keys, new_values)
    out = decode_attention(q, k, v, keys, values, state(50), **options)
    assert error(out, truth) < 8e-3
    assert error(large[0][:, :, 50, size:], new_keys[:, :, 50]) < 8e-3
    assert mx.array_equal(large[1][:, :, 50, size:], v).item()


def test_rows_with_gaps_give_nan():
    q, k, v, keys, values = arrays()
    with_gaps = mx.stack([keys, keys], axis=-1)[..., 0]
    mx.eval(with_gaps)
    out = decode_attention(q, k, v, with_gaps, values, state(3), scale=1.0)
    assert mx.all(mx.isnan(out)).item()


def test_queries_of_another_dtype():
    q, k, v, keys, values = arrays(dtype=BF16)
    wide = q.astype(F32)
    weight = norms(64)["q_norm"]
    truth, _, _ = decode_attention_reference(
        wide, k, v, keys, values, state(40), scale=0.1, q_norm=weight
    )
    mx.eval(truth)
    out = decode_attention(wide, k, v, keys, values, state(40), scale=0.1, q_norm=weight)
    assert out.dtype == F32
    assert error(out, truth) < 2e-6


def test_one_recorded_graph_decodes_many_tokens():
    """The cache grows in place, and only the state says where; an output orders the next call."""
    tokens, capacity = 40, 64
    q, k, v = (normal(tokens, 1, h, 32, seed=s) for h, s in ((4, 1), (2, 2), (2, 3)))
    keys, values = mx.zeros((1, 2, capacity, 32)), mx.zeros((1, 2, capacity, 32))
    mx.eval(keys, values)
    done = 0

    @mx.compile
    def step(q, k, v, at, before):
        nonlocal done
        done += 1
        return decode_attention(q, k, v, keys, values, at, scale=0.2, rope=Rope(32), after=before)

    out = mx.zeros((1,))
    for token in range(tokens):
        out = step(q[token], k[token], v[token], state(token), out)
        rotated = mx.fast.rope(
            k[: token + 1, 0].swapaxes(0, 1)[None], 32, traditional=False, base=10000.0, scale=1.0,
            offset=0,
        )  # fmt: skip
        truth = mx.fast.scaled_dot_product_attention(
            Rope(32)(q[token], mx.array(token))[:, :, None],
            rotated,
            v[: token + 1, 0].swapaxes(0, 1)[None],
            scale=0.2,
        )[:, :, 0]
        assert error(out, truth) < 3e-6
    assert done <= 2  # once for each shape of `before`


def test_scores_that_overflow_an_exponential():
    q, k, v, keys, values = arrays(capacity=300)
    check((30 * q, k, v, 30 * keys, values), state(280), scale=1.0)


def test_the_reference_attends_as_stock_does():
    given = arrays(dtype=F32)
    options = {"scale": 0.1, "window": 20, "sinks": normal(4), "rope": Rope(32), **norms(64)}
    for found, truth in zip(
        decode_attention_reference(*given, state(40), **options),
        stock(*given, state(40), **options),
        strict=True,
    ):
        assert error(found, truth) < 2e-6


BAD = [
    ({"q": (1, 5, 64)}, {}, r"q has shape \(1, 5, 64\).*multiple of Hkv"),
    ({"q": (1, 4, 32)}, {}, r"q has shape"),
    ({"k": (1, 1, 64)}, {}, r"k has shape \(1, 1, 64\).*\(1, 2, 64\)"),
    ({"v": (2, 2, 64)}, {}, r"v has shape"),
    ({"values": (1, 2, 49, 64)}, {}, r"keys have shape .* and values \(1, 2, 49, 64\)"),
    ({"state": (2,)}, {}, r"state has shape \(2,\); it takes \(3,\) or \(1, 3\)"),
    ({}, {"q_norm": mx.ones(32)}, r"q_norm has shape \(32,\)"),
    ({}, {"sinks": mx.ones(2)}, r"sinks has shape \(2,\); 4 heads need \(4,\)"),
    ({}, {"window": 0}, r"window=0; give a positive number"),
    ({}, {"rope": Rope(128)}, r"rope rotates 128 elements; heads have 64"),
    ({}, {"splits": 0}, r"splits=0; give a number from 1"),
]


@pytest.mark.parametrize(("shapes", "options", "text"), BAD)
def test_shapes_that_do_not_fit(shapes, options, text):
    names = dict(zip(("q", "k", "v", "keys", "values"), arrays(), strict=True))
    names["state"] = state(3)
    for name, shape in shapes.items():
        names[name] = mx.zeros(shape, names[name].dtype)
    with pytest.raises(ValueError, match=text):
        decode_attention(*names.values(), scale=1.0, **options)


def test_heads_that_no_lane_can_read():
    with pytest.raises(ValueError, match=r"keys have heads of 36 elements of .*bfloat16"):
        decode_attention(*arrays(size=36, dtype=BF16), state(3), scale=1.0)
    with pytest.raises(ValueError, match="keys have heads of 512 elements"):
        decode_attention(*arrays(size=512), state(3), scale=1.0)


def test_dtypes_that_do_not_fit():
    q, k, v, keys, values = arrays()
    with pytest.raises(TypeError, match=r"k is .*float16 and keys are .*float32; cast one"):
        decode_attention(q, k.astype(F16), v, keys, values, state(3), scale=1.0)
    with pytest.raises(TypeError, match=r"q is .*int32"):
        decode_attention(q.astype(mx.int32), k, v, keys, values, state(3), scale=1.0)
    with pytest.raises(TypeError, match=r"state is .*int64; it takes int32"):
        decode_attention(q, k, v, keys, values, state(3).astype(mx.int64), scale=1.0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dims": 7}, "dims=7 must be even"),
        ({"dims": 8, "base": None}, "either a base or freqs"),
        ({"dims": 8, "freqs": mx.ones(4)}, "either a base or freqs"),
        ({"dims": 8, "base": -1.0}, "base=-1.0 must be positive"),
        ({"dims": 8, "base": None, "freqs": mx.ones(8)}, r"freqs has shape \(8,\)"),
    ],
)
def test_ropes_that_cannot_be(options, text):
    with pytest.raises(ValueError, match=text):
        Rope(**options)


def test_there_is_no_writing_in_place_by_a_reference(monkeypatch):
    monkeypatch.setenv("ZMLX_BACKEND", "reference")
    with pytest.raises(VariableError, match="this kernel has a source and no reference"):
        decode_attention(*arrays(), state(3), scale=1.0)


def variants(dtype):
    """Call every form of the text, with what can be left out and what cannot."""
    rich = {"rope": Rope(64, base=None, freqs=mx.ones(32), multiplier=1.5), "sinks": mx.ones(4)}
    for options in ({}, {"rope": Rope(64)}, {**rich, **norms(64, dtype), "after": mx.ones(1)}):
        for splits in (1, 2):
            given = arrays(capacity=70, dtype=dtype)
            decode_attention(*given, state(3), scale=1.0, splits=splits, **options)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_apples_compiler_would_take_it(dtype, monkeypatch):
    try:
        strict.find()
    except strict.ClangUnavailable as missing:
        pytest.skip(str(missing))
    monkeypatch.setenv("ZMLX_BACKEND", "emulator")
    monkeypatch.setitem(launch._BACKENDS, "emulator", "zmlx.backend.strict")
    launch.forget()
    before = strict_launch._looked.cache_info()
    variants(dtype)
    after = strict_launch._looked.cache_info()
    assert after.hits + after.misses > before.hits + before.misses
    launch.forget()
