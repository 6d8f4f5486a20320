"""`zmlx.testing`: what is right passes in every dtype and layout; every planted fault is found."""

from __future__ import annotations

import re

import mlx.core as mx
import pytest

from zmlx.testing import assert_gradient_matches, assert_matches

SHAPES = [(17,), (8, 33)]
DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def swish(x):
    return x * mx.clip(x + 3, 0, 6) / 6


def small(x):
    return 2e-5 * x


def rows(x):
    return mx.sum(x.astype(mx.float32), axis=-1).astype(x.dtype)


def several(x):
    return {"double": x * 2, "rows": [rows(x), x > 0]}


@pytest.mark.parametrize("function", [swish, rows, mx.exp, mx.log, several])
def test_what_is_right_passes(function):
    assert_matches(function, function, [*SHAPES, (2, 3, 5)])


def test_numbers_empty_arrays_and_shapes_for_each_input():
    assert_matches(swish, swish, [(), (0,), (3, 0, 2), (1,)])
    assert_matches(mx.matmul, mx.matmul, [((3, 4), (4, 5))], n_inputs=2, dtypes=[mx.float32])
    assert_matches(mx.add, mx.add, [(4,), ((2, 4), (4,))], n_inputs=2)
    assert_gradient_matches(swish, swish, [(), (0,), (1,)])


def test_integers_and_booleans_are_compared_exactly():
    dtypes = [mx.int32, mx.uint8, mx.int64, mx.bool_]
    assert_matches(lambda x: x + x, lambda x: x + x, SHAPES, dtypes=dtypes)
    with pytest.raises(AssertionError, match="1 of 17 elements are off"):
        assert_matches(
            lambda x: x + (mx.arange(x.size) == 3).reshape(x.shape).astype(x.dtype),
            lambda x: x,
            [(17,)],
            dtypes=[mx.int32],
        )
    with pytest.raises(AssertionError):
        assert_matches(mx.logical_not, lambda x: x, [(17,)], dtypes=[mx.bool_])


def one_wrong(x):
    y = swish(x)
    flat = y.flatten()
    flat[-1] = flat[-1] * 1.06
    return flat.reshape(y.shape)


def one_nan(x):
    flat = swish(x).flatten()
    flat[3] = mx.nan
    return flat.reshape(x.shape)


def of_the_buffer(x):
    """Read as if the input were row contiguous, as a kernel without strides does."""
    return swish(mx.contiguous(x.T).reshape(x.shape)) if x.ndim == 2 else swish(x)


