"""Metal kernels on a CUDA device: values against numpy, grids, launches, threads.

One process, `pytest tests/cuda`; each kernel is compiled once, about a second each.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from metal.cases import MAKERS, as_numpy, differences

from zmlx.backend.definition import CudaBody, Definition
from zmlx.backend.launch import launcher
from zmlx.backend.signature import ATTRIBUTES

pytestmark = pytest.mark.skipif(not mx.cuda.is_available(), reason="no CUDA device")


def definition(source: str, **settings: Any) -> Definition:
    settings = {"input_names": ("x",), "output_names": ("out",), **settings}
    return Definition(name="under_test", source=source, **settings)


def run(source: str, *inputs: Any, grid: Any, shape: Any, dtype: Any = mx.float32, **more: Any):
    """Launch a kernel of inputs x, y, ... with one output; settings go to its definition."""
    names = ("x", "y", "z")[: len(inputs)]
    call = {k: more.pop(k) for k in ("template", "init_value", "stream") if k in more}
    threadgroup = more.pop("threadgroup", (32, 1, 1))
    kernel = launcher(definition(source, input_names=names, **more), "cuda")
    return kernel(
        inputs=list(inputs),
        output_shapes=[shape],
        output_dtypes=[dtype],
        grid=grid,
        threadgroup=threadgroup,
        **call,
    )[0]


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_values(make):
    told: list[str] = []
    for case in make():
        try:
            outputs = launcher(case.definition(), "cuda")(**case.arguments())
            mx.eval(outputs)
        except Exception as error:
            told.append(f"{case.name}: {type(error).__name__}: {str(error)[:1500]}")
            continue
        kinds = case.outputs.values()
        for out, truth, (_, dtype) in zip(outputs, case.truths(), kinds, strict=True):
            told += differences(case, as_numpy(out), truth, dtype)
    assert not told, "\n" + "\n".join(told)


def test_the_catalog_is_right_as_MLX_is_set():
    """Tests run with MLX's float32 products in 32 bits; users do not."""
    given = {name: value for name, value in os.environ.items() if name != "MLX_ENABLE_TF32"}
    program = [sys.executable, str(Path(__file__).with_name("sanitized.py")), "catalog"]
    done = subprocess.run(program, env=given, capture_output=True, text=True, check=False)
    assert done.stdout == "catalog: right\n", done.stdout + done.stderr


# ---- the grid ------------------------------------------------------------------------------------


