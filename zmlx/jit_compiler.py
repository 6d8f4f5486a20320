"""`jit`: a scalar Python function becomes an elementwise kernel (zmlx.authoring.jit)."""

from zmlx.authoring.jit import JitError, JitFunction, jit

__all__ = ["JitError", "JitFunction", "jit"]
