"""What is changed in a Metal source before a C++ compiler reads it; lines keep their numbers.

Variables in threadgroup memory are shared by the threads of a group: their declarations become
references to memory that the emulator hands out. Function constants get their values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

_TOKEN = re.compile(
    r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'|^[ \t]*\#(?:\\\n|[^\n])*"
    r"|[A-Za-z_]\w*|\d[\w.]*|\s+|.",
    re.DOTALL | re.MULTILINE,
)
#: of parameters that the host gives memory; the word is a macro and would leave nothing
_ARGUMENT = re.compile(r"\[\[\s*threadgroup\(\s*\d+\s*\)\s*\]\]")
_FUNCTION_CONSTANT = re.compile(
    r"\bconstant\s+(?P<type>\w+)\s+(?P<name>\w+)\s*\[\[\s*function_constant\(\s*(?P<index>\d+)\s*\)"
    r"\s*\]\]\s*;"
)


def threadgroup_variables(source: str) -> str:
    """Return the source with each `threadgroup T name[N];` as a reference to shared memory.

    Pointers and references to threadgroup memory are not touched; the word alone means nothing to
    the compiler.
    """
    tokens = _TOKEN.findall(_ARGUMENT.sub("", source))
    out: list[str] = []
    number = 0
    at = 0
    begins = True  # whether a statement may begin here
    while at < len(tokens):
        token = tokens[at]
        if token == "threadgroup" and begins:
            end = _end_of_statement(tokens, at)
            rewritten = _declaration("".join(tokens[at + 1 : end]), number)
            if rewritten is not None:
                out.append(rewritten)
                number += 1
                at = end + 1
                begins = True
                continue
        if not _is_space(token):
            begins = token in {"{", "}", ";"} or (begins and token == "static")
        out.append(token)
        at += 1
    return "".join(out)


def function_constants(source: str, values: Mapping[int, bool | int | float]) -> str:
    """Return the source with each `constant T name [[function_constant(i)]];` given its value.

    A constant without a value is zero, as one that a device leaves undefined may be.
    """

    def replaced(match: re.Match[str]) -> str:
        value = values.get(int(match["index"]), 0)
        text = str(value).lower() if isinstance(value, bool) else repr(value)
        lines = "\n" * match[0].count("\n")
        return f"static const {match['type']} {match['name']} = {match['type']}({text});{lines}"

    return _FUNCTION_CONSTANT.sub(replaced, source)


def _is_space(token: str) -> bool:
    return token.isspace() or token.startswith(("//", "/*")) or token.lstrip().startswith("#")


def _end_of_statement(tokens: list[str], start: int) -> int:
    """Return where the semicolon is that ends a declaration."""
    depth = 0
    for at in range(start, len(tokens)):
        if tokens[at] in {"(", "[", "{"}:
            depth += 1
        elif tokens[at] in {")", "]", "}"}:
            depth -= 1
        elif tokens[at] == ";" and depth <= 0:
            return at
    return len(tokens)


def _declaration(text: str, number: int) -> str | None:
    """Return what stands for a declaration of threadgroup variables, or None for other statements.

    Args:
        text: what stands between `threadgroup` and the semicolon.
        number: tells this declaration from others in the source.
    """
    plain = re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL)
    # A pointer, a reference, a variable with a value or a function: not memory to hand out.
    outside = re.sub(r"\[[^\]]*\]", "", _without_arguments(plain))
    if any(mark in outside for mark in "*&={"):
        return None
    parts = list(_split(plain))
    first = re.match(r"(?P<type>.*[\s>])(?P<name>[A-Za-z_]\w*)\s*(?P<sizes>(?:\[.*\]\s*)*)$",
                     parts[0].strip(), re.DOTALL)  # fmt: skip
    if first is None:
        return None
    kind = " ".join(re.sub(r"\bthreadgroup\b", "", first["type"]).split())
    declarators = [(first["name"], first["sizes"])]
    for part in parts[1:]:
        more = re.match(r"\s*(?P<name>[A-Za-z_]\w*)\s*(?P<sizes>.*)$", part, re.DOTALL)
        if more is None:
            return None
        declarators.append((more["name"], more["sizes"]))
    return _references(kind, declarators, number) + "\n" * text.count("\n")


def _references(kind: str, declarators: list[tuple[str, str]], number: int) -> str:
    statements = []
    for index, (name, sizes) in enumerate(declarators):
        unique = f"{number}_{index}"
        size = " ".join(sizes.split())
        statements.append(
            f"using zmlx_type_{unique} = {kind} {size}; struct zmlx_tag_{unique} {{}}; "
            f"zmlx_type_{unique}& {name} = "
            f'::zmlx::shared<zmlx_type_{unique}, zmlx_tag_{unique}>("{name}");'
        )
    return " ".join(statements)


def _without_arguments(text: str) -> str:
    """Return the text without what stands in angle brackets."""
    before = None
    while before != text:
        before, text = text, re.sub(r"<[^<>]*>", "", text)
    return text


def _split(text: str) -> Iterator[str]:
    """Yield the declarators, separated by commas that stand in no brackets."""
    depth = start = 0
    for at, char in enumerate(text):
        if char in "<([{":
            depth += 1
        elif char in ">)]}":
            depth -= 1
        elif char == "," and depth == 0:
            yield text[start:at]
            start = at + 1
    yield text[start:]
