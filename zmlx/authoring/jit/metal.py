"""The typed form as text in the Metal Shading Language."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from zmlx.authoring.functions import FUNCTIONS, preludes
from zmlx.authoring.jit.ir import (
    Apply,
    Assign,
    Binary,
    Break,
    Call,
    Cast,
    Compare,
    Constant,
    Continue,
    Expression,
    For,
    Function,
    If,
    Kind,
    Logic,
    Power,
    Return,
    Select,
    Statement,
    Unary,
    Unpack,
    Variable,
    expressions,
    loops,
    reachable,
)

#: How a dtype is written.
TYPES = {
    mx.float32: "float",
    mx.float16: "half",
    mx.bfloat16: "bfloat16_t",
    mx.bool_: "bool",
    mx.int8: "int8_t",
    mx.int16: "int16_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
}

_POWER = """
template <int exponent, typename T>
inline T zmlx_power(T base) {
  T result = (exponent & 1) ? base : T(1);
  for (int rest = exponent >> 1; rest > 0; rest >>= 1) {
    base = base * base;
    if (rest & 1) {
      result = result * base;
    }
  }
  return result;
}
"""

# Python's: rounded down, the rest has the sign of the divisor. Zero divides to 0, and -1 is apart
# because the smallest number divided by it does not fit.
_WHOLE = {
    "//": """
inline INT zmlx_floor_divide(INT a, INT b) {
  if (b == 0) {
    return 0;
  }
  if (b == -1) {
    return INT(UINT(0) - UINT(a));
  }
  INT quotient = a / b;
  return quotient - INT(a % b != 0 && (a < 0) != (b < 0));
}
""",
    "%": """
