"""Compiled kernels are kept on disk, whole or not at all, for every process."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import pytest
from emulator.bodies import I, run, values

from zmlx.backend.emulator import toolchain

SCRIPT = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import mlx.core as mx
from emulator.bodies import run
print(run("{I} y[i] = x[i] * 3;", mx.arange(5)).tolist())
"""
TEXT = 'extern "C" __attribute__((visibility("default"))) void zmlx_entry() {}\n'


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Give these tests a folder of their own, with the native library that is there."""
    folder = tmp_path_factory.mktemp("cache")
    toolchain.native.load()
    (folder / "native").symlink_to(toolchain.native.cache_folder())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZMLX_CACHE_DIR", str(folder))
        yield


def kernels():
    return sorted(toolchain.toolchain().folder.glob("*/*.so"))


def test_a_kernel_is_compiled_once(monkeypatch):
    source = f"{I} y[i] = x[i] + {os.getpid()};"
    before = len(kernels())
    run(source, mx.arange(3), name="kept")
    assert len(kernels()) == before + 1
    monkeypatch.setattr(toolchain, "_compile_kernel", lambda *_: pytest.fail("compiled again"))
    assert values(run(source, mx.arange(3), name="kept", ensure_row_contiguous=False)) == [
        n + os.getpid() for n in range(3)
    ]


def test_processes_that_compile_the_same_at_once(tmp_path):
    """They start with nothing but the native library: each makes the prelude or waits for it."""
    native = toolchain.native.cache_folder()
    (tmp_path / "native").symlink_to(native.resolve())
    environment = {**os.environ, "ZMLX_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [process.communicate()[0] for process in running]
    assert outputs == ["[0, 3, 6, 9, 12]\n"] * 3
    [folder] = (tmp_path / "emulator").iterdir()
    assert len(list(folder.glob("*/*.so"))) == 1
    assert not list(folder.glob("*/.*"))


def test_threads_that_compile_the_same_text_at_once():
    text = f"{TEXT}// {os.urandom(8).hex()}\n"
    with ThreadPoolExecutor(4) as pool:
        files = set(pool.map(lambda _: toolchain.compiled(text), range(4)))
    assert len(files) == 1
    assert files.pop().is_file()


def test_a_compilation_that_fails_leaves_nothing():
    before = set(toolchain.toolchain().folder.rglob("*"))
    with pytest.raises(ValueError, match="does not compile"):
        toolchain.compiled("no kernel")
    left = set(toolchain.toolchain().folder.rglob("*")) - before
    assert all(path.is_dir() for path in left)


def test_clang_gives_way_to_gcc(monkeypatch):
    versions = {"clang++": "Debian clang version 14.0.6", "/bin/g++": "g++ (Debian 12.2.0) 12.2.0"}
    monkeypatch.setattr(toolchain.build, "find_compiler", lambda: "clang++")
    monkeypatch.setattr(toolchain.build, "compiler_version", lambda compiler: versions[compiler])
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: f"/bin/{name}")
    assert toolchain._find_gcc() == ("/bin/g++", versions["/bin/g++"])
    monkeypatch.setattr(toolchain.shutil, "which", lambda _: None)
    with pytest.raises(toolchain.build.NativeUnavailable, match=r"needs g\+\+ 12 or newer"):
        toolchain._find_gcc()


def test_half_where_the_compiler_has_no_type_for_it(tmp_path):
    """It is a class there; the whole prelude compiles with it too."""
    source = (
        "#include <zmlx/prelude.h>\nhalf f(half a) { return a > 0 ? a * 2 + 1 : half(0.5f); }\n"
    )
    tools = toolchain.toolchain()
    command = [*tools.compiler, *tools.flags, "-U__GNUC__", "-D__GNUC__=11", "-fsyntax-only"]
    done = subprocess.run(
        [*command, "-x", "c++", "-"], input=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[:2000]