def metal_positions(grid: tuple[int, ...], group: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Return what every thread of a grid must see, by the name; each of shape (z, y, x, 3)."""
    group = tuple(min(g, t) for g, t in zip(grid, group, strict=True))
    groups = tuple(-(-g // t) for g, t in zip(grid, group, strict=True))
    seen = {name: np.zeros((*grid[::-1], 3), np.int64) for name in ATTRIBUTES}
    for z, y, x in itertools.product(*(range(n) for n in grid[::-1])):
        at = (x, y, z)
        block = tuple(a // t for a, t in zip(at, group, strict=True))
        inside = tuple(a % t for a, t in zip(at, group, strict=True))
        size = tuple(min(t, g - b * t) for g, t, b in zip(grid, group, block, strict=True))
        index = inside[0] + size[0] * (inside[1] + size[1] * inside[2])
        threads, full = int(np.prod(size)), int(np.prod(group))
        values = {
            "dispatch_quadgroups_per_threadgroup": -(-full // 4),
            "dispatch_simdgroups_per_threadgroup": -(-full // 32),
            "dispatch_threads_per_threadgroup": group,
            "grid_origin": (0, 0, 0),
            "grid_size": grid,
            "quadgroup_index_in_threadgroup": index // 4,
            "quadgroups_per_threadgroup": -(-threads // 4),
            "simdgroup_index_in_threadgroup": index // 32,
            "simdgroups_per_threadgroup": -(-threads // 32),
            "thread_execution_width": 32,
            "thread_index_in_quadgroup": index % 4,
            "thread_index_in_simdgroup": index % 32,
            "thread_index_in_threadgroup": index,
            "thread_position_in_grid": at,
            "thread_position_in_threadgroup": inside,
            "threadgroup_position_in_grid": block,
            "threadgroups_per_grid": groups,
            "threads_per_grid": grid,
            "threads_per_simdgroup": 32,
            "threads_per_threadgroup": size,
        }
        for name, value in values.items():
            seen[name][z, y, x] = value
    return seen


GRIDS = [
    ((64, 1, 1), (32, 1, 1)),
    ((12, 6, 4), (4, 3, 2)),
    ((7, 1, 1), (32, 1, 1)),
    ((33, 1, 1), (32, 1, 1)),
    ((1000, 1, 1), (256, 1, 1)),
    ((10, 7, 3), (4, 4, 2)),
    ((9, 5, 1), (8, 8, 1)),
    ((5, 3, 7), (2, 3, 4)),
]


@pytest.mark.parametrize(("grid", "group"), GRIDS, ids=str)
def test_every_thread_knows_its_place(grid, group):
    lines = []
    for k, (name, kind) in enumerate(ATTRIBUTES.items()):
        for c in range(3):
            value = f"{name}.{'xyz'[c]}" if kind == "uint3" else name
            lines.append(f"out[(at * {len(ATTRIBUTES)} + {k}) * 3 + {c}] = {value};")
    source = """
        uint3 p = thread_position_in_grid, g = threads_per_grid;
        uint at = p.x + g.x * (p.y + g.y * p.z);
    """ + "\n".join(lines)
    shape = (*grid[::-1], len(ATTRIBUTES), 3)
    out = np.array(
        run(source, grid=grid, threadgroup=group, shape=shape, dtype=mx.int32, init_value=-7)
    )
    wrong = []
    for k, (name, want) in enumerate(metal_positions(grid, group).items()):
        got = out[..., k, :]
        if (got != want).any():
            at = tuple(np.argwhere(got != want)[0][:3])
            wrong.append(f"{name} at (z, y, x) {at}: {got[at]}, right is {want[at]}")
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize("n", [1, 31, 33, 77, 500])
def test_sums_over_a_threadgroup_that_is_cut_off(n):
    """Barriers, shuffles and shared memory when a part of the block does not exist."""
    source = """
        threadgroup float parts[8];
        uint i = thread_position_in_grid.x;
        float s = simd_sum(x[i]);
        if (thread_index_in_simdgroup == 0) { parts[simdgroup_index_in_threadgroup] = s; }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        float all = 0;
        for (uint k = 0; k < simdgroups_per_threadgroup; ++k) { all += parts[k]; }
        out[i] = all;
    """
    x = np.random.default_rng(n).integers(-9, 9, n).astype(np.float32)
    out = np.array(run(source, mx.array(x), grid=(n, 1, 1), threadgroup=(256, 1, 1), shape=(n,)))
    want = np.concatenate([np.full(len(g), g.sum()) for g in np.split(x, range(256, n, 256))])
    assert (out == want).all()


def test_nothing_is_written_outside_of_the_grid():
    n = 37
    out = run(
        "out[thread_position_in_grid.x] = 1;",
        grid=(n, 1, 1),
        threadgroup=(16, 1, 1),
        shape=(64,),
        init_value=0.0,
    )
    assert np.array(out).tolist() == [1.0] * n + [0.0] * (64 - n)


def test_an_empty_grid_runs_no_thread():
    out = run("out[0] = 1;", grid=(0, 1, 1), shape=(4,), init_value=5.0)
    assert np.array(out).tolist() == [5.0] * 4
    empty = run("out[thread_position_in_grid.x] = 1;", grid=(0, 1, 1), shape=(0, 3))
    mx.eval(empty)
    assert empty.shape == (0, 3)


def test_a_thread_that_returns_is_not_waited_for():
    source = """
        uint i = thread_position_in_grid.x;
        if (i >= 40) return;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        out[i] = simd_sum(1.0f);
    """
    out = run(source, grid=(64, 1, 1), threadgroup=(64, 1, 1), shape=(64,), init_value=0.0)
    assert np.array(out).tolist() == [32.0] * 32 + [8.0] * 8 + [0.0] * 24


# ---- launches ------------------------------------------------------------------------------------

DOUBLE = "uint i = thread_position_in_grid.x; out[i] = T(x[i] * 2);"


@pytest.mark.parametrize(
    "dtype", [mx.float32, mx.float16, mx.bfloat16, mx.int32, mx.uint8, mx.bool_]
)
def test_one_source_for_every_dtype(dtype):
    x = mx.array([0, 1, 1, 0, 1, 1, 1]).astype(dtype)
    out = run(DOUBLE, x, grid=(7, 1, 1), shape=(7,), dtype=dtype, template=[("T", dtype)])
    assert mx.array_equal(out, (x * 2).astype(dtype)).item()


def test_a_view_is_copied_only_when_asked_for():
    x = mx.arange(12, dtype=mx.float32).reshape(3, 4).T
    source = "uint i = thread_position_in_grid.x; out[i] = x[i];"
    dense = run(source, x, grid=(12, 1, 1), shape=(12,))
    raw = run(source, x, grid=(12, 1, 1), shape=(12,), ensure_row_contiguous=False)
    assert mx.array_equal(dense, x.flatten()).item()
    assert mx.array_equal(raw, mx.arange(12, dtype=mx.float32)).item()


@pytest.mark.parametrize("value", [0.0, 3.5, -1.0])
def test_outputs_start_with_init_value(value):
    out = run("if (thread_position_in_grid.x == 1) out[1] = 9;", grid=(4, 1, 1), shape=(4,),
              init_value=value)  # fmt: skip
    assert np.array(out).tolist() == [value, 9.0, value, value]


def test_a_scalar_is_a_value_and_an_array_a_pointer_in_one_definition():
    kernel = launcher(definition("out[0] = *x;"), "cuda")
    call = {"output_shapes": [(1,)], "output_dtypes": [mx.float32], "grid": (1, 1, 1)}
    call |= {"threadgroup": (1, 1, 1)}
    assert kernel(inputs=[mx.array([4.0])], **call)[0].item() == 4
    source = "out[thread_position_in_grid.x] = x + 1;"
    for x in (2, 2.0, mx.array(2.0), mx.array(2, mx.int32)):
        assert run(source, x, grid=(1, 1, 1), shape=(1,)).item() == 3


def test_the_shape_of_a_scalar_is_an_error():
    with pytest.raises(ValueError, match=r"'x' has no dimensions here.*x_shape"):
        run("out[0] = x_shape[0];", mx.array(1.0), grid=(1, 1, 1), shape=(1,))


def test_negative_and_repeated_template_values():
    source = "out[thread_position_in_grid.x] = N * 10 + (F ? 1 : 0);"
    for n, flag in ((-3, True), (3, True), (-3, False), (3, False)):
        out = run(source, grid=(1, 1, 1), shape=(1,), template=[("N", n), ("F", flag)])
        assert out.item() == n * 10 + flag


def test_a_compile_error_names_the_line():
    out = run("uint i = 0;\nout[i] = missing;", grid=(1, 1, 1), shape=(1,))
    with pytest.raises(RuntimeError, match=r'under_test\(2\): error: identifier "missing"'):
        mx.eval(out)


def test_a_body_for_cuda_is_taken_as_it_is():
    kernel = launcher(
        definition(
            "this is not Metal",
            cuda=CudaBody(
                "out[threadIdx.x] = twice(__ldg(x + threadIdx.x));",
                "__device__ float twice(float v) { return v + v; }\n",
            ),
        ),
        "cuda",
    )
    x = mx.arange(8, dtype=mx.float32)
    (out,) = kernel(inputs=[x], output_shapes=[(8,)], output_dtypes=[mx.float32], grid=(8, 1, 1),
                    threadgroup=(8, 1, 1))  # fmt: skip
    assert mx.array_equal(out, x * 2).item()


# ---- transformations, streams, threads -----------------------------------------------------------


def doubled(x: mx.array) -> mx.array:
    return run(DOUBLE, x, grid=(x.size, 1, 1), shape=x.shape, dtype=x.dtype,
               template=[("T", x.dtype)])  # fmt: skip


@pytest.mark.parametrize("n", [64, 77])
def test_under_compile(n):
    f = mx.compile(lambda x: doubled(doubled(x) + 1))
    for start in (0, 5):
        x = mx.arange(start, start + n, dtype=mx.float32)
        assert mx.array_equal(f(x), x * 4 + 2).item()


def test_vmap_and_gradients_are_refused_by_mlx():
    """MLX has neither for custom kernels; authors add them with mx.custom_function."""
    with pytest.raises(Exception, match=r"(?i)vmap|not implemented"):
        mx.eval(mx.vmap(doubled)(mx.ones((3, 32))))
    with pytest.raises(Exception, match=r"(?i)vjp|not implemented"):
        mx.eval(mx.grad(lambda x: doubled(x).sum())(mx.ones(32)))


def test_streams():
    streams = [mx.new_stream(mx.gpu) for _ in range(3)]
    outs = []
    for k, stream in enumerate(streams * 3):
        x = mx.full((65,), float(k))
        outs.append(run(DOUBLE, x, grid=(65, 1, 1), shape=(65,), stream=stream,
                        template=[("T", mx.float32)]))  # fmt: skip
    mx.eval(outs)
    assert [o[64].item() for o in outs] == [2.0 * k for k in range(9)]


def test_threads():
    def work(k: int) -> bool:
        with mx.stream(mx.new_stream(mx.gpu)):
            x = mx.full((40 + k,), float(k))
            return all(mx.array_equal(doubled(x), x + x).item() for _ in range(20))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))


def test_many_launches_of_changing_sizes():
    for n in range(1, 200, 7):
        x = mx.arange(n, dtype=mx.float32)
        assert mx.array_equal(doubled(x), x * 2).item(), n
