"""When an array equals its reference, and what to say when it does not.

The expected values e come from the reference, in float32 or wider, not rounded to the output's
dtype. An element x is right when

    |x - e| <= max(atol * min(1, M), eps * R) + max(rtol, 2 * eps) * |e|

where M is the largest finite |e| of the array, R the root mean square of its finite elements, and
eps the step of 1.0 in the coarser of the output's and the inputs' dtype (2^-23 in float32, 2^-10 in
float16, 2^-7 in bfloat16). For gradients 2 M stands in the place of R: they may be computed from
outputs that were rounded, so that what they lose is relative to the largest. For outputs in float16
2^-24 is added, the step of its smallest numbers.

So an array of small values has a small tolerance, and even in bfloat16 it is no more than 3.2 % of
the largest value: neither zeros nor values that are all 5 % too large pass, unless a caller allows
that much. NaN is expected where e is NaN and infinity where e is. Where e is finite but too large
for the output's dtype, an infinity is right and so is the dtype's largest value. Whole numbers and
booleans are equal or wrong. Shape and dtype are compared first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from zmlx.backend.signature import dtype_name

#: dtype -> the step of its smallest numbers, where values of a test come near to it
_FINEST = {mx.float16: 2.0**-24}


@dataclass(frozen=True)
class Mismatch:
    """How an array differs from what was expected.

    Attributes:
        text: one or more lines for people.
        severity: worst error over what is allowed; infinite when NaN, shape or dtype are wrong.
    """

    text: str
    severity: float

    def summary(self) -> str:
        """Return it in one line: how many elements are off, and the worst."""
        lines = self.text.splitlines()
        return lines[0] if len(lines) == 1 else f"{lines[-1]}, {lines[0]}"


@dataclass(frozen=True)
class Tolerance:
    """What a caller allows.

    Attributes:
        atol: absolute error.
        rtol: error relative to the expected element.
        gradient: whether gradients are compared, which are allowed more in dtypes of 16 bits.
    """

    atol: float
    rtol: float
    gradient: bool = False

    def __post_init__(self) -> None:
        """Refuse what is no tolerance."""
        for name, value in (("atol", self.atol), ("rtol", self.rtol)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value!r}: expected a finite number of 0 or more")


def mismatch(
    got: Any, truth: mx.array, like: mx.array, inputs_dtype: mx.Dtype, tolerance: Tolerance
) -> Mismatch | None:
    """Return how an array differs from what was expected, or None when it does not.

    Args:
        got: what is tested; something other than an array is a mismatch.
        truth: the expected values, in float32 or wider.
        like: an array with the expected shape and dtype; it is not evaluated.
        inputs_dtype: of what the values were computed from.
        tolerance: what is allowed at least.
    """
    if not isinstance(got, mx.array):
        return Mismatch(f"got {type(got).__name__}, expected an array", float("inf"))
    if got.shape != like.shape:
        return Mismatch(f"got shape {tuple(got.shape)}, expected {tuple(like.shape)}", float("inf"))
    if got.dtype != like.dtype:
        names = f"got {dtype_name(got.dtype)}, expected {dtype_name(like.dtype)}"
        return Mismatch(f"{names} (shape {tuple(got.shape)})", float("inf"))
    if got.size == 0:
        mx.eval(got)
        return None
    values, expected = _numbers(got), _numbers(truth)
    if not mx.issubdtype(like.dtype, mx.inexact):
        error = (values != expected).astype(np.float64)
        return _worst(values, expected, error, np.zeros_like(error), "equal")
    eps = max(_eps(like.dtype), _eps(inputs_dtype))
    allowed, terms = _allowed(expected, eps, _FINEST.get(like.dtype, 0.0), tolerance)
    error = _errors(values, expected, like.dtype, allowed)
    return _worst(values, expected, error, allowed, terms)


def shows_something(truth: mx.array) -> bool:
    """Return whether an expected array has a finite element that is not zero.

    Where no array of a test has one, a kernel that gives zeros passes it.
    """
    values = _numbers(truth)
    return bool(np.any(np.isfinite(values) & (values != 0)))


def _allowed(
    expected: np.ndarray[Any, Any], eps: float, finest: float, tolerance: Tolerance
) -> tuple[np.ndarray[Any, Any], str]:
    magnitude = np.abs(np.where(np.isfinite(expected), expected, 0))
    largest, square = float(magnitude.max()), float(np.sqrt(np.mean(np.square(magnitude))))
    rounded = eps * (2 * largest if tolerance.gradient else square)
    absolute = max(tolerance.atol * min(1.0, largest), rounded) + finest
    relative = max(tolerance.rtol, 2 * eps)
    return absolute + relative * magnitude, f"{absolute:.3g} + {relative:.3g} x |expected|"


def _errors(
    values: np.ndarray[Any, Any],
    expected: np.ndarray[Any, Any],
    dtype: mx.Dtype,
    allowed: np.ndarray[Any, Any],
) -> np.ndarray[Any, Any]:
    """Return |values - expected|: 0 where both are the same special value, else infinity there."""
    with np.errstate(invalid="ignore", over="ignore"):
        same = (values == expected) | (np.isnan(values) & np.isnan(expected))
        finite = np.isfinite(values) & np.isfinite(expected)
        error = np.where(same, 0.0, np.where(finite, np.abs(values - expected), np.inf))
        # What is too large for the dtype becomes infinite or stays at the largest value.
        limit = float(mx.finfo(dtype).max)
        too_large = np.isfinite(expected) & (np.abs(expected) > limit)
        right = too_large & (np.sign(values) == np.sign(expected)) & (np.abs(values) >= limit)
        return np.where(right & ~(error <= allowed), 0.0, error)


def _worst(
    values: np.ndarray[Any, Any],
    expected: np.ndarray[Any, Any],
    error: np.ndarray[Any, Any],
    allowed: np.ndarray[Any, Any],
    terms: str,
) -> Mismatch | None:
    wrong = ~(error <= allowed)
    count = int(wrong.sum())
    if count == 0:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(wrong, np.where(allowed > 0, error / allowed, np.inf), 0.0)
    index = tuple(int(i) for i in np.unravel_index(int(np.argmax(ratio)), ratio.shape))
    place = f"element {list(index)}" if index else "the only element"
    numbers = f"got {_shown(values[index])}, expected {_shown(expected[index])}"
    errors = f"error {_shown(error[index])}, allowed {_shown(allowed[index])} ({terms})"
    return Mismatch(
        f"worst at {place}: {numbers}\n{errors}\n{count} of {values.size} elements are off",
        float(ratio[index]),
    )


def _numbers(array: mx.array) -> np.ndarray[Any, Any]:
    """Return an array's values in float64, complex128, or its own whole numbers."""
    if array.dtype == mx.bfloat16:
        array = array.astype(mx.float32)
    values = np.array(array)
    if values.dtype.kind == "f":
        return values.astype(np.float64)
    return values.astype(np.complex128) if values.dtype.kind == "c" else values


def _eps(dtype: mx.Dtype) -> float:
    return float(mx.finfo(dtype).eps) if mx.issubdtype(dtype, mx.inexact) else 0.0


def _shown(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, float | complex) else str(value)
