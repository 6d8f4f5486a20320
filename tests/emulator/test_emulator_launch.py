"""A launch on the emulator takes what `mx.fast.metal_kernel` takes and gives a lazy array."""

from __future__ import annotations

import threading

import mlx.core as mx
import numpy as np
import pytest
from emulator.bodies import I, define, run, values

from zmlx.backend.emulator import faults

FLOATS = (mx.float32, mx.float16, mx.bfloat16)
WHOLE = (mx.int8, mx.uint8, mx.int16, mx.uint16, mx.int32, mx.uint32, mx.int64, mx.uint64)


@pytest.mark.parametrize("dtype", [*FLOATS, *WHOLE, mx.complex64], ids=str)
def test_every_dtype_goes_in_and_out(dtype):
    x = mx.arange(37).astype(dtype)
    y = run(f"{I} T v = x[i]; y[i] = v + v;", x, template=[("T", dtype)], group=8)
    assert y.dtype == dtype
    assert values(y.astype(mx.float32)) == values((x + x).astype(mx.float32))


def test_bool_goes_in_and_out():
    x = mx.array([True, False, True])
    assert values(run(f"{I} y[i] = !x[i];", x)) == [False, True, False]


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_16_bit_floats_round_after_each_operation(dtype):
    a, b, c = (mx.random.normal((999,), key=mx.random.key(k)).astype(dtype) for k in range(3))
    y = run(f"{I} y[i] = x[i] * z[i] + w[i];", a, b, c)
    assert mx.array_equal(y, a * b + c).item()
    y = run(f"{I} y[i] = x[i] / z[i] - w[i];", a, b, c)
    assert mx.array_equal(y, a / b - c, equal_nan=True).item()


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_conversions_to_16_bits_round_as_mlx(dtype):
    special = [0.0, -0.0, 1e-8, 6e-8, 65504.0, 65519.9, 65520.0, 1e38, 3e38, np.inf, -np.inf]
    edges = np.float32(1) + np.arange(64, dtype=np.float32) / 2**13
    x = mx.concatenate([mx.array(special), mx.array(edges), mx.random.normal((500,))])
    y = run(f"{I} y[i] = T(x[i]);", x, dtype=dtype, template=[("T", dtype)])
    assert mx.array_equal(y, x.astype(dtype)).item()


def test_scalars_shapes_strides_and_ndim():
    x = mx.arange(24).reshape(2, 3, 4).swapaxes(0, 2)
    source = f"{I} y[i] = i < 3 ? x_shape[i] : i < 6 ? int(x_strides[i - 3]) : x_ndim + z;"
    y = run(source, x, 10, shape=(7,), dtype=mx.int32, threads=7, ensure_row_contiguous=False)
    assert values(y) == [4, 3, 2, 1, 4, 12, 13]
    y = run(source, x, 10, shape=(7,), dtype=mx.int32, threads=7)
    assert values(y) == [4, 3, 2, 6, 2, 1, 13]


@pytest.mark.parametrize("contiguous", [True, False])
def test_inputs_that_are_not_contiguous(contiguous):
    x = mx.arange(60).astype(mx.float32).reshape(3, 20)[::-1, 1::3].T
    index = "i" if contiguous else "elem_to_loc(int64_t(i), x_shape, x_strides, x_ndim)"
    y = run(f"{I} y[i] = x[{index}];", x, ensure_row_contiguous=contiguous)
    assert mx.array_equal(y, x).item()


def test_small_inputs_scalars_and_empty_arrays():
    assert run(f"{I} y[i] = x + z[0] + w;", mx.array(1.5), mx.array([2.0]), 0.25).item() == 3.75
    empty = run(f"{I} y[i] = x[i];", mx.zeros((0, 3)), threads=0)
    assert empty.shape == (0, 3)
    assert values(empty) == []


def test_template_header_and_helpers_of_mlx():
    header = "template <typename T> T twice(T v) { return v + v; }\n"
    y = run(
        f"{I} if (flag) y[i] = ceildiv(twice(T(x[i])), N);",
        mx.arange(5),
        dtype=mx.int32,
        header=header,
        template=[("T", mx.int32), ("N", 3), ("flag", True)],
    )
    assert values(y) == [0, 1, 2, 2, 3]


def test_init_value_and_atomics():
    x = mx.arange(100) % 4
    y = run(
        f"{I} atomic_fetch_add_explicit(&y[x[i]], 1, memory_order_relaxed);",
        x, shape=(4,), dtype=mx.int32, init_value=7, atomic_outputs=True,
    )  # fmt: skip
    assert values(y) == [32] * 4
    y = run(
        f"{I} atomic_fetch_add_explicit(&y[0], x[i], memory_order_relaxed);",
        mx.ones((50,)), shape=(1,), init_value=0.5, atomic_outputs=True,
    )  # fmt: skip
    assert values(y) == [50.5]


