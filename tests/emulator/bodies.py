"""Kernels of one line for the tests of the emulator."""

from __future__ import annotations

import mlx.core as mx

from zmlx.backend.definition import Definition
from zmlx.backend.launch import launcher

I = "uint i = thread_position_in_grid.x;"  # noqa: E741


def define(source, name="probe", inputs=("x",), outputs=("y",), **options):
    """Return a kernel on the emulator."""
    return launcher(Definition(name, tuple(inputs), tuple(outputs), source, **options), "emulator")


def run(source, *inputs, shape=None, dtype=None, threads=None, group=32, **options):
    """Run a kernel with one output, like its first input where nothing else is said."""
    launch = {k: options.pop(k) for k in ("template", "init_value", "stream") if k in options}
    names = options.pop("inputs", ("x", "z", "w")[: len(inputs)])
    first = inputs[0] if inputs and isinstance(inputs[0], mx.array) else mx.array(0.0)
    shape = first.shape if shape is None else shape
    threads = threads if threads is not None else max(first.size, 1)
    [out] = define(source, inputs=names, **options)(
        inputs=list(inputs),
        output_shapes=[shape],
        output_dtypes=[dtype or first.dtype],
        grid=threads if isinstance(threads, tuple) else (threads, 1, 1),
        threadgroup=group if isinstance(group, tuple) else (group, 1, 1),
        **launch,
    )
    return out


def values(array):
    """Return an array's elements as a list."""
    return array.tolist()
