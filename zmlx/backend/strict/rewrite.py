"""Metal text as clang's "C++ for OpenCL" takes it: words put in, and nothing taken out.

What is written | what clang reads
--- | ---
`threadgroup float x[8];` | `threadgroup float (&x)[8] = zmlx_threadgroup_storage();`
`v.xy` | `v.template zmlx_lanes<0, 1>()`
`v.xy = w` | `v.template zmlx_set<0, 1>() = w`
`int f() const` in a class | `int f() const thread`
`constant int n [[function_constant(1)]];` | `constant int n [[function_constant(1)]] = {};`
`1.0bf` | `bfloat(1.0f)`
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from zmlx.backend.strict.outline import Head, Outline, Scope, parameters, without_template
from zmlx.backend.strict.tokens import Token, closing

#: Words that name an address space.
SPACES = frozenset({"device", "threadgroup", "constant", "thread", "threadgroup_imageblock"})
#: What may be inserted where: offset and text.
Edit = tuple[int, str]

_LANES = re.compile(r"[xyzw]{2,4}|[rgba]{2,4}")
_ASSIGNED = ("=", "+=", "-=", "*=", "/=")


def edits(found: Sequence[Token], seen: Outline) -> list[Edit]:
    """Return everything to insert, in the order of offsets.

    Args:
        found: all tokens, those of directives too.
        seen: the outline of those that are of none.
    """
    inserted = [
        *_swizzles(found, seen),
        *_literals(found),
        *_instantiations(found),
        *_methods(seen),
    ]
    inserted += [*_constants(seen), *_includes(found)]
    for declaration in threadgroup_variables(found):
        inserted += declaration.edits()
    return sorted(inserted, key=lambda edit: edit[0])


class ThreadgroupVariables:
    """A declaration of variables in threadgroup memory: `threadgroup float a[8], b;`.

    Attributes:
        first: the word `threadgroup`.
        names: the variables' names.
        initialised: the name of one that is given a value, or None.
    """

    def __init__(self, found: Sequence[Token], start: int) -> None:
        self.first = found[start]
        self.names: list[Token] = []
        self.initialised: Token | None = None
        self._ends: list[int] = []
        index = _type_end(found, start)
        while index < len(found) and found[index].kind == "name":
            self.names.append(found[index])
            index += 1
            while index < len(found) and found[index].text == "[":
                index = closing(found, index) + 1
            word = found[index].text if index < len(found) else "#"
            # In a macro the declaration may end without a semicolon.
            over = self.first.directive and (word == "#" or not found[index].directive)
            if word not in (",", ";") and not over:
                self.initialised = self.names[-1]
                return
            self._ends.append(found[index - 1].end)
            if word != ",":
                return
            index += 1

    def edits(self) -> Iterator[Edit]:
        """Yield what makes references of the variables."""
        for name, end in zip(self.names, self._ends, strict=False):
            yield name.start, "(&"
            yield name.end, ")"
            yield end, " = zmlx_threadgroup_storage()"


def threadgroup_variables(found: Sequence[Token]) -> Iterator[ThreadgroupVariables]:
    """Yield the declarations of variables in threadgroup memory, those in macros too."""
    for index, token in enumerate(found):
        if token.text != "threadgroup" or not _begins(found, index):
            continue
        end = _type_end(found, index)
        if end + 1 >= len(found) or found[end].kind != "name":
            continue
        if found[end + 1].text in ("[", ";", ",", "=", "{") or token.directive:
            yield ThreadgroupVariables(found, index)


def _begins(found: Sequence[Token], index: int) -> bool:
    """Does a declaration begin at this word, or with qualifiers right before it?"""
    while index and found[index - 1].text in ("static", "const", "volatile"):
        index -= 1
    before = found[index - 1].text if index else ";"
    if before == ")" and not found[index].directive:
        return found[index - 1].directive or _is_alignas(found, index - 1)
    return (
        before in (";", "{", "}", ")", ":") or found[index - 1].directive != found[index].directive
    )


def _is_alignas(found: Sequence[Token], end: int) -> bool:
    depth, index = 0, end
    while index >= 0:
        depth += (found[index].text == ")") - (found[index].text == "(")
        if depth == 0:
            return index > 0 and found[index - 1].text == "alignas"
        index -= 1
    return False


def _type_end(found: Sequence[Token], start: int) -> int:
    """Return the index behind the type of a declaration that begins with an address space."""
    index = start + 1
    named = False
    while index < len(found):
        word = found[index]
        if word.text in ("const", "volatile", "typename", "unsigned", "signed", "metal", "::"):
            named = named or word.text in ("unsigned", "signed")
        elif word.text == "<":
            index = closing(found, index)
        elif word.kind == "name" and (not named or found[index - 1].text == "::"):
            named = True
        elif word.kind == "name" and word.text in ("int", "char", "short", "long"):
            pass
        else:
            return index
        index += 1
    return index


def _swizzles(found: Sequence[Token], seen: Outline) -> Iterator[Edit]:
    # A member of a class of the text with such a name is no swizzle.
    members = {
        token.text for head in seen.heads if head.scope.kind == "class" for token in head.tokens
    }
    for index in range(1, len(found)):
        token, before = found[index], found[index - 1].text
        if before not in (".", "->") or not _LANES.fullmatch(token.text) or token.text in members:
            continue
        after = found[index + 1].text if index + 1 < len(found) else ""
        letters = "xyzw" if token.text[0] in "xyzw" else "rgba"
        lanes = ", ".join(str(letters.index(letter)) for letter in token.text)
        name = "zmlx_set" if after in _ASSIGNED else "zmlx_lanes"
        yield token.start, f"template {name}<{lanes}>()/*"
        yield token.end, "*/"


def _literals(found: Sequence[Token]) -> Iterator[Edit]:
    for token in found:
        if token.kind == "number" and token.text.lower().endswith("bf") and token.text[1:2] != "x":
            yield token.start, "bfloat("
            yield token.end - 2, "f)/*"
            yield token.end, "*/"


def _instantiations(found: Sequence[Token]) -> Iterator[Edit]:
    """Hide the attributes of `template [[host_name("f")]] [[kernel]] decltype(f<int>) f<int>;`."""
    for index, token in enumerate(found):
        if token.text != "template" or found[index + 1 : index + 2] == []:
            continue
        at = index + 1
        while at < len(found) and found[at].text == "[[":
            at = closing(found, at) + 1
        if at > index + 1:
            yield found[index + 1].start, "/*"
            yield found[at - 1].end, "*/"


def _methods(seen: Outline) -> Iterator[Edit]:
    """A method without an address space works on objects in `thread`, as in Metal.

    For clang an object that has no name is in no address space, so that constructors must be in
    none, and a method is declared a second time for such objects. As objects in other address
    spaces would do there too, it is deleted for those.
    """
    methods = [method for head in seen.heads if (method := Method.of(head))]
    named = {(method.owner, method.name, space) for method in methods for space in method.spaces}
    for method in methods:
        if method.is_constructor:
            yield from method.without_space()
        elif method.spaces <= {"thread"}:
            others = [
                space
                for space in ("device", "threadgroup")
                if (method.owner, method.name, space) not in named
            ]
            yield from method.on_thread(others)


class Method:
    """A method or constructor as its class declares it.

    Attributes:
        owner: the class's scope.
        name: as written, such as "operator+".
        spaces: address spaces that stand behind its parameters.
    """

    def __init__(self, owner: Scope, tokens: Sequence[Token], brackets: tuple[int, int]) -> None:
        self.owner = id(owner)
        self._tokens = tokens
        bare = without_template(tokens)
        opened, closed = brackets
        self._rest = bare[closed + 1 :]
        words = [token.text for token in bare[:opened]]
        at = words.index("operator") if "operator" in words else opened - 1
        self.name = " ".join(words[at:])
        self.is_constructor = self.name == owner.name
        self.spaces = {token.text for token in self._rest} & SPACES

    @classmethod
    def of(cls, head: Head) -> Method | None:
        """Return the method that a head declares, or None."""
        bare = without_template(head.tokens)
        words = {token.text for token in bare}
        if head.scope.kind != "class" or words & {"static", "friend", "using", "typedef", "~"}:
            return None
        brackets = parameters(bare)
        if brackets is None or (brackets[0] < 2 and bare[0].text != head.scope.name):
            return None
        rest = {token.text for token in bare[brackets[1] + 1 :]}
        if rest - {"const", "noexcept", "volatile", *SPACES}:
            return None
        return cls(head.scope, head.tokens, brackets)

    def without_space(self) -> Iterator[Edit]:
        """Yield what hides the word `thread`."""
        for token in self._rest:
            if token.text == "thread":
                yield token.start, "/*"
                yield token.end, "*/"

    def on_thread(self, others: Sequence[str]) -> Iterator[Edit]:
        """Yield what declares it for `thread` and for objects without a name, not for `others`."""
        copies = [f"{self._in(space)} = delete; " for space in others]
        # What is constant or has its type deduced needs its body in both cases, unless that names
        # the object's own address space.
        words = {token.text for token in self._tokens if token not in self._rest}
        if {"constexpr", "auto"} & words and "thread" not in words:
            yield from self.without_space()
        else:
            copies.append(f"{self._in('')}; ")
            if not self.spaces:
                behind = [t for t in self._tokens if t not in self._rest or t.text != "noexcept"]
                yield behind[-1].end, " thread "
        yield self._tokens[0].start, "".join(copies)

    def _in(self, space: str) -> str:
        """Return the declaration with another address space."""
        head = [token.text for token in self._tokens if token not in self._rest]
        rest = [token.text for token in self._rest if token.text not in SPACES]
        rest.insert(len(rest) - rest.count("noexcept"), space)
        return " ".join([*head, *rest])


def _constants(seen: Outline) -> Iterator[Edit]:
    for head in seen.heads:
        words = {token.text for token in head.tokens}
        declared = parameters(without_template(head.tokens)) is None
        if head.end.text == ";" and "function_constant" in words and declared:
            yield head.end.start, " = {}"


def _includes(found: Sequence[Token]) -> Iterator[Edit]:
    """All of Metal's headers are in one here."""
    for index in range(len(found) - 2):
        words = [token.text for token in found[index : index + 3]]
        metals = words[2].startswith("metal_") or words[2] == "simd"
        if found[index].directive and words[:2] == ["include", "<"] and metals:
            yield found[index].end, " <metal_stdlib> //"
