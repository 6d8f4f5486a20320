"""Which scope each token stands in, and where declarations and statements begin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from zmlx.backend.strict.tokens import Token, closing


@dataclass(frozen=True)
class Scope:
    """A pair of braces: a namespace, a class, a function, a block in one, or anything else.

    Attributes:
        kind: "namespace", "class", "function", "block" or "other".
        name: of a class.
        kernel: the function around it, or it itself, is a kernel.
    """

    kind: str
    name: str = ""
    kernel: bool = False

    @property
    def code(self) -> bool:
        """Statements stand here."""
        return self.kind in ("function", "block")


@dataclass(frozen=True)
class Head:
    """Tokens of a declaration, up to and without the `;`, `{`, `:` or `=` that ends it."""

    scope: Scope
    tokens: tuple[Token, ...]
    end: Token


@dataclass
class Outline:
    """What was found.

    Attributes:
        heads: declarations in namespaces and classes.
        statements: index of a statement's first token, and its scope.
    """

    heads: list[Head] = field(default_factory=list)
    statements: list[tuple[int, Scope]] = field(default_factory=list)


def outline(found: Sequence[Token]) -> Outline:
    """Walk over tokens (none of them of a directive) and return what stands where."""
    result = Outline()
    scopes = [Scope("namespace")]
    parens = [0]
    head: list[Token] = []
    ended = False  # the head's end was seen; the rest (an initialiser) is no part of it
    for index, token in enumerate(found):
        word, scope = token.text, scopes[-1]
        if word == "{":
            if not ended and not scope.code:
                _close(result, scope, head, token)
            scopes.append(_opened(scope, head, parens[-1]))
            parens.append(0)
        elif word == "}" and len(scopes) > 1:
            inner = scopes.pop()
            parens.pop()
            if inner.kind == "other":
                continue
        elif word == ";" and not parens[-1]:
            if not ended and not scope.code:
                _close(result, scope, head, token)
        elif word == ":" and head and head[-1].text in ("public", "private", "protected"):
            pass
        else:
            if not head and scope.code and not parens[-1]:
                result.statements.append((index, scope))
            parens[-1] += (word == "(") - (word == ")")
            if word in ("=", ":") and not parens[-1] and not scope.code and not ended:
                ended = bool(without_template(head)) and not _is_type(head)
                if ended:
                    _close(result, scope, head, token)
            head.append(token)
            continue
        if scopes[-1].kind != "other":
            head, ended = [], False
    return result


def without_template(head: Sequence[Token]) -> tuple[Token, ...]:
    """Return a declaration without the `template <...>` and attributes before it."""
    start = 0
    while start < len(head):
        if head[start].text == "template" and head[start + 1 : start + 2]:
            bracket = head[start + 1].text == "<"
            start = closing(head, start + 1) + 1 if bracket else start + 1
        elif head[start].text == "[[":
            start = closing(head, start) + 1
        else:
            break
    return tuple(head[start:])


def parameters(head: Sequence[Token]) -> tuple[int, int] | None:
    """Return the indices of the brackets around a function's parameters; None for anything else."""
    index = depth = 0
    while index < len(head):
        word = head[index].text
        if word == "[[" or (word == "<" and index and _is_template(head[index - 1])):
            index = closing(head, index) + 1
            continue
        if word == "operator" and head[index + 1 : index + 3]:
            call = head[index + 1].text == "(" and head[index + 2].text == ")"
            if call:
                index += 3
                continue
        if word == "(" and index and not depth:
            before = head[index - 1]
            named = before.kind == "name" or "operator" in [t.text for t in head[:index]]
            if before.text in ("decltype", "alignas", "__attribute__", "static_assert", "_Pragma"):
                index = closing(head, index) + 1
                continue
            return (index, closing(head, index)) if named or before.text == ">" else None
        index += 1
    return None


def _is_template(before: Token) -> bool:
    """Does a `<` behind this token open arguments of a template?"""
    return before.kind == "name" and before.text != "operator"


def _is_type(head: Sequence[Token]) -> bool:
    words = {token.text for token in without_template(head)[:2]}
    return bool(words & {"struct", "class", "union", "enum", "namespace", "using"})


def _close(result: Outline, scope: Scope, head: list[Token], end: Token) -> None:
    if head:
        result.heads.append(Head(scope, tuple(head), end))


def _opened(scope: Scope, head: list[Token], parens: int) -> Scope:
    """Return the scope that a brace after `head` opens."""
    if scope.code:
        # In code a brace after a name, a bracket of a type, `=`, `,` or `return` is a value's.
        last = head[-1] if head else None
        value = last is not None and (
            last.text in ("=", ",", "(", "return", "]", ">", "{")
            or (last.kind == "name" and last.text not in ("else", "do", "try", "const", "mutable"))
        )
        if head and head[0].text in ("struct", "class", "union"):
            return Scope("class", _class_name(head), scope.kernel)
        return Scope("other" if value else "block", kernel=scope.kernel)
    bare = without_template(head)
    words = [token.text for token in bare]
    if "namespace" in words:
        return Scope("namespace")
    if words[:1] == ["extern"] and len(words) == 2:
        return Scope("namespace")
    if parens or ("=" in words and parameters(bare) is None):
        return Scope("other")
    if {"struct", "class", "union"} & set(words[:2]) and parameters(bare) is None:
        return Scope("class", _class_name(bare))
    if words[:1] == ["enum"] or parameters(bare) is None:
        return Scope("other")
    return Scope("function", kernel="kernel" in [token.text for token in head])


def _class_name(head: Sequence[Token]) -> str:
    for index, token in enumerate(head):
        if token.text in ("struct", "class", "union"):
            named = [t for t in head[index + 1 :] if t.kind == "name" and t.text != "alignas"]
            return named[0].text if named else ""
    return ""
