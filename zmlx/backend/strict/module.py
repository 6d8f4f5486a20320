"""What only the compiled text shows: functions that call themselves, and threadgroup memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from zmlx.backend.strict.diagnosis import Diagnosis

#: Bytes of threadgroup memory that every Apple GPU gives a threadgroup.
THREADGROUP_BYTES = 32 * 1024
_DEFINED = re.compile(r'^define .*?@(?:"([^"]+)"|([\w$.]+))\(.*?(?:!dbg !(\d+))? \{$')
_CALLED = re.compile(r'\bcall\b[^@]*@(?:"([^"]+)"|([\w$.]+))\((.*)\)')
_BYTES = re.compile(r"\bi64(?: noundef)? (\d+)")
_PROGRAM = re.compile(r'^!(\d+) = distinct !DISubprogram\(name: "([^"]*)".*?file: !(\d+), line: (\d+)')
_FILE = re.compile(r'^!(\d+) = !DIFile\(filename: "([^"]*)"')


@dataclass
class _Function:
    debug: str
    calls: list[str] = field(default_factory=list)
    bytes: int = 0


def faults(module: str) -> Iterator[Diagnosis]:
    """Yield the recursions and the kernels with too much threadgroup memory of a module."""
    functions, places = _read(module)
    for name, function in functions.items():
        part, line, shown = places.get(function.debug, ("", 1, name))
        if name in _reached(functions, name):
            message = f"function {shown!r} calls itself"
            yield Diagnosis(part, line, 1, message, "Metal has no recursion: use a loop")
        held = sum(functions[called].bytes for called in function.calls if called in functions)
        if held > THREADGROUP_BYTES:
            message = f"{held:,} bytes of threadgroup memory; there are {THREADGROUP_BYTES:,}"
            yield Diagnosis(part, line, 1, message, "take smaller threadgroup arrays")


def _read(module: str) -> tuple[dict[str, _Function], dict[str, tuple[str, int, str]]]:
    """Return functions by name, and the part, line and name of each by its debug number."""
    functions: dict[str, _Function] = {}
    programs: dict[str, tuple[str, int, str]] = {}
    files: dict[str, str] = {}
    current: _Function | None = None
    for line in module.splitlines():
        if match := _DEFINED.match(line):
            current = functions[match[1] or match[2]] = _Function(match[3] or "")
        elif line == "}":
            current = None
        elif current and (match := _CALLED.search(line)):
            current.calls.append(match[1] or match[2])
            if current.calls[-1].startswith("_Z22zmlx_threadgroup_bytes"):
                size = _BYTES.search(match[3])
                current.bytes += int(size[1]) if size else 0
        elif match := _PROGRAM.match(line):
            programs[match[1]] = (match[3], int(match[4]), match[2])
        elif match := _FILE.match(line):
            files[match[1]] = match[2]
    places = {
        number: (files.get(file, ""), line, name) for number, (file, line, name) in programs.items()
    }
    return functions, places


def _reached(functions: dict[str, _Function], start: str) -> set[str]:
    """Return what a function calls, at any depth."""
    reached: set[str] = set()
    waiting = list(functions[start].calls)
    while waiting:
        name = waiting.pop()
        if name not in reached and name in functions:
            reached.add(name)
            waiting += functions[name].calls
    return reached
