"""From a `Definition` to something that can be called, on the backend that runs here."""

from __future__ import annotations

from importlib import import_module

from zmlx.backend.definition import Definition, Launch

#: backend -> module with `compiled(definition) -> Launch`, imported when it is first needed
_BACKENDS = {
    "metal": "zmlx.backend.metal",
    "cuda": "zmlx.backend.cuda",
    "emulator": "zmlx.backend.emulator",
}

#: (definition, backend) -> its compiled kernel
_COMPILED: dict[tuple[Definition, str], Launch] = {}


def launcher(definition: Definition, backend: str) -> Launch:
    """Return the compiled kernel of a backend; equal definitions share one.

    Raises:
        ValueError: the backend runs no sources, or the definition is not one it takes.
    """
    key = (definition, backend)
    found = _COMPILED.get(key)
    if found is None:
        if backend not in _BACKENDS:
            raise ValueError(
                f"backend {backend!r} runs no Metal source; one of {', '.join(_BACKENDS)}"
            )
        # Of threads that compile the same one at once, the first decides which is kept.
        found = _COMPILED.setdefault(key, import_module(_BACKENDS[backend]).compiled(definition))
    return found


def compiled_kernels() -> list[tuple[Definition, str]]:
    """Return the definitions that were compiled in this process, each with its backend."""
    return list(_COMPILED)


def forget() -> None:
    """Drop every compiled kernel; whoever holds one keeps it, later ones are compiled anew."""
    _COMPILED.clear()
