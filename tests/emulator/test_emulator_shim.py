"""The standard library of Metal on the CPU: its functions give what their names say."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from emulator.bodies import I, define, run, values

UNARY = {
    "exp": np.exp, "exp2": np.exp2, "exp10": lambda x: 10.0**x, "log": np.log, "log2": np.log2,
    "log10": np.log10, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x), "sin": np.sin,
    "cos": np.cos, "tan": np.tan, "asin": np.arcsin, "acos": np.arccos, "atan": np.arctan,
    "sinh": np.sinh, "cosh": np.cosh, "tanh": np.tanh, "asinh": np.arcsinh, "atanh": np.arctanh,
    "abs": np.abs, "fabs": np.abs, "floor": np.floor, "ceil": np.ceil, "rint": np.rint,
    "trunc": np.trunc, "round": lambda x: np.trunc(x + np.copysign(0.5, x)), "sign": np.sign,
    "fract": lambda x: x - np.floor(x), "saturate": lambda x: np.clip(x, 0, 1),
    "sinpi": lambda x: np.sin(np.pi * x), "cospi": lambda x: np.cos(np.pi * x),
}  # fmt: skip
BINARY = {
    "pow(abs(a), b)": lambda a, b: np.abs(a) ** b, "atan2(a, b)": np.arctan2,
    "fmod(a, b)": np.fmod, "max(a, b)": np.maximum, "min(a, b)": np.minimum,
    "copysign(a, b)": np.copysign, "fdim(a, b)": lambda a, b: np.maximum(a - b, 0),
    "step(a, b)": lambda a, b: (b >= a) * 1.0, "mix(a, b, T(0.25f))": lambda a, b: a * 0.75 + b / 4,
    "fma(a, b, a)": lambda a, b: a * b + a, "clamp(a, T(-0.5f), T(0.5f))":
    lambda a, b: np.clip(a, -0.5, 0.5), "divide(a, b)": lambda a, b: a / b,
}  # fmt: skip
PRECISION = {mx.float32: 1e-6, mx.float16: 2**-10, mx.bfloat16: 2**-7}


def close(value, truth, dtype):
    value = np.array(value.astype(mx.float32), dtype=np.float64)
    return np.allclose(value, truth, rtol=PRECISION[dtype], atol=PRECISION[dtype], equal_nan=True)


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
def test_functions_of_one_number(dtype):
    """All in one kernel: each function writes a row."""
    x = mx.array(np.linspace(-1.7, 1.7, 40, dtype=np.float32)).astype(dtype)
    spaces = ("metal::", "metal::fast::", "metal::precise::", "")
    source = I + "".join(
        f"y[{row} * 40 + i] = {spaces[row % 4]}{name}(x[i]);" for row, name in enumerate(UNARY)
    )
    y = run(source, x, shape=(len(UNARY), 40), dtype=dtype, threads=40)
    wide = np.array(x.astype(mx.float32), dtype=np.float64)
    with np.errstate(all="ignore"):
        for row, (name, function) in enumerate(UNARY.items()):
            assert close(y[row], function(wide), dtype), name


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
def test_functions_of_more_numbers(dtype):
    a, b = (mx.random.normal((40,), key=mx.random.key(k)).astype(dtype) for k in range(2))
    source = f"{I} T a = x[i], b = z[i];" + "".join(
        f"y[{row} * 40 + i] = metal::{call};" for row, call in enumerate(BINARY)
    )
    y = run(
        source.replace("pow(abs(a)", "pow(metal::abs(a)"), a, b, shape=(len(BINARY), 40),
        dtype=dtype, threads=40, template=[("T", dtype)],
    )  # fmt: skip
    wide = [np.array(v.astype(mx.float32), dtype=np.float64) for v in (a, b)]
    for row, (name, function) in enumerate(BINARY.items()):
        assert close(y[row], function(*wide), dtype), name


def test_special_values():
    x = mx.array([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1.0])
    y = run(
        f"{I} y[i] = isnan(x[i]) | isinf(x[i]) << 1 | isfinite(x[i]) << 2 | signbit(x[i]) << 3;",
        x, dtype=mx.int32,
    )  # fmt: skip
    assert [v & 7 for v in values(y)] == [4, 4, 2, 2, 1, 4]
    assert [v >> 3 for v in values(y)][:4] == [0, 1, 0, 1]
    y = run(f"{I} y[i] = exp(-INFINITY) + max(NAN, x[i]) + M_PI_F;", mx.array([1.0]))
    assert values(y) == [pytest.approx(1 + np.pi)]


def test_literals_are_float_and_products_are_not_fused():
    x = mx.random.normal((2000,), key=mx.random.key(0))
    z, w = mx.random.normal((2, 2000), key=mx.random.key(1))
    y = run(f"{I} y[i] = x[i] * 0.1 + z[i] * w[i];", x, z, w)
    truth = np.array(x) * np.float32(0.1) + np.array(z) * np.array(w)
    assert np.array_equal(np.array(y), truth)


def test_whole_numbers():
    x = mx.array([0, 1, 40, 2**31, 2**32 - 1], dtype=mx.uint32)
    source = (
        "y[i] = popcount(x[i]); y[i + 5] = clz(x[i]); y[i + 10] = ctz(x[i]);"
        "y[i + 15] = reverse_bits(x[i]); y[i + 20] = rotate(x[i], 4u);"
        "y[i + 25] = mulhi(x[i], 1u << 31); y[i + 30] = addsat(x[i], 7u);"
        "y[i + 35] = extract_bits(x[i], 3, 4); y[i + 40] = as_type<uint>(as_type<float>(x[i]));"
    )
    y = np.array(run(I + source, x, shape=(9, 5), threads=5))
    numbers = [int(v) for v in values(x)]
    assert y[0].tolist() == [v.bit_count() for v in numbers]
    assert y[1].tolist() == [32 - v.bit_length() for v in numbers]
    assert y[2].tolist() == [(v & -v).bit_length() - 1 if v else 32 for v in numbers]
    assert y[3].tolist() == [int(f"{v:032b}"[::-1], 2) for v in numbers]
    assert y[4].tolist() == [(v << 4 | v >> 28) & 0xFFFFFFFF for v in numbers]
    assert y[5].tolist() == [v >> 1 for v in numbers]
    assert y[6].tolist() == [min(v + 7, 0xFFFFFFFF) for v in numbers]
    assert y[7].tolist() == [v >> 3 & 15 for v in numbers]
    assert y[8].tolist() == numbers


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("float4 v(1, 2, 3, 4); v.xy = v.zw; y[i] = v[i] + v.w;", [7, 8, 7, 8]),
        ("float4 v = float4(float2(1, 2), 3, 4) * 2; y[i] = v[i] + dot(v.xyz, float3(1));",
         [14, 16, 18, 20]),
        ("uint3 u(1, 2, 3); y[i] = i < 3 ? (u << 2)[i] : u.z % 2;", [4, 8, 12, 1]),
        ("half4 h = half4(1.5h); y[i] = float4(h + half4(1, 2, 3, 4))[i];", [2.5, 3.5, 4.5, 5.5]),
        ("bfloat4 b(bfloat(1), 2, 3, 4); y[i] = b.wzyx[i];", [4, 3, 2, 1]),
        ("float4 v(3, -1, 2, 0); y[i] = select(v, float4(9), v < 1.0f)[i];", [3, 9, 2, 9]),
        ("float3 v(3, 0, 4); y[i] = i < 3 ? normalize(v)[i] : length(v);", [0.6, 0, 0.8, 5]),
        ("float3 c = cross(float3(1, 0, 0), float3(0, 1, 0)); y[i] = i < 3 ? c[i] : sizeof(c);",
         [0, 0, 1, 16]),
        ("float4 v = exp(float4(0)); v.rgb += 1; v *= 2; y[i] = v[i];", [4, 4, 4, 2]),
        ("float2 v = float2(int2(3, 4)); y[i] = all(v > 2) + any(v == float2(3)) + v[i % 2];",
         [5, 6, 5, 6]),
        ("packed_float3 p = float3(1, 2, 3); y[i] = i < 3 ? p[i] : sizeof(p);", [1, 2, 3, 12]),
        ("float4 v(1, 2, 3, 4); v.zw.y = 9; v.rgb.b += v.wzyx.x; y[i] = v[i];", [1, 2, 12, 9]),
        ("float4 v(1, 2, 3, 4); y[i] = fma(v.xy, v.zw, v.yx)[i % 2] + mix(v.xy, v.zw, 0.5f).x;",
         [7, 11, 7, 11]),
        ("int3 v(-9, 2, 9); v++; --v; v = clamp(v, int3(-1), int3(4)); y[i] = v[i % 3];",
         [-1, 2, 4, -1]),
        ("y[i] = mad24(int(i) - 2, 3, -1);", [-7, -4, -1, 2]),
        ("const bfloat b(x[i]); float f = 1; f += b; int n = 0; n += b; y[i] = f + n + int(b);",
         [1, 4, 7, 10]),
        ("half h = x[i]; y[i] = h > 1 ? h : 0.5f;", [0.5, 0.5, 2, 3]),
        ("complex64_t c(1, 2); c = c * c + 1; y[i] = i % 2 ? c.imag : c.real;", [-2, 4, -2, 4]),
    ],
)  # fmt: skip
def test_vectors_and_small_types(source, expected):
    y = run(f"{I} {source}", mx.arange(4).astype(mx.float32))
    assert values(y) == pytest.approx(expected)


def simd(expression, x, threads=None, dtype=None):
    """Return what each thread of one threadgroup gets from an expression of v and lane."""
    source = f"{I} uint lane = thread_index_in_simdgroup; auto v = x[i]; y[i] = {expression};"
    threads = threads or x.size
    return values(run(source, x, group=threads, dtype=dtype or x.dtype, inputs=("x",)))


def test_reductions_of_a_simdgroup():
    x = mx.arange(64).astype(mx.float32)
    assert simd("simd_sum(v)", x) == [496.0] * 32 + [1520.0] * 32
    assert simd("simd_max(v) - simd_min(v)", x) == [31.0] * 64
    assert simd("simd_product(lane < 3 ? v + 1 : 1.0f)", x)[:32] == [6.0] * 32
    assert simd("simd_prefix_inclusive_sum(v)", x)[:4] == [0, 1, 3, 6]
    assert simd("simd_prefix_exclusive_sum(v)", x)[:4] == [0, 0, 1, 3]
    whole = mx.arange(32)
    assert simd("simd_or(v) + simd_xor(v) + simd_and(v | 64)", whole) == [31 + 0 + 64] * 32
    assert simd("quad_sum(v)", whole)[:8] == [6] * 4 + [22] * 4


def test_a_simdgroup_that_is_not_full():
    x = mx.arange(40).astype(mx.int32)
    assert simd("simd_sum(1)", x) == [32] * 32 + [8] * 8
    assert simd("simd_max(v)", x)[-1] == 39
    assert simd("simd_min(v)", x)[-1] == 32


def test_bfloat_is_summed_in_float():
    x = mx.array([256.0] + [1.0] * 31).astype(mx.bfloat16)
    assert simd("simd_sum(v)", x) == [288.0] * 32


@pytest.mark.parametrize("call", ["simd_sum", "simd_max", "quad_sum", "simd_prefix_inclusive_sum"])
def test_nothing_of_64_bits_is_reduced(call):
    """As on a device, where MLX's function for bfloat would take it and round to 8 bits."""
    with pytest.raises(ValueError, match=call):
        simd(f"{call}(v)", mx.arange(32, dtype=mx.int64))


