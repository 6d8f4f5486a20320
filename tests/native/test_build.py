"""Finding, building and loading the native library, and every way in which that can fail.

The compilers here are scripts: one leaves an empty object for each source and "links" by copying
the real library, so that a build takes a second and its steps can be counted.
"""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from click.testing import CliRunner

from zmlx.backend.cpu import build, native, selftest
from zmlx.backend.cpu.command import native as command

ROOT = Path(__file__).parents[2]
CHILD = """
import sys
from zmlx.backend.cpu import native
try:
    print(native.load().kernels())
except native.NativeUnavailable as refusal:
    sys.exit(f"refused: {refusal}")
"""


@pytest.fixture(scope="module")
def real() -> Path:
    """Return the real library, built with the real compiler."""
    return Path(str(native.load().__file__))


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Let `load` start anew, with an empty cache folder and no package library."""
    monkeypatch.setattr(native, "_LOADED", native._Loaded())
    monkeypatch.setattr(native, "BUNDLED", tmp_path / "bundled")
    monkeypatch.setenv("ZMLX_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "native"


def script(path: Path, body: str) -> Path:
    version = '[ "${@: -1}" = --version ] && echo "fake 1.0" && exit'
    path.write_text(f"#!/bin/bash\n{version}\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def copier(real, monkeypatch, tmp_path):
    """Use a compiler that links by copying the real library; return its log of outputs."""
    log = tmp_path / "compiled"
    body = f"""
