"""Inputs on which a wrong kernel shows: of every dtype, and laid out in memory in several ways.

Floating values have a random sign and a magnitude of about 1.5 |n| with normal n, between 1/16 and
8: none is near zero, where everything is right within a tolerance. The first element is positive.
All are at least 1/16 from a multiple of 1/4, where functions like to have corners, at which a
gradient is a matter of rounding and taste. Integers lie between -9 and 9 (unsigned ones from 1 to
9) and are not zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from zmlx.backend.signature import dtype_name

FLOATS = (mx.float32, mx.float16, mx.bfloat16)
#: Ways in which the same values lie in memory.
LAYOUTS = ("contiguous", "transposed", "strided", "mixed")

#: One shape for all inputs, or a shape for each.
ShapeLike = Sequence[int] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Case:
    """One call that is compared.

    Attributes:
        shapes: shape of each input.
        dtype: of the inputs.
        layout: one of `LAYOUTS`.
        seed: what the caller gave.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtype: mx.Dtype
    layout: str
    seed: int

    def subject(self) -> str:
        """Return dtype and shapes as text, such as "float32 (8, 1000)"."""
        shapes = " and ".join(map(str, dict.fromkeys(self.shapes)))
        return f"{dtype_name(self.dtype)} {shapes}"

    def inputs(self) -> list[mx.array]:
        """Return row contiguous inputs; those of all layouts hold the same values."""
        return [
            sample(shape, self.dtype, seed=self.seed, number=number)
            for number, shape in enumerate(self.shapes)
        ]

    def laid_out(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        """Return arrays with the same values in this case's layout."""
        if self.layout == "mixed":
            first, *others = arrays
            return [_strided(first), *others]
        change = {"transposed": _transposed, "strided": _strided}.get(self.layout)
        return [array if change is None else change(array) for array in arrays]

    def __str__(self) -> str:
        """Name dtype, shapes, layout and seed."""
        return f"{self.subject()}, {self.layout} inputs, seed {self.seed}"


def cases(
    shapes: Sequence[ShapeLike],
    dtypes: Sequence[mx.Dtype] | None,
    *,
    n_inputs: int,
    seed: int,
    layouts: Sequence[str] = LAYOUTS,
) -> list[Case]:
    """Return every dtype with every shape in every layout that is another one for it.

    Args:
        shapes: each one shape for all inputs, or `n_inputs` shapes.
        dtypes: of the inputs; None for float32, float16 and bfloat16.
        n_inputs: how many arrays a function takes, one or more.
        seed: of the values.
        layouts: those wanted.

    Raises:
        ValueError: no shape or dtype, or a shape is none.
        TypeError: a dtype is none.
    """
    if n_inputs < 1:
        raise ValueError(f"n_inputs={n_inputs}: a function takes at least one array")
    wanted = FLOATS if dtypes is None else tuple(dtypes)
    for dtype in wanted:
        if not isinstance(dtype, mx.Dtype) or dtype == mx.complex64:
            raise TypeError(
                f"dtype {dtype!r}: expected a dtype of real numbers, such as mx.float16"
            )
    given = [_shapes(shape, n_inputs) for shape in shapes]
    if not given or not wanted:
        raise ValueError("nothing to compare: give at least one shape and one dtype")
    return [
        Case(shape, dtype, layout, seed)
        for dtype in wanted
        for shape in given
        for layout in layouts
        if _applies(layout, shape)
    ]


def sample(shape: Sequence[int], dtype: mx.Dtype, *, seed: int, number: int = 0) -> mx.array:
    """Return evaluated values of a shape and dtype, the same on every machine.

    Args:
        shape: may be empty, or hold zeros.
        dtype: of real numbers.
        seed: from 0; another one gives other values.
        number: of the input, from 0; inputs of one call differ.
    """
    random = np.random.default_rng((seed, number))
    if mx.issubdtype(dtype, mx.floating):
        sign = np.where(random.random(shape) < 0.5, -1.0, 1.0)
        if sign.size:
            sign.flat[0] = 1.0
        quarters = np.minimum(6 * np.abs(random.standard_normal(shape)), 31.5)
        # The middle half of each quarter; its ends are numbers that bfloat16 holds.
        off_corners = (np.floor(quarters) + 0.25 + 0.5 * (quarters % 1)) / 4
        array = mx.array(np.asarray(sign * off_corners, np.float32)).astype(dtype)
    else:
        values: Any = random.integers(1, 10, shape)
        if dtype == mx.bool_:
            values = values % 2
        elif mx.issubdtype(dtype, mx.signedinteger):
            values = values * random.choice([-1, 1], shape)
        array = mx.array(np.asarray(values, np.int32)).astype(dtype)
    mx.eval(array)
    return array


def widened(arrays: Sequence[mx.array]) -> list[mx.array]:
    """Return arrays of 16 bits as float32, the others as they are."""
    narrow = (mx.float16, mx.bfloat16)
    return [array.astype(mx.float32) if array.dtype in narrow else array for array in arrays]


def _shapes(shape: ShapeLike, n_inputs: int) -> tuple[tuple[int, ...], ...]:
    if isinstance(shape, int):
        raise ValueError(f"shape {shape!r}: expected a tuple, such as ({shape},)")
    each = tuple(shape)
    found = (
        tuple(tuple(one) for one in each)  # type: ignore[arg-type]
        if each and not any(isinstance(one, int) for one in each)
        else (each,) * n_inputs
    )
    if len(found) != n_inputs:
        raise ValueError(f"shape {shape!r}: {len(found)} shapes for {n_inputs} inputs")
    for one in found:
        if any(type(length) is not int or length < 0 for length in one):
            raise ValueError(f"shape {shape!r}: expected whole numbers of 0 or more")
    return found  # type: ignore[return-value]


def _applies(layout: str, shapes: tuple[tuple[int, ...], ...]) -> bool:
    """Return whether a layout differs from the contiguous one for inputs of these shapes."""
    if layout == "contiguous":
        return True
    if any(0 in shape for shape in shapes):
        return False
    if layout == "transposed":
        return any(len(shape) > 1 for shape in shapes)
    if layout == "mixed":
        return len(shapes) > 1 and len(shapes[0]) > 0
    return any(len(shape) > 0 for shape in shapes)


def _transposed(array: mx.array) -> mx.array:
    """Return the values in the order of columns."""
    if array.ndim < 2:
        return array
    turned = mx.contiguous(array.swapaxes(0, -1))
    mx.eval(turned)
    return _evaluated(turned.swapaxes(0, -1))


def _strided(array: mx.array) -> mx.array:
    """Return the values with others between them, which are NaN where the dtype has NaN."""
    if array.ndim == 0:
        return array
    poison = mx.nan if mx.issubdtype(array.dtype, mx.floating) else 1
    between = mx.full(array.shape, poison).astype(array.dtype)
    # A margin in front, so that the first element is not where the buffer begins.
    spread = mx.stack([between, array], axis=-1).flatten(-2)
    mx.eval(spread)
    return _evaluated(spread[..., 1::2])


def _evaluated(array: mx.array) -> mx.array:
    mx.eval(array)
    return array
