"""Kernels compiled ahead of MLX, in a tenth of the time, and kept on disk.

MLX compiles a custom kernel at its first evaluation in each process; more than nine tenths of that
time go into headers of which the kernel uses next to nothing. So at the first call of a kernel with
new types it is compiled with only what it uses of them, and put where MLX looks before it compiles.
What does not go that way, for whatever reason, MLX compiles as ever, with its own messages.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Hashable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from zmlx.backend.capability import architecture
from zmlx.backend.cuda import nvrtc
from zmlx.backend.cuda.files import write_whole
from zmlx.backend.cuda.headers import headers
from zmlx.backend.cuda.jit_module import (
    ASKED,
    KNOWN,
    VERSION,
    KernelText,
    Module,
    cache_folder,
    file_in,
    module_of,
)
from zmlx.backend.cuda.side_by_side import run
from zmlx.backend.cuda.source import OVERLAPPED, PRELUDE, WAIT, CudaSource
from zmlx.backend.definition import Template
from zmlx_autopatch import speech

#: Forms that a kernel remembers; more than that start over.
_REMEMBERED = 4096
_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]*)"(.*)$', re.MULTILINE)
#: A comment that holds a hash of what the line includes.
_DIGEST = re.compile(r"//\s*[0-9a-f]{8,64}\s*$")


class Lean(NamedTuple):
    """How kernels are compiled here.

    Attributes:
        compiler: what compiles them.
        options: what it is told.
        folder: where MLX looks for them.
        digest: changes with whatever else a binary depends on but its kernel's text.
    """

    compiler: nvrtc.Compiler
    options: tuple[str, ...]
    folder: Path
    digest: str


class Kernel:
    """A kernel for `mx.fast.cuda_kernel`, which waits for those before it where they overlap.

    Args:
        name: the kernel's.
        input_names: its inputs'.
        output_names: its outputs'.
        source: its text.
        ensure_row_contiguous: as MLX takes it.
        whole: the text before parts of it went into files, by default the same.
        told: declarations that go before it; they may read constants.
        early: inputs that it reads before it waits, which it does itself then.
        cluster: blocks that are a cluster, as its text says.

    Attributes:
        name, input_names, ensure_row_contiguous, early, cluster: the same.
        source: its body, with all that goes before it.
        run: what MLX made of it. A call whose `output_dtypes` or `template` is not what it was at
            the call before, which is here, has to be noticed first.

    Raises:
        RuntimeError: this MLX has no CUDA.
    """

    __slots__ = (
        "_forms",
        "_text",
        "cluster",
        "early",
        "ensure_row_contiguous",
        "input_names",
        "name",
        "output_dtypes",
        "run",
        "source",
        "template",
    )

    def __init__(
        self,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: CudaSource,
        *,
        ensure_row_contiguous: bool,
        whole: CudaSource | None = None,
        told: str = "",
        early: Sequence[str] = (),
        cluster: int = 1,
    ) -> None:
        self.name, self.input_names, self.early = name, tuple(input_names), tuple(early)
        self.cluster = cluster
        self.source = told + ("" if early else f"{WAIT}\n") + source.body
        self.ensure_row_contiguous = ensure_row_contiguous
        found = lean()
        header = f'#include "{OVERLAPPED}"\n{source.header}'
        if found is not None:
            header = f"// {found.digest}\n{header}"
        self.run: Any = mx.fast.cuda_kernel(
            name=name,
            input_names=list(input_names),
            output_names=list(output_names),
            source=self.source,
            header=header,
            ensure_row_contiguous=ensure_row_contiguous,
        )
        self.output_dtypes: Sequence[mx.Dtype] | None = None
        self.template: Template | None = None
        self._forms: set[Hashable] = set()
        self._text: KernelText | None = None
        if found is not None and is_settled(whole or source):
            names = tuple(input_names), tuple(output_names)
            self._text = KernelText(name, *names, self.source, header)

    def notice(
        self, inputs: Sequence[Any], output_dtypes: Sequence[mx.Dtype], template: Template | None
    ) -> None:
        """Have what a call needs compiled before MLX needs it, if it comes for the first time.

        Calls are told apart by what commonly differs; what differs otherwise MLX compiles.
        """
        first = getattr(inputs[0], "dtype", None) if inputs else None
        form = (tuple(map(tuple, template or ())), tuple(output_dtypes), first)
        if form not in self._forms:
            if len(self._forms) >= _REMEMBERED:
                self._forms.clear()
            self._forms.add(form)
            self._prepare(inputs, output_dtypes, template or ())
        self.output_dtypes, self.template = output_dtypes, template

    def _prepare(
        self, inputs: Sequence[Any], output_dtypes: Sequence[mx.Dtype], template: Template
    ) -> None:
        found = lean()
        if found is None or self._text is None:
            return
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        given = [(array.dtype, array.ndim) for array in arrays]
        run(partial(_kept_or_left, self._text, given, output_dtypes, template, found))

    def binary(
        self,
        inputs: Sequence[tuple[mx.Dtype, int]],
        output_dtypes: Sequence[mx.Dtype],
        template: Template | None,
    ) -> tuple[bytes, str]:
        """Return what is compiled for a call, and the kernel's name in it.

        Args:
            inputs: dtype and number of dimensions of each.
            output_dtypes: as of the call.
            template: as of the call.

        Raises:
            nvrtc.CompileError: it cannot be compiled ahead, or does not compile.
            OSError: it cannot be kept.
        """
        found = lean()
        if found is None or self._text is None:
            raise nvrtc.CompileError(f"kernel {self.name} is left to MLX")
        module = module_of(self._text, inputs, output_dtypes, template or ())
        file = keep(module, found)
        if file is None:
            raise nvrtc.CompileError(f"there is no folder for kernel {self.name}")
        names = file.with_suffix(".txt").read_text().splitlines()
        lowered = dict(line.split("\t") for line in names)[module.kernel]
        return file.read_bytes(), lowered

    def asked(self, name: str) -> tuple[str, ...]:
        """Return what the kernel is given along with an input: of "shape", "strides", "ndim"."""
        return tuple(what for what in ASKED if f"{name}_{what}" in self.source)


def _kept_or_left(
    text: KernelText,
    inputs: Sequence[tuple[mx.Dtype, int]],
    output_dtypes: Sequence[mx.Dtype],
    template: Template,
    lean: Lean,
) -> None:
    """Compile what a call needs, or say that MLX will."""
    try:
        keep(module_of(text, inputs, output_dtypes, template), lean)
    except (nvrtc.CompileError, OSError, TypeError, ValueError) as failure:
        if speech.level() == "debug":
            speech.say(f"zmlx: kernel {text.name} is left to MLX: {failure}")


def is_settled(source: CudaSource) -> bool:
    """Return whether a text says all that is compiled; of a file it may have no more than a name.

    What is included by a path must be this package's, or have a hash of its contents beside it.
    """
    return all(
        path == str(PRELUDE) or _DIGEST.search(rest)
        for text in (source.header, source.body)
        for path, rest in _INCLUDE.findall(text)
    )


def keep(module: Module, lean: Lean) -> Path | None:
    """Compile a module and put it where MLX looks, unless there is one.

    Returns:
        Its file; None where none can be.

    Raises:
        nvrtc.CompileError: it does not compile.
        OSError: it cannot be written.
    """
    file = file_in(lean.folder, module.name)
    names = file.with_suffix(".txt")
    if file.is_file() and names.is_file():  # MLX cannot do with one of them
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(file.parent, os.W_OK):
        return None
    binary, lowered = lean.compiler.binary(
        module.text,
        module.kernel,
        file=f"{module.name}.cu",
        headers=headers(),
        options=lean.options,
    )
    # MLX reads the names when it has found the binary.
    write_whole(names, f"{module.kernel}\t{lowered}\n".encode())
    write_whole(file, binary)
    return file


@cache
def lean() -> Lean | None:
    """Return how kernels are compiled in this process; None where that is left to MLX."""
    if not mx.cuda.is_available() or VERSION not in KNOWN:
        return None
    compiler, folder = nvrtc.loaded(), cache_folder()
    if compiler is None or folder is None:
        return None
    return lean_for(compiler, architecture(), folder)


def lean_for(compiler: nvrtc.Compiler, capability: int, folder: Path) -> Lean:
    """Return how kernels are compiled for an architecture (compute capability times ten)."""
    accelerated = "a" if capability >= 90 else ""
    options = (
        "--device-as-default-execution-space",
        f"--gpu-architecture=sm_{capability}{accelerated}",
    )
    return Lean(compiler, options, folder, _digest(*options, VERSION, *compiler.version))


def _digest(*facts: object) -> str:
    """Return a hash of facts, of the headers here, and of those that kernels include."""
    digest = hashlib.sha256(repr((facts, headers())).encode())
    for file in sorted(PRELUDE.parent.glob("*.cuh")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
