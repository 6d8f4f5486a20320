"""Where tests of jit run: everywhere that is possible here."""

from __future__ import annotations

import os
from importlib.util import find_spec
from unittest import mock

import mlx.core as mx

from zmlx.backend import current

#: Values of ZMLX_BACKEND: the device of this machine, the reference, the emulator.
BACKENDS = ["reference"]
if current() != "cpu":
    BACKENDS.append("auto")
elif find_spec("zmlx.backend.emulator") is not None:
    BACKENDS.append("emulator")


def referenced(function):
    """Return a function that computes the same with references, whatever the backend in force."""

    def call(*arguments):
        with mock.patch.dict(os.environ, ZMLX_BACKEND="reference"):
            result = function(*arguments)
            mx.eval(result)
        return result

    return call


def anchored(values, function, *arguments):
    """See that what kernels gave, alone or several, is what references give."""
    truths = referenced(function)(*arguments)
    several = (
        [(values, truths)] if isinstance(values, mx.array) else zip(values, truths, strict=True)
    )
    for value, truth in several:
        assert mx.allclose(value, truth, rtol=1e-4, atol=1e-5, equal_nan=True).item()
