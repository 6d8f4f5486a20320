"""What a GPU would let pass and the emulator finds: planted faults, and kernels without any."""

from __future__ import annotations

import re

import mlx.core as mx
import pytest
from emulator.bodies import I, define, run, values

from zmlx.backend.emulator import faults

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


def fault(kind, source, *inputs, **options):
    """Run a kernel that must fail; return the fault."""
    out = run(source, *inputs, name="planted", **options)
    with pytest.raises(faults.Fault) as caught:
        mx.eval(out)
    assert type(caught.value) is kind
    assert "kernel 'planted'" in str(caught.value)
    return caught.value


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.uint8], ids=str)
@pytest.mark.parametrize(("index", "element"), [("i + 1", 40), ("i - 1", -1), ("i + 400", 400)])
def test_reads_outside_an_input(index, element, dtype):
    x = mx.zeros((40,), dtype=dtype)
    found = fault(faults.OutOfBounds, f"{I}\ny[i] = x[int({index})];", x)
    assert f"reads element {element} of input 'x', which has 40" in str(found)
    assert found.place == "planted (body):2"
    assert f"thread ({39 if element == 40 else 0}, 0, 0) of the grid" in found.thread


def test_reads_that_end_in_another_array_of_the_launch():
    x = mx.zeros((8,))
    found = fault(faults.OutOfBounds, f"{I} y[i] = x[i + 4] + z[i];", x, mx.ones((8,)))
    assert "element 8 of input 'x'" in str(found)


def test_writes_outside_an_output_in_the_rounded_up_grid():
    found = fault(faults.OutOfBounds, f"{I} y[i] = 1;", shape=(30,), threads=32)
    assert "writes element 30 of output 'y', which has 30" in str(found)


def test_reads_outside_through_a_cast_and_a_vector():
    x = mx.zeros((10,), dtype=mx.float32)
    source = f"{I} y[i] = ((const device float4*)x)[i].w;"
    found = fault(faults.OutOfBounds, source, x, shape=(3,), threads=3)
    assert "input 'x', which has 10" in str(found)


def test_a_strided_input_ends_with_its_last_element():
    x = mx.arange(64).astype(mx.float32).reshape(8, 8)[:, ::2]
    source = "y[0] = x[{}];"
    last = run(source.format(62), x, shape=(1,), threads=1, ensure_row_contiguous=False)
    assert last.item() == 62
    fault(
        faults.OutOfBounds, source.format(63), x, shape=(1,), threads=1, ensure_row_contiguous=False
    )


def test_outside_threadgroup_memory_and_local_arrays():
    source = f"threadgroup float s[32], t[32]; {I} s[i] = 0; t[i] = 0; {BARRIER} threadgroup float* p = s; y[i] = p[i + 1];"  # noqa: E501
    found = fault(faults.OutOfBounds, source, shape=(32,), dtype=mx.float32, threads=32)
    assert "reads element 32 of threadgroup variable 's', which has 32" in str(found)
    source = f"{I} float a[4] = {{1, 2, 3, 4}}; y[i] = a[i];"
    found = fault(faults.OutOfBounds, source, shape=(5,), dtype=mx.float32, threads=5)
    assert "takes element 4 of 'float [4]'" in str(found)
    assert found.place == "planted (body):1"


def test_constants_of_the_header_may_be_read():
    header = "constant float table[3] = {1.0f, 2.0f, 4.0f};\n"
    y = run(f"{I} y[i] = table[i % 3];", shape=(6,), dtype=mx.float32, threads=6, header=header)
    assert values(y) == [1, 2, 4, 1, 2, 4]


def test_writes_to_an_input():
    source = f"{I} const_cast<float*>(x)[i] = 1; y[i] = 1;"
    found = fault(faults.ReadOnly, source, mx.zeros((40,)))
    assert "writes element 0 of input 'x'" in str(found)


def test_outputs_that_are_not_written():
    found = fault(faults.Unwritten, f"{I} if (i != 7 && i != 9) y[i] = x[i];", mx.zeros((40,)))
    assert "2 of the 40 elements of output 'y' were never written" in str(found)
    assert "element 7" in str(found)
    y = run(f"{I} if (i != 7) y[i] = 1;", shape=(9,), dtype=mx.float32, threads=9, init_value=5)
    assert values(y) == [1, 1, 1, 1, 1, 1, 1, 5, 1]


