"""From the Metal Shading Language to CUDA C++, token by token, once per kernel.

Names, types and functions are no business of this module: `include/metal.cuh` has them. What is
left is what C++ cannot define: address spaces, suffixes of numbers, swizzles, `?:` between a
16-bit float and another number, pragmas and includes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from zmlx.backend.cuda.tokens import (
    BRACKETS,
    Token,
    TranslationError,
    closing,
    inserted,
    text_of,
    tokenize,
)

#: Words of Metal that have nothing like them in CUDA (beginning or whole).
_FOREIGN = re.compile(
    r"texture(1d|2d|3d|cube|_buffer)\w*|depth2d\w*|depthcube\w*|sampler|simdgroup_(matrix|load|store"
    r"|multiply\w*|(float|half|bfloat)8x8|async_copy|event)|make_filled_simdgroup_matrix|imageblock"
    r"|(float|half)[234]x[234]|kernel|vertex|fragment|visible_function_table|intersection_\w+"
    r"|ray_data|object_data|threadgroup_imageblock|function_constant|cooperative_tensor"
)
#: Includes that the prelude stands for.
_KNOWN_INCLUDE = re.compile(
    r'\s*include\s*(<metal_\w+>|<metal/\w+>|"mlx/backend/metal/kernels/(utils|bf16|bf16_math|defines)\.h")'
)
_NUMBER = re.compile(
    r"(?P<digits>0[xX][\da-fA-F'.]+(?:[pP][+-]?\d+)?|[\d.']+(?:[eE][+-]?\d+)?)(?P<suffix>\w*)"
)
_SWIZZLE = re.compile(r"[xyzw]{2,4}|[rgba]{2,4}")
_ASSIGNMENTS = frozenset(("=", "+=", "-=", "*=", "/="))
_FLOAT_CONSTANTS = frozenset(
    ("INFINITY", "NAN", "MAXFLOAT", "HUGE_VALF", "FLT_MAX", "FLT_MIN", "FLT_EPSILON")
)
_ACROSS_LANES = re.compile(r"(simd|quad)_[a-z]\w*")
_QUALIFIERS = frozenset(("const", "volatile", "static", "constexpr", "inline", "restrict"))
_RENAMED = {"Limits": "value_limits", "MLX_MTL_CONST": "static constexpr"}


def translate_header(text: str) -> str:
    """Return what stands before a kernel, in CUDA C++, line by line.

    Raises:
        TranslationError: it holds something that CUDA has not; the text names it and its line.
    """
    return text_of(_common(tokenize(text), at_file_level=True))


def translate_body(text: str) -> str:
    """Return the body of a kernel in CUDA C++, line by line.

    Raises:
        TranslationError: as for `translate_header`.
    """
    return text_of(_converge(_common(tokenize(text), at_file_level=False)))


def names_in(text: str) -> frozenset[str]:
    """Return the identifiers of a source, those in its macros included."""
    found: set[str] = set()
    for token in tokenize(text):
        if token.kind == "name":
            found.add(token.text)
        elif token.kind == "directive":
            found.update(re.findall(r"[A-Za-z_]\w*", token.text))
    return frozenset(found)


def always_indexed(name: str, text: str) -> bool:
    """Whether a source uses a name as an array only: whenever it stands there, `[` follows."""
    tokens = tokenize(text)
    for index, token in enumerate(tokens):
        if token.kind == "directive" and re.search(rf"\b{re.escape(name)}\b", token.text):
            return False
        if token.text == name and tokens[index + 1].text != "[":
            return False
    return True


def _common(tokens: list[Token], *, at_file_level: bool) -> list[Token]:
    tokens = [_directive(t, at_file_level) if t.kind == "directive" else t for t in tokens]
    for change in (
        _refuse,
        _plain_tokens,
        _attributes,
        partial(_address_spaces, at_file_level=at_file_level),
        _swizzles,
        _conditionals,
    ):
        tokens = change(tokens)
    return tokens


def _refuse(tokens: list[Token]) -> list[Token]:
    for index, token in enumerate(tokens):
        member = index > 0 and tokens[index - 1].text in (".", "->")
        if token.kind == "name" and not member and _FOREIGN.fullmatch(token.text):
            raise TranslationError(
                f"line {token.line}: {token.text!r} has no counterpart on CUDA; "
                "give the kernel a body for CUDA of its own (cuda=...)"
            )
    return tokens


def _directive(token: Token, at_file_level: bool) -> Token:
    """Translate a line that starts with `#`."""
    text = token.text[1:].strip()
    if text.startswith("include"):
        if not _KNOWN_INCLUDE.match(text):
            raise TranslationError(f"line {token.line}: #{text} is not there on CUDA")
        changed = ""
    elif text.startswith("pragma"):
        changed = _pragma(text, token.line)
    elif text.startswith("define"):
        changed = _define(text, at_file_level)
    else:
        changed = f"#{text}"
    # A macro over several lines comes out as one: the lines that it took are put back behind it.
    return Token("directive", changed + "\n" * token.text.count("\n"), token.space, token.line)


def _pragma(text: str, line: int) -> str:
    if re.search(r"contract\s*\(\s*off\s*\)", text):
        raise TranslationError(
            f"line {line}: #{text} has no counterpart on CUDA, where the compiler fuses a product "
            "with a sum; give the kernel a body for CUDA (cuda=...) with __fmul_rn"
        )
    if re.search(r"\bunroll\b", text) and "clang" in text:
        count = re.search(r"unroll_count\s*\(\s*(\w+)\s*\)", text)
        return "#pragma unroll" + (f" {count[1]}" if count else "")
    if re.search(r"\bnounroll\b|unroll\s*\(\s*disable", text):
        return "#pragma unroll 1"
    return f"#{text}" if re.match(r"pragma\s+(unroll|once)\b", text) else ""


def _define(text: str, at_file_level: bool) -> str:
    match = re.match(r"define\s+\w+(\([^)]*\))?", text)
    if match is None:
        return f"#{text}"
    replaced = _common(tokenize(text[match.end() :]), at_file_level=at_file_level)
    return f"#{match.group()} {' '.join(text_of(replaced).replace(chr(92), ' ').split())}"


def _plain_tokens(tokens: list[Token]) -> list[Token]:
    """Change what needs no look around: numbers, pragmas in strings, names of another kind."""
    changed: list[Token] = []
    for token in tokens:
        if token.kind == "number":
            changed += inserted(_number(token.text), token)
        elif token.kind == "name" and token.text in _RENAMED:
            changed += inserted(_RENAMED[token.text], token)
        elif token.kind == "string" and token.text.startswith('"clang loop unroll'):
            changed.append(Token("string", '"unroll"', token.space, token.line))
        else:
            changed.append(token)
    return changed


def _number(text: str) -> str:
    """Give a number the type it has in Metal: no double, `h` and `bf` as suffixes."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        return text
    digits, suffix = match["digits"], match["suffix"].lower()
    hexadecimal = digits[:2] in ("0x", "0X")
    fractional = any(c in digits for c in (".pP" if hexadecimal else ".eE"))
    if suffix in ("h", "bf"):
        exact = digits if fractional else f"{digits}.0"
        return f"metal::{'half' if suffix == 'h' else 'bfloat'}({exact}f)"
    return f"{digits}f" if fractional and not suffix else text


