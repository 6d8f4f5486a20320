"""What a tuning result belongs to: machine, versions, what the kernel holds, and its inputs.

Everything here is text made of contents. Nothing is a memory address, which another object may
have in the next process or in the next minute.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

import mlx.core as mx

from zmlx.backend.definition import Definition
from zmlx.backend.signature import dtype_name
from zmlx.version import __version__

_PLAIN = (int, float, complex, bool, bytes, type(None), type(Ellipsis))


class NoContent(TypeError):
    """Something has no content that could be written down; it can be told apart here only."""


@dataclass(frozen=True)
class Machine:
    """Where and with which software a result was measured.

    Attributes:
        device: the device's name, exactly as MLX reports it.
        backend: "metal", "cuda" or "cpu".
        mlx: version of mlx.
        zmlx: version of zmlx.
    """

    device: str
    backend: str
    mlx: str
    zmlx: str


@dataclass(frozen=True)
class Subject:
    """What was tuned: one kernel with one kind of inputs, and the choices that it had.

    Attributes:
        machine: where.
        kernel: the kernel's name, for people.
        content: hash of everything that the kernel is made of.
        inputs: shapes and dtypes of the inputs, as text.
        candidates: labels of the choices, in their order.
    """

    machine: Machine
    kernel: str
    content: str
    inputs: str
    candidates: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return {**asdict(self), "candidates": list(self.candidates)}


@cache
def machine(backend: str, *, any_device: bool = False) -> Machine:
    """Return this machine for a backend; with `any_device` its device has no name.

    Asked for once per process, since MLX's default device decides the backend.
    """
    device = "" if any_device else str(mx.device_info().get("device_name", "unknown"))
    return Machine(device, backend, version("mlx"), __version__)


@cache
def content_of(definition: Definition) -> str:
    """Return the hash of a kernel's definition: source, header, names and switches."""
    return digest(definition)


def digest(*values: Any) -> str:
    """Return a hash of contents.

    Raises:
        NoContent: a value, or one inside it, is of a kind that has no content to write down.
    """
    return hashlib.sha256(text_of(values).encode()).hexdigest()[:24]


def inputs_text(inputs: Sequence[Any]) -> str:
    """Return shapes and dtypes of arrays, and the types of plain values, as text.

    The values of numbers do not matter to a launch, so they are left out.

    Example:
        (8, 1000) float32, (1000,) bfloat16, float
    """
    return ", ".join(_input_text(value) for value in inputs)


def text_of(value: Any) -> str:
    """Return text that two values share when, and only when, they hold the same.

    Plain values, dtypes, sequences, mappings, dataclasses, functions (their code, defaults, and
    what they refer to outside), and objects with a dataclass in `spec`, such as compiled kernels.

    Raises:
        NoContent: for anything else.
    """
    return _text(value, set())


def _input_text(value: Any) -> str:
    if isinstance(value, mx.array):
        return f"{tuple(value.shape)} {dtype_name(value.dtype)}"
    return type(value).__name__


def _text(value: Any, seen: set[types.CodeType]) -> str:
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, _PLAIN):
        return f"{type(value).__name__}:{value!r}"
    if isinstance(value, mx.Dtype):
        return str(value)
    if isinstance(value, Mapping):
        entries = sorted(f"{_text(k, seen)}={_text(v, seen)}" for k, v in value.items())
        return f"{{{','.join(entries)}}}"
    if isinstance(value, list | tuple):
        return f"({','.join(_text(inner, seen) for inner in value)})"
    if isinstance(value, set | frozenset):
        return f"<{','.join(sorted(_text(inner, seen) for inner in value))}>"
    if isinstance(value, types.ModuleType):
        return f"module:{value.__name__}"
    if isinstance(value, type | types.BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, types.CodeType):
        return _code_text(value, seen)
    if isinstance(value, types.FunctionType):
        return _function_text(value, seen)
    held = value if dataclasses.is_dataclass(value) else getattr(value, "spec", None)
    if dataclasses.is_dataclass(held):
        fields = {f.name: getattr(held, f.name) for f in dataclasses.fields(held)}
        return f"{type(held).__qualname__}{_text(fields, seen)}"
    raise NoContent(f"a {type(value).__name__} has no content to write down")


def _function_text(function: types.FunctionType, seen: set[types.CodeType]) -> str:
    code = function.__code__
    if code in seen:
        return f"again:{function.__module__}.{function.__qualname__}"
    seen.add(code)
    values = {name: value for name, value in _outside(function) if not _foreign(value, function)}
    parts = (function.__defaults__, function.__kwdefaults__, values)
    return f"{function.__module__}{_code_text(code, seen)}{_text(parts, seen)}"


def _code_text(code: types.CodeType, seen: set[types.CodeType]) -> str:
    parts = (code.co_name, code.co_code, code.co_consts, code.co_names, code.co_varnames)
    return _text(parts, seen)


def _outside(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Give the names that a function looks up outside itself, with what they stand for now."""
    for name in sorted(_names(function.__code__) & set(function.__globals__)):
        yield name, function.__globals__[name]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        yield name, cell.cell_contents


def _foreign(value: Any, function: types.FunctionType) -> bool:
    """Return whether a value is a function of another module, which the code names already."""
    return isinstance(value, types.FunctionType) and value.__module__ != function.__module__


def _names(code: types.CodeType) -> set[str]:
    """Return the names in a function's code, those of functions inside it too."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names
