"""The assertions: every dtype, shape and layout is run, and one error tells of all that is off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx

from zmlx.deprecation import takes_compute_dtype
from zmlx.testing.difference import Mismatch, Tolerance, mismatch, shows_something
from zmlx.testing.inputs import Case, ShapeLike, cases, sample, widened
from zmlx.tuning.arrays import leaves

#: Cases that an error lists after the worst one.
_MOST_LISTED = 8


@dataclass(frozen=True)
class _Failure:
    case: Case
    what: str
    mismatch: Mismatch


@takes_compute_dtype
def assert_matches(
    kernel_fn: Callable[..., Any],
    ref_fn: Callable[..., Any],
    shapes: Sequence[ShapeLike],
    *,
    dtypes: Sequence[mx.Dtype] | None = None,
    atol: float = 1e-5,
    rtol: float = 1e-5,
    n_inputs: int = 1,
    seed: int = 42,
) -> None:
    """Assert that a function gives what its reference gives: values, shapes and dtypes.

    Both are called with the same random inputs, also with transposed and strided ones. The
    reference gets inputs of 16 bits as float32, and its result is not rounded; the shapes and
    dtypes are those that it gives for the inputs as they are. What is allowed is in
    `zmlx.testing.difference`: the tolerances are widened to the dtype's rounding, and never so
    much that zeros or values that are 5 % too large pass.

    Args:
        kernel_fn: what is tested; takes `n_inputs` arrays, and returns an array or several in a
            list, tuple or dictionary.
        ref_fn: the same in MLX operations.
        shapes: each one shape for all inputs, or a tuple of `n_inputs` shapes. () is one number,
            and a length may be 0.
        dtypes: of the inputs; None for float32, float16 and bfloat16.
        atol: absolute error that is allowed, where the values are not all smaller than 1.
        rtol: error that is allowed, relative to the expected element.
        n_inputs: arrays that the functions take.
        seed: of the inputs.

    Raises:
        AssertionError: with the worst element of the worst case, and the other cases that fail.
        ValueError: the arguments leave nothing to compare; or every expected element is zero or not
            finite, so that a kernel of zeros would pass.
        Exception: what the reference raises.
    """
    tolerance = Tolerance(atol, rtol)
    every = cases(shapes, dtypes, n_inputs=n_inputs, seed=seed)
    failures: list[_Failure] = []
    expected: list[mx.array] = []
    for case in every:
        inputs = case.inputs()
        like = _arrays(ref_fn(*inputs))
        truths = _arrays(ref_fn(*widened(inputs)))
        expected += truths
        got = _called(lambda xs: _results(kernel_fn(*xs)), case.laid_out(inputs))
        failures += _compared(case, "output", got, truths, like, tolerance)
    if any(truth.size for truth in expected) and not any(map(shows_something, expected)):
        raise ValueError(
            f"{_name(ref_fn)} gives no finite number but zero for shapes {list(shapes)}: a kernel "
            "of zeros would pass; choose other shapes, another seed, or a reference with more in it"
        )
    _raise(kernel_fn, failures, len(every))


@takes_compute_dtype
def assert_gradient_matches(
    kernel_fn: Callable[..., Any],
    ref_fn: Callable[..., Any],
    shapes: Sequence[ShapeLike],
    *,
    dtypes: Sequence[mx.Dtype] | None = None,
    atol: float = 1e-4,
    rtol: float = 1e-4,
    n_inputs: int = 1,
    seed: int = 42,
) -> None:
    """Assert that the gradients of a function are those of its reference, for every input.

    Gradients are vector-Jacobian products with random cotangents, so that no error hides in a sum;
    cotangents come in the layouts of the inputs. Otherwise it is as `assert_matches`. A gradient
    that is zero everywhere in truth is compared like another.

    Args:
        kernel_fn: what is tested; its outputs are floating point.
        ref_fn: the same in MLX operations that can be differentiated.
        shapes: as in `assert_matches`.
        dtypes: floating ones; None for float32, float16 and bfloat16.
        atol: as in `assert_matches`.
        rtol: as in `assert_matches`.
        n_inputs: arrays that the functions take.
        seed: of inputs and cotangents.

    Raises:
        AssertionError: with the worst element of the worst case, and the other cases that fail; or
            the function cannot be differentiated.
        ValueError: the arguments leave nothing to compare.
        TypeError: a dtype is not floating point.
        Exception: what the reference raises.
    """
    tolerance = Tolerance(atol, rtol, gradient=True)
    every = cases(shapes, dtypes, n_inputs=n_inputs, seed=seed)
    failures: list[_Failure] = []
    for case in every:
        if not mx.issubdtype(case.dtype, mx.floating):
            raise TypeError(f"dtype {case.dtype}: gradients need floating point")
        inputs = case.inputs()
        cotangents = _cotangents(ref_fn, inputs, seed)
        truths = _gradients(ref_fn, widened(inputs), widened(cotangents))
        pulled = _laid_out(case, cotangents)
        got = _called(partial(_gradients, kernel_fn, cotangents=pulled), case.laid_out(inputs))
        failures += _compared(case, "gradient of input", got, truths, inputs, tolerance)
    _raise(kernel_fn, failures, len(every))


def _gradients(
    function: Callable[..., Any], inputs: list[mx.array], cotangents: list[mx.array]
) -> list[Any]:
    def flat(*arrays: mx.array) -> list[mx.array]:
        return _arrays(function(*arrays))

    return list(mx.vjp(flat, inputs, cotangents)[1])


def _cotangents(ref_fn: Callable[..., Any], inputs: list[mx.array], seed: int) -> list[mx.array]:
    outputs = _arrays(ref_fn(*inputs))
    for output in outputs:
        if not mx.issubdtype(output.dtype, mx.floating):
            raise TypeError(f"{_name(ref_fn)} gives {output.dtype}: gradients need floating point")
    return [
        sample(output.shape, output.dtype, seed=seed, number=len(inputs) + number)
        for number, output in enumerate(outputs)
    ]


def _laid_out(case: Case, arrays: list[mx.array]) -> list[mx.array]:
    return arrays if any(0 in array.shape for array in arrays) else case.laid_out(arrays)


def _called(
    call: Callable[[list[mx.array]], list[Any]], inputs: list[mx.array]
) -> list[Any] | Exception:
    """Return evaluated results, or what was raised instead."""
    try:
        results = call(inputs)
        mx.eval([value for value in results if isinstance(value, mx.array)])
    except Exception as error:  # noqa: BLE001 - whatever it is, it stands in the report
        return error
    return results


def _compared(
    case: Case,
    what: str,
    got: list[Any] | Exception,
    truths: list[mx.array],
    like: list[mx.array],
    tolerance: Tolerance,
) -> Iterator[_Failure]:
    if isinstance(got, Exception):
        yield _Failure(case, "call", _raised(got))
    elif len(got) != len(truths):
        text = f"got {len(got)} {what}s, expected {len(truths)}"
        yield _Failure(case, what, Mismatch(text, float("inf")))
    else:
        for number, (value, truth, kind) in enumerate(zip(got, truths, like, strict=True)):
            found = mismatch(value, truth, kind, case.dtype, tolerance)
            if found is not None:
                yield _Failure(case, f"{what} {number}", found)


@dataclass(frozen=True)
class _Raised(Mismatch):
    error: Exception


def _raised(error: Exception) -> Mismatch:
    return _Raised(
        f"raised {type(error).__name__}: {' '.join(str(error).split())}", float("inf"), error
    )


def _raise(kernel_fn: Callable[..., Any], failures: list[_Failure], total: int) -> None:
    """Raise one error about all failures, the worst in full."""
    if not failures:
        return
    failed = len({failure.case for failure in failures})
    worst = max(failures, key=lambda failure: failure.mismatch.severity)
    lines = [
        f"{_name(kernel_fn)} does not match its reference in {failed} of {total} cases",
        f"{worst.what}, {worst.case}",
        *(f"  {line}" for line in worst.mismatch.text.splitlines()),
    ]
    others = [failure for failure in failures if failure is not worst]
    if others:
        lines.append("also:")
    for failure in others[:_MOST_LISTED]:
        lines.append(f"  {failure.what}, {failure.case}: {failure.mismatch.summary()}")
    if len(others) > _MOST_LISTED:
        lines.append(f"  and {len(others) - _MOST_LISTED} more")
    cause = worst.mismatch.error if isinstance(worst.mismatch, _Raised) else None
    raise AssertionError("\n".join(lines)) from cause


def _results(result: Any) -> list[Any]:
    return [leaf for _, leaf in leaves(result)]


def _arrays(result: Any) -> list[mx.array]:
    """Return the arrays of a result.

    Raises:
        TypeError: something else is in it.
    """
    found = _results(result)
    for value in found:
        if not isinstance(value, mx.array):
            raise TypeError(f"expected an array, or several, and got a {type(value).__name__}")
    return found


def _name(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", None) or getattr(function, "name", None)
    return str(name or f"the {type(function).__name__}")