def test_shuffles():
    x = mx.arange(32)
    lanes = list(range(32))
    assert simd("simd_shuffle_xor(v, 5)", x) == [i ^ 5 for i in lanes]
    assert simd("simd_shuffle(v, 31 - lane)", x) == lanes[::-1]
    assert simd("simd_shuffle_down(v, 4)", x) == [i + 4 if i < 28 else i for i in lanes]
    assert simd("simd_shuffle_up(v, 4)", x) == [i - 4 if i >= 4 else i for i in lanes]
    assert simd("simd_shuffle_rotate_down(v, 4)", x) == [(i + 4) % 32 for i in lanes]
    assert simd("simd_shuffle_and_fill_up(v, -v, 2)", x) == [-30, -31, *lanes[:-2]]
    assert simd("simd_broadcast(v, 7) + simd_broadcast_first(v)", x) == [7] * 32
    assert simd("simd_shuffle_down(float2(v, 1), 1).x", x, dtype=mx.float32)[:2] == [1, 2]
    # A lane that is not there has nothing to give.
    assert simd("simd_shuffle_xor(v, 16)", x.astype(mx.int32), threads=24)[:16] == [
        *range(16, 24), *[-1] * 8,
    ]  # fmt: skip


def test_votes():
    x = mx.arange(32)
    assert simd("simd_any(v == 3) + 2 * simd_all(v < 32) + 4 * simd_all(v < 31)", x) == [3] * 32
    assert simd("int((uint64_t)simd_ballot(v % 2 == 0) & 0xffff)", x) == [0x5555] * 32


