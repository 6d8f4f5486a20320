"""What a command means, in the order in which a user would mean it.

1. a path, or a file ending in .py: that file
2. `python`, `python3.12`, ...: as the shell would find it
3. a console script beside this interpreter: run by this interpreter
4. the dotted name of a module that can be imported: `python -m`
5. a program on PATH
6. the name of a module without a dot: last, since the standard library has modules named `code`,
   `test` and `this`

`mlx_lm.generate` is both 3 and 4; 3 is what the user's shell runs.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from importlib.machinery import ModuleSpec
from typing import NoReturn

_PYTHON = re.compile(r"(python|pypy)[0-9.]*(\.exe)?$")


class NotFound(Exception):
    """Nothing has that name; the text says so in one line."""


class NotExecutable(Exception):
    """It is a file, but not one that the system can start; the text says what to do."""


def resolve(command: str, arguments: list[str]) -> list[str]:
    """Return the argument list that starts a command; its first element is a path.

    Raises:
        NotFound: there is no such command.
        NotExecutable: it is a file that cannot be started.
    """
    if command.endswith(".py") and os.path.isfile(command):
        return [sys.executable, command, *arguments]
    if os.sep in command:
        return [_executable(command), *arguments]
    if _PYTHON.match(command):
        return [shutil.which(command) or _beside(command) or _missing(command), *arguments]
    script = _beside(command)
    if script is not None:
        return [*([sys.executable] if _is_python(script) else []), script, *arguments]
    module = [sys.executable, "-m", command, *arguments] if _is_module(command) else None
    if module is not None and "." in command:
        return module
    found = shutil.which(command)
    if found is not None:
        return [found, *arguments]
    return module or _missing(command)


def startup_is_disabled(argv: list[str]) -> str | None:
    """Return the interpreter's flag that keeps the start-up file from running, or None."""
    if not _PYTHON.match(os.path.basename(argv[0])):
        return None
    options = iter(argv[1:])
    for option in options:
        if not option.startswith("-") or option in ("-", "--"):
            return None
        if option.startswith("--"):
            continue
        for position, letter in enumerate(option[1:], 1):
            if letter in "ISE":
                return f"-{letter}"
            if letter in "cm":
                return None
            if letter in "WX":
                if position == len(option) - 1:
                    next(options, None)  # the value is the next argument
                break
    return None


def foreign_interpreter(argv: list[str]) -> str | None:
    """Return the Python that a script names in its first line, if another environment's, or None.

    A name that PATH decides (`/usr/bin/env python3`) counts as ours.
    """
    try:
        with open(argv[0], "rb") as file:
            line = file.readline(256)
    except OSError:
        return None
    words = line[2:].decode(errors="replace").split() if line.startswith(b"#!") else []
    if not words or not _PYTHON.match(os.path.basename(words[0])):
        return None
    return None if os.path.dirname(words[0]) == os.path.dirname(sys.executable) else words[0]


def is_installed(package: str) -> bool:
    """Whether an interpreter that starts elsewhere finds a package too.

    One that lies in the current folder is seen by `python -m`, and by nothing that it starts.
    """
    first_is_the_programs_own = not getattr(sys.flags, "safe_path", False)
    return _find(package, sys.path[first_is_the_programs_own:]) is not None


def _executable(path: str) -> str:
    if not os.path.isfile(path):
        raise NotFound(f"{path}: no such file")
    if not os.access(path, os.X_OK):
        raise NotExecutable(f"{path} is not executable; did you mean `zmlx run python {path}`?")
    return path


def _missing(command: str) -> NoReturn:
    raise NotFound(
        f"{command}: not a file, nor a command of this environment, a module, or a program on PATH"
    )


def _beside(command: str) -> str | None:
    """Return the program of that name beside this interpreter, or None."""
    path = os.path.join(os.path.dirname(sys.executable), command)
    return path if os.path.isfile(path) and os.access(path, os.X_OK) else None


def _is_python(script: str) -> bool:
    with open(script, "rb") as file:
        first = file.readline(256)
        # Long paths are started through the shell, by a second line.
        return first.startswith(b"#!") and b"python" in first + file.readline(256)


def _is_module(name: str) -> bool:
    """Whether `python -m name` would find something to run, without importing anything."""
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts):
        return False
    spec = None
    path: list[str] | None = None
    for length in range(1, len(parts) + 1):
        spec = _find(".".join(parts[:length]), path)
        if spec is None:
            return False
        locations = spec.submodule_search_locations
        path = [] if locations is None else list(locations)
    if spec is not None and spec.submodule_search_locations is not None:
        return _find(f"{name}.__main__", path) is not None
    return True


def _find(name: str, path: list[str] | None) -> ModuleSpec | None:
    """Ask the finders themselves: `importlib.util.find_spec` would import the parent packages."""
    if path is None:
        path = ["", *sys.path]  # the interpreter with -m starts at the current folder
    for finder in sys.meta_path:
        spec = finder.find_spec(name, path)
        if spec is not None:
            return spec
    return None
