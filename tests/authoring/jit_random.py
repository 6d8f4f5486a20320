"""Random scalar functions in Python, to compare what they compute everywhere."""

from __future__ import annotations

import random

#: Functions of one argument that are smooth and tame everywhere. (Where float32 rounds tanh to 1,
#: comparing it with 1 would go another way than in float64.)
_TAME = ("math.sin({})", "math.cos({})", "0.75 * math.tanh({})", "math.atan({})", "abs({})")
_GUARDED = (
    "math.exp(min({}, 2.0))",
    "math.sqrt(abs({}) + 0.25)",
    "math.log(1.5 + abs({}))",
    "math.log1p(abs({}))",
    "math.expm1(max(min({}, 1.5), -3.0))",
    "0.75 * math.erf({})",
    "math.asinh({})",
)
_STEPS = ("math.floor({})", "math.ceil({})", "round({})", "int({})", "math.trunc({})")


class Programs:
    """Writes functions of `x`, `y` and a whole number `n`; the same ones for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def module(self, count: int) -> str:
        """Return a module with functions f0, f1, ... and `every`, which returns all of them."""
        parts = ["import math", ""]
        for index in range(count):
            callee = f"f{index - 1}" if index % 3 == 2 else None
            parts += self.function(f"f{index}", callee)
        calls = ", ".join(f"f{index}(x, y, n)" for index in range(count))
        parts += ["@jit", "def every(x, y, n: int):", f"    return {calls}", ""]
        return "\n".join(parts)

    def function(self, name: str, callee: str | None) -> list[str]:
        """Return the lines of a function."""
        self._floats, self._wholes, self._loops = ["x", "y"], ["n"], 0
        self._callee = callee
        lines = ["@jit", f"def {name}(x, y, n: int):"]
        body = [f"a = {self._float(2)}", f"b = {self._float(1)}", f"k = {self._whole(1)}"]
        self._floats += ["a", "b"]
        self._wholes += ["k"]
        for _ in range(self._random.randint(2, 4)):
            body += self._statement(2)
        body.append(f"return {self._float(2)} + a - 0.5 * b")
        return [*lines, *(f"    {line}" for line in body), "", ""]

    def _pick(self, *choices: str) -> str:
        return self._random.choice(choices)

    def _statement(self, depth: int) -> list[str]:
        kind = self._random.random()
        if depth == 0 or kind < 0.35:
            return [self._assignment()]
        if kind < 0.65:
            lines = [f"if {self._condition(2)}:", *self._block(depth)]
            if self._random.random() < 0.3:
                lines += [f"elif {self._condition(1)}:", *self._block(depth)]
            if self._random.random() < 0.6:
                lines += ["else:", *self._block(depth)]
            return lines
        if kind < 0.75 and depth < 2:
            return [f"if {self._condition(1)}:", f"    return {self._float(1)}"]
        return self._loop(depth)

    def _loop(self, depth: int) -> list[str]:
        counter = f"i{self._loops}"
        self._loops += 1
        bound = self._pick("3", "n", "1, n + 1", "4, 0, -2", "min(n, 2)", "0, 2 * n, 3", "k % 4")
        lines = [f"for {counter} in range({bound}):"]
        self._wholes.append(counter)
        inner = self._block(depth)
        if self._random.random() < 0.4:
            way = self._pick("break", "continue")
            inner += [f"    if {self._condition(1)}:", f"        {way}"]
            inner += self._block(1)
        self._wholes.remove(counter)
        # What a loop adds up stays small: it is halved on each turn.
        return [*lines, "    a = 0.5 * a", *inner]

    def _block(self, depth: int) -> list[str]:
        lines = []
        for _ in range(self._random.randint(1, 2)):
            lines += self._statement(depth - 1)
        return [f"    {line}" for line in lines]

    def _assignment(self) -> str:
        name = self._pick("a", "b")
        kind = self._random.random()
        if kind < 0.4:
            return f"{name} {self._pick('+', '-')}= {self._float(2)}"
        if kind < 0.5:
            return f"a, b = b, {self._float(1)}"
        if kind < 0.6:
            return f"k = {self._whole(2)}"
        return f"{name} = {self._float(2)}"

    def _float(self, depth: int) -> str:
        if depth == 0:
            constant = f"{self._random.choice((0.25, 0.5, 1.5, -2.0, 3.0))}"
            return self._pick(*self._floats, *self._floats, constant, self._whole(0))
        kind = self._random.random()
        one, two = self._float(depth - 1), self._float(depth - 1)
        if kind < 0.35:
            return f"({one} {self._pick('+', '-', '*')} {two})"
        if kind < 0.45:
            return f"({one} / (1.25 + abs({two})))"
        if kind < 0.52:
            operator, divisor = self._pick("//", "%"), self._pick("1.5", "-0.75", "2", "-3")
            return f"({one} {operator} {divisor})"
        if kind < 0.6:
            return f"{self._pick('min', 'max')}({one}, {two})"
        if kind < 0.7:
            return f"({one} if {self._condition(depth - 1)} else {two})"
        if kind < 0.75:
            return self._random.choice(("{} ** 2", "{} ** 3", "(abs({}) + 0.5) ** 1.5")).format(
                f"math.sin({one})"
            )
        if kind < 0.8 and self._callee:
            return f"{self._callee}(math.sin({one}), math.cos({two}), {self._whole(0)} % 3)"
        if kind < 0.85:
            return self._random.choice(_STEPS).format(one)
        return self._random.choice((*_TAME, *_GUARDED)).format(one)

    def _whole(self, depth: int) -> str:
        if depth == 0:
            return self._pick(*self._wholes, *self._wholes, "2", "-3", "1")
        one, two = self._whole(depth - 1), self._whole(depth - 1)
        return self._pick(
            f"({one} + {two})",
            f"({one} * {two} % 7)",
            f"({one} // {self._pick('2', '-3')})",
            f"abs({one})",
            f"max({one}, {two})",
            f"({one} if {self._condition(0)} else {two})",
            f"({one} & {two})",
        )

    def _condition(self, depth: int) -> str:
        kind = self._random.random()
        if depth and kind < 0.3:
            joined = self._pick("and", "or")
            return f"({self._condition(depth - 1)} {joined} {self._condition(depth - 1)})"
        if depth and kind < 0.4:
            return f"(not {self._condition(depth - 1)})"
        if kind < 0.5:
            return f"({self._float(0)} {self._pick('<', '<=')} {self._float(0)} < 1.75)"
        if kind < 0.7:
            return f"({self._whole(0)} {self._pick('==', '!=', '>')} {self._whole(0)})"
        return f"({self._float(0)} {self._pick('<', '>', '<=', '>=')} {self._float(0)})"
