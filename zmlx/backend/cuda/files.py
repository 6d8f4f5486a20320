"""Long texts of kernels as files that are included: MLX hashes a kernel's text at every evaluation.

Two kilobytes of text cost about a microsecond a launch; an include costs what its path is long. The
files lie in ZMLX_CACHE_DIR, named by what they hold.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from pathlib import Path

from zmlx.backend.cuda.source import CudaSource
from zmlx_autopatch import variables

#: Texts of fewer characters stay where they are.
LONG = 1000
#: MLX looks for these in a body, to know what it has to pass.
_PASSED = re.compile(r"\w_(shape|strides|ndim)\b")


def in_files(source: CudaSource) -> CudaSource:
    """Return a source with includes in place of a long header and a long body.

    Where no file can be written, it stays as it is.
    """
    folder = Path(variables.text("ZMLX_CACHE_DIR") or "~/.cache/zmlx").expanduser() / "cuda"
    header, body = source.header, source.body
    with contextlib.suppress(OSError):  # the text itself does as well
        if len(header) > LONG:
            header = _included(folder, header)
        if len(body) > LONG and not _PASSED.search(body):
            body = _included(folder, body)
    return CudaSource(header, body, source.input_names)


def _included(folder: Path, text: str) -> str:
    file = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.cuh"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Written under another name first: processes may do the same at the same time.
        handle, name = tempfile.mkstemp(dir=folder)
        with os.fdopen(handle, "w") as target:
            target.write(text + "\n")
        os.replace(name, file)
    return f'#include "{file}"\n'
