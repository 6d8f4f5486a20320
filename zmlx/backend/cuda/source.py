"""The text of a kernel for `mx.fast.cuda_kernel`: prelude, translated header, names, body."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from zmlx.backend.cuda.tokens import TranslationError
from zmlx.backend.cuda.translate import always_indexed, names_in, translate_body, translate_header
from zmlx.backend.definition import Definition
from zmlx.backend.signature import ATTRIBUTES

#: What Metal has and CUDA has not. It is included, not pasted: MLX hashes the text at every call.
PRELUDE = Path(__file__).with_name("include") / "metal.cuh"

#: What lets kernels overlap, and the call that each of them begins with.
OVERLAPPED = PRELUDE.with_name("overlapped.cuh")
WAIT = "::zmlx::wait_for_earlier();"

#: The input that holds the size of a grid that is no multiple of the threadgroup.
GRID_INPUT = "zmlx_grid"


class Variant(NamedTuple):
    """What changes a kernel's text from call to call.

    Attributes:
        cut: the grid is no multiple of the threadgroup; its size comes as an input of three int32.
        scalars: the inputs that have no dimensions; in Metal their names are values, not pointers.
        constants: whole numbers of the template that MLX cannot put into a kernel's name.
    """

    cut: bool = False
    scalars: tuple[int, ...] = ()
    constants: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class CudaSource:
    """Arguments of `mx.fast.cuda_kernel`."""

    header: str
    body: str
    input_names: tuple[str, ...]


class Translation:
    """A definition in CUDA C++; what its variants share is translated once.

    Raises:
        TranslationError: the source or header holds something that CUDA has not.
    """

    def __init__(self, definition: Definition) -> None:
        self.definition = definition
        self._body = self._translated("source", translate_body, definition.source)
        header = self._translated("header", translate_header, definition.header)
        self.header = f'#include "{PRELUDE}"\n'
        if header.strip():
            self.header += (
                "namespace mlx::core::cu::header {\n"
                f'#line 1 "{definition.name} header"\n{header}\n}}\n'
                "namespace mlx::core::cu { using namespace header; }\n"
            )

    @cached_property
    def names(self) -> frozenset[str]:
        """The identifiers in the kernel's body."""
        return names_in(self.definition.source)

    def asks_about(self, name: str) -> bool:
        """Return whether the kernel uses an input's shape, strides or number of dimensions."""
        return any(f"{name}_{what}" in self.names for what in ("shape", "strides", "ndim"))

    @cached_property
    def watched(self) -> tuple[int, ...]:
        """Inputs for which it matters whether they have dimensions."""
        source = self.definition.source
        return tuple(
            index
            for index, name in enumerate(self.definition.input_names)
            if not always_indexed(name, source)
            or any(f"{name}_{what}" in source for what in ("shape", "strides", "ndim"))
        )

    def source(self, variant: Variant) -> CudaSource:
        """Return the text of a variant.

        Raises:
            TranslationError: an input without dimensions is asked for its shape.
        """
        names = list(self.definition.input_names)
        outer, inner = self._arrays(variant)
        for index in variant.scalars:
            self._check_scalar(names[index])
            inner.append(f"const auto& {names[index]} = *zmlx_{names[index]};")
            names[index] = f"zmlx_{names[index]}"
        if variant.cut:
            names.append(GRID_INPUT)
        outer += [f"constexpr int {name} = {value};" for name, value in variant.constants]
        text = "\n".join(
            (
                " ".join((*outer, *self._grid(variant.cut), "{", *inner)),
                f'#line 1 "{self.definition.name}"',
                f"{self._body}\n}}",
            )
        )
        return CudaSource(self.header, text, tuple(names))

    def _grid(self, cut: bool) -> list[str]:
        used = [name for name in ATTRIBUTES if name in self.names]
        lines = []
        if cut:
            lines.append(f"const metal::cut_grid zmlx_at({GRID_INPUT});")
            lines.append("if (zmlx_at.outside()) return;")
        elif used:
            lines.append("const metal::whole_grid zmlx_at;")
        return lines + [f"const {ATTRIBUTES[name]} {name} = zmlx_at.{name}();" for name in used]

    def _arrays(self, variant: Variant) -> tuple[list[str], list[str]]:
        """Return declarations that give arrays their Metal types, outside and inside a block.

        A name cannot be declared anew from itself, hence the way through another name.
        """
        outer: list[str] = []
        inner: list[str] = []
        for index, name in enumerate(self.definition.input_names):
            for what, kind in (("shape", "int"), ("strides", "int64_t")):
                array = f"{name}_{what}"
                if array in self.names and index not in variant.scalars:
                    outer.append(f"const {kind}* zmlx_{array} = {array}.data();")
                    inner.append(f"const {kind}* const {array} = zmlx_{array};")
        for name in self.definition.output_names if self.definition.atomic_outputs else ():
            kind = f"metal::atomic<cuda::std::remove_pointer_t<decltype({name})>>"
            outer.append(f"auto* const zmlx_{name} = reinterpret_cast<{kind}*>({name});")
            inner.append(f"auto* const {name} = zmlx_{name};")
        return outer, inner

    def _check_scalar(self, name: str) -> None:
        for what in ("shape", "strides", "ndim"):
            if f"{name}_{what}" in self.names:
                raise TranslationError(
                    f"kernel {self.definition.name!r}: the input {name!r} has no dimensions here, "
                    f"and the source uses {name}_{what}"
                )

    def _translated(self, where: str, translate: Callable[[str], str], text: str) -> str:
        try:
            return translate(text)
        except TranslationError as error:
            raise TranslationError(f"kernel {self.definition.name!r}, {where}, {error}") from error