inline INT zmlx_remainder(INT a, INT b) {
  if (b == 0 || b == -1) {
    return 0;
  }
  INT rest = a % b;
  return rest != 0 && (rest < 0) != (b < 0) ? rest + b : rest;
}
""",
}

_REMAINDER = """
inline float zmlx_remainder(float a, float b) {
  float rest = metal::fmod(a, b);
  return rest != 0.0f && (rest < 0.0f) != (b < 0.0f) ? rest + b : rest;
}
"""

# The quotient itself may round up to the next whole number; what the rest leaves does not.
_FLOOR_DIVIDE = """
inline float zmlx_floor_divide(float a, float b) {
  if (metal::isinf(b) && metal::isfinite(a)) {
    return a * b < 0.0f ? -1.0f : 0.0f;
  }
  return metal::rint((a - zmlx_remainder(a, b)) / b);
}
"""

# What does not fit becomes the nearest number that does, NaN becomes 0.
_TO_WHOLE = """
inline INT zmlx_to_whole(float a) {
  if (a >= HALF) {
    return MOST;
  }
  if (a < -HALF) {
    return -MOST - 1;
  }
  return a == a ? INT(a) : 0;
}
"""

_TURNS = """
inline UINT zmlx_turns(INT start, INT stop, INT step) {
  if (step > 0 && start < stop) {
    return (UINT(stop) - UINT(start) - 1) / UINT(step) + 1;
  }
  if (step < 0 && start > stop) {
    return (UINT(start) - UINT(stop) - 1) / (UINT(0) - UINT(step)) + 1;
  }
  return 0;
}
"""


@dataclass(frozen=True)
class Port:
    """An input of a kernel: an array of elements, or one number for all of them."""

    dtype: mx.Dtype
    scalar: bool


@dataclass(frozen=True)
class Text:
    """What a kernel is made of: the functions, and the body that calls the last one."""

    header: str
    body: str


def write(
    function: Function,
    inputs: tuple[Port, ...],
    outputs: tuple[mx.Dtype, ...],
    *,
    integer: mx.Dtype,
    large: bool,
) -> Text:
    """Return a kernel that computes one element per thread.

    Args:
        function: what is computed of an element.
        inputs: one for each parameter; they are called in0, in1, ... in the text.
        outputs: dtypes of the results; they are called out0, out1, ...
        integer: int32 or int64, the dtype of INT.
        large: arrays of 2**31 elements or more: the grid has rows of `LARGE_ROW` threads, and
            the last row is cut off.
    """
    writer = _Writer(integer)
    texts = [writer.function(each) for each in reachable(function)]
    header = writer.prelude(reachable(function)) + "\n" + "\n".join(texts)
    return Text(header, writer.body(function, inputs, outputs, large=large))


#: Threads in a row of the grid of a large array.
LARGE_ROW = 2**30


class _Writer:
    """Writes functions; each has a name of its own."""

    def __init__(self, integer: mx.Dtype) -> None:
        wide = integer == mx.int64
        self._types = {Kind.BOOL: "bool", Kind.INT: TYPES[integer], Kind.FLOAT: "float"}
        self._unsigned = "uint64_t" if wide else "uint32_t"
        self._suffix = "L" if wide else ""
        self._most = 2**63 - 1 if wide else 2**31 - 1
        self._names: dict[Function, str] = {}

    def prelude(self, functions: Iterable[Function]) -> str:
        """Return what the functions need before them."""
        called: set[str] = set()
        parts: dict[str, None] = {}
        for function in functions:
            for node in expressions(function):
                match node:
                    case Call(function=name):
                        called.add(name)
                    case Power(kind=Kind.FLOAT):
                        parts[_POWER] = None
                    case Power(kind=Kind.INT):
                        parts[_POWER] = None
                    case Binary(operator="//" | "%" as shown, kind=Kind.INT):
                        parts[_WHOLE[shown]] = None
                    case Binary(operator="//" | "%" as shown, kind=Kind.FLOAT):
                        parts[_REMAINDER] = None
                        if shown == "//":
                            parts[_FLOOR_DIVIDE] = None
                    case Cast(kind=Kind.INT, operand=operand) if operand.kind == Kind.FLOAT:
                        parts[_TO_WHOLE] = None
            if any(not _simple(loop) for loop in loops(function.body)):
                parts[_TURNS] = None
        text = "".join(parts).replace("UINT", self._unsigned).replace("INT", self._types[Kind.INT])
        text = text.replace("HALF", f"{float(self._most + 1)!r}f")
        text = text.replace("MOST", f"{self._most}{self._suffix}")
        return preludes(sorted(called)) + text

    def function(self, function: Function) -> str:
        """Return a function's text; its locals stand before its statements, set to zero."""
        name = f"jit{len(self._names)}_{_ascii(function.name)}"
        self._names[function] = name
        local = _Locals(function)
        lines = []
        result = self._types[function.results[0]]
        if len(function.results) > 1:
            result = f"{name}_results"
            members = "".join(
                f" {self._types[kind]} r{index};" for index, kind in enumerate(function.results)
            )
            lines.append(f"struct {result} {{{members} }};")
        parameters = ", ".join(
            f"{self._types[function.variables[p]]} {local[p]}" for p in function.parameters
        )
        lines.append(f"inline {result} {name}({parameters}) {{")
        for variable, kind in function.variables.items():
            if variable not in function.parameters:
                lines.append(f"  {self._types[kind]} {local[variable]} = {_zero(kind)};")
        statements = _Statements(self, function, local, result)
        lines += statements.block(function.body, "  ")
        lines.append("}")
        return "\n".join(lines) + "\n"

    def body(
        self,
        function: Function,
        inputs: tuple[Port, ...],
        outputs: tuple[mx.Dtype, ...],
        *,
        large: bool,
    ) -> str:
        """Return the kernel's body: load, call, store."""
        lines = ["uint32_t i = thread_position_in_grid.x;"]
        if large:
            full = next(index for index, port in enumerate(inputs) if not port.scalar)
            lines = [
                "uint64_t count = 1;",
                f"for (int d = 0; d < in{full}_ndim; ++d) {{",
                f"  count *= uint64_t(in{full}_shape[d]);",
                "}",
                "uint64_t i = uint64_t(thread_position_in_grid.y) * "
                f"{LARGE_ROW} + thread_position_in_grid.x;",
                "if (i >= count) {",
                "  return;",
                "}",
            ]
        loads = []
        for index, (port, parameter) in enumerate(zip(inputs, function.parameters, strict=True)):
            source = f"in{index}" if port.scalar else f"in{index}[i]"
            wanted = self._types[function.variables[parameter]]
            loads.append(
                source if TYPES[port.dtype] == wanted else f"static_cast<{wanted}>({source})"
            )
        call = f"{self._names[function]}({', '.join(loads)})"
        if len(outputs) == 1:
            values = [call]
        else:
            lines.append(f"{self._names[function]}_results r = {call};")
            values = [f"r.r{index}" for index in range(len(outputs))]
        for index, (dtype, value) in enumerate(zip(outputs, values, strict=True)):
            if TYPES[dtype] != self._types[function.results[index]]:
                value = f"static_cast<{TYPES[dtype]}>({value})"
            lines.append(f"out{index}[i] = {value};")
        return "\n".join(lines) + "\n"

    def type_of(self, kind: Kind) -> str:
        """Return how a kind is written."""
        return self._types[kind]

    @property
    def unsigned(self) -> str:
        """The unsigned type as wide as INT."""
        return self._unsigned

    def called(self, function: Function) -> str:
        """Return the name of a function that has been written."""
        return self._names[function]

    def constant(self, value: float | int | bool, kind: Kind) -> str:
        """Return a number as text."""
        if kind == Kind.BOOL:
            return "true" if value else "false"
        if kind == Kind.INT:
            if value == -self._most - 1:
                return f"(-{self._most}{self._suffix} - 1)"
            text = f"{value}{self._suffix}"
        else:
            with np.errstate(over="ignore"):
                number = np.float32(value)
            if math.isnan(number):
                return "NAN"
            text = "INFINITY" if math.isinf(number) else f"{abs(number)!s}f"
            if math.copysign(1, number) < 0:
                text = f"-{text}"
        return f"({text})" if text.startswith("-") else text


