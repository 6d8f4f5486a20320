"""Runs hand-written CUDA bodies on the CPU (`warps.hpp`), in the place of `mx.fast.cuda_kernel`."""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
from nvrtc_program import DTYPES, assemble
from precompiled import compile_with

from zmlx.backend.cuda import CudaSource

HEADER = Path(__file__).with_name("warps.hpp")
#: int8 and so on of the same size, which numpy knows
BITS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


@cache
def _library(text: str) -> ctypes.CDLL:
    """Compile a program."""
    digest = hashlib.sha256((text + HEADER.read_text()).encode()).hexdigest()[:20]
    folder = Path(tempfile.gettempdir()) / f"zmlx-warps-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    library = folder / f"{digest}.so"
    if not library.is_file():
        compile_with(HEADER, ["-std=c++20", "-O1", "-w", "-shared", "-fPIC"], text, library)
    found = ctypes.CDLL(str(library))
    found.launch.restype = ctypes.c_char_p
    return found


def _shared(array: mx.array) -> np.ndarray:
    """Return numpy's view of the memory of an evaluated array."""
    plain = array.view(BITS[array.dtype.size])
    mx.eval(plain)
    return np.asarray(plain)


@cache
def _phase() -> int:
    """Return how far MLX's own buffers on the CPU are from 16 bytes; on a GPU they are not."""
    return _shared(mx.zeros(64, mx.uint32)).ctypes.data % 16


def _aligned(view: np.ndarray) -> np.ndarray:
    """Return a copy with the same strides that lies as on a GPU."""
    extent = view.itemsize + sum(
        (n - 1) * s for n, s in zip(view.shape, view.strides, strict=True) if n
    )
    room = np.zeros(extent + 32, np.uint8)
    start = (view.ctypes.data - _phase() - room.ctypes.data) % 16
    bytes_ = room[start : start + extent]
    copy = np.ndarray(view.shape, view.dtype, bytes_.data, strides=view.strides)
    copy[...] = view
    return copy


def _program(name: str, function: str, source: CudaSource, inputs: list[mx.array], outputs) -> str:
    """Return a kernel with a function around it that takes pointers, strides and shapes."""
    arguments, at = [], 0
    for n, array in zip(source.input_names, inputs, strict=True):
        arguments.append(f"(const {DTYPES[array.dtype]}*)pointers[{at}]")
        for what, kind, table in (
            ("shape", "Shape", "shapes"),
            ("strides", "Strides", "strides"),
        ):
            if array.ndim and f"{n}_{what}" in source.body:
                arguments.append(f"{kind}({table}[{at}])")
        at += 1
    for dtype in outputs:
        arguments.append(f"({DTYPES[dtype]}*)pointers[{at}]")
        at += 1
    return f"""{function}
namespace mlx::core::cu {{
extern "C" const char* launch(void** pointers, Shape* shapes, Strides* strides, unsigned* grid,
                              int threads, bool backwards) {{
  return run_grid({{grid[0], grid[1], grid[2]}}, threads, backwards, [&] {{
    custom_kernel_{name}({", ".join(arguments)});
  }});
}}
}}
"""


def kernels_on_cpu(header: Callable[[str], str], backwards: Callable[[], bool]):
    """Return a stand-in for `mx.fast.cuda_kernel`, which computes when it is called.

    Args:
        header: from what stands before the kernel to what the CPU's compiler takes.
        backwards: whether threads and blocks run from the last to the first.
    """

    def cuda_kernel(*, name, input_names, output_names, source, header: str = "", **_):
        def launch(*, inputs, output_shapes, output_dtypes, grid, threadgroup, template, **_):
            mx.eval(inputs)
            text = CudaSource(translated(header), source, tuple(input_names))
            function = assemble(
                name,
                text,
                [(x.dtype, x.ndim) for x in inputs],
                list(zip(output_names, output_dtypes, strict=True)),
                template,
            ).replace("namespace cg = cooperative_groups;", "")
            library = _library(_program(name, function, text, inputs, output_dtypes))
            outputs = [mx.full(s, 7, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]
            mx.eval(outputs)
            originals = [_shared(x) for x in (*inputs, *outputs)]
            views = [_aligned(view) for view in originals]
            shapes, strides = (np.zeros((len(inputs), 10), t) for t in (np.int32, np.int64))
            for i, (array, view) in enumerate(zip(inputs, views, strict=False)):
                shapes[i, : array.ndim] = view.shape
                strides[i, : array.ndim] = [s // view.itemsize for s in view.strides]
            pointers = (ctypes.c_void_p * len(views))(*(v.ctypes.data for v in views))
            blocks = [-(-g // t) for g, t in zip(grid, threadgroup, strict=True)]
            told = library.launch(
                pointers,
                shapes.ctypes.data_as(ctypes.c_void_p),
                strides.ctypes.data_as(ctypes.c_void_p),
                (ctypes.c_uint * 3)(*blocks),
                int(np.prod(threadgroup)),
                backwards(),
            )
            assert not told, told.decode()
            for original, view in zip(originals, views, strict=True):
                original[...] = view
            return outputs

        return launch

    translated = header
    return cuda_kernel
