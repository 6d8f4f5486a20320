"""Kernels that are whole functions, not bodies: those that MLX ships as headers.

    softmax = Function("softmax.h", "softmax_single_row<float, float>")
    [y] = softmax({0: x, 2: 1000}, {1: (x.shape, x.dtype)}, grid=(8 * 256, 1, 1),
                  threadgroup=(256, 1, 1))

A function is instantiated and launched as MLX does it: arguments go by the numbers of its buffers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from zmlx.backend.cpu import build, native
from zmlx.backend.emulator import assembly, rewriting, toolchain
from zmlx.backend.emulator.kernel import group_size, loaded
from zmlx.backend.signature import ATTRIBUTES

_ATTRIBUTE = re.compile(r"\[\[\s*(?P<text>.*?)\s*\]\]", re.DOTALL)
_BUFFER = re.compile(r"\bbuffer\(\s*(\d+)\s*\)")
_INCLUDE = re.compile(r'\s*#include\s+"(mlx/[^"]+)"')
_KERNELS = "mlx/backend/metal/kernels"
#: what the prelude holds already
_IN_PRELUDE = ("utils.h", "bf16.h", "bf16_math.h", "complex.h", "defines.h", "logging.h")
#: types of constants that are given as Python numbers
_CONSTANTS = {
    "int": mx.int32,
    "int32_t": mx.int32,
    "uint": mx.uint32,
    "uint32_t": mx.uint32,
    "size_t": mx.uint64,
    "uint64_t": mx.uint64,
    "int64_t": mx.int64,
    "float": mx.float32,
    "bool": mx.bool_,
    "short": mx.int16,
}

#: What a buffer may be given: an array, or numbers of the type that the function declares.
Buffer = mx.array | bool | int | float | list[int] | tuple[int, ...]


@dataclass(frozen=True)
class _Parameter:
    """A parameter of a function.

    Attributes:
        name: its name.
        kind: its type without address space, const, and `*` or `&`.
        reference: whether it is a reference, not a pointer.
        buffer: the number of its buffer; -1 for one with a position's attribute.
        attribute: the position's attribute.
    """

    name: str
    kind: str
    reference: bool
    buffer: int
    attribute: str = ""


class Function:
    """A kernel function of one of MLX's headers, instantiated."""

    def __init__(
        self,
        headers: str | Sequence[str],
        instantiation: str,
        *,
        constants: Mapping[int, bool | int | float] | None = None,
    ) -> None:
        """Compile it.

        Args:
            headers: files of mlx's folder of Metal headers, in the order in which MLX puts them
                together; `utils.h` comes before all. The last one holds the function. A path that
                is absolute is taken as it is.
            instantiation: the function with its template's arguments, such as
                "affine_qmv_fast<float, 64, 4, false>".
            constants: values of function constants, by their index.

        Raises:
            ValueError: the last header has no such kernel.
            zmlx.backend.emulator.faults.CompileError: it does not compile.
        """
        files = [headers] if isinstance(headers, str) else list(headers)
        self.name = instantiation.partition("<")[0].strip()
        self._parameters = _parameters_of(self.name, _path(files[-1]).read_text(), files[-1])
        seen = {_path(file) for file in _IN_PRELUDE}
        text = "".join(_inlined(_path(file), seen) for file in files)
        text = rewriting.threadgroup_variables(rewriting.function_constants(text, constants or {}))
        buffers = [p for p in self._parameters if p.buffer >= 0]
        self._slots = {p.buffer: index for index, p in enumerate(buffers)}
        arguments = [
            assembly.position(p.attribute)
            if p.buffer < 0
            else f"zmlx::{'Reference' if p.reference else 'Pointer'}{{b[{self._slots[p.buffer]}]}}"
            for p in self._parameters
        ]
        self._buffers = buffers
        self._loaded: dict[tuple[tuple[int, int, str], ...], Any] = {}
        self._text = "\n".join([text, '#line 1 "entry"', assembly.entry(instantiation, arguments)])

    def __call__(
        self,
        buffers: Mapping[int, Buffer],
        outputs: Mapping[int, tuple[Sequence[int], mx.Dtype]],
        *,
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        may_leave_unwritten: bool = False,
    ) -> list[mx.array]:
        """Launch it; lazy, as any operation of MLX.

        Args:
            buffers: inputs by number; arrays are given as they lie in memory, strides and all.
            outputs: shapes and dtypes by number.
            grid: threads in all (for a launch by threadgroups: their number times their size).
            threadgroup: threads of one.
            may_leave_unwritten: elements of outputs that no thread writes are no fault.

        Returns:
            The outputs, in the order of their numbers.

        Raises:
            ValueError: there is no buffer of a number, or a constant's type is not known.
            zmlx.backend.emulator.faults.LimitError: more than 1,024 threads a threadgroup, or more
                than 32 KB of threadgroup memory.
        """
        inputs: list[mx.array] = []
        numbers = sorted(outputs)
        unknown = (set(buffers) | set(outputs)) - set(self._slots)
        if unknown:
            raise ValueError(
                f"{self.name} has no buffer {sorted(unknown)[0]}; it has {sorted(self._slots)}"
            )
        parts = []
        for parameter in self._buffers:
            number = parameter.buffer
            if number in outputs:
                parts.append((assembly.OUTPUT, numbers.index(number), parameter.name))
            elif number in buffers:
                parts.append((assembly.DATA, len(inputs), parameter.name))
                inputs.append(_array(buffers[number], parameter))
            else:
                parts.append((assembly.ABSENT, 0, parameter.name))
        group = group_size(self.name, grid, threadgroup)
        made = self._loaded.get(tuple(parts))
        if made is None:
            made = loaded(self.name, self._text, parts, ensure_row_contiguous=False)
            self._loaded[tuple(parts)] = made
        result: list[mx.array] = native.load().emulate(
            made,
            inputs,
            [list(outputs[number][0]) for number in numbers],
            [outputs[number][1] for number in numbers],
            grid=tuple(grid),
            threadgroup=group,
            may_leave_unwritten=may_leave_unwritten,
        )
        return result


