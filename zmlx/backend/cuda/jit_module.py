"""What MLX makes of the launch of a custom kernel: a program, the module's name, its file.

MLX keeps the modules of its own kernels on disk, and looks there for every module before it
compiles one. Where, and under which name, is worked out here as MLX does it; the versions of MLX of
which that is known to be right are `KNOWN`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from zmlx_autopatch import variables

#: The installed one, and those whose texts these are.
VERSION = str(vars(mx)["__version__"])
KNOWN = ("0.32.4",)

#: dtype -> its name in a kernel's name, and in a program
_TYPES = {
    mx.bool_: ("bool", "bool"),
    mx.int8: ("int8_t", "int8_t"),
    mx.int16: ("int16_t", "int16_t"),
    mx.int32: ("int32_t", "int32_t"),
    mx.int64: ("int64_t", "int64_t"),
    mx.uint8: ("uint8_t", "uint8_t"),
    mx.uint16: ("uint16_t", "uint16_t"),
    mx.uint32: ("uint32_t", "uint32_t"),
    mx.uint64: ("uint64_t", "uint64_t"),
    mx.float16: ("float16_t", "__half"),
    mx.bfloat16: ("bfloat16_t", "__nv_bfloat16"),
    mx.float32: ("float", "float"),
    mx.float64: ("double", "double"),
    mx.complex64: ("complex64_t", "mlx::core::cu::complex64_t"),
}
_START = '\n#include "mlx/backend/cuda/device/utils.cuh"\n\n#include <cooperative_groups.h>\n\n'
_OPEN = "namespace mlx::core::cu {\n\nnamespace cg = cooperative_groups;\n\n"
_CLOSE = "\n}\n\n} // namespace mlx::core::cu\n"
#: What a body can ask of an input with dimensions, and its type.
_ASKED = {"shape": "Shape", "strides": "Strides", "ndim": "int"}
#: The longest name of a file.
_LONGEST = 245


class KernelText(NamedTuple):
    """Arguments of `mx.fast.cuda_kernel` that go into a program."""

    name: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    source: str
    header: str


class Module(NamedTuple):
    """What is compiled for a launch.

    Attributes:
        kernel: the kernel's name, in C++ with its namespaces.
        text: the program.
        name: the module's.
    """

    kernel: str
    text: str
    name: str


def module_of(
    kernel: KernelText,
    inputs: Sequence[tuple[mx.Dtype, int]],
    output_dtypes: Sequence[mx.Dtype],
    template: Sequence[tuple[str, mx.Dtype | int | bool]],
) -> Module:
    """Return the module of a launch.

    Args:
        kernel: the kernel.
        inputs: dtype and number of dimensions of each.
        output_dtypes: one for each output.
        template: names and values.

    Raises:
        ValueError: there are too many or too few of something.
        TypeError: a value of the template is none that MLX takes.
    """
    values = [(name, *_written(value)) for name, value in template]
    name = "custom_kernel_" + kernel.name + "".join(f"_{short}" for _, short, _ in values)
    parameters = []
    for array, (dtype, ndim) in zip(kernel.input_names, inputs, strict=True):
        parameters.append(f"    const {_TYPES[dtype][1]}* {array}")
        for what, kind in _ASKED.items() if ndim else ():
            if f"{array}_{what}" in kernel.source:
                parameters.append(f"    const __grid_constant__ {kind} {array}_{what}")
    for array, dtype in zip(kernel.output_names, output_dtypes, strict=True):
        parameters.append(f"    {_TYPES[dtype][1]}* {array}")
    constants = "".join(f"  {declared.format(name)}\n" for name, _, declared in values)
    text = (
        f"{_START}{kernel.header}{_OPEN}__global__ void {name}(\n"
        + ",\n".join(parameters)
        + ") {\n"
        + (f"{constants}\n" if constants else "")
        + f"{kernel.source}{_CLOSE}"
    )
    return Module(f"mlx::core::cu::{name}", text, f"{name}_{std_hash(text.encode()):x}")


def _written(value: mx.Dtype | int | bool) -> tuple[str, str]:
    """Return how a value is written in a kernel's name, and its declaration but for the name."""
    if isinstance(value, bool):
        return "ft"[value], f"constexpr bool {{}} = {str(value).lower()};"
    if isinstance(value, int):
        return str(value), f"constexpr int {{}} = {value};"
    if isinstance(value, mx.Dtype):
        return _TYPES[value][0], f"using {{}} = {_TYPES[value][1]};"
    raise TypeError(f"a template takes no {type(value).__name__}")


def cache_folder() -> Path | None:
    """Return the folder in which MLX looks; None if it looks nowhere."""
    chosen = variables.foreign("MLX_PTX_CACHE_DIR")
    if chosen is not None:
        return Path(chosen) if chosen else None
    names = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")
    found = (variables.foreign(name) for name in names)
    temporary = next((folder for folder in found if folder is not None), "/tmp")
    return Path(temporary) / "mlx" / VERSION / "ptx"


def file_in(folder: Path, module: str) -> Path:
    """Return a module's file; a name that is too long for one is split into folders."""
    whole = range(0, len(module), _LONGEST)
    *folders, last = (module[start : start + _LONGEST] for start in whole)
    return folder.joinpath(*folders, f"{last}.ptx")


_ALL = (1 << 64) - 1
_FACTOR = 0xC6A4A7935BD1E995


def std_hash(data: bytes) -> int:
    """Return `std::hash<std::string>` of libstdc++: MurmurHash64A by Austin Appleby."""
    result = 0xC70F6907 ^ (len(data) * _FACTOR & _ALL)
    whole = len(data) & ~7
    for start in range(0, whole, 8):
        word = int.from_bytes(data[start : start + 8], "little") * _FACTOR & _ALL
        result = (result ^ (_shifted(word) * _FACTOR & _ALL)) * _FACTOR & _ALL
    if whole != len(data):
        result = (result ^ int.from_bytes(data[whole:], "little")) * _FACTOR & _ALL
    return _shifted(_shifted(result) * _FACTOR & _ALL)


def _shifted(word: int) -> int:
    return word ^ word >> 47
