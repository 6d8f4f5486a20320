"""Scalar Python functions as elementwise kernels.

Python's syntax tree (`source`, `definition`, `names`) is checked (`flow`) and lowered (`lower`,
`expressions`) to a typed form (`ir`), which is differentiated (`derive`), printed as Metal
(`metal`), evaluated with MLX operations (`evaluate`) and run (`kernel`, `function`).
"""

from zmlx.authoring.jit.function import JitFunction, jit
from zmlx.authoring.jit.source import JitError

__all__ = ["JitError", "JitFunction", "jit"]