@pytest.mark.parametrize("dtype", [mx.float32, mx.int8, mx.bfloat16, mx.bool_], ids=str)
def test_no_written_value_passes_for_an_unwritten_one(dtype):
    every = mx.arange(256).astype(mx.uint8).view(mx.int8)
    x = every.astype(dtype) if dtype != mx.bfloat16 else mx.full((4,), float("nan"), dtype=dtype)
    assert run(f"{I} y[i] = x[i];", x).size == x.size
    half = f"{I} if (i % 2) y[i] = x[i];"
    fault(faults.Unwritten, half, x)


def test_reads_of_an_output_that_is_not_written_yet():
    found = fault(faults.Uninitialized, f"{I} y[i] += x[i];", mx.zeros((4,)))
    assert "reads element 0 of output 'y'" in str(found)


def test_a_missing_barrier_between_write_and_read():
    source = f"threadgroup float s[64];\n{I}\ns[i] = x[i];\n{{}}\ny[i] = s[63 - i];"
    x = mx.arange(64).astype(mx.float32)
    assert values(run(source.format(BARRIER), x, group=64)) == values(x[::-1])
    for missing in (
        "",
        "simdgroup_barrier(mem_flags::mem_threadgroup);",
        "threadgroup_barrier(mem_flags::mem_device);",
        "simd_sum(x[i]);",
    ):
        found = fault(faults.Race, source.format(missing), x, group=64)
        assert "threadgroup variable 's'" in str(found)
        assert "without a barrier for threadgroup memory" in str(found)
        assert re.match(r"planted \(body\):[35]", found.place)


def test_a_missing_barrier_between_read_and_the_next_write():
    source = f"""threadgroup float s[1]; {I} if (i == 0) s[0] = x[0]; {BARRIER}
    y[i] = s[0]; LAST
    if (i == 63) s[0] = 5;"""
    x = mx.full((64,), 2.0)
    assert values(run(source.replace("LAST", BARRIER), x, group=64)) == [2] * 64
    found = fault(faults.Race, source.replace("LAST", ""), x, group=64)
    assert "writes another value to element 0 of threadgroup variable 's'" in str(found)
    assert "read, without a barrier" in str(found)
    assert found.place == "planted (body):3"


def test_within_a_simdgroup_its_own_barrier_is_enough():
    source = f"threadgroup float s[32]; {I} s[i] = x[i]; {{}} y[i] = s[31 - i];"
    x = mx.arange(32).astype(mx.float32)
    barrier = "simdgroup_barrier(mem_flags::mem_threadgroup);"
    assert values(run(source.format(barrier), x)) == values(x[::-1])
    fault(faults.Race, source.format(""), x)


def test_threads_that_write_the_same_value_do_no_harm():
    source = f"threadgroup int flag; {I} flag = {{}}; {BARRIER} y[i] = flag;"
    y = run(source.format("3"), shape=(64,), dtype=mx.int32, threads=64, group=64)
    assert values(y) == [3] * 64
    fault(faults.Race, source.format("i"), shape=(64,), dtype=mx.int32, threads=64, group=64)


def test_two_threads_that_write_one_element():
    fault(faults.Race, f"{I} y[i / 2] = x[i];", mx.arange(64).astype(mx.float32), shape=(32,))
    y = run(f"{I} y[i / 2] = x[i];", mx.ones((64,)), shape=(32,))
    assert values(y) == [1] * 32


def test_what_another_threadgroup_wrote_is_not_there_for_sure():
    source = f"{I} y[i] = 1; threadgroup_barrier(mem_flags::mem_device); y[i] += y[{{}}];"
    same = source.format("i")
    assert values(run(same, shape=(64,), dtype=mx.int32, threads=64)) == [2] * 64
    found = fault(
        faults.Race, source.format("i < 32 ? i : i - 32"), shape=(64,), dtype=mx.int32, threads=64
    )
    assert "a thread of another threadgroup wrote" in str(found)


