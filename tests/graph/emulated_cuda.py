"""CUDA on a machine without it: the launches of kernels run in the emulator, from their Metal text.

What a launch is given is what it would be given on a GPU: the kernels' CUDA texts are made, but not
compiled.
"""

from __future__ import annotations

import sys
from typing import Any

import mlx.core as mx
import pytest

from zmlx.backend import cuda, emulator
from zmlx.backend.cuda import addresses
from zmlx.backend.launch import forget

#: A device without tensor cores, for the bodies that were written for those are no Metal.
_ARCHITECTURE = 70


def emulate_cuda(patch: pytest.MonkeyPatch) -> None:
    """Have MLX's default device taken for CUDA, and kernels of definitions run in the emulator."""
    running: list[Any] = []
    compiled = cuda.compiled

    def cuda_kernel(**_: Any) -> Any:
        emulated = emulator.compiled(running[-1])
        count = len(running[-1].input_names)

        def run(*, inputs: Any, **launch: Any) -> Any:
            return emulated(inputs=list(inputs)[:count], **launch)

        return run

    def compiled_for_cuda(definition: Any) -> Any:
        running.append(definition)
        launch = compiled(definition)
        running.pop()

        def launched(**arguments: Any) -> Any:
            running.append(definition)
            try:
                return launch(**arguments)
            finally:
                running.pop()

        return launched

    patch.setattr(mx.fast, "cuda_kernel", cuda_kernel, raising=False)
    patch.setattr(cuda, "compiled", compiled_for_cuda)
    # A table of addresses is nothing that the emulator could follow.
    patch.setattr(addresses, "_addresses", lambda arrays: [0] * len(arrays))
    patch.setattr(addresses, "_watched", lambda _: lambda: False)
    patch.setattr(addresses.Addresses, "knows", lambda *_: False)
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] != "zmlx":
            continue
        if hasattr(module, "for_kernels"):
            patch.setattr(module, "for_kernels", lambda **_: "cuda")
        if callable(getattr(module, "architecture", None)):
            patch.setattr(module, "architecture", lambda: _ARCHITECTURE)
        if callable(getattr(module, "has_tensor_cores", None)):
            patch.setattr(module, "has_tensor_cores", lambda: False)
    forget()
