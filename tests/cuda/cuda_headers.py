"""CUDA's headers, from NVIDIA's wheel."""

from __future__ import annotations

import shutil
from importlib import metadata
from pathlib import Path

from nvrtc_program import EXPECTED


def cuda_include() -> Path | None:
    """Return the folder of CUDA's headers, or None where the wheel is not installed."""
    try:
        files = metadata.files("nvidia-cuda-runtime") or []
    except metadata.PackageNotFoundError:
        return None
    found = (file for file in files if file.as_posix().endswith("include/cuda.h"))
    return next((Path(str(file.locate())).parent for file in found), None)


def cannot_compile() -> bool:
    """Whether tests that compile host code are to be skipped; in CI they fail instead."""
    return (cuda_include() is None or shutil.which("c++") is None) and not EXPECTED
