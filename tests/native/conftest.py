"""The native library, with each set of kernels that this processor has."""

from __future__ import annotations

import exact
import pytest

from zmlx.backend.cpu import native


@pytest.fixture(scope="module")
def library():
    return native.load()


@pytest.fixture(params=exact.kernel_sets())
def kernels(request, library):
    """Run a test with each set of kernels that this processor has."""
    before = library.kernels()
    library.set_kernels(request.param)
    yield library
    library.set_kernels(before)