def test_positions_in_a_grid_that_threadgroups_do_not_divide():
    names = (
        "thread_position_in_threadgroup", "threadgroup_position_in_grid", "threads_per_threadgroup",
        "threadgroups_per_grid", "threads_per_grid",
    )  # fmt: skip
    source = "uint3 p = thread_position_in_grid; uint at = (p.z * 5 + p.y) * 7 + p.x;" + "".join(
        f"y[at * 18 + {3 * n} + 0] = {name}.x; y[at * 18 + {3 * n} + 1] = {name}.y;"
        f"y[at * 18 + {3 * n} + 2] = {name}.z;"
        for n, name in enumerate(names)
    ) + "y[at * 18 + 15] = thread_index_in_threadgroup; y[at * 18 + 16] = " \
        "thread_index_in_simdgroup; y[at * 18 + 17] = simdgroup_index_in_threadgroup;"  # fmt: skip
    y = run(source, shape=(3, 5, 7, 18), dtype=mx.uint32, threads=(7, 5, 3), group=(4, 4, 2))
    for z, j, x in np.ndindex(3, 5, 7):
        group = np.array([x // 4, j // 4, z // 2])
        size = np.minimum([4, 4, 2], np.array([7, 5, 3]) - group * [4, 4, 2])
        inside = np.array([x, j, z]) - group * [4, 4, 2]
        index = inside[0] + size[0] * (inside[1] + size[1] * inside[2])
        expected = [*inside, *group, *size, 2, 2, 2, 7, 5, 3, index, index % 32, index // 32]
        assert values(y[z, j, x]) == [int(n) for n in expected]


def test_lazy_compiled_differentiated_and_evaluated_twice():
    square = define(f"{I} y[i] = x[i] * x[i];")

    def call(x):
        return square(
            inputs=[x], output_shapes=[x.shape], output_dtypes=[x.dtype],
            grid=(x.size, 1, 1), threadgroup=(16, 1, 1),
        )[0]  # fmt: skip

    wrapped = mx.custom_function(call)
    wrapped.vjp(lambda primal, cotangent, _: 2 * primal * cotangent)
    x = mx.arange(20).astype(mx.float32)
    compiled = mx.compile(lambda v: call(v + 1) * 2)
    assert values(compiled(x)) == values((x + 1) ** 2 * 2)
    assert values(compiled(x)) == values((x + 1) ** 2 * 2)
    assert values(mx.grad(lambda v: wrapped(v).sum())(x)) == values(2 * x)


def test_threads_launch_and_compile_at_once():
    results = {}

    def work(number):
        x = mx.full((64,), number, dtype=mx.float32)
        total = run(
            f"{I} threadgroup float s[64]; s[i] = x[i]; "
            "threadgroup_barrier(mem_flags::mem_threadgroup); y[i] = s[63 - i] + simd_sum(x[i]);",
            x, group=64, name="shared_by_threads",
        )  # fmt: skip
        results[number] = values(total)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: [n * 33.0] * 64 for n in range(6)}


def test_verbose_prints_the_kernel_as_mlx_writes_it(capsys):
    x = mx.arange(10).astype(mx.float16)
    define("y[0] = x[0] + s;", name="shown", inputs=("x", "s"))(
        inputs=[x, 2.0], output_shapes=[(1,)], output_dtypes=[mx.float16],
        grid=(1, 1, 1), threadgroup=(1, 1, 1), verbose=True,
    )  # fmt: skip
    text = capsys.readouterr().out
    for part in ("const device float16_t* x", "const constant float& s", "device float16_t* y"):
        assert part in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"group": 2048}, "2,048 threads"),
        ({"group": (32, 32, 2)}, "2,048 threads"),
        ({"group": 0}, "at least 1"),
        ({"threads": (4, -1, 1)}, "at least 0"),
        ({"threads": (4, 1)}, "three numbers"),
    ],
)
def test_launches_that_no_device_runs(options, words):
    with pytest.raises(ValueError, match=words):
        run(f"{I} y[i] = x[i];", mx.zeros(4), **options)


def test_threadgroup_memory_beyond_a_device():
    source = "threadgroup float s[{}]; s[0] = 1; y[0] = s[0];"
    assert run(source.format(8192), mx.zeros(1)).item() == 1
    with pytest.raises(faults.LimitError, match=r"'probe' takes 32,784 bytes"):
        run(source.format(8193), mx.zeros(1))


def test_numbers_of_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match=r"2 inputs given, it has 1 \(x\)"):
        run(f"{I} y[i] = x[i];", mx.zeros(4), mx.zeros(4), inputs=("x",))
    with pytest.raises(ValueError, match="has no outputs; name at least one"):
        define("", outputs=())


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"source": f"{I}\n\n  y[i] = lost(x[i]);"}, r"broken \(body\):3:10: error: .*lost"),
        (
            {"source": f"{I} y[i] = x[i];", "header": "\nfloat f() { return g(); }\n"},
            r"broken \(header\):2:\d+: error: .*'?g'?",
        ),
        ({"source": f"{I} bfloat b = 0.5f; y[i] = b;"}, r"broken \(body\):1:.*bfloat"),
        ({"source": f"{I} y[i] = x[i]"}, r"broken \(body\):"),
        ({"source": f"{I} x[i] = y[i];"}, r"broken \(body\):1:.*read-only"),
    ],
)
def test_a_source_that_does_not_compile_names_its_line(options, place):
    with pytest.raises(faults.CompileError, match=place):
        run(options.pop("source"), mx.zeros(4), name="broken", **options)