def _path(file: str) -> Path:
    return _found(f"{_KERNELS}/{file}")


def _found(name: str) -> Path:
    """Return where a header is: some of MLX's are replaced by ours."""
    ours = toolchain.HERE / "include" / name
    return ours if ours.is_file() else build.mlx_include() / name


def _inlined(file: Path, seen: set[Path]) -> str:
    """Return a header's text with those that it includes in their places, each once.

    They are rewritten together: an include is read by the compiler only, after that.
    """
    if file in seen:
        return ""
    seen.add(file)
    lines = [f'#line 1 "{file.name} (header)"']
    for number, line in enumerate(file.read_text().splitlines(), 1):
        included = _INCLUDE.match(line)
        if included:
            lines.append(_inlined(_found(included[1]), seen))
            lines.append(f'#line {number + 1} "{file.name} (header)"')
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


def _array(value: Buffer, parameter: _Parameter) -> mx.array:
    if isinstance(value, mx.array):
        return value
    if parameter.kind not in _CONSTANTS:
        raise ValueError(f"buffer '{parameter.name}' of type {parameter.kind} takes an array")
    return mx.array(value, dtype=_CONSTANTS[parameter.kind])


def _parameters_of(name: str, text: str, file: str) -> list[_Parameter]:
    """Return the parameters of the kernel of a name.

    Raises:
        ValueError: the text has none.
    """
    plain = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    match = re.search(
        rf"(?:\[\[\s*kernel\s*\]\]|\bkernel\b)\s+void\s+{re.escape(name)}\s*\(", plain
    )
    if match is None:
        raise ValueError(f"{file} has no kernel named {name!r}")
    parameters: list[_Parameter] = []
    free = 0
    for declared in _arguments(plain, match.end()):
        found = [m["text"] for m in _ATTRIBUTE.finditer(declared)]
        words = _ATTRIBUTE.sub("", declared).strip()
        kind, _, identifier = re.sub(r"([*&])", r" \1 ", words).rpartition(" ")
        position = next((a for a in found if a in ATTRIBUTES), "")
        number = -1
        if not position:
            given = next((_BUFFER.search(a) for a in found if _BUFFER.search(a)), None)
            number = int(given[1]) if given else free
            free = number + 1
        bare = re.sub(r"\b(const|constant|device|threadgroup|thread)\b|[*&]", "", kind).strip()
        parameters.append(_Parameter(identifier, bare, "&" in words, number, position))
    return parameters


def _arguments(text: str, start: int) -> list[str]:
    """Return what stands between commas, from after a bracket to the one that closes it."""
    depth, begin, found = 0, start, []
    for at in range(start, len(text)):
        char = text[at]
        if char in "(<[":
            depth += 1
        elif char in ")>]" and depth > 0:
            depth -= 1
        elif char == ")" or (char == "," and depth == 0):
            found.append(text[begin:at])
            begin = at + 1
            if char == ")":
                break
    return found
