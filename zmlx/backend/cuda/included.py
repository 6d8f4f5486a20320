"""Long texts of kernels, put into files that are included.

MLX hashes a kernel's text at every evaluation, half a microsecond for each kilobyte. Of a file that
is included only the name is in the text, and the name holds a hash of the contents.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from zmlx.backend.cpu import native
from zmlx.backend.cuda.files import write_whole
from zmlx.backend.cuda.source import PRELUDE, CudaSource

#: Characters from which a text goes into a file.
LONG = 1000
#: What MLX looks for in a body, to pass it along with an input.
_PARTS = ("shape", "strides", "ndim")


def shortened(source: CudaSource, name: str) -> CudaSource:
    """Return a kernel's text with its long parts in files; as it is where no file can be written.

    Args:
        source: the text.
        name: of the kernel, for the files' names.
    """
    try:
        return CudaSource(_header(source.header, name), _body(source, name), source.input_names)
    except OSError:  # a cache that nobody may write to costs time, nothing else
        return source


def _header(header: str, name: str) -> str:
    prelude = f'#include "{PRELUDE}"\n'
    if len(header) < LONG:
        return header
    rest = header.removeprefix(prelude)
    return f'{prelude if rest != header else ""}#include "{_file(rest, name)}"\n'


def _body(source: CudaSource, name: str) -> str:
    if len(source.body) < LONG:
        return source.body
    passed = [
        f"{array}_{part}"
        for array in source.input_names
        for part in _PARTS
        if f"{array}_{part}" in source.body
    ]
    return f'// {" ".join(passed)}\n#include "{_file(source.body, name)}"\n'


def _file(text: str, name: str) -> Path:
    """Return a file that holds a text, written if it is not there."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    file = native.cache_folder().parent.absolute() / "cuda" / f"{name}-{digest}.cuh"
    if not file.is_file():
        write_whole(file, f"{text}\n".encode())
    return file
