"""From words to a tree, or to the reason why a formula is opaque.

The language is that of C's expressions without side effects: arithmetic, comparisons, logic, bits,
`? :`, calls of known functions (with or without `metal::`, `metal::precise::`, `metal::fast::`),
conversions and literals.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Mapping

from zmlx.authoring.formula.errors import FormulaError
from zmlx.authoring.formula.functions import FUNCTIONS, METAL_ONLY, OF_DEFAULT_HEADER
from zmlx.authoring.formula.kinds import CASTS
from zmlx.authoring.formula.tokens import Token, tokens
from zmlx.authoring.formula.tree import (
    Binary,
    Call,
    Cast,
    Choice,
    Name,
    Number,
    Tree,
    Unary,
    substituted,
)
from zmlx.authoring.msl import DEFAULT_HEADER

#: operators from the loosest to the tightest, as in C
LEVELS: tuple[tuple[str, ...], ...] = (
    ("||",),
    ("&&",),
    ("|",),
    ("^",),
    ("&",),
    ("==", "!="),
    ("<", "<=", ">", ">="),
    ("<<", ">>"),
    ("+", "-"),
    ("*", "/", "%"),
)
_CONSTANTS: dict[str, float] = {
    "INFINITY": math.inf,
    "HUGE_VALF": math.inf,
    "NAN": math.nan,
    "M_E_F": math.e,
    "M_LOG2E_F": 1 / math.log(2),
    "M_LOG10E_F": 1 / math.log(10),
    "M_LN2_F": math.log(2),
    "M_LN10_F": math.log(10),
    "M_PI_F": math.pi,
    "M_PI_2_F": math.pi / 2,
    "M_PI_4_F": math.pi / 4,
    "M_1_PI_F": 1 / math.pi,
    "M_2_PI_F": 2 / math.pi,
    "M_2_SQRTPI_F": 2 / math.sqrt(math.pi),
    "M_SQRT2_F": math.sqrt(2),
    "M_SQRT1_2_F": math.sqrt(0.5),
    "FLT_MAX": (2 - 2.0**-23) * 2.0**127,
    "FLT_MIN": 2.0**-126,
    "FLT_EPSILON": 2.0**-23,
}
_ASSIGNS = {"=", "+=", "-=", "*=", "/=", "%=", "&=", "|=", "^=", "<<=", ">>=", "++", "--"}
_STATEMENTS = {";", "{", "}"}
_PREFIX = re.compile(r"^(?:metal::)?(?:(precise|fast)::)?(\w+)$")


class Opaque(Exception):
    """A formula may be good Metal and is not one that is understood here; the text says why."""


def parse(text: str, variables: Collection[str], *, header: str = "", elsewhere: str = "") -> Tree:
    """Return the tree of a formula.

    Args:
        text: the formula.
        variables: names that it may use.
        header: what stands before the kernel; its functions and constants may be used.
        elsewhere: statements before the formula in the same kernel; their names may be used.

    Raises:
        FormulaError: it has a mistake.
        Opaque: it uses what has no formula here.
    """
    return _Parser(text, variables, header, elsewhere).whole()


class _Parser:
    def __init__(self, text: str, variables: Collection[str], header: str, elsewhere: str) -> None:
        self.text = text
        self.variables = variables
        self.header = header
        self.elsewhere = elsewhere
        self.words = tokens(text)
        self.position = 0
        #: reasons why the formula is opaque: known only when all of it was read without a mistake
        self.opaque: list[str] = []
        #: the text is a derivative of the table of functions
        self.calculus = False

    def whole(self) -> Tree:
        if any(word.text in _STATEMENTS for word in self.words):
            raise Opaque("it holds statements, and a formula is one expression")
        tree = self.choice()
        word = self.word
        if word.kind != "end":
            raise self.unexpected(word)
        if self.opaque:
            raise Opaque(self.opaque[0])
        return tree

    @property
    def word(self) -> Token:
        return self.words[self.position]

    def take(self, *signs: str) -> Token | None:
        """Return the next word and step over it if it is one of these signs."""
        word = self.word
        if word.kind == "sign" and word.text in signs:
            self.position += 1
            return word
        return None

    def expect(self, sign: str, why: str) -> None:
        if self.take(sign) is None:
            raise FormulaError(
                self.text, self.word.at, f"expected {sign!r} {why}", _found(self.word)
            )

    def unexpected(self, word: Token) -> FormulaError:
        text = self.text
        if word.text in _ASSIGNS:
            advice = "compare with ==" if word.text == "=" else "write the new value itself"
            return FormulaError(text, word.at, "a formula cannot assign", advice)
        if word.kind == "end":
            return FormulaError(text, word.at, "the formula ends too early", "a value is missing")
        if word.kind in ("name", "number"):
            return FormulaError(
                text, word.at, f"unexpected {word.text!r}", "an operator is missing before it"
            )
        return FormulaError(text, word.at, f"unexpected {word.text!r}", "a value should stand here")

    def choice(self) -> Tree:
        condition = self.level(0)
        mark = self.take("?")
        if mark is None:
            return condition
        yes = self.choice()
        self.expect(":", "of the '?'")
        return Choice(condition, yes, self.choice(), mark.at)

    def level(self, number: int) -> Tree:
        if number == len(LEVELS):
            return self.unary()
        left = self.level(number + 1)
        while (sign := self.take(*LEVELS[number])) is not None:
            right = self.level(number + 1)
            self.check_division(sign, left, right)
            left = Binary(sign.text, left, right, sign.at)
        return left

    def check_division(self, sign: Token, left: Tree, right: Tree) -> None:
        if (
            sign.text == "/"
            and isinstance(left, Number)
            and isinstance(right, Number)
            and left.kind != "float" != right.kind
            and (right.value == 0 or left.value % right.value)
        ):
            raise FormulaError(
                self.text,
                sign.at,
                "C divides whole numbers without a remainder",
                f"write {left.value}.0f / {right.value}.0f",
            )

    def unary(self) -> Tree:
        sign = self.take("-", "!", "~", "+")
        if sign is None:
            return self.postfix()
        operand = self.unary()
        if sign.text == "+":
            return operand
        if sign.text == "-" and isinstance(operand, Number) and operand.kind != "bool":
            return Number(-operand.value, operand.kind, sign.at)
        return Unary(sign.text, operand, sign.at)

    def postfix(self) -> Tree:
        tree = self.primary()
        word = self.word
        if word.text in (".", "->"):
            raise FormulaError(
                self.text,
                word.at,
                "a formula cannot read members",
                "its values are numbers; for vectors and structs write a kernel (zmlx.metal)",
            )
        if word.text == "[":
            raise FormulaError(
                self.text,
                word.at,
                "a formula cannot index",
                "it sees one element of each array; for other elements write a kernel (zmlx.metal)",
            )
        return tree

    def primary(self) -> Tree:
        word = self.word
        if word.kind == "number":
            self.position += 1
            return self.number(word)
        if word.kind == "name":
            self.position += 1
            return self.name(word)
        if self.take("("):
            return self.parenthesis()
        raise self.unexpected(word)

    def parenthesis(self) -> Tree:
        """Read `(expression)`, or a conversion as C writes it: `(float)x`."""
        word, after = self.word, self.words[self.position + 1]
        if word.kind == "name" and _is_type(word.text) and after.text == ")":
            self.position += 2
            return Cast(_unprefixed(word.text), self.unary(), word.at)
        inner = self.choice()
        self.expect(")", "to close the '('")
        return inner

    def number(self, word: Token) -> Number:
        digits = word.text.lower()
        if digits.startswith("0x"):
            value, suffix = int(digits.rstrip("ul"), 16), digits[len(digits.rstrip("ul")) :]
        else:
            body = digits.rstrip("fhul")
            suffix = digits[len(body) :]
            if any(mark in body for mark in ".e") or "f" in suffix or "h" in suffix:
                self.check_float(word, body, suffix)
                return Number(float(body), "float", word.at)
            if len(body) > 1 and body.startswith("0"):
                raise FormulaError(
                    self.text, word.at, "C reads digits after a 0 as octal", "leave out the 0"
                )
            if self.calculus:
                return Number(float(body), "float", word.at)
            value = int(body)
        if value >= 1 << 64:
            raise FormulaError(self.text, word.at, "the number needs more than 64 bits", "")
        return Number(value, _whole_kind(value, suffix), word.at)

    def check_float(self, word: Token, body: str, suffix: str) -> None:
        if suffix not in ("", "f", "h") or (suffix and not any(mark in body for mark in ".e")):
            raise FormulaError(
                self.text, word.at, f"{word.text!r} is not a number in C", f"write {float(body)}f"
            )

    def name(self, word: Token) -> Tree:
        if word.text == "static_cast":
            return self.static_cast(word)
        if self.word.text == "(":
            return self.call(word)
        if self.word.text == "<" and _unprefixed(word.text) in ("as_type", "reinterpret_cast"):
            self.opaque.append(f"{word.text!r} has no formula here")
            return self.skipped_template(word)
        if word.text in self.variables:
            return Name(word.text, word.at)
        if word.text in ("true", "false"):
            return Number(word.text == "true", "bool", word.at)
        if word.text in _CONSTANTS:
            return Number(_CONSTANTS[word.text], "float", word.at)
        if _declares(self.header, word.text) or _mentions(self.elsewhere, word.text):
            self.opaque.append(f"{word.text!r} is defined outside of the formula")
            return Name(word.text, word.at)
        raise self.unknown_name(word)

    def unknown_name(self, word: Token) -> FormulaError:
        name = word.text
        if name in FUNCTIONS or name in METAL_ONLY:
            return FormulaError(
                self.text, word.at, f"the function {name!r} has no arguments", f"write {name}(...)"
            )
        if name + "_F" in _CONSTANTS:
            advice = f"in Metal it is {name}_F"
        else:
            known = [*self.variables, *_CONSTANTS]
            near = difflib.get_close_matches(name, known, n=1)
            advice = f"known here: {', '.join(self.variables) or 'no variables'}"
            advice = f"did you mean {near[0]!r}? {advice}" if near else advice
        return FormulaError(self.text, word.at, f"unknown name {name!r}", advice)

    def static_cast(self, word: Token) -> Tree:
        self.expect("<", "after static_cast")
        kind = self.word
        if kind.kind != "name" or not _is_type(kind.text):
            raise FormulaError(
                self.text, kind.at, f"unknown type {kind.text!r}", f"known: T, {', '.join(CASTS)}"
            )
        self.position += 1
        self.expect(">", "after the type")
        (operand,) = self.arguments(word, 1)
        return Cast(_unprefixed(kind.text), operand, word.at)

    def skipped_template(self, word: Token) -> Tree:
        self.expect("<", "")
        while self.take(">") is None:
            if self.word.kind == "end":
                raise FormulaError(self.text, word.at, "the '<' is never closed", "")
            self.position += 1
        self.arguments(word, None)
        return Number(0.0, "float", word.at)

    def call(self, word: Token) -> Tree:
        name = word.text
        if _is_type(name) and name not in self.variables:
            (operand,) = self.arguments(word, 1)
            return Cast(_unprefixed(name), operand, word.at)
        match = _PREFIX.match(name)
        plain = match.group(2) if match else name
        given = self.calculus or DEFAULT_HEADER.strip() in self.header
        if name in OF_DEFAULT_HEADER and given:
            return Call(name, tuple(self.arguments(word, 1)), False, word.at)
        if match is None or _defines(self.header, name):
            if match is None and not _mentions(self.header, name.rpartition("::")[2]):
                raise self.unknown_function(word)
            self.opaque.append(f"the header's function {name!r} has no formula here")
            self.arguments(word, None)
            return Number(0.0, "float", word.at)
        if plain == "where" and self.calculus:
            condition, yes, no = self.arguments(word, 3)
            return Choice(condition, yes, no, word.at)
        if plain == "select":
            no, yes, condition = self.arguments(word, 3)
            return Choice(condition, yes, no, word.at)
        if plain in FUNCTIONS and plain not in OF_DEFAULT_HEADER:
            arguments = self.arguments(word, FUNCTIONS[plain].arguments)
            name = plain if plain == "round" else FUNCTIONS[plain].name
            return Call(name, tuple(arguments), match.group(1) == "fast", word.at)
        if plain in METAL_ONLY:
            self.opaque.append(f"Metal's function {name!r} has no formula here")
            self.arguments(word, None)
            return Number(0.0, "float", word.at)
        raise self.unknown_function(word)

    def unknown_function(self, word: Token) -> FormulaError:
        name = word.text
        if name in OF_DEFAULT_HEADER:
            return FormulaError(
                self.text,
                word.at,
                f"{name!r} is a function of msl.DEFAULT_HEADER",
                "pass header=msl.DEFAULT_HEADER",
            )
        plain = name.rpartition("::")[2]
        near = difflib.get_close_matches(plain, [*FUNCTIONS, *METAL_ONLY], n=1)
        advice = "define it in header, or use Metal's own functions"
        advice = f"did you mean {near[0]!r}? Else {advice}" if near else advice
        return FormulaError(self.text, word.at, f"unknown function {name!r}", advice)

    def arguments(self, word: Token, count: int | None) -> list[Tree]:
        self.expect("(", f"after {word.text!r}")
        found: list[Tree] = []
        if self.take(")") is None:
            found.append(self.choice())
            while self.take(","):
                found.append(self.choice())
            self.expect(")", f"after the arguments of {word.text!r}")
        if count is not None and len(found) != count:
            takes = f"{count} argument{'s' if count > 1 else ''}"
            raise FormulaError(
                self.text,
                word.at,
                f"{word.text!r} takes {takes} and is given {len(found)}",
                f"write {word.text}({', '.join('abc'[:count])})",
            )
        return found


def _found(word: Token) -> str:
    return "the formula ends here" if word.kind == "end" else f"found {word.text!r}"


def _unprefixed(name: str) -> str:
    return name.removeprefix("metal::")


def _is_type(name: str) -> bool:
    return _unprefixed(name) in CASTS or name == "T"


def _whole_kind(value: int, suffix: str) -> str:
    if "u" in suffix:
        return "uint64_t" if "l" in suffix or value >= 1 << 32 else "uint"
    return "int64_t" if "l" in suffix or value >= 1 << 31 else "int"


def _mentions(text: str, name: str) -> bool:
    return bool(text) and re.search(rf"\b{re.escape(name)}\b", text) is not None


def _declares(header: str, name: str) -> bool:
    """Say whether a header has a macro or a constant of this name, outside of its functions."""
    if re.search(rf"^\s*#\s*define\s+{re.escape(name)}\b", header, re.MULTILINE):
        return True
    outside, depth = [], 0
    for character in re.sub(r"//[^\n]*|/\*.*?\*/", " ", header, flags=re.DOTALL):
        depth += (character in "({") - (character in ")}")
        outside.append(character if depth == 0 else " ")
    return _mentions("".join(outside), name)


def _defines(header: str, name: str) -> bool:
    """Say whether a header holds `name(`: a function's or a macro's definition."""
    return bool(header) and re.search(rf"(?<!::)\b{re.escape(name)}\s*\(", header) is not None


def let(text: str, variables: Collection[str], *, header: str = "") -> Mapping[str, Tree]:
    """Read declarations, such as `float s = kk_sigmoid(x); auto t = s * x;`.

    Returns:
        the trees of the declared names, in terms of `variables`.

    Raises:
        FormulaError: an expression has a mistake.
        Opaque: there is more than declarations of numbers.
    """
    found: dict[str, Tree] = {}
    clean = re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL)
    for statement in filter(str.strip, clean.split(";")):
        match = re.match(
            r"\s*(?:(?:const|constexpr|thread)\s+)*([A-Za-z_][\w:]*)\s+([A-Za-z_]\w*)\s*=(?!=)",
            statement,
        )
        if match is None or not (match.group(1) == "auto" or _is_type(match.group(1))):
            raise Opaque(f"the prelude holds {statement.strip()!r}, which is no plain declaration")
        kind, name = match.groups()
        # Blanks in place of what stands before, so that an error points to the right column.
        value = " " * match.end() + statement[match.end() :]
        tree = substituted_parse(value, [*variables, *found], found, header)
        found[name] = tree if kind == "auto" else Cast(_unprefixed(kind), tree, match.start())
    return found


def substituted_parse(
    text: str, variables: Collection[str], known: Mapping[str, Tree], header: str
) -> Tree:
    """Parse a formula and put trees in the place of the known names."""
    return substituted(parse(text, variables, header=header), known)


def parse_partial(text: str) -> Tree:
    """Return a derivative of the table of functions as a tree over a, b, c and y.

    There `where(condition, a, b)` chooses, and numbers are floats.
    """
    parser = _Parser(text, ("a", "b", "c", "y"), "", "")
    parser.calculus = True
    return parser.whole()