def test_lanes_that_part_meet_again():
    x = mx.arange(32)
    source = f"""{I} int s = 0;
    if (i % 2) {{ s = simd_sum(1); }} else if (i < 8) {{ s = 10 * simd_sum(1); }}
    for (uint k = 0; k < i % 4; ++k) s += 100 * simd_sum(1);
    y[i] = s + 10000 * simd_sum(1);"""
    odd = [16, 16, 16, 16]
    loops = [0, 2400, 2400 + 1600, 2400 + 1600 + 800]
    expected = [
        320000 + loops[i % 4] + (odd[i % 4] if i % 2 else 40 if i < 8 else 0) for i in range(32)
    ]
    assert values(run(source, x)) == expected


def test_matrices_of_a_simdgroup():
    source = """simdgroup_float8x8 p, q, r(1.0f);
    simdgroup_load(p, x, 8); simdgroup_load(q, z, 8, ulong2(0), true);
    simdgroup_multiply_accumulate(r, p, q, r); simdgroup_store(r, y, 8);"""
    a, b = mx.random.normal((2, 8, 8), key=mx.random.key(0))
    y = run(source, a, b, threads=32)
    assert mx.allclose(y, a @ b.T + mx.eye(8), rtol=1e-5, atol=1e-5).item()


def test_threadgroup_atomics():
    source = f"""threadgroup atomic_uint n; {I} if (i == 0) atomic_store_explicit(&n, 0u,
    memory_order_relaxed); threadgroup_barrier(mem_flags::mem_threadgroup);
    uint mine = atomic_fetch_add_explicit(&n, 1u, memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    y[mine] = atomic_load_explicit(&n, memory_order_relaxed);"""
    assert values(run(source, shape=(64,), dtype=mx.uint32, threads=64, group=64)) == [64] * 64