def _attributes(tokens: list[Token]) -> list[Token]:
    """Drop `[[...]]`."""
    kept: list[Token] = []
    index = 0
    while index < len(tokens):
        if [t.text for t in tokens[index : index + 2]] == ["[", "["]:
            end = closing(tokens, index)
            if any(t.text.endswith("function_constant") for t in tokens[index:end]):
                raise TranslationError(f"line {tokens[index].line}: function constants are no part")
            index = end + 1
        else:
            kept.append(tokens[index])
            index += 1
    return kept


# ---- address spaces ------------------------------------------------------------------------------


def _address_spaces(tokens: list[Token], *, at_file_level: bool) -> list[Token]:
    """Turn `threadgroup` and `constant` variables into CUDA's, and drop the words elsewhere."""
    changed: list[Token] = []
    in_parentheses = 0
    for index, token in enumerate(tokens):
        if token.text in ("(", ")"):
            in_parentheses += 1 if token.text == "(" else -1
        if token.text in ("device", "thread") and token.kind == "name":
            changed.append(Token("mark", "", token.space, token.line))
        elif token.text in ("threadgroup", "constant"):
            declares = not in_parentheses and _declares_variable(tokens, index)
            word = _space_word(tokens, index, declares)
            if word == "__shared__" and at_file_level and not _in_braces(tokens, index):
                raise TranslationError(
                    f"line {token.line}: a threadgroup variable belongs into the kernel's body"
                )
            changed.append(Token("name" if word else "mark", word, token.space, token.line))
        else:
            changed.append(token)
    return changed


