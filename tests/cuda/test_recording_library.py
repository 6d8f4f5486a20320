"""The native part of recordings compiles with the headers that NVIDIA's and MLX's wheels have."""

from __future__ import annotations

import threading
import time
import weakref
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from cuda_headers import cannot_compile, cuda_include
from nvrtc_program import compile_program, is_missing
from nvrtc_program import library as nvrtc_library

from zmlx.backend.cuda import library, recording
from zmlx.backend.cuda.ahead import lean_for
from zmlx.backend.cuda.nvrtc import Compiler
from zmlx.backend.extension import NativeUnavailable, find_compiler, mlx_include


@pytest.mark.skipif(
    cannot_compile(), reason="no nvidia-cuda-runtime (in the extra dev), or no compiler"
)
def test_it_compiles(tmp_path):
    include = cuda_include()
    assert include is not None
    built = library.build(tmp_path, find_compiler(), [mlx_include(), include])
    assert [built] == list(tmp_path.iterdir())
    data = built.read_bytes()
    # Found by name while it runs: no library of CUDA's has to be there to load it.
    assert b"cuGraphAddKernelNode_v2" in data
    assert b"cuGraphAddDependencies_v2" in data
    assert b"libcudart" not in data


def test_what_does_not_compile_is_told(tmp_path):
    with pytest.raises(NativeUnavailable, match=r"compiling .* failed"):
        library.build(tmp_path, find_compiler(), [])


def test_without_the_compiler_of_MLX_there_is_none():
    """It is what compiles kernels, too."""
    library._loaded.cache_clear()
    with pytest.raises(NativeUnavailable):
        library.load()


@pytest.fixture
def slow(monkeypatch):
    """A build that takes until `end` is set; `started` has the names of the threads that did."""
    state = SimpleNamespace(started=[], end=threading.Event(), result=ModuleType("library"))

    def build():
        state.started.append(threading.current_thread().name)
        assert state.end.wait(30)
        if isinstance(state.result, Exception):
            raise state.result
        return state.result

    monkeypatch.setattr(library, "_load", build)
    monkeypatch.setattr(library.mx.cuda, "is_available", lambda: True)
    library._loaded.cache_clear()
    yield state
    state.end.set()
    library._loaded.cache_clear()


def ended():
    for thread in threading.enumerate():
        if thread.name == "zmlx-library":
            thread.join(30)


def test_it_is_built_once_while_other_things_are_done(slow):
    library.begin()
    while not slow.started:
        time.sleep(0.01)
    assert library.is_being_built()
    threading.Timer(0.1, slow.end.set).start()
    assert library.load() is slow.result  # waits
    ended()
    assert not library.is_being_built()
    assert library.load() is slow.result
    assert slow.started == ["zmlx-library"]


def test_a_build_that_fails_is_not_tried_again(slow, capfd):
    slow.result = NativeUnavailable("no compiler")
    slow.end.set()
    library.begin()
    ended()
    for _ in range(2):
        with pytest.raises(NativeUnavailable, match="no compiler"):
            library.load()
    assert slow.started == ["zmlx-library"]
    assert capfd.readouterr() == ("", "")


def test_who_asks_in_vain_is_not_kept(slow, monkeypatch):
    class Model:
        pass

    def missing():
        raise NativeUnavailable("no compiler")

    def ask():
        model = Model()
        library.wait()
        return weakref.ref(model)

    monkeypatch.setattr(library, "_load", missing)
    asked = [ask() for _ in range(2)]
    assert [model() for model in asked] == [None, None]


def test_whatever_else_goes_wrong_is_told_who_asks(slow, capfd):
    slow.result = PermissionError("not yours")
    slow.end.set()
    library.begin()
    ended()
    with pytest.raises(PermissionError, match="not yours"):
        library.load()
    library.wait()
    assert capfd.readouterr() == ("", "")


def test_without_cuda_nothing_is_built(slow, monkeypatch):
    monkeypatch.setattr(library.mx.cuda, "is_available", lambda: False)
    library.begin()
    ended()
    assert slow.started == []


@pytest.mark.skipif(is_missing(), reason="no nvidia-cuda-nvrtc (in the extra dev)")
def test_the_kernel_that_copies_compiles():
    assert compile_program(recording.mover_text(128)) is None


def test_the_most_that_are_copied_is_the_same_in_both_languages():
    text = (library.SOURCE / "recording.h").read_text()
    assert "kMostMoves = 128;" in text
    assert "from[128]" in recording.mover_text(128)


@pytest.mark.skipif(is_missing(), reason="no nvidia-cuda-nvrtc (in the extra dev)")
def test_the_kernel_that_copies_is_compiled_as_others_are():
    nvrtc, _ = nvrtc_library()
    compiler = Compiler(nvrtc, ())
    options = lean_for(compiler, 90, Path()).options
    binary, name = recording.mover(compiler, options, 128)
    assert (binary[:4], name) == (b"\x7fELF", "zmlx_move")