out="${{@: -1}}"
echo "$(basename "$out")" >> {log}
for argument; do [ "$argument" = -shared ] && exec cp {real} "$out"; done
touch "$out"
"""
    monkeypatch.setenv("ZMLX_CXX", str(script(tmp_path / "copier", body)))
    return log


def announced():
    lines: list[str] = []
    return lines, lines.append


def test_every_source_is_compiled_somewhere():
    units = build._units("x86_64").keys() | build._units("aarch64").keys()
    assert units <= {file.name for file in build.SOURCE.glob("*.cpp")}
    together = [
        name
        for unit in units
        for name in re.findall(r'#include "(.*\.cpp)"', (build.SOURCE / unit).read_text())
    ]
    assert len(together) == len(set(together))
    assert units | set(together) == {file.name for file in build.SOURCE.glob("*.cpp")}
    assert not units & set(together)


def test_a_build_is_announced_once_and_found_again(fresh, copier, monkeypatch):
    lines, announce = announced()
    module = native.load(announce=announce)
    assert re.fullmatch(r"zmlx: compiling the CPU kernels, once \(about \d+ s\), with .*", lines[0])
    assert len(lines) == 1
    assert native.load() is module
    compiled = copier.read_text().split()
    assert len(compiled) == len(set(compiled)) == len(build._units()) + 2

    monkeypatch.setattr(native, "_LOADED", native._Loaded())
    again = native.load(announce=announce)
    assert again.__file__ == module.__file__
    assert len(lines) == 1
    assert copier.read_text().split() == compiled
    assert sorted(path.name for path in Path(again.__file__).parent.iterdir()) == [
        Path(again.__file__).name,
        build.MANIFEST,
    ]
    y = again.quantized_matmul(
        mx.ones((1, 64)), *mx.quantize(mx.ones((4, 64)), 64, 4), group_size=64, bits=4
    )
    assert mx.allclose(y, mx.full((1, 4), 64.0)).item()


def test_the_key_holds_the_compiler_and_the_sources(fresh, copier, monkeypatch, tmp_path):
    first = native.find().library.parent.name
    monkeypatch.setenv("ZMLX_CXX", str(script(tmp_path / "other", "")))
    second = native.find().library.parent.name
    assert first.split("-")[0] == second.split("-")[0]
    assert first != second
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "one.cpp").write_text("int one;")
    monkeypatch.setattr(build, "SOURCE", tmp_path / "source")
    assert native.find().library.parent.name.split("-")[0] != first.split("-")[0]


def test_no_compiler_is_a_refusal_that_is_remembered(fresh, monkeypatch, tmp_path):
    monkeypatch.delenv("ZMLX_CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        native.NativeUnavailable, match=r"no C\+\+ compiler found; install"
    ) as first:
        native.load()
    with pytest.raises(native.NativeUnavailable) as second:
        native.load()
    assert first.value is second.value


def test_a_compiler_that_is_not_there(fresh, monkeypatch):
    monkeypatch.setenv("ZMLX_CXX", "gxx-99 -pipe")
    with pytest.raises(native.NativeUnavailable, match="no program gxx-99 on PATH"):
        native.load()


def test_a_compiler_with_arguments(fresh, copier, monkeypatch):
    monkeypatch.setenv("ZMLX_CXX", f"{os.environ['ZMLX_CXX']} -pipe")
    assert native.find().version == "fake 1.0"
    assert native.load(announce=announced()[1]).kernels()


def test_a_library_is_used_without_the_compiler_that_made_it(fresh, copier, monkeypatch, tmp_path):
    library = native.load(announce=announced()[1]).__file__
    monkeypatch.setattr(native, "_LOADED", native._Loaded())
    monkeypatch.delenv("ZMLX_CXX")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert native.load().__file__ == library


def test_a_compile_error_is_told_and_leaves_nothing(fresh, monkeypatch, tmp_path):
    body = "echo 'In file included' >&2; echo 'mlx/array.h:3:1: error: boom' >&2; exit 1"
    monkeypatch.setenv("ZMLX_CXX", str(script(tmp_path / "broken", body)))
    with pytest.raises(native.NativeUnavailable) as refusal:
        native.load(announce=announced()[1])
    text = str(refusal.value)
    assert re.search(r"compiling \w+\.cpp failed: mlx/array\.h:3:1: error: boom", text)
    log = Path(re.search(r"\(log: (.*)\)", text).group(1))
    assert "In file included" in log.read_text()
    log.unlink()
    assert [path.suffix for path in fresh.iterdir()] == [".lock"]


def test_a_slow_failure_is_not_repeated_until_asked_for(fresh, monkeypatch, tmp_path):
    count = tmp_path / "count"
    body = f"echo again >> {count}; echo 'error: boom' >&2; exit 1"
    monkeypatch.setenv("ZMLX_CXX", str(script(tmp_path / "broken", body)))
    monkeypatch.setattr(native, "_WORTH_REMEMBERING", 0.0)
    with pytest.raises(native.NativeUnavailable, match="error: boom"):
        native.load(announce=announced()[1])
    before = count.read_text()
    monkeypatch.setattr(native, "_LOADED", native._Loaded())
    lines, announce = announced()
    with pytest.raises(native.NativeUnavailable, match=r"error: boom.*`zmlx native build` tries"):
        native.load(announce=announce)
    assert (count.read_text(), lines) == (before, [])

    monkeypatch.setattr(native, "_LOADED", native._Loaded())
    result = CliRunner().invoke(command, ["build"])
    assert result.exit_code == 1
    assert "error: boom" in result.stderr
    assert len(count.read_text()) > len(before)


def test_another_binary_interface_is_refused(fresh, copier, monkeypatch):
    def tag(library: Path) -> str:
        return "nanobind_other_v1" if library.name.startswith("core") else "nanobind_ours_v2"

    monkeypatch.setattr(build, "abi_tag", tag)
    with pytest.raises(native.NativeUnavailable, match="interface nanobind_ours_v2, the installed"):
        native.load(announce=announced()[1])
    assert not list(fresh.glob(f"*/{build.MODULE}*"))


def test_the_interfaces_of_mlx_and_of_ours_are_read(real):
    assert re.fullmatch(r"nanobind_\w+_v\d+", build.abi_tag(real))
    assert build.abi_tag(real) == build.abi_tag(build.mlx_extension())
    assert build.abi_tag(Path(__file__)) == ""


def test_a_library_that_fails_its_self_test_is_refused(fresh, copier, monkeypatch, tmp_path, real):
    tag = build.abi_tag(real)
    body = f"""
