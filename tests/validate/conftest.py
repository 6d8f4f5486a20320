"""Tiny checkpoints, and kernels that are wrong without the probe noticing."""

from __future__ import annotations

import pytest
from zoo.disk import make_checkpoint

from zmlx.kernels import spec
from zmlx.patch import pattern


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Return the folder of a tiny 4-bit dense model with float32 scales."""
    return make_checkpoint(
        tmp_path_factory.mktemp("tiny"), "llama", quantize={"bits": 4, "group_size": 32}
    )


@pytest.fixture
def sabotage(monkeypatch):
    """Return a function that changes what every kernel returns, behind the probe's back."""

    def apply(change):
        implementation = spec.KernelSpec.implementation

        def wrong(self, backend):
            kernel = implementation(self, backend)
            if self.name == "program":  # runs the others' kernels; its results are not returned
                return kernel
            return lambda *args, **kwargs: change(kernel(*args, **kwargs))

        monkeypatch.setattr(spec.KernelSpec, "implementation", wrong)
        monkeypatch.setattr(spec.KernelSpec, "probe", lambda self, backend, **_: None)
        # Generated classes hold the kernels that they were made with.
        monkeypatch.setattr(pattern, "_GENERATED", {})

    return apply
