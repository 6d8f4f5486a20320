"""Every backend that runs here: references, the emulator, and a GPU where there is one."""

from __future__ import annotations

import pytest

import zmlx.backend

HERE = zmlx.backend.current()
BACKENDS = ["reference", "emulator", *([] if HERE == "cpu" else [HERE])]
SOURCES = [backend for backend in BACKENDS if backend != "reference"]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Run the test once on each backend."""
    monkeypatch.setenv("ZMLX_BACKEND", request.param)
    return request.param


@pytest.fixture(params=SOURCES)
def device(request, monkeypatch):
    """Run the test once on each backend that runs sources."""
    monkeypatch.setenv("ZMLX_BACKEND", request.param)
    return request.param
