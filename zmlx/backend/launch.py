"""From a `Definition` to something that can be called, on the backend that runs here."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import cast

from zmlx.backend.definition import Definition, Launch

#: backend -> module with `compiled(definition) -> Launch`, imported when it is first needed
_BACKENDS = {
    "metal": "zmlx.backend.metal",
    "cuda": "zmlx.backend.cuda",
    "emulator": "zmlx.backend.emulator",
}


@cache
def launcher(definition: Definition, backend: str) -> Launch:
    """Return the compiled kernel of a backend; equal definitions share one.

    Raises:
        ValueError: the backend runs no sources, or the definition is not one it takes.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"backend {backend!r} runs no Metal source; one of {', '.join(_BACKENDS)}")
    return cast(Launch, import_module(_BACKENDS[backend]).compiled(definition))
