"""Patch as on a GPU: on one if it is there, else with kernels that run in the emulator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import mlx.core as mx

from zmlx import backend
from zmlx.kernels import calling, spec
from zmlx.patch import pattern
from zmlx.runtime import model as runtime

#: What there is no device for runs in the emulator; a device that is here runs its own kernels.
BACKENDS = ("metal", "cuda") if backend.current() == "cpu" else (backend.current(),)


@contextmanager
def on_gpu(name: str = BACKENDS[-1]) -> Iterator[dict[str, int]]:
    """Let `patch` decide as on a backend, with caches of its own; yield kernel -> its calls."""
    calls: dict[str, int] = {}
    implementation = spec.KernelSpec.implementation

    def counted(self: spec.KernelSpec, where: str) -> Any:
        kernel = implementation(self, "emulator" if mx.default_device() == mx.cpu else where)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[self.name] = calls.get(self.name, 0) + 1
            return kernel(*args, **kwargs)

        return call

    chosen = "emulator" if mx.default_device() == mx.cpu else "auto"
    spec._probe.cache_clear()
    calling.forget()
    with (
        mock.patch.dict("os.environ", ZMLX_BACKEND=chosen),
        mock.patch.object(runtime.backend, "current", return_value=name),
        mock.patch.object(spec.KernelSpec, "implementation", counted),
        mock.patch.object(pattern, "_GENERATED", {}),
    ):
        yield calls
    spec._probe.cache_clear()
    calling.forget()