out="${{@: -1}}"
echo {tag} > "$out"
"""
    monkeypatch.setenv("ZMLX_CXX", str(script(tmp_path / "liar", body)))
    with pytest.raises(native.NativeUnavailable, match="the self-test failed"):
        native.load(announce=announced()[1])
    assert not list(fresh.glob(f"*/{build.MODULE}*"))


def test_the_self_test_sees_every_operation(real):
    library = native.load()
    assert selftest.failures(library) == []
    names = [name for name in dir(library) if "quantized" in name]
    assert len(names) == 10
    for name in names:
        parts = {key: getattr(library, key) for key in dir(library) if not key.startswith("__")}
        good = parts[name]
        parts[name] = lambda *args, _good=good, **kwargs: _good(*args, **kwargs) * 1.05
        found = selftest.failures(SimpleNamespace(**parts))
        assert found
        assert all(line.startswith(f"error: {name}, ") for line in found), name


def test_a_cache_that_cannot_be_written_builds_for_this_run(fresh, copier, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("ZMLX_CACHE_DIR", str(tmp_path / "file"))
    lines, announce = announced()
    module = native.load(announce=announce)
    assert module.kernels()
    assert len(lines) == 1
    assert "cannot write to" in lines[0]
    assert "this run only" in lines[0]
    assert not Path(module.__file__).exists()


@pytest.mark.parametrize("damage", ["shorter", "garbage", "empty", "no manifest"])
def test_a_damaged_library_is_built_again(fresh, copier, damage):
    library = Path(native.load(announce=announced()[1]).__file__)
    whole = library.read_bytes()
    library.unlink()  # this process still has it mapped
    manifest = library.parent / build.MANIFEST
    if damage == "shorter":
        library.write_bytes(whole[: len(whole) // 2])
    elif damage == "empty":
        library.write_bytes(b"")
    elif damage == "no manifest":
        library.write_bytes(whole)
        manifest.unlink()
    else:  # as it should be, by the manifest, yet no library
        library.write_bytes(b"garbage")
        facts = json.loads(manifest.read_text())
        manifest.write_text(json.dumps({**facts, "sha256": build.hash_of(library)}))
    child = start()  # Python would give this process its own library again
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    assert errors.count("compiling the CPU kernels") == 1
    assert library.read_bytes() == whole


def test_a_library_in_the_package_comes_first(fresh, copier, monkeypatch, tmp_path):
    lines, announce = announced()
    result = CliRunner().invoke(command, ["build", "--into", str(native.BUNDLED)])
    assert result.exit_code == 0, result.output
    module = native.load(announce=announce)
    assert Path(module.__file__) == Path(result.stdout.strip())
    assert Path(module.__file__).parent == native.BUNDLED
    assert lines == []


def test_what_is_shipped_is_not_compiled_twice(fresh, copier, tmp_path):
    cached = Path(native.load(announce=announced()[1]).__file__)
    compiled = copier.read_text()
    result = CliRunner().invoke(command, ["build", "--into", str(tmp_path / "ship")])
    assert result.exit_code == 0, result.output
    shipped = Path(result.stdout.strip())
    assert shipped.parent == tmp_path / "ship"
    assert build.fits(shipped)
    assert shipped.read_bytes() == cached.read_bytes()
    assert copier.read_text() == compiled
    cached.unlink()  # this process still has it mapped
    cached.write_bytes(b"damaged")
    assert CliRunner().invoke(command, ["build", "--into", str(shipped.parent)]).exit_code == 0
    assert build.fits(shipped)
    assert sorted(copier.read_text().split()) == sorted(2 * compiled.split())


def ship(real: Path, **changed: str) -> Path:
    """Put a library into the package whose manifest says something else; return the library."""
    native.BUNDLED.mkdir()
    shutil.copy(real, native.BUNDLED)
    facts = json.loads((real.parent / build.MANIFEST).read_text())
    (native.BUNDLED / build.MANIFEST).write_text(json.dumps({**facts, **changed}))
    return native.BUNDLED / real.name


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"mlx": "0.1"}, f"was built for mlx 0.1, and mlx {build.mlx_version()} is installed"),
        ({"interface": "nanobind_other_v1"}, "was built for another build of mlx"),
        ({"sources": "0"}, "was built from other sources"),
        ({"sha256": "0"}, "is damaged"),
        ({"unknown": "0"}, "is not whole"),
    ],
)
def test_a_library_in_the_package_that_does_not_fit(fresh, copier, real, changed, reason):
    ship(real, **changed)
    found = native.find()
    assert found.library.parent != native.BUNDLED
    assert found.bundled.startswith(f"the one in the package {reason}")
    info = json.loads(CliRunner().invoke(command, ["info", "--json"]).stdout)
    assert info["bundled"] == found.bundled
    lines, announce = announced()
    assert native.load(announce=announce).kernels()
    assert lines[0] == f"zmlx: native CPU kernels: {found.bundled}"
    assert lines[1].startswith("zmlx: compiling the CPU kernels, once")


def test_without_a_compiler_both_reasons_are_told(fresh, real, monkeypatch, tmp_path):
    library = ship(real)
    other = library.rename(library.with_name(f"{build.MODULE}.cpython-399-vax.so")).name
    monkeypatch.delenv("ZMLX_CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    reason = rf"in the package is for another Python or processor \({other}; .*; no C\+\+ compiler"
    with pytest.raises(native.NativeUnavailable, match=reason):
        native.load()


def test_a_library_in_the_package_that_does_not_load(fresh, copier, real):
    library = ship(real)
    library.write_bytes(b"garbage")
    manifest = native.BUNDLED / build.MANIFEST
    facts = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**facts, "sha256": build.hash_of(library)}))
    lines, announce = announced()
    assert native.load(announce=announce).kernels()
    assert f"{library} does not load: " in lines[0]
    assert library.read_bytes() == b"garbage"


def test_a_terminal_counts_the_steps(fresh, copier):
    master, slave = pty.openpty()
    child = [sys.executable, "-c", CHILD]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(child, env=environment, stdout=subprocess.PIPE, stderr=slave, text=True)
    os.close(slave)
    shown = os.read(master, 1 << 16).decode()
    os.close(master)
    assert (done.returncode, done.stdout.count("\n")) == (0, 1), shown
    steps = len(build._units()) + 3  # with nanobind, the link and the self-test
    line, _, counted = shown.partition("\r\n")
    assert line.startswith("zmlx: compiling the CPU kernels, once")
    assert counted.split("\r\x1b[K") == [
        "",
        *(f"zmlx: compiling the CPU kernels {done}/{steps}" for done in range(1, steps + 1)),
        "",
    ]


def start(environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", CHILD], env=env, start_new_session=True, **pipes)


def test_two_processes_at_once_build_once(fresh, copier):
    children = [start() for _ in range(2)]
    results = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0, 0], results
    assert results[0][0] == results[1][0]
    compiled = copier.read_text().split()
    assert len(compiled) == len(set(compiled))
    assert sorted("compiling" in err for _, err in results) == [False, True]


def test_a_build_that_was_killed_is_no_hindrance(fresh, copier, monkeypatch, tmp_path):
    slow = script(tmp_path / "slow", f"touch {tmp_path}/started; sleep 60")
    copying = os.environ["ZMLX_CXX"]
    monkeypatch.setenv("ZMLX_CXX", str(slow))
    child = start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    parts = list(fresh.glob("*.part"))
    assert len(parts) == 1
    slow.write_text(Path(copying).read_text())  # the same compiler, now well
    assert native.load(announce=announced()[1]).kernels()
    assert not parts[0].exists()


def test_commands(fresh, copier, monkeypatch):
    run = CliRunner().invoke
    before = json.loads(run(command, ["info", "--json"]).stdout)
    assert before["built"] is False
    assert "kernels" not in before
    built = run(command, ["build"])
    assert built.exit_code == 0, built.output
    assert built.stdout.strip() == before["library"]
    assert "ready after" in built.stderr
    facts = json.loads(run(command, ["info", "--json"]).stdout)
    assert facts["built"] is True
    assert facts["kernels"] == facts["available"][0]
    assert facts["available"][-1] == "portable"
    assert facts["threads"] >= 1
    text = run(command, ["info"]).stdout
    assert facts["library"] in text
    assert facts["kernels"] in text
    assert run(command, ["clear"]).stdout.startswith("removed 1 from ")
    assert not fresh.exists()
    assert run(command, ["clear"]).stdout.startswith("removed 0 from ")


def test_commands_without_a_compiler(fresh, monkeypatch):
    monkeypatch.setenv("ZMLX_CXX", "nothing-of-that-name")
    result = CliRunner().invoke(command, ["build"])
    assert result.exit_code == 1
    assert "no program nothing-of-that-name" in result.stderr
    info = json.loads(CliRunner().invoke(command, ["info", "--json"]).stdout)
    assert "nothing-of-that-name" in info["unavailable"]


def test_other_systems_have_none(fresh, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(native.NativeUnavailable, match="only for Linux"):
        native.load()


def test_a_bad_number_of_threads_is_a_refusal(fresh, copier, monkeypatch):
    monkeypatch.setenv("ZMLX_NUM_THREADS", "many")
    with pytest.raises(native.NativeUnavailable, match="ZMLX_NUM_THREADS='many'"):
        native.load(announce=announced()[1])
