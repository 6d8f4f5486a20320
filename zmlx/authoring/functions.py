"""The mathematical functions of kernels: one table for every language that authors write in.

Each row says what a function is called in Metal, in MLX and on Python's numbers, and what its
derivatives are. Derivatives are text in the part that C and Python have in common: numbers, names,
`+ - * /`, comparisons, calls of functions of this table and `where(condition, a, b)`. The
arguments are `a` and `b`, the result is `y`. Where a function has a corner the derivative is MLX's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx


@dataclass(frozen=True)
class Function:
    """A mathematical function of one or two arguments.

    Attributes:
        name: what authors call it.
        arguments: how many it takes.
        metal: what a kernel calls it.
        mlx: the same on arrays of float32 (for `whole`: of integers as well).
        python: the same on Python's numbers, for constants.
        partials: the derivative by each argument; empty when `result` is "bool".
        result: "float", "bool", or "whole": integers stay integers, all else is a float.
        prelude: Metal text that defines `metal`, when it is not of Metal's own library.
        requires: names of functions whose prelude must stand before this one.
        aliases: other names for it.
    """

    name: str
    arguments: int
    metal: str
    mlx: Callable[..., mx.array]
    python: Callable[..., Any]
    partials: tuple[str, ...] = ()
    result: Literal["float", "bool", "whole"] = "float"
    prelude: str = ""
    requires: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


_LOG1P = """
inline float zmlx_log1p(float a) {
  // The error of rounding 1 + a is divided out again; an infinite a would give inf / inf.
  float sum = 1.0f + a;
  if (sum == 1.0f || metal::isinf(sum)) {
    return a;
  }
  return metal::precise::log(sum) * (a / (sum - 1.0f));
}
"""

_EXPM1 = """
inline float zmlx_expm1(float a) {
  // exp(a) - 1 cancels near zero; its relative error is that of log(exp(a)) against a.
  float power = metal::precise::exp(a);
  if (power == 1.0f) {
    return a;
  }
  float less = power - 1.0f;
  if (less == -1.0f || metal::isinf(power)) {
    return less;
  }
  return less * (a / metal::precise::log(power));
}
"""

# Polynomials fitted to erf(sqrt(s)) / sqrt(s) on [0, 1] and to log(1 - erf(a)) on [1, 4] at
# Chebyshev points; in float32 the relative error is below 2e-7.
_ERF = """
inline float zmlx_erf(float a) {
  float size = metal::abs(a);
  if (!(size > 1.0f)) {
    float s = a * a;
    float sum = 7.882497113e-05f;
    sum = sum * s - 8.018854993e-04f;
    sum = sum * s + 5.189311943e-03f;
    sum = sum * s - 2.685432880e-02f;
    sum = sum * s + 1.128359746e-01f;
    sum = sum * s - 3.761262690e-01f;
    sum = sum * s + 1.128379166e+00f;
    return a * sum;
  }
  if (size >= 4.0f) {
    return a > 0.0f ? 1.0f : -1.0f;
  }
  float sum = -1.330939039e-05f;
  sum = sum * size + 3.175720346e-04f;
  sum = sum * size - 3.436867598e-03f;
  sum = sum * size + 2.262198592e-02f;
  sum = sum * size - 1.033189800e-01f;
  sum = sum * size - 6.390933195e-01f;
  sum = sum * size - 1.125925949e+00f;
  sum = sum * size - 7.569686265e-04f;
  float rest = metal::precise::exp(sum);
  return a > 0.0f ? 1.0f - rest : rest - 1.0f;
}
"""

_SIGMOID = """
inline float zmlx_sigmoid(float a) {
  float part = 1.0f / (1.0f + metal::precise::exp(metal::abs(a)));
  return a < 0.0f ? part : 1.0f - part;
}
"""

_SQUARE = """
template <typename T>
inline T zmlx_square(T a) {
  return a * a;
}
"""

_RECIPROCAL = """
inline float zmlx_reciprocal(float a) {
  return 1.0f / a;
}
"""

# Metal's max and min drop a NaN; MLX's and these keep it.
_MAX = """
template <typename T>
inline T zmlx_max(T a, T b) {
  return (a > b || a != a) ? a : b;
}
"""

_MIN = """
template <typename T>
inline T zmlx_min(T a, T b) {
  return (a < b || a != a) ? a : b;
}
"""

_LOGADDEXP = """
inline float zmlx_logaddexp(float a, float b) {
  float high = (a > b || a != a) ? a : b;
  float low = (a < b || a != a) ? a : b;
  // Equal infinities would cancel to NaN.
  if (metal::isinf(high) || metal::isinf(low)) {
    return high;
  }
  return high + zmlx_log1p(metal::precise::exp(low - high));
}
"""

# Metal's own takes no integers.
_SIGN = """
template <typename T>
inline T zmlx_sign(T a) {
  return T(a > T(0)) - T(a < T(0));
}
"""


def _sigmoid(a: float) -> float:
    part = 1 / (1 + math.exp(min(abs(a), 700.0)))
    return part if a < 0 else 1 - part


def _logaddexp(a: float, b: float) -> float:
    return max(a, b) + math.log1p(math.exp(-abs(a - b)))


def _sign(a: float) -> float | int:
    return (a > 0) - (a < 0) if isinstance(a, int) else float((a > 0) - (a < 0))


_ROWS = (
    Function("exp", 1, "metal::precise::exp", mx.exp, math.exp, ("y",)),
    Function(
        "exp2",
        1,
        "metal::precise::exp2",
        lambda a: mx.power(2.0, a),
        lambda a: 2.0**a,
        ("0.6931471805599453 * y",),
    ),
    Function("expm1", 1, "zmlx_expm1", mx.expm1, math.expm1, ("y + 1",), prelude=_EXPM1),
    Function("log", 1, "metal::precise::log", mx.log, math.log, ("1 / a",)),
    Function("log2", 1, "metal::precise::log2", mx.log2, math.log2, ("1.4426950408889634 / a",)),
    Function(
        "log10", 1, "metal::precise::log10", mx.log10, math.log10, ("0.4342944819032518 / a",)
    ),
    Function("log1p", 1, "zmlx_log1p", mx.log1p, math.log1p, ("1 / (1 + a)",), prelude=_LOG1P),
    Function("sqrt", 1, "metal::precise::sqrt", mx.sqrt, math.sqrt, ("0.5 / y",)),
    Function(
        "rsqrt",
        1,
        "metal::precise::rsqrt",
        mx.rsqrt,
        lambda a: 1 / math.sqrt(a),
        ("-0.5 * y / a",),
    ),
    Function(
        "square",
        1,
        "zmlx_square",
        mx.square,
        lambda a: a * a,
        ("2 * a",),
        result="whole",
        prelude=_SQUARE,
    ),
    Function(
        "reciprocal",
        1,
        "zmlx_reciprocal",
        mx.reciprocal,
        lambda a: 1 / a,
        ("-y * y",),
        prelude=_RECIPROCAL,
    ),
    Function("sin", 1, "metal::precise::sin", mx.sin, math.sin, ("cos(a)",)),
    Function("cos", 1, "metal::precise::cos", mx.cos, math.cos, ("-sin(a)",)),
    Function("tan", 1, "metal::precise::tan", mx.tan, math.tan, ("1 + y * y",)),
    Function(
        "asin",
        1,
        "metal::precise::asin",
        mx.arcsin,
        math.asin,
        ("rsqrt(1 - a * a)",),
        aliases=("arcsin",),
    ),
    Function(
        "acos",
        1,
        "metal::precise::acos",
        mx.arccos,
        math.acos,
        ("-rsqrt(1 - a * a)",),
        aliases=("arccos",),
    ),
    Function(
        "atan",
        1,
        "metal::precise::atan",
        mx.arctan,
        math.atan,
        ("1 / (1 + a * a)",),
        aliases=("arctan",),
    ),
    Function("sinh", 1, "metal::precise::sinh", mx.sinh, math.sinh, ("cosh(a)",)),
    Function("cosh", 1, "metal::precise::cosh", mx.cosh, math.cosh, ("sinh(a)",)),
    Function("tanh", 1, "metal::precise::tanh", mx.tanh, math.tanh, ("1 - y * y",)),
    Function(
        "asinh",
        1,
        "metal::precise::asinh",
        mx.arcsinh,
        math.asinh,
        ("rsqrt(a * a + 1)",),
        aliases=("arcsinh",),
    ),
    Function(
        "acosh",
        1,
        "metal::precise::acosh",
        mx.arccosh,
        math.acosh,
        ("rsqrt(a * a - 1)",),
        aliases=("arccosh",),
    ),
    Function(
        "atanh",
        1,
        "metal::precise::atanh",
        mx.arctanh,
        math.atanh,
        ("1 / (1 - a * a)",),
        aliases=("arctanh",),
    ),
    Function(
        "atan2",
        2,
        "metal::precise::atan2",
        mx.arctan2,
        math.atan2,
        ("b / (a * a + b * b)", "-a / (a * a + b * b)"),
        aliases=("arctan2",),
    ),
    Function(
        "sigmoid", 1, "zmlx_sigmoid", mx.sigmoid, _sigmoid, ("y * (1 - y)",), prelude=_SIGMOID
    ),
    Function(
        "erf",
        1,
        "zmlx_erf",
        mx.erf,
        math.erf,
        ("1.1283791670955126 * exp(-a * a)",),
        prelude=_ERF,
    ),
    Function(
        "logaddexp",
        2,
        "zmlx_logaddexp",
        mx.logaddexp,
        _logaddexp,
        ("exp(a - y)", "exp(b - y)"),
        prelude=_LOGADDEXP,
        requires=("log1p",),
    ),
    # 0 to the power 0 does not change with the exponent, though log(0) is infinite.
    Function(
        "pow",
        2,
        "metal::pow",
        mx.power,
        math.pow,
        ("b * pow(a, b - 1)", "where(y == 0, 0, y * log(a))"),
        aliases=("power",),
    ),
    Function(
        "abs",
        1,
        "metal::abs",
        mx.abs,
        abs,
        ("sign(a)",),
        result="whole",
        aliases=("fabs", "absolute"),
    ),
    Function("sign", 1, "zmlx_sign", mx.sign, _sign, ("0",), result="whole", prelude=_SIGN),
    Function(
        "max",
        2,
        "zmlx_max",
        mx.maximum,
        max,
        ("where(a > b, 1, 0)", "where(a <= b, 1, 0)"),
        result="whole",
        prelude=_MAX,
        aliases=("maximum", "fmax"),
    ),
    Function(
        "min",
        2,
        "zmlx_min",
        mx.minimum,
        min,
        ("where(a < b, 1, 0)", "where(a >= b, 1, 0)"),
        result="whole",
        prelude=_MIN,
        aliases=("minimum", "fmin"),
    ),
    Function("floor", 1, "metal::floor", mx.floor, math.floor, ("0",)),
    Function("ceil", 1, "metal::ceil", mx.ceil, math.ceil, ("0",)),
    Function("trunc", 1, "metal::trunc", mx.trunc, math.trunc, ("0",)),
    # Halves go to the even neighbour, as in Python and MLX.
    Function("rint", 1, "metal::rint", mx.round, round, ("0",), aliases=("round",)),
    Function("isnan", 1, "metal::isnan", mx.isnan, math.isnan, result="bool"),
    Function("isinf", 1, "metal::isinf", mx.isinf, math.isinf, result="bool"),
    Function("isfinite", 1, "metal::isfinite", mx.isfinite, math.isfinite, result="bool"),
)

#: name or alias -> function
FUNCTIONS: dict[str, Function] = {
    name: function for function in _ROWS for name in (function.name, *function.aliases)
}


def preludes(names: Iterable[str]) -> str:
    """Return the Metal text that these functions need before a kernel, each part once."""
    wanted: dict[str, None] = {}
    for name in names:
        function = FUNCTIONS[name]
        for needed in (*function.requires, function.name):
            wanted[needed] = None
    return "".join(FUNCTIONS[name].prelude for name in wanted)