@pytest.mark.parametrize(
    "name", ["fetch_add", "fetch_max", "fetch_min", "fetch_or", "fetch_xor", "exchange"]
)
def test_device_atomics(name):
    x = mx.array([5, 3, 12, 9], dtype=mx.uint32)
    call = f"{I} atomic_{name}_explicit(&y[0], x[i], memory_order_relaxed);"
    y = run(call, x, shape=(1,), init_value=4, atomic_outputs=True)
    steps = {
        "fetch_add": 33, "fetch_max": 12, "fetch_min": 3, "fetch_or": 4 | 5 | 3 | 12 | 9,
        "fetch_xor": 4 ^ 5 ^ 3 ^ 12 ^ 9, "exchange": 9,
    }  # fmt: skip
    assert values(y) == [steps[name]]


def test_float_maximum_by_exchange():
    header = '#include "mlx/backend/metal/kernels/atomic.h"\n'
    source = f"{I} mlx_atomic_fetch_max_explicit((device mlx_atomic<float>*)y, x[i], 0);"
    x = mx.random.normal((50,), key=mx.random.key(0))
    y = run(source, x, shape=(1,), init_value=-5, header=header)
    assert y.item() == mx.max(x).item()


def test_multiple_outputs():
    kernel = define(f"{I} low[i] = min(x[i], 3.0f); high[i] = x[i] > 3;", outputs=("low", "high"))
    low, high = kernel(
        inputs=[mx.arange(6).astype(mx.float32)], output_shapes=[(6,), (2, 3)],
        output_dtypes=[mx.float32, mx.bool_], grid=(6, 1, 1), threadgroup=(32, 1, 1),
    )  # fmt: skip
    assert values(low) == [0, 1, 2, 3, 3, 3]
    assert values(high) == [[False] * 3, [False, True, True]]
