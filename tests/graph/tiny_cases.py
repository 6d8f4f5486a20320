"""Makes programs of MLX functions, for tests: a small exporter, and how results are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from zmlx.backend import strict
from zmlx.graph.nodes import Node, Value
from zmlx.graph.tiny import TinyProgram, tiny_program


def traced(
    function: Callable[..., object], *arrays: mx.array
) -> tuple[list[Node], list[Value], list[Value], dict[Value, mx.array]]:
    """Return nodes, inputs, outputs and constants of a function, as `tiny_program` takes them."""
    values: dict[str, Value] = {}

    def value(description: tuple[str, Sequence[int], mx.Dtype]) -> Value:
        name, shape, dtype = description
        return values.setdefault(name, Value(tuple(shape), dtype, name))

    nodes: list[Node] = []
    ends: dict[str, list[Value]] = {}
    constants: dict[Value, mx.array] = {}

    def note(event: dict) -> None:
        kind = event["type"]
        if kind in ("inputs", "outputs"):
            ends[kind] = [value(d) for d in event[kind]]
        elif kind == "constants":
            for name, array in event["constants"]:
                constants[value((name, array.shape, array.dtype))] = array
        elif kind == "primitive":
            outputs = tuple(value(d) for d in event["outputs"])
            inputs = tuple(value(d) for d in event["inputs"])
            nodes.append(Node(event["name"], inputs, outputs, tuple(event["arguments"])))

    mx.export_function(note, function, *arrays)
    return nodes, ends["inputs"], ends["outputs"], constants


def program_of(function: Callable[..., object], *arrays: mx.array) -> TinyProgram:
    """Return a function of arrays as a program."""
    return looked_at(tiny_program(*traced(function, *arrays)))


def looked_at(program: TinyProgram) -> TinyProgram:
    """Assert that a program's kernel is Metal, for what clang and the strict rules see."""
    found = strict.check(
        program.definition,
        input_dtypes=[value.dtype for value in program.reads],
        input_shapes=[value.shape for value in program.reads],
        output_dtypes=[value.dtype for value in program.outputs],
    )
    assert not found, "\n".join(str(diagnosis) for diagnosis in found)
    return program


def bits(array: mx.array) -> np.ndarray:
    """Return an array's elements as unsigned numbers, NaN as one of them."""
    if array.dtype == mx.bfloat16:
        array = array.astype(mx.float32)
    plain = np.array(array)
    if plain.dtype.kind == "f":
        plain = np.where(np.isnan(plain), np.nan, plain).astype(plain.dtype)
        return plain.view({2: np.uint16, 4: np.uint32}[plain.dtype.itemsize])
    return plain


def agree(given: mx.array, expected: mx.array, tolerance: float | None = None) -> None:
    """Assert that arrays are equal bit by bit, or within a relative tolerance of the largest."""
    assert given.shape == expected.shape
    assert given.dtype == expected.dtype
    if tolerance is None:
        different = np.flatnonzero(bits(given) != bits(expected))
        assert not different.size, (
            f"{different.size} differ, first at {different[0]}: "
            f"{given.reshape(-1)[int(different[0])]} for {expected.reshape(-1)[int(different[0])]}"
        )
        return
    one, other = (np.array(a.astype(mx.float32), dtype=np.float64) for a in (given, expected))
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    scale = max(np.max(np.abs(other[np.isfinite(other)]), initial=0.0), 1e-30)
    with np.errstate(invalid="ignore"):
        error = np.max(np.where(same, 0.0, np.abs(one - other)), initial=0.0) / scale
    assert error <= tolerance, f"relative error {error}"


def holds(
    function: Callable[..., object],
    *arrays: mx.array,
    tolerance: float | None = None,
    expected: Callable[..., object] | None = None,
) -> TinyProgram:
    """Assert that a function's program gives what MLX gives on the CPU; return the program."""
    program = program_of(function, *arrays)
    outputs = program(*arrays)
    wanted = (expected or function)(*arrays)
    wanted = [wanted] if isinstance(wanted, mx.array) else list(wanted)
    assert len(outputs) == len(wanted)
    for given, right in zip(outputs, wanted, strict=True):
        agree(given, right, tolerance)
    return program