def _space_word(tokens: Sequence[Token], index: int, declares: bool) -> str:
    specifiers = _specifiers(tokens, index)
    if tokens[index].text == "threadgroup":
        return "__shared__" if declares else ""
    if not declares:
        return "" if "const" in specifiers else "const"
    words = [word for word in ("static", "constexpr") if word not in specifiers]
    return " ".join(words)


def _in_braces(tokens: Sequence[Token], index: int) -> bool:
    depth = 0
    for token in tokens[:index]:
        depth += {"{": 1, "}": -1}.get(token.text, 0) if token.kind == "mark" else 0
    return depth > 0


def _specifiers(tokens: Sequence[Token], index: int) -> set[str]:
    """Return the words of the declaration's type around an address space."""
    words: set[str] = set()
    for step in (-1, 1):
        at = index + step
        while 0 <= at < len(tokens) and (
            tokens[at].kind == "name" or tokens[at].text in ("<", ">", "::")
        ):
            words.add(tokens[at].text)
            at += step
    return words


def _declares_variable(tokens: Sequence[Token], index: int) -> bool:
    """Whether the type after an address space is that of a variable, not of what is pointed to."""
    depth = words = 0
    at = index + 1
    while at < len(tokens):
        token = tokens[at]
        words += depth == 0 and token.kind == "name" and token.text not in _QUALIFIERS
        if token.text == "(" and tokens[at - 1].text in ("decltype", "alignas", "__attribute__"):
            at = closing(tokens, at)
        elif token.text in ("<", ">"):
            depth += 1 if token.text == "<" else -1
            if depth < 0:
                return False
        elif depth == 0 and token.text in (";", "=", "[", ",", "{"):
            return words > 1  # a type and a name; none after a member function's parameters
        elif depth == 0 and token.kind == "mark" and token.text not in ("::", ""):
            return False
        at += 1
    return False


# ---- swizzles ------------------------------------------------------------------------------------


def _swizzles(tokens: list[Token]) -> list[Token]:
    """Turn `v.xz` into a call, unless the source declares something of that name."""
    after_dot = [i > 0 and tokens[i - 1].text in (".", "->") for i in range(len(tokens))]
    declared = {t.text for t, dot in zip(tokens, after_dot, strict=True) if not dot}
    changed: list[Token] = []
    for index, token in enumerate(tokens):
        swizzle = token.kind == "name" and after_dot[index] and _SWIZZLE.fullmatch(token.text)
        if not swizzle or token.text in declared or tokens[index + 1].text == "(":
            changed.append(token)
            continue
        lanes = ", ".join(
            str("xyzw".find(c) if c in "xyzw" else "rgba".find(c)) for c in token.text
        )
        verb = "put" if tokens[index + 1].text in _ASSIGNMENTS else "get"
        changed += inserted(f"{verb}(metal::swizzle<{lanes}>())", token)
    return changed


# ---- conditional expressions ---------------------------------------------------------------------


