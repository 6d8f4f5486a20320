"""Rules of Metal that clang does not hold: they are read off the text itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from zmlx.backend.strict.diagnosis import Diagnosis
from zmlx.backend.strict.outline import Outline, parameters, without_template
from zmlx.backend.strict.rewrite import SPACES, threadgroup_variables
from zmlx.backend.strict.tokens import Parts, Token, closing

#: word -> what to do instead
_REFUSED = {
    "goto": "Metal has no goto: use loops and conditions",
    "asm": "Metal has no inline assembly",
    "register": "Metal has no storage class register",
    "thread_local": "Metal has no thread_local: variables in a function are a thread's own",
    "typeid": "Metal has no type identification at run time",
    "dynamic_cast": "Metal has no type identification at run time",
}
_INDIRECT = ("*", "&", "&&")
#: Words that begin statements, so that no type stands there.
_NO_TYPE = frozenset(
    [
        *("return", "else", "case", "delete", "throw", "goto", "do", "new", "sizeof", "break"),
        *("continue", "if", "while", "for", "switch", "using", "namespace", "default", "operator"),
        *("public", "private", "protected", "template"),
    ]
)
#: Words before the type of a declaration.
_QUALIFIERS = frozenset(
    [
        *("const", "constexpr", "volatile", "static", "inline", "typename", "struct", "unsigned"),
        *("signed", "extern", "typedef", "METAL_FUNC", "friend", "mutable", "explicit"),
    ]
)
_POINT = "name one of device, threadgroup, constant, thread before the type it points to"
_REFER = "name one of device, threadgroup, constant, thread before the type it refers to"


def broken(parts: Parts, found: Sequence[Token], seen: Outline) -> Iterator[Diagnosis]:
    """Yield what is wrong with a text.

    Args:
        parts: where its tokens stand.
        found: all tokens, those of directives too.
        seen: the outline of those that are of none.
    """
    code = [token for token in found if not token.directive]
    spaces = SPACES | _aliases(found)
    faults = [*_refused(code), *_threadgroup(found, code, seen), *_signs(code, spaces)]
    faults += [*_parameters(seen, spaces), *_declarations(code, seen, spaces)]
    told = set()
    for token, message, advice in faults:
        place = parts.place(token.start)
        if (token.start, message) not in told:
            told.add((token.start, message))
            yield Diagnosis(place.part, place.line, place.column, message, advice)


_Fault = tuple[Token, str, str]


def _refused(code: Sequence[Token]) -> Iterator[_Fault]:
    for token in code:
        if token.text in _REFUSED:
            yield token, f"{token.text!r} is no word of Metal", _REFUSED[token.text]


def _threadgroup(found: Sequence[Token], code: Sequence[Token], seen: Outline) -> Iterator[_Fault]:
    kernel = {code[index].start: scope.kernel for index, scope in seen.statements}
    for variables in threadgroup_variables(found):
        if variables.initialised:
            name = variables.initialised
            message = f"threadgroup variable {name.text!r} is given a value where it is declared"
            yield name, message, "assign it in the code, from one thread, before a barrier"
        first = _statement(variables.first, kernel)
        if not variables.first.directive and not kernel.get(first, True):
            message = "a threadgroup variable in a function that is not a kernel"
            yield variables.first, message, "declare it in the kernel and pass a pointer to it"


def _statement(token: Token, kernel: dict[int, bool]) -> int:
    """Return where the statement begins that a token is in."""
    return max((start for start in kernel if start <= token.start), default=token.start)


def _aliases(found: Sequence[Token]) -> set[str]:
    """Return names that stand for text with an address space: `#define OUT device`."""
    names = set()
    for index, token in enumerate(found):
        if token.directive and token.text == "define":
            line = _directive(found, index)
            if {t.text for t in line} & SPACES:
                names.add(line[0].text)
        elif token.text == "using" and found[index + 2 : index + 3]:
            end = next((i for i in range(index, len(found)) if found[i].text == ";"), index)
            inside = {t.text for t in found[index:end]}
            if inside & SPACES and not inside & set(_INDIRECT):
                names.add(found[index + 1].text)
    return names


def _directive(found: Sequence[Token], start: int) -> Sequence[Token]:
    end = start + 1
    while end < len(found) and found[end].directive and found[end].text != "#":
        end += 1
    return found[start + 1 : end] or found[start : start + 1]


def _fault(sign: Token) -> _Fault:
    if sign.text == "*":
        return sign, "a pointer without an address space", _POINT
    return sign, "a reference without an address space", _REFER


def _bare(words: Sequence[Token], spaces: set[str] | frozenset[str]) -> bool:
    texts = {token.text for token in words}
    return not texts & spaces and not texts & {"auto", "decltype"}


def _parameters(seen: Outline, spaces: set[str] | frozenset[str]) -> Iterator[_Fault]:
    """Pointers and references among the parameters and the result of functions."""
    for head in seen.heads:
        bare = without_template(head.tokens)
        brackets = parameters(bare)
        if brackets is None or (brackets[0] < 2 and head.scope.kind != "class"):
            continue
        opened, closed = brackets
        for parameter in _separated(bare[opened + 1 : closed]):
            sign = _indirection(parameter)
            if sign and _bare(parameter, spaces):
                yield _fault(sign)
        result = bare[: opened - 1]
        words = [token.text for token in result]
        if "operator" not in words and "=" not in words:
            sign = _indirection(result)
            if sign and _bare(result, spaces):
                yield _fault(sign)


def _separated(inside: Sequence[Token]) -> Iterator[Sequence[Token]]:
    """Split parameters at the commas between them; what follows a `=` is left out."""
    start = index = 0
    end = -1
    while index < len(inside):
        word = inside[index].text
        if word in ("(", "[", "{", "[[") or (word == "<" and inside[index - 1].kind == "name"):
            index = closing(inside, index)
        elif word == "=" and end < 0:
            end = index
        elif word == ",":
            yield inside[start : end if end >= 0 else index]
            start, end = index + 1, -1
        index += 1
    yield inside[start : end if end >= 0 else index]


def _indirection(words: Sequence[Token]) -> Token | None:
    """Return the first sign of a pointer or reference in a declaration."""
    index = 0
    while index < len(words):
        word = words[index]
        grouped = word.text == "(" and [t.text for t in words[index + 1 : index + 2]]
        if grouped and grouped[0] in _INDIRECT:
            return words[index + 1]
        if word.text in ("[[", "[", "(") or (
            word.text == "<" and index and words[index - 1].kind == "name"
        ):
            index = closing(words, index)
        elif word.text in _INDIRECT:
            return word
        index += 1
    return None


def _declarations(
    code: Sequence[Token], seen: Outline, spaces: set[str] | frozenset[str]
) -> Iterator[_Fault]:
    """Variables and members: `float* p = x;` at the beginning of a statement."""
    starts = [index for index, _ in seen.statements]
    starts += [i + 2 for i in range(len(code) - 2) if _is_for(code, i)]
    for index in starts:
        words = code[index : index + 40]
        sign = _declared(words)
        if sign and _bare(words[: words.index(sign)], spaces):
            yield _fault(sign)
    for head in seen.heads:
        bare = without_template(head.tokens)
        if parameters(bare) is None:
            sign = _declared((*bare, Token(";", "sign", head.end.start)))
            if sign and _bare(bare, spaces):
                yield _fault(sign)


def _is_for(code: Sequence[Token], index: int) -> bool:
    return code[index].text == "for" and code[index + 1].text == "("


def _declared(words: Sequence[Token]) -> Token | None:
    """Return the sign in `TYPE * name` and the like, where TYPE names no address space."""
    index = 0
    while index < len(words) and words[index].text in _QUALIFIERS:
        index += 1
    if index >= len(words):
        return None
    builtin = index and words[index - 1].text in ("unsigned", "signed")
    if not (builtin and words[index].text in _INDIRECT):
        if words[index].kind != "name" or words[index].text in _NO_TYPE | SPACES | {"auto"}:
            return None
        index += 1
        while index + 1 < len(words) and words[index].text in ("::", "<"):
            index = closing(words, index) + 1 if words[index].text == "<" else index + 2
    while index < len(words) and words[index].text == "const":
        index += 1
    if index + 2 >= len(words) or words[index].text not in _INDIRECT:
        return None
    sign = words[index]
    while index < len(words) and words[index].text in (*_INDIRECT, "const"):
        index += 1
    named = index + 1 < len(words) and words[index].kind == "name"
    return sign if named and words[index + 1].text in ("=", ";", "[", ",", "{", ":") else None


def _signs(code: Sequence[Token], spaces: set[str] | frozenset[str]) -> Iterator[_Fault]:
    """Types in casts and templates: after `*` a bracket that closes means a pointer."""
    for index in range(2, len(code) - 1):
        token, after = code[index], code[index + 1].text
        if token.text not in _INDIRECT or after not in (")", ">"):
            continue
        if code[index - 1].text == "operator":
            continue
        words = _back(code, index)
        if words and words[0].kind == "name" and _bare(words, spaces):
            yield _fault(token)


def _back(code: Sequence[Token], index: int) -> Sequence[Token]:
    """Return the tokens of the type before a sign."""
    start, depth = index, 0
    while start:
        word = code[start - 1].text
        depth += (word in (">", ")")) - (word in ("<", "("))
        if depth < 0 or (depth == 0 and word in (",", ";", "{", "}", "=", "[")):
            break
        start -= 1
    return code[start:index]