FAULTS = {
    "zeros": lambda x: mx.zeros_like(x),
    "five percent": lambda x: (swish(x).astype(mx.float32) * 1.05).astype(x.dtype),
    "one element": one_wrong,
    "nan": one_nan,
    "inf": lambda x: mx.where(swish(x) > 3, mx.inf, swish(x)),
    "dtype": lambda x: swish(x).astype(mx.float32 if x.dtype != mx.float32 else mx.float16),
    "shape": lambda x: swish(x)[None],
    "flat": lambda x: swish(x).flatten()[:-1],
    "sign": lambda x: -swish(x),
    "order": of_the_buffer,
    "two outputs": lambda x: [swish(x), swish(x)],
    "no output": lambda x: [],
    "no array": lambda x: None,
    "raises": lambda x: 1 / 0,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found_in_every_dtype(fault, dtype):
    with pytest.raises(AssertionError, match="does not match its reference in"):
        assert_matches(FAULTS[fault], swish, [(8, 33)], dtypes=[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reference", [swish, small, rows, mx.exp, lambda x: mx.softmax(x * 0)])
def test_zeros_and_five_percent_fail_whatever_the_size_of_the_values(reference, dtype):
    def zeros(x):
        return mx.zeros_like(reference(x))

    def more(x):
        return (reference(x.astype(mx.float32)) * 1.05).astype(reference(x).dtype)

    for wrong in (zeros, more):
        with pytest.raises(AssertionError):
            assert_matches(wrong, reference, [(8, 1000)], dtypes=[dtype])


def strided_only(x):
    """Right unless elements are apart, which shows as NaN from between them."""
    view = memoryview(x)
    dense = view.strides is None or view.strides[-1] == view.itemsize
    return swish(x) if dense else swish(x) * mx.nan


def test_layouts_are_tried():
    with pytest.raises(AssertionError, match=r"in 1 of 2 cases\noutput 0, .*strided inputs"):
        assert_matches(strided_only, swish, [(17,)], dtypes=[mx.float32])

    seen = []

    def noting(a, b):
        mx.eval(a, b)
        seen.append((memoryview(a).strides, memoryview(b).strides))
        return a + b

    assert_matches(noting, mx.add, [(3, 4)], n_inputs=2, dtypes=[mx.float32])
    assert seen == [
        ((16, 4), (16, 4)),
        ((4, 12), (4, 12)),
        ((32, 8), (32, 8)),
        ((32, 8), (16, 4)),
    ]


def test_special_values_are_expected_where_the_reference_has_them():
    def special(x):
        return mx.where(x > 2, mx.inf, mx.where(x < -2, mx.nan, mx.where(x < -1, -mx.inf, x)))

    assert_matches(special, special, [(8, 100)])
    for wrong in (
        lambda x: mx.nan_to_num(special(x)),
        lambda x: mx.where(x < -1, mx.nan, special(x)),
    ):
        with pytest.raises(AssertionError):
            assert_matches(wrong, special, [(8, 100)])


def test_what_float16_cannot_hold_finer_is_right():
    def tiny(x):
        return (x.astype(mx.float32) * 1e-6).astype(x.dtype)

    assert_matches(tiny, lambda x: x * 1e-6, SHAPES, dtypes=[mx.float16])
    with pytest.raises(AssertionError):
        assert_matches(lambda x: tiny(x) * 0, lambda x: x * 1e-6, SHAPES, dtypes=[mx.float16])


def test_what_is_too_large_for_the_dtype_may_be_infinite_or_largest():
    def huge(x):
        return x * 30000

    assert_matches(huge, huge, [(8, 100)], dtypes=[mx.float16])
    assert_matches(lambda x: mx.clip(huge(x), -65504, 65504), huge, [(8, 100)], dtypes=[mx.float16])
    with pytest.raises(AssertionError):
        assert_matches(lambda x: -huge(x), huge, [(8, 100)], dtypes=[mx.float16])


def test_the_message_names_the_worst_element():
    def wrong(x):
        return swish(x) + (mx.arange(x.size) == 5).reshape(x.shape) * mx.array(100.0, x.dtype)

    with pytest.raises(AssertionError) as raised:
        assert_matches(wrong, swish, [(17,), (2, 9)], dtypes=[mx.float32, mx.bfloat16], seed=7)
    text = str(raised.value)
    lines = text.splitlines()
    assert lines[0] == "wrong does not match its reference in 10 of 10 cases"
    assert re.match(r"output 0, float32 \(\d.*, \w+ inputs, seed 7", lines[1])
    assert "worst at element [" in lines[2]
    assert re.search(r"got 1\d\d\..*, expected -?\d", lines[2])
    assert re.search(
        r"error (99\.9|100).*, allowed .*e-05 \(.* \+ 1e-05 x \|expected\|\)", lines[3]
    )
    assert re.search(r"1 of 1[78] elements are off", lines[4])
    assert lines[5] == "also:"
    assert "bfloat16 (2, 9), transposed inputs" in text
    assert "and 1 more" in lines[-1]
    assert len(lines) == 15


def test_what_was_raised_is_the_cause():
    with pytest.raises(AssertionError, match="raised ZeroDivisionError: division") as raised:
        assert_matches(lambda x: 1 / 0, swish, [(17,)])
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_a_test_that_could_not_fail_is_refused():
    with pytest.raises(ValueError, match="a kernel of zeros would pass"):
        assert_matches(mx.zeros_like, lambda x: x * 0, SHAPES)
    with pytest.raises(ValueError, match="zeros would pass"):
        assert_matches(lambda x: x * mx.nan, lambda x: x * mx.nan, SHAPES)
    assert_matches(lambda x: x * 0, lambda x: x * 0, [(0,)])  # nothing but shape and dtype


def test_what_earlier_versions_took_is_ignored():
    for check in (assert_matches, assert_gradient_matches):
        with pytest.warns(DeprecationWarning, match="compute_dtype is ignored"):
            check(swish, swish, SHAPES, compute_dtype=mx.float32)


@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        ({"shapes": []}, ValueError, "nothing to compare"),
        ({"shapes": [3]}, ValueError, "expected a tuple"),
        ({"shapes": [(-1,)]}, ValueError, "whole numbers of 0"),
        ({"shapes": [((3,), (4,))]}, ValueError, "2 shapes for 1 inputs"),
        ({"dtypes": []}, ValueError, "nothing to compare"),
        ({"dtypes": ["float32"]}, TypeError, "expected a dtype"),
        ({"dtypes": [mx.complex64]}, TypeError, "real numbers"),
        ({"n_inputs": 0}, ValueError, "at least one"),
        ({"atol": -1.0}, ValueError, "atol=-1.0"),
        ({"rtol": float("nan")}, ValueError, "rtol=nan"),
    ],
)
def test_bad_arguments(bad, error, text):
    for check in (assert_matches, assert_gradient_matches):
        with pytest.raises(error, match=text):
            check(swish, swish, **{"shapes": SHAPES, **bad})


def test_inputs_are_the_same_for_a_seed_and_leave_the_global_state_alone():
    def values(seed):
        seen = []
        assert_matches(lambda x: seen.append(x) or x, lambda x: x, [(9,)], seed=seed)
        return seen[0].tolist()

    mx.random.seed(3)
    expected = mx.random.uniform().item()
    mx.random.seed(3)
    assert values(1) == values(1) != values(2)
    assert mx.random.uniform().item() == expected


def with_gradient(vjp):
    @mx.custom_function
    def function(a, b):
        return a * b

    @function.vjp
    def function_vjp(primals, cotangent, output):
        return vjp(*primals, cotangent)

    return function


GRADIENT_FAULTS = {
    "zeros": lambda a, b, g: (mx.zeros_like(a), g * a),
    "five percent": lambda a, b, g: (g * b, (g * a * 1.05).astype(a.dtype)),
    "none": lambda a, b, g: (g * b, None),
    "cotangent": lambda a, b, g: (g, g * a),
    "swapped": lambda a, b, g: (g * a, g * b),
    "without cotangent": lambda a, b, g: (b, a),
    "sign": lambda a, b, g: (g * b, -g * a),
    "summed": lambda a, b, g: (mx.broadcast_to((g * b).mean(), a.shape), g * a),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", GRADIENT_FAULTS)
def test_wrong_gradients_are_found(fault, dtype):
    wrong = with_gradient(GRADIENT_FAULTS[fault])
    assert_matches(wrong, mx.multiply, SHAPES, n_inputs=2, dtypes=[dtype])
    with pytest.raises(AssertionError, match=r"gradient of input [01]"):
        assert_gradient_matches(wrong, mx.multiply, SHAPES, n_inputs=2, dtypes=[dtype])


def test_right_gradients_pass():
    right = with_gradient(lambda a, b, g: (g * b, g * a))
    assert_gradient_matches(right, mx.multiply, SHAPES, n_inputs=2)
    for function in (swish, mx.sigmoid, mx.tanh, mx.rsqrt, rows, lambda x: [x * x, mx.exp(x)]):
        assert_gradient_matches(function, function, [*SHAPES, (8, 1000)])
    assert_gradient_matches(mx.floor, mx.floor, SHAPES)  # zero in truth


def test_a_function_without_a_gradient_is_an_error():
    def hard(x):
        return mx.stop_gradient(swish(x))

    with pytest.raises(AssertionError, match="gradient of input 0"):
        assert_gradient_matches(hard, swish, SHAPES)
    with pytest.raises(TypeError, match="floating point"):
        assert_gradient_matches(swish, swish, SHAPES, dtypes=[mx.int32])
    with pytest.raises(TypeError, match="gradients need floating point"):
        assert_gradient_matches(lambda x: x > 0, lambda x: x > 0, SHAPES)