def _zero(kind: Kind) -> str:
    return {Kind.BOOL: "false", Kind.INT: "0", Kind.FLOAT: "0.0f"}[kind]


def _ascii(name: str) -> str:
    """Return a name with what C's identifiers cannot hold replaced."""
    return "".join(
        c if c.isascii() and (c.isalnum() or c == "_") else "_" if c == " " else f"u{ord(c):x}"
        for c in name
    )


def _simple(loop: For) -> bool:
    """Return whether a loop can count up or down by one without passing its bound."""
    return isinstance(loop.step, Constant) and loop.step.value in (1, -1)


class _Locals:
    """Metal's names of a function's variables; no two alike, none a word of the language."""

    def __init__(self, function: Function) -> None:
        self._names: dict[str, str] = {}
        taken: set[str] = set()
        for variable in function.variables:
            name = f"v_{_ascii(variable)}"
            while name in taken:
                name += "_"
            taken.add(name)
            self._names[variable] = name

    def __getitem__(self, variable: str) -> str:
        return self._names[variable]


class _Statements:
    """Writes the statements of one function."""

    def __init__(self, writer: _Writer, function: Function, local: _Locals, result: str) -> None:
        self._writer = writer
        self._function = function
        self._local = local
        self._result = result
        self._counters = 0

    def block(self, body: tuple[Statement, ...], indent: str) -> list[str]:
        """Return the lines of a body."""
        lines: list[str] = []
        for statement in body:
            lines += [indent + line for line in self._statement(statement)]
        return lines

    def _statement(self, statement: Statement) -> list[str]:
        match statement:
            case Assign(name=name, value=value):
                return [f"{self._local[name]} = {self._bare(value)};"]
            case Unpack(names=names, call=call):
                return self._unpack(names, call)
            case If(condition=condition, then=then, otherwise=otherwise):
                lines = [f"if ({self._bare(condition)}) {{", *self.block(then, "  ")]
                if otherwise:
                    lines += ["} else {", *self.block(otherwise, "  ")]
                return [*lines, "}"]
            case For():
                return self._for(statement)
            case Return(values=values):
                texts = [self._bare(value) for value in values]
                return [f"return {texts[0]};" if len(texts) == 1 else self._results(texts)]
            case Break():
                return ["break;"]
            case Continue():
                return ["continue;"]

    def _results(self, texts: list[str]) -> str:
        return f"return {self._result}{{{', '.join(texts)}}};"

    def _unpack(self, names: tuple[str, ...], call: Apply) -> list[str]:
        if len(names) == 1:
            return [f"{self._local[names[0]]} = {self._text(call)};"]
        self._counters += 1
        taken = f"r{self._counters}"
        kind = f"{self._writer.called(call.function)}_results"
        lines = [f"{kind} {taken} = {self._text(call)};"]
        return lines + [
            f"{self._local[name]} = {taken}.r{index};" for index, name in enumerate(names)
        ]

    def _for(self, loop: For) -> list[str]:
        """Return a loop; it counts with a variable of its own, the body may assign the name."""
        self._counters += 1
        counter, integer = f"k{self._counters}", self._writer.type_of(Kind.INT)
        name, body = self._local[loop.name], self.block(loop.body, "  ")
        start, stop, step = (self._bare(bound) for bound in (loop.start, loop.stop, loop.step))
        if _simple(loop):
            up = isinstance(loop.step, Constant) and loop.step.value == 1
            turn = f"{counter} {'<' if up else '>'} end{counter}; {'++' if up else '--'}{counter}"
            lines = [
                f"const {integer} end{counter} = {stop};",
                f"for ({integer} {counter} = {start}; {turn}) {{",
                f"  {name} = {counter};",
            ]
            return [*lines, *body, "}"]
        unsigned = self._writer.unsigned
        return [
            f"const {integer} start{counter} = {start};",
            f"const {integer} step{counter} = {step};",
            f"const {unsigned} turns{counter} = zmlx_turns(start{counter}, {stop}, step{counter});",
            f"for ({unsigned} {counter} = 0; {counter} < turns{counter}; ++{counter}) {{",
            f"  {name} = {integer}({unsigned}(start{counter}) + "
            f"{counter} * {unsigned}(step{counter}));",
            *body,
            "}",
        ]

    def _bare(self, node: Expression) -> str:
        """Return an expression without parentheses around the whole of it."""
        text = self._text(node)
        compound = isinstance(node, Binary | Compare | Logic | Select)
        return text[1:-1] if compound and text.startswith("(") else text

    def _text(self, node: Expression) -> str:
        match node:
            case Constant(value=value, kind=kind):
                return self._writer.constant(value, kind)
            case Variable(name=name):
                return self._local[name]
            case Cast():
                return self._cast(node)
            case Unary():
                return self._unary(node)
            case Binary():
                return self._binary(node)
            case Power(base=base, exponent=exponent, kind=kind):
                # Whole numbers wrap around; C++ promises that of unsigned ones only.
                if kind == Kind.INT:
                    integer, unsigned = self._writer.type_of(kind), self._writer.unsigned
                    inner = f"{unsigned}({self._bare(base)})"
                    return f"{integer}(zmlx_power<{exponent}>({inner}))"
                return f"zmlx_power<{exponent}>({self._bare(base)})"
            case Compare(operator=shown, left=left, right=right):
                return f"({self._text(left)} {shown} {self._text(right)})"
            case Logic(operator=shown, left=left, right=right):
                symbol = "&&" if shown == "and" else "||"
                return f"({self._text(left)} {symbol} {self._text(right)})"
            case Select(condition=condition, yes=yes, no=no):
                parts = (self._text(part) for part in (condition, yes, no))
                return "({} ? {} : {})".format(*parts)
            case Call(function=name, arguments=arguments):
                return f"{FUNCTIONS[name].metal}({', '.join(self._bare(a) for a in arguments)})"
            case Apply(function=function, arguments=arguments):
                given = ", ".join(self._bare(argument) for argument in arguments)
                return f"{self._writer.called(function)}({given})"

    def _cast(self, node: Cast) -> str:
        inner = self._text(node.operand)
        if node.kind == Kind.BOOL:
            return f"({inner} != {_zero(node.operand.kind)})"
        if node.kind == Kind.INT and node.operand.kind == Kind.FLOAT:
            return f"zmlx_to_whole({self._bare(node.operand)})"
        return f"{self._writer.type_of(node.kind)}({self._bare(node.operand)})"

    def _unary(self, node: Unary) -> str:
        inner = self._text(node.operand)
        if node.operator == "not":
            return f"(!{inner})"
        if node.kind == Kind.INT and node.operator == "-":
            unsigned = self._writer.unsigned
            return f"{self._writer.type_of(node.kind)}({unsigned}(0) - {unsigned}({inner}))"
        return f"({node.operator}{inner})"

    def _binary(self, node: Binary) -> str:
        shown = node.operator
        if shown in ("//", "%"):
            name = "zmlx_floor_divide" if shown == "//" else "zmlx_remainder"
            return f"{name}({self._bare(node.left)}, {self._bare(node.right)})"
        left, right = self._text(node.left), self._text(node.right)
        if node.kind == Kind.INT and shown in "+-*":
            unsigned = self._writer.unsigned
            inner = f"{unsigned}({left}) {shown} {unsigned}({right})"
            return f"{self._writer.type_of(node.kind)}({inner})"
        if node.kind == Kind.BOOL:  # & | ^ of bool are int in C++
            return f"bool({left} {shown} {right})"
        return f"({left} {shown} {right})"
