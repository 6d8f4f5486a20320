"""What each elementwise primitive computes of one element, as MLX's GPU kernels do.

An expression gets the names of variables that hold its operands, and is rounded to the dtype of
its result by whoever writes it. 16-bit floats compute by Metal's rules on every backend: in float,
rounded after each operation. Products of float32 go through `tiny_product`, because CUDA's
compiler would fuse them with a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from zmlx.authoring.functions import FUNCTIONS
from zmlx.graph.nodes import Node
from zmlx.graph.tiny.literals import FLOATS, SIGNED, literal, type_name

_PRODUCT = """
#ifdef __CUDACC__
inline float tiny_product(float a, float b) { return __fmul_rn(a, b); }
#else
inline float tiny_product(float a, float b) { return a * b; }
#endif
"""
_SIGMOID = """
template <typename T>
inline T tiny_sigmoid(T x) {
  T y = T(1 / (1 + metal::exp(metal::abs(x))));
  return x < 0 ? y : T(1 - y);
}
"""
_LARGER = """
template <typename T>
inline T tiny_larger(T a, T b) { return (a != a) | (a > b) ? a : b; }
"""
_SMALLER = """
template <typename T>
inline T tiny_smaller(T a, T b) { return (a != a) | (a < b) ? a : b; }
"""
_REMAINDER = """
template <typename T>
inline T tiny_remainder(T a, T b) {
  T r = T(a % b);
  return r != 0 && (r < 0) != (b < 0) ? T(r + b) : r;
}
inline float tiny_float_remainder(float a, float b) {
  float r = metal::fmod(a, b);
  return r != 0 && (r < 0) != (b < 0) ? r + b : r;
}
"""
_QUOTIENT = """
template <typename T>
inline T tiny_quotient(T a, T b) {
  T q = T(a / b);
  return a % b != 0 && (a < 0) != (b < 0) ? T(q - 1) : q;
}
"""
_POWER = """
template <typename T>
inline T tiny_power(T base, T exponent) {
  if (exponent < 0) {
    return T(0);
  }
  T power = T(1);
  for (; exponent; exponent >>= 1) {
    power = exponent & 1 ? T(power * base) : power;
    base = T(base * base);
  }
  return power;
}
"""
_KEY = """
// Unsigned numbers in the order of a sort: -0 equals 0, NaN comes last.
inline uint tiny_key(float x) {
  uint bits = x == 0.0f ? 0u : as_type<uint>(x);
  return x != x ? 0xffffffffu : bits >> 31 ? ~bits : bits | 0x80000000u;
}
inline uint tiny_key(int x) { return uint(x) ^ 0x80000000u; }
inline uint tiny_key(uint x) { return x; }
"""


def _across(name: str, joined: str) -> str:
    """Return a function that joins a value of 2 * distance lanes, for each of them."""
    return f"""
