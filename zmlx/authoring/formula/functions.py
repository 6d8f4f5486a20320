"""The functions that a formula may call: the authors' table, and what only Metal's text has."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import mlx.core as mx

from zmlx.authoring import functions as shared
from zmlx.authoring.functions import Function


def _half_away(a: mx.array) -> mx.array:
    whole = mx.trunc(a)
    return mx.where(mx.abs(a - whole) >= 0.5, whole + mx.sign(a), whole)


def _truncated_remainder(a: mx.array, b: mx.array) -> mx.array:
    size = mx.remainder(mx.abs(a), mx.abs(b))
    return mx.where(a < 0, -size, size)


_sigmoid = shared.FUNCTIONS["sigmoid"].python


def _eased(t: float) -> float:
    return t * t * (3 - 2 * t)


def _copysign(a: mx.array, b: mx.array) -> mx.array:
    # -0.0 is negative too; its reciprocal tells.
    negative = mx.logical_or(b < 0, mx.reciprocal(b) < 0)
    return mx.where(negative, -mx.abs(a), mx.abs(a))


def _silu(a: mx.array) -> mx.array:
    return a * mx.sigmoid(a)


def _smoothstep(a: mx.array, b: mx.array, c: mx.array) -> mx.array:
    t = mx.minimum(mx.maximum((c - a) / (b - a), 0.0), 1.0)
    return t * t * (3.0 - 2.0 * t)


_CLAMP = """
template <typename T>
inline T zmlx_clamp(T a, T low, T high) {
  return zmlx_min(zmlx_max(a, low), high);
}
"""

#: Rows beside the shared ones. `python` computes constants; derivatives as in the shared table.
_ROWS = (
    Function(
        "exp10",
        1,
        "metal::precise::exp10",
        lambda a: mx.power(10.0, a),
        lambda a: 10.0**a,
        ("2.302585092994046 * y",),
    ),
    Function(
        "sinpi",
        1,
        "metal::precise::sinpi",
        lambda a: mx.sin(math.pi * a),
        lambda a: math.sin(math.pi * a),
        ("3.141592653589793 * cospi(a)",),
    ),
    Function(
        "cospi",
        1,
        "metal::precise::cospi",
        lambda a: mx.cos(math.pi * a),
        lambda a: math.cos(math.pi * a),
        ("-3.141592653589793 * sinpi(a)",),
    ),
    # In the shared table halves go to the even neighbour, as in Python; in C away from zero.
    Function(
        "round",
        1,
        "metal::round",
        _half_away,
        lambda a: math.copysign(math.floor(abs(a) + 0.5), a),
        ("0",),
    ),
    Function(
        "fract",
        1,
        "metal::fract",
        lambda a: mx.minimum(a - mx.floor(a), 1 - 2.0**-24),
        lambda a: a - math.floor(a),
        ("1",),
    ),
    Function(
        "fmod",
        2,
        "metal::fmod",
        _truncated_remainder,
        math.fmod,
        ("1", "-trunc(a / b)"),
    ),
    Function(
        "fma",
        3,
        "metal::fma",
        lambda a, b, c: a * b + c,
        lambda a, b, c: a * b + c,
        ("b", "a", "1"),
    ),
    Function(
        "clamp",
        3,
        "zmlx_clamp",
        lambda a, b, c: mx.minimum(mx.maximum(a, b), c),
        lambda a, b, c: min(max(a, b), c),
        (
            "where(a > b, where(a < c, 1, 0), 0)",
            "where(a <= b, where(b < c, 1, 0), 0)",
            "where(max(a, b) >= c, 1, 0)",
        ),
        result="whole",
        prelude=_CLAMP,
        requires=("max", "min"),
    ),
    Function(
        "saturate",
        1,
        "metal::saturate",
        lambda a: mx.minimum(mx.maximum(a, 0.0), 1.0),
        lambda a: min(max(a, 0.0), 1.0),
        ("where(a > 0, where(a < 1, 1, 0), 0)",),
    ),
    Function(
        "mix",
        3,
        "metal::mix",
        lambda a, b, c: a + (b - a) * c,
        lambda a, b, c: a + (b - a) * c,
        ("1 - c", "c", "b - a"),
    ),
    Function(
        "step",
        2,
        "metal::step",
        lambda a, b: (b >= a).astype(mx.float32),
        lambda a, b: float(b >= a),
        ("0", "0"),
    ),
    Function(
        "smoothstep",
        3,
        "metal::smoothstep",
        _smoothstep,
        lambda a, b, c: 0.0 if c <= a else 1.0 if c >= b else _eased((c - a) / (b - a)),
        (
            "-6 * saturate((c - a) / (b - a)) * saturate((b - c) / (b - a)) * (b - c)"
            " / ((b - a) * (b - a))",
            "-6 * saturate((c - a) / (b - a)) * saturate((b - c) / (b - a)) * (c - a)"
            " / ((b - a) * (b - a))",
            "6 * saturate((c - a) / (b - a)) * saturate((b - c) / (b - a)) / (b - a)",
        ),
    ),
    Function(
        "copysign",
        2,
        "metal::copysign",
        _copysign,
        math.copysign,
        ("where(a < 0, -sign(copysign(1, b)), sign(copysign(1, b)))", "0"),
    ),
    replace(shared.FUNCTIONS["pow"], name="powr", metal="metal::powr", aliases=()),
    # Of `zmlx.msl.DEFAULT_HEADER`; known where that header is given.
    Function(
        "kk_sigmoid",
        1,
        "kk_sigmoid",
        mx.sigmoid,
        shared.FUNCTIONS["sigmoid"].python,
        ("y * (1 - y)",),
    ),
    Function(
        "kk_silu",
        1,
        "kk_silu",
        _silu,
        lambda a: a * _sigmoid(a),
        ("kk_sigmoid(a) * (1 + a * (1 - kk_sigmoid(a)))",),
    ),
)

#: name or alias -> function
FUNCTIONS: dict[str, Function] = shared.FUNCTIONS | {row.name: row for row in _ROWS}

#: functions of `zmlx.msl.DEFAULT_HEADER`
OF_DEFAULT_HEADER = ("kk_sigmoid", "kk_silu")

#: Functions of Metal's library that have no formula here: their expressions run, on devices only.
_METAL_ONLY = """
    absdiff addsat all any as_type clz cross ctz distance divide dot extract_bits faceforward
    fdim fmax3 fmedian3 fmin3 frexp hadd ilogb insert_bits isnormal isordered isunordered
    ldexp length length_squared logb mad24 madhi madsat max3 median3 min3 modf mul24 mulhi
    nextafter normalize popcount reflect refract reinterpret_cast reverse_bits rhadd rotate
    signbit sincos subsat tanpi
"""
METAL_ONLY = frozenset(_METAL_ONLY.split())


def needed(names: Iterable[str]) -> str:
    """Return the Metal text that must stand before a kernel that calls these functions."""
    wanted: dict[str, None] = {}
    for name in names:
        for part in (*FUNCTIONS[name].requires, name):
            wanted[FUNCTIONS[part].prelude] = None
    return "".join(wanted)
