"""Several environments at once: programs of other virtual environments, and start-up files that
rewrite their own. Numbers are those of the case list."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from zmlx_autopatch.launch.environment import site_folder

STATE = "import zmlx_autopatch; print(zmlx_autopatch.state()['installed'])"
HOOKED = "import sys; print('zmlx_autopatch.hook' in sys.modules)"


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """Return the interpreter of an environment that holds no package."""
    folder = tmp_path_factory.mktemp("other") / "env"
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    return folder / "bin" / "python"


def start(interpreter: Path, code: str, *path: Path | str, **variables: str):
    """Start an interpreter as a child of `zmlx run` does."""
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("ZMLX_", "PYTHON"))},
        "PYTHONPATH": os.pathsep.join([site_folder(), *map(str, path)]),
        **variables,
    }
    done = subprocess.run(
        [interpreter, "-c", code], capture_output=True, text=True, env=environment, cwd="/"
    )
    return done.returncode, done.stdout, done.stderr


def test_an_environment_without_zmlx_is_left_alone(other):  # 19
    assert start(other, HOOKED) == (0, "False\n", "")
    assert start(other, HOOKED, ZMLX_STRICT="1") == (0, "False\n", "")


def test_it_says_so_when_asked(other):  # 19
    line = f"zmlx: not installed for {other}: it stays as it is\n"
    assert start(other, HOOKED, ZMLX_LOG="debug") == (0, "False\n", line)


def test_an_environment_that_sees_our_packages_is_hooked(other, python):  # 18, 19
    """Its prefix is another, and it would be wrong to stand aside for that."""
    assert start(other, STATE, python.packages) == (0, "True\n", "")


def test_a_start_up_file_that_rewrites_the_prefix_and_adds_the_packages(
    other, python, tmp_path
):  # 6, 7
    """As some distributions do: only after it has run can zmlx be found."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "sitecustomize.py").write_text(
        "import site, sys\n"
        "sys.prefix = sys.exec_prefix = '/opt/rewritten'\n"
        "sys.executable = '/opt/rewritten/bin/python'\n"
        "site.PREFIXES[:] = [sys.prefix]\n"
        f"site.addsitedir({str(python.packages)!r})\n"
    )
    code = STATE + "; import sys; print(sys.prefix)"
    assert start(other, code, tmp_path / "theirs") == (0, "True\n/opt/rewritten\n", "")


def test_the_users_file_is_the_one_that_python_would_have_run(other, python, tmp_path):  # 1, 8
    """One on PYTHONPATH, one among the packages; usercustomize is nobody's business of ours."""
    site = next(other.parents[1].glob("lib/python*/site-packages"))
    on_path = tmp_path / "theirs"
    on_path.mkdir()
    code = (
        "import sys; print([getattr(sys.modules.get(n), '__file__', None) for n in"
        " ('sitecustomize', 'usercustomize')])"
    )
    try:
        (site / "sitecustomize.py").write_text("")
        (on_path / "usercustomize.py").write_text("")
        for _ in range(2):
            native = start(other, code, on_path, PYTHONPATH=str(on_path))
            assert start(other, code, on_path, python.packages) == native
            (on_path / "sitecustomize.py").write_text("")
        assert str(on_path) in native[1]
    finally:
        (site / "sitecustomize.py").unlink()


@pytest.mark.parametrize("shebang", ["own", "other", "env", "shell"])
def test_a_script_of_another_environment_is_pointed_out(zmlx_run, other, tmp_path, shebang):  # 47
    tools = tmp_path / "tools"
    tools.mkdir()
    first = {
        "own": f"#!{sys.executable}\n",
        "other": f"#!{other}\n",
        "env": "#!/usr/bin/env python3\n",
        "shell": "#!/bin/sh\n",
    }[shebang]
    (tools / "their_tool").write_text(first + ("exit 0\n" if shebang == "shell" else "exit(0)\n"))
    (tools / "their_tool").chmod(0o755)
    path = os.pathsep.join([str(tools), os.path.dirname(sys.executable), os.environ["PATH"]])
    result = zmlx_run("their_tool", PATH=path)
    expected = f"zmlx: {tools / 'their_tool'} is run by {other}: install zmlx there, or its models"
    assert result.code == 0
    assert (expected in result.err) is ("is run by" in result.err) is (shebang == "other")
    assert zmlx_run("--quiet", "their_tool", PATH=path).err.count("zmlx:") == 0
