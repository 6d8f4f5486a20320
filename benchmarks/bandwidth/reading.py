"""The machine's own read bandwidth: a sum over an array, compiled here, with nothing beside it."""

from __future__ import annotations

import ctypes
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

from zmlx.backend.cpu.build import find_compiler

SOURCE = Path(__file__).parent / "read.cpp"
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fPIC", "-shared", "-pthread")


def reader(size: int) -> Callable[[int], float]:
    """Return threads -> GB/s of reading `size` bytes once.

    The array comes from MLX, so that it lies in the same kind of memory as weights do.

    Args:
        size: bytes; several times the processor's caches.

    Raises:
        zmlx.backend.cpu.build.NativeUnavailable: there is no compiler.
        subprocess.CalledProcessError: the compiler refuses the source.
    """
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "read.so"
        command = [*shlex.split(find_compiler()), *FLAGS, str(SOURCE), "-o", str(library)]
        subprocess.run(command, check=True)
        read = ctypes.CDLL(str(library)).seconds_to_read
    read.restype = ctypes.c_double
    read.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
    array = mx.ones((size // 4,), mx.uint32)
    mx.eval(array)
    view = np.array(array, copy=False)

    def rate(threads: int) -> float:
        return view.nbytes / float(read(view.ctypes.data, view.nbytes // 8, threads)) / 1e9

    return rate