def _conditionals(tokens: list[Token]) -> list[Token]:
    """Give both arms of every `?:` one type where Metal has a rule and C++ has none.

    From the last to the first, so that an arm's own conditionals are done when it is.
    """
    for index in range(len(tokens) - 1, -1, -1):
        if tokens[index].text != "?" or tokens[index].kind != "mark":
            continue
        colon = _end_of_arm(tokens, index + 1, ":")
        end = _end_of_arm(tokens, colon + 1, None)
        first, second = tokens[index + 1 : colon], tokens[colon + 1 : end]
        if not first or not second:
            raise TranslationError(f"line {tokens[index].line}: an arm of ?: is empty")
        if _stays((*first, *second)) or (_is_number(first) and _is_number(second)):
            continue
        tokens[colon + 1 : end] = _arm(second, other=first)
        tokens[index + 1 : colon] = _arm(first, other=second)
    return tokens


def _end_of_arm(tokens: Sequence[Token], start: int, mark: str | None) -> int:
    """Return where an arm ends: at its colon, or for the second one where the expression does."""
    inner = 0
    at = start
    while at < len(tokens):
        text = tokens[at].text if tokens[at].kind == "mark" else ""
        if text in BRACKETS:
            at = closing(tokens, at)
        elif text == "?":
            inner += 1
        elif text == ":" and inner:
            inner -= 1
        elif text == ":" or (text in (",", ";", ")", "]", "}") and not (mark and text == ",")):
            break
        at += 1
    if mark and (at >= len(tokens) or tokens[at].text != mark):
        raise TranslationError(f"line {tokens[start].line}: ? without its colon")
    # The empty last token holds the end's space and belongs to no expression.
    return min(at, len(tokens) - 1) if mark is None else at


def _is_number(arm: Sequence[Token]) -> bool:
    return (
        len(arm) <= 2
        and (arm[-1].kind == "number" or arm[-1].text in _FLOAT_CONSTANTS)
        and all(t.text in ("+", "-") for t in arm[:-1])
    )


def _stays(arms: Sequence[Token]) -> bool:
    """Whether to leave a conditional alone: each arm is written twice, which would grow too long."""
    return sum(t.text == "?" for t in arms) > 7 or any(t.text in ("{", "}") for t in arms)


def _arm(arm: list[Token], *, other: list[Token]) -> list[Token]:
    """Wrap an arm in what converts it, if need be, to the type it has together with the other."""
    type_of_other = text_of([Token(t.kind, t.text, " " if t.space else "") for t in other]).strip()
    start = inserted(f"metal::arm<decltype({type_of_other})>(", arm[0])
    rest = [Token(arm[0].kind, arm[0].text, "", arm[0].line), *arm[1:]]
    return [*start, *rest, Token("mark", ")", "", arm[-1].line)]


# ---- functions across lanes ----------------------------------------------------------------------


def _converge(tokens: list[Token]) -> list[Token]:
    """Put `__syncwarp();` before statements outside of branches that call across lanes.

    All threads that still run reach such a statement; CUDA lets them reach it one after another.
    """
    changed: list[Token] = []
    statement: list[Token] = []
    depth = 0
    for token in tokens:
        statement.append(token)
        if token.kind != "mark":
            continue
        if token.text in BRACKETS:
            depth += 1
        elif token.text in BRACKETS.values():
            depth -= 1
        if depth == 0 and token.text in (";", "}", ""):
            changed += _together(statement)
            statement = []
    return changed + statement


def _together(statement: list[Token]) -> list[Token]:
    calls = any(
        t.kind == "name" and _ACROSS_LANES.fullmatch(t.text) and following.text in ("(", "<")
        for t, following in zip(statement, statement[1:], strict=False)
    )
    starts = [i for i, t in enumerate(statement) if t.text and t.kind != "directive"]
    if not calls or not starts or statement[starts[0]].text in ("else", "while", "case", "default"):
        return statement
    first = statement[starts[0]]
    return [
        *statement[: starts[0]],
        *inserted("__syncwarp();", first),
        Token(first.kind, first.text, " ", first.line),
        *statement[starts[0] + 1 :],
    ]
