"""What only the compiled text shows: functions that call themselves, and threadgroup memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from zmlx.backend.strict.diagnosis import Diagnosis

#: Bytes of threadgroup memory that every Apple GPU gives a threadgroup.
THREADGROUP_BYTES = 32 * 1024
_DEFINED = re.compile(r'^define .*?@(?:"([^"]+)"|([\w$.]+))\(.*?(?:!dbg !(\d+))? \{$')
_CALLED = re.compile(r'\bcall\b[^@]*@(?:"([^"]+)"|([\w$.]+))\((.*)\)(?:.*!dbg !(\d+))?')
_BYTES = re.compile(r"\bi64(?: noundef)? (\d+)")
_PROGRAM = re.compile(r'^!(\d+) = distinct !DISubprogram\(name: "([^"]*)".*?line: (\d+)')
_LOCATION = re.compile(r"^!(\d+) = !DILocation\(line: (\d+), column: (\d+), scope: !(\d+)")
_IN_FILE = re.compile(r"^!(\d+) = (?:distinct )?!DI(?:Subprogram|LexicalBlock)\w*\(.*?file: !(\d+)")
_FILE = re.compile(r'^!(\d+) = !DIFile\(filename: "([^"]*)"')


@dataclass
class _Function:
    debug: str
    #: name of a called function, and the debug number of the call
    calls: list[tuple[str, str]] = field(default_factory=list)
    bytes: int = 0


@dataclass
class _Debug:
    """Debug numbers -> lines, columns, names and files."""

    programs: dict[str, tuple[str, int]] = field(default_factory=dict)
    locations: dict[str, tuple[int, int, str]] = field(default_factory=dict)
    scopes: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def read(self, line: str) -> None:
        if match := _PROGRAM.match(line):
            self.programs[match[1]] = (match[2], int(match[3]))
        if match := _LOCATION.match(line):
            self.locations[match[1]] = (int(match[2]), int(match[3]), match[4])
        elif match := _IN_FILE.match(line):
            self.scopes[match[1]] = match[2]
        elif match := _FILE.match(line):
            self.files[match[1]] = match[2]

    def file(self, scope: str) -> str:
        return self.files.get(self.scopes.get(scope, ""), "")


def faults(module: str) -> Iterator[Diagnosis]:
    """Yield the recursions and the kernels with too much threadgroup memory of a module."""
    functions, debug = _read(module)
    for name, function in functions.items():
        if name in _reached(functions, name):
            shown, line = debug.programs.get(function.debug, (name, 1))
            message = f"function {shown!r} calls itself"
            advice = "Metal has no recursion: use a loop"
            yield Diagnosis(debug.file(function.debug), line, 1, message, advice)
        variables = [
            (functions[called].bytes, at)
            for called, at in function.calls
            if called in functions and functions[called].bytes
        ]
        held = sum(size for size, _ in variables)
        if held > THREADGROUP_BYTES:
            message = f"{held:,} bytes of threadgroup memory; there are {THREADGROUP_BYTES:,}"
            line, column, scope = debug.locations.get(max(variables)[1], (1, 1, ""))
            advice = "take smaller threadgroup arrays"
            yield Diagnosis(debug.file(scope), line, column, message, advice)


def _read(module: str) -> tuple[dict[str, _Function], _Debug]:
    functions: dict[str, _Function] = {}
    debug = _Debug()
    current: _Function | None = None
    for line in module.splitlines():
        if match := _DEFINED.match(line):
            name = match[1] or match[2]
            current = functions[name] = _Function(match[3] or "")
        elif line == "}":
            current = None
        elif current and (match := _CALLED.search(line)):
            called = match[1] or match[2]
            current.calls.append((called, match[4] or ""))
            if called.startswith("_Z22zmlx_threadgroup_bytes"):
                size = _BYTES.search(match[3])
                current.bytes += int(size[1]) if size else 0
        elif line.startswith("!"):
            debug.read(line)
    return functions, debug


def _reached(functions: dict[str, _Function], start: str) -> set[str]:
    """Return what a function calls, at any depth."""
    reached: set[str] = set()
    waiting = [called for called, _ in functions[start].calls]
    while waiting:
        name = waiting.pop()
        if name not in reached and name in functions:
            reached.add(name)
            waiting += [called for called, _ in functions[name].calls]
    return reached
