"""clang's messages as diagnoses: in Metal's words, at a place of the text, with what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from zmlx.backend.signature import ATTRIBUTES
from zmlx.backend.strict.diagnosis import Diagnosis
from zmlx.backend.strict.rewrite import Edit
from zmlx.backend.strict.tokens import Parts

_LINE = re.compile(
    r"(?P<file>[^:\n]+):(?P<line>\d+):(?P<column>\d+): "
    r"(?P<kind>fatal error|error|warning|note): (?P<text>.*)"
)
#: OpenCL's word -> Metal's
_WORDS = [
    (re.compile(r"\b__global\b"), "device"),
    (re.compile(r"\b__local\b"), "threadgroup"),
    (re.compile(r"\b__private\b"), "thread"),
    (re.compile(r"\b__constant\b"), "constant"),
    (re.compile(r"\b__generic\b ?"), ""),
    (re.compile(r"\bzmlx_word_"), ""),
    (re.compile(r"no matching member function for call to 'zmlx_\w+'"), "no such lanes"),
    (re.compile(r"C\+\+ for OpenCL|OpenCL C?"), "Metal"),
    (re.compile(r"requires cl_khr_fp64(?: and __opencl_c_fp64)? support"), "is refused by Metal"),
    (re.compile(r" \[-W.*\]$"), ""),
    (re.compile(r"^(unknown attribute '.*') ignored$"), r"\1"),
]
_SPACE = re.compile(r"\b(const|volatile|__\w+)\s+")
#: Attributes of Metal that a text may use besides those that MLX gives variables for.
_KNOWN = frozenset(ATTRIBUTES) | {
    *("buffer", "function_constant", "host_name", "kernel", "visible", "stitchable", "user"),
    *("max_total_threads_per_threadgroup", "threadgroup", "__local", "texture", "sampler"),
    *("required_threads_per_threadgroup", "id", "early_fragment_tests", "index_type"),
}
#: What a message or its notes say -> what to do; the first that fits.
_ADVICE = [
    (
        r"'([\w ]* )?(float|half)' to .*bfloat",
        "Metal rounds to bfloat only where it is told to: write bfloat(x) or T(x)",
    ),
    (r"bfloat.* to '([\w ]* )?half'", "between bfloat and half goes float: half(float(x))"),
    (r"bfloat.* to '([\w ]* )?(int|uint|long|ulong)'", "say so where bfloat becomes whole: int(x)"),
    (r"double", "Metal has no double: write float, and 1.0f"),
    (r"narrowed", "write the conversion: T(x)"),
    (r"virtual", "Metal has no virtual functions: use templates"),
    (r"exceptions disabled", "Metal has no exceptions"),
    (r"'default (new|delete)'", "Metal has no dynamic allocation: declare arrays of fixed size"),
    (r"variable length array|constant expression", "sizes are known when a kernel is compiled"),
    (r"program scope", "write `constant` before a variable outside functions"),
    (r"assign to|read-only|not assignable|const-qualified", "constant and const are read only"),
    (r"address space|(device|threadgroup|constant|thread) \S+ ?\*", "take the same address space"),
    (r"undeclared|no member named|unknown type", "only Metal's own library and MLX's prelude"),
    (r"unknown attribute", "Metal has no such attribute"),
    (r"file not found", "only Metal's own headers can be included"),
    (r"ambiguous", "give every argument the same type: float(x), T(x)"),
]


@dataclass
class _Message:
    text: str
    kind: str
    #: The message's own place, then those of its notes.
    places: list[tuple[str, int, int]]
    notes: list[str] = field(default_factory=list)


def diagnoses(told: str, parts: Parts, edits: Sequence[Edit]) -> Iterator[Diagnosis]:
    """Yield the errors that clang told, at their places in the text before its edits."""
    names = {parts.place(offset).part for offset, _ in edits} | set(parts.names)
    moved: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for offset, inserted in edits:
        place = parts.place(offset)
        moved.setdefault((place.part, place.line), []).append((place.column, len(inserted)))
    seen: set[Diagnosis] = set()
    for message in _messages(told):
        if not _counts(message):
            continue
        own = [place for place in message.places if place[0] in names]
        part, line, column = own[0] if own else (parts.names[0], 1, 1)
        column = _before_edits(moved.get((part, line), []), column)
        text = _in_metal(message.text)
        diagnosis = Diagnosis(part, line, column, text, _advice(message, text))
        if diagnosis not in seen:
            seen.add(diagnosis)
            yield diagnosis


def _messages(told: str) -> Iterator[_Message]:
    current: _Message | None = None
    for line in told.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        place = (match["file"], int(match["line"]), int(match["column"]))
        if match["kind"] == "note" and current is not None:
            current.notes.append(match["text"])
            # Places of candidates say nothing of the place of the fault.
            if "requested here" in match["text"] or "expanded from macro" in match["text"]:
                current.places.append(place)
            continue
        if current is not None:
            yield current
        current = _Message(match["text"], match["kind"], [place])
    if current is not None:
        yield current


def _counts(message: _Message) -> bool:
    if message.kind == "warning":
        unknown = re.match(r"unknown attribute '(.*)' ignored", message.text)
        return bool(unknown) and unknown is not None and unknown[1] not in _KNOWN
    return not _reads_constant(message)


def _reads_constant(message: _Message) -> bool:
    """Is this a copy out of `constant` memory, which Metal makes and clang does not?"""
    both = re.match(r"incompatible operand types \('(.*)' and '(.*)'\)+$", message.text)
    if both:
        first, second = (
            _SPACE.sub("", side.split("(aka '")[-1].rstrip("')")) for side in both.groups()
        )
        return first == second
    if not re.match(r"no matching constructor for init|no viable overloaded '='", message.text):
        return False
    copy = re.compile(
        r"the implicit copy (constructor|assignment operator)\) not viable.*__constant"
    )
    return any(copy.search(note) for note in message.notes)


def _in_metal(text: str) -> str:
    for pattern, word in _WORDS:
        text = pattern.sub(word, text)
    return text.strip()


def _advice(message: _Message, text: str) -> str:
    everything = "\n".join([text, *(_in_metal(note) for note in message.notes)])
    for where in (text, everything):
        for pattern, advice in _ADVICE:
            if re.search(pattern, where):
                return advice
    return ""


def _before_edits(moved: Sequence[tuple[int, int]], column: int) -> int:
    """Return the column in the text as it was written; inside an insertion, where it stands."""
    shift = 0
    for at, length in sorted(moved):
        if at + shift > column:
            break
        if at + shift + length > column:
            return at
        shift += length
    return column - shift