def test_threadgroup_memory_that_nobody_wrote():
    found = fault(faults.Uninitialized, f"threadgroup float s[32]; {I} y[i] = s[i];", mx.zeros(32))
    assert "reads element 0 of threadgroup variable 's', which this threadgroup never wrote" in str(
        found
    )
    # What the threadgroup before left there is not there either.
    source = f"threadgroup float s[32]; {I} if (i < 32) s[i] = 1; {BARRIER} y[i] = s[i % 32];"
    found = fault(faults.Uninitialized, source, mx.zeros(64))
    assert "threadgroup (1, 0, 0)" in found.thread


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (f"{I} if (i < 50)\n{BARRIER} y[i] = 1;", r"thread 50 .* has returned"),
        (
            f"{I} if (i >= 50) {{ y[i] = 1; return; }}\n{BARRIER} y[i] = 1;",
            r"thread 50 .* returned",
        ),
        (f"{I} if (i < 50)\n{BARRIER} else\n{BARRIER} y[i] = 1;", r"waits at the one in .*:3"),
    ],
)
def test_a_barrier_that_not_all_threads_reach(source, words):
    found = fault(faults.Divergence, source, shape=(128,), dtype=mx.float32, threads=128, group=128)
    assert re.search(words, str(found))
    assert found.place == "planted (body):2"


def test_a_simdgroup_barrier_that_not_all_lanes_reach():
    source = f"{I} if (i % 2) simdgroup_barrier(mem_flags::mem_none); y[i] = 1;"
    found = fault(faults.Divergence, source, shape=(32,), dtype=mx.float32, threads=32)
    assert "a simdgroup_barrier that not all lanes reach" in str(found)


def test_threads_outside_of_the_grid_are_missed_by_no_barrier():
    source = f"threadgroup float s[64]; {I} s[i % 64] = x[i]; {BARRIER} y[i] = s[i % 64];"
    x = mx.arange(70).astype(mx.float32)
    assert values(run(source, x, group=64)) == values(x)


@pytest.mark.parametrize("use", ["v[i].x", "v[i][3]", "dot(v[i], v[i])"])
def test_a_vector_at_an_address_that_is_no_multiple(use):
    source = f"{I} auto v = (const device float4*)(x + 1);\ny[i] = {use};"
    found = fault(faults.Misaligned, source, mx.zeros((40,)), shape=(2,), threads=2)
    assert "is no multiple of 16" in str(found)
    assert found.place == "planted (body):2"
    # A slice begins where it begins, on a device too.
    aligned = f"{I} y[i] = ((const device float4*)x)[i].x;"
    x = mx.arange(40).astype(mx.float32)
    assert values(run(aligned, x[4:], shape=(2,), threads=2)) == [4, 8]
    fault(faults.Misaligned, aligned, x[2:], shape=(2,), threads=2)


def test_local_variables_that_no_stack_holds():
    source = f"{I} float a[40000]; for (int k = 0; k < 40000; ++k) a[k] = k + i; y[i] = a[i];"
    with pytest.raises(faults.CompileError, match=r"frame size of 16\d{4} bytes"):
        run(source, shape=(2,), dtype=mx.float32, threads=2)


def test_after_a_fault_all_goes_on():
    x = mx.arange(8).astype(mx.float32)
    bad = run(f"{I} y[i] = x[i + 1];", x)
    for _ in range(2):  # it stays uncomputed
        with pytest.raises(faults.OutOfBounds):
            mx.eval(bad)
    with pytest.raises(faults.OutOfBounds):
        mx.eval(mx.exp(bad) + 1)
    good = run(f"{I} y[i] = x[i] + 1;", mx.exp(x) * 2)
    assert values(good + 1) == values(mx.exp(x) * 2 + 2)


def test_a_plain_bug_gives_its_plain_result():
    kernel = define(f"{I} y[i] = x[i] - 1;")
    x = mx.arange(4).astype(mx.float32)
    [y] = kernel(
        inputs=[x], output_shapes=[x.shape], output_dtypes=[x.dtype], grid=(4, 1, 1),
        threadgroup=(4, 1, 1),
    )  # fmt: skip
    assert values(y) == [-1, 0, 1, 2]