template <typename T>
inline T {name}(T a, ushort distance) {{
  for (; distance; distance >>= 1) {{
    T b = simd_shuffle_xor(a, distance);
    a = {joined};
  }}
  return a;
}}
"""


#: Text before a kernel by the function that needs it.
HEADERS: dict[str, str] = {
    "tiny_product": _PRODUCT,
    "tiny_sigmoid": _SIGMOID,
    "tiny_larger": _LARGER,
    "tiny_smaller": _SMALLER,
    "tiny_remainder": _REMAINDER,
    "tiny_float_remainder": _REMAINDER,
    "tiny_quotient": _QUOTIENT,
    "tiny_power": _POWER,
    "tiny_key": _KEY,
    "simd_total": _across("simd_total", "a + b"),
    "simd_times": _across("simd_times", "a * b"),
    "simd_larger": _across("simd_larger", "tiny_larger(a, b)"),
    "simd_smaller": _across("simd_smaller", "tiny_smaller(a, b)"),
    "zmlx_log1p": FUNCTIONS["log1p"].prelude,
    "zmlx_expm1": FUNCTIONS["expm1"].prelude,
    "zmlx_erf": FUNCTIONS["erf"].prelude,
    "zmlx_logaddexp": FUNCTIONS["logaddexp"].prelude,
}


@dataclass(frozen=True)
class Operands:
    """The operands of one element: names of variables, and their dtypes and that of the result."""

    names: Sequence[str]
    dtypes: Sequence[mx.Dtype]
    result: mx.Dtype
    arguments: Sequence[Any]

    def __getitem__(self, index: int) -> str:
        return self.names[index]

    @property
    def of_floats(self) -> bool:
        """Whether the first operand is a float."""
        return self.dtypes[0] in FLOATS


_Expression = Callable[[Operands], str]


def _function(name: str, *, keeps_whole: bool = False) -> _Expression:
    def written(o: Operands) -> str:
        if keeps_whole and not o.of_floats:
            return o[0]
        return f"{name}({', '.join(o.names)})"

    return written


def _in_float(name: str) -> _Expression:
    return lambda o: f"{name}({', '.join(f'float({n})' for n in o.names)})"


def _between(sign: str) -> _Expression:
    return lambda o: f"{o[0]} {sign} {o[1]}"


def _product(first: int, second: int) -> _Expression:
    def written(o: Operands) -> str:
        if o.dtypes[0] == mx.float32:
            return f"tiny_product({o[first]}, {o[second]})"
        return f"{o[first]} * {o[second]}"

    return written


def _abs(o: Operands) -> str:
    return f"metal::abs({o[0]})" if o.of_floats or o.dtypes[0] in SIGNED else o[0]


def _sign(o: Operands) -> str:
    if o.dtypes[0] in (*FLOATS, *SIGNED):
        return f"int({o[0]} > 0) - int({o[0]} < 0)"
    return f"{o[0]} != 0"


def _floor_divide(o: Operands) -> str:
    if o.of_floats:
        return f"metal::floor({type_name(o.dtypes[0])}({o[0]} / {o[1]}))"
    return f"tiny_quotient({o[0]}, {o[1]})" if o.dtypes[0] in SIGNED else f"{o[0]} / {o[1]}"


def _remainder(o: Operands) -> str:
    if o.of_floats:
        return f"tiny_float_remainder(float({o[0]}), float({o[1]}))"
    return f"tiny_remainder({o[0]}, {o[1]})" if o.dtypes[0] in SIGNED else f"{o[0]} % {o[1]}"


def _power(o: Operands) -> str:
    return f"{'metal::pow' if o.of_floats else 'tiny_power'}({o[0]}, {o[1]})"


def _equal(o: Operands) -> str:
    same = f"{o[0]} == {o[1]}"
    if o.arguments and o.arguments[0] and o.of_floats:
        return f"{same} || ({o[0]} != {o[0]} && {o[1]} != {o[1]})"
    return same


def _log(o: Operands) -> str:
    return f"metal::precise::{('log2', 'log10', 'log')[o.arguments[0]]}({o[0]})"


def _sqrt(o: Operands) -> str:
    return f"metal::precise::{'rsqrt' if o.arguments[0] else 'sqrt'}({o[0]})"


def _bitwise(o: Operands) -> str:
    return f"{o[0]} {('&', '|', '^', '<<', '>>')[o.arguments[0]]} {o[1]}"


def _as_type(o: Operands) -> str:
    given, wanted = o.dtypes[0], o.result
    if wanted == mx.bool_:
        return f"{o[0]} != {literal(0, given)}"
    return f"float({o[0]})" if given in FLOATS and given != mx.float32 != wanted else o[0]


def _view(o: Operands) -> str:
    if mx.bool_ in (o.dtypes[0], o.result):
        return o[0]
    return f"as_type<{type_name(o.result)}>({o[0]})"


def _select(o: Operands) -> str:
    first, second = o.names[1:]
    if o.result in (mx.float16, mx.bfloat16):
        # A constant and a variable of these are different types to a compiler.
        first, second = (f"{type_name(o.result)}({name})" for name in (first, second))
    return f"{o[0]} ? {first} : {second}"


def _key(o: Operands) -> str:
    dtype = o.dtypes[0]
    kind = "float" if dtype in FLOATS else "int" if dtype in SIGNED else "uint"
    return f"tiny_key({kind}({o[0]}))"


_PRECISE = {
    "ArcCos": "acos",
    "ArcCosh": "acosh",
    "ArcSin": "asin",
    "ArcSinh": "asinh",
    "ArcTan": "atan",
    "ArcTan2": "atan2",
    "ArcTanh": "atanh",
    "Cos": "cos",
    "Cosh": "cosh",
    "Exp": "exp",
    "Sin": "sin",
    "Sinh": "sinh",
    "Tan": "tan",
    "Tanh": "tanh",
}

#: Primitive -> its expression.
EXPRESSIONS: dict[str, _Expression] = {
    **{op: _function(f"metal::precise::{name}") for op, name in _PRECISE.items()},
    "Abs": _abs,
    "Add": _between("+"),
    "AsType": _as_type,
    "BitwiseBinary": _bitwise,
    "BitwiseInvert": lambda o: f"~{o[0]}",
    "Ceil": _function("metal::ceil", keeps_whole=True),
    "Divide": _between("/"),
    "Equal": _equal,
    "Erf": _in_float("zmlx_erf"),
    "Expm1": _in_float("zmlx_expm1"),
    "Floor": _function("metal::floor", keeps_whole=True),
    "FloorDivide": _floor_divide,
    "Greater": _between(">"),
    "GreaterEqual": _between(">="),
    "Less": _between("<"),
    "LessEqual": _between("<="),
    "Log": _log,
    "Log1p": _in_float("zmlx_log1p"),
    "LogAddExp": _in_float("zmlx_logaddexp"),
    "LogicalAnd": _between("&&"),
    "LogicalNot": lambda o: f"!{o[0]}",
    "LogicalOr": _between("||"),
    "Maximum": _function("tiny_larger"),
    "Minimum": _function("tiny_smaller"),
    "Multiply": _product(0, 1),
    "Negative": lambda o: f"-{o[0]}",
    "NotEqual": _between("!="),
    "Power": _power,
    "Remainder": _remainder,
    "Round": _function("metal::rint", keeps_whole=True),
    "Select": _select,
    "Sigmoid": _function("tiny_sigmoid"),
    "Sign": _sign,
    "SortKey": _key,
    "Sqrt": _sqrt,
    "Square": _product(0, 0),
    "Subtract": _between("-"),
    "View": _view,
}

#: Functions of the above that call another one.
REQUIRED = {
    "simd_larger": "tiny_larger",
    "simd_smaller": "tiny_smaller",
    "zmlx_logaddexp": "zmlx_log1p",
}

#: How long an operation takes, in simple instructions, where that is not 1.
WORK = {
    **dict.fromkeys(_PRECISE, 16),
    **dict.fromkeys(("Erf", "Expm1", "Log", "Log1p", "LogAddExp", "Power"), 24),
    **dict.fromkeys(("Divide", "DivMod", "FloorDivide", "Remainder", "Sqrt"), 8),
    **dict.fromkeys(("Sigmoid", "SortKey"), 20),
}


def expression(node: Node, number: int, names: Sequence[str]) -> str:
    """Return the text that computes one element of a node's output.

    Args:
        node: an elementwise primitive.
        number: which of its outputs.
        names: of variables with the operands' elements.
    """
    operands = Operands(
        names, [v.dtype for v in node.inputs], node.outputs[number].dtype, node.arguments
    )
    if node.op == "DivMod":
        return (_floor_divide, _remainder)[number](operands)
    return EXPRESSIONS[node.op](operands)
