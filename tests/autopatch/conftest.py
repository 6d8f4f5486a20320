"""Runs pieces of Python in fresh interpreters, with the hook and with stand-ins for mlx-lm."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAKES = Path(__file__).with_name("fakes")
#: stands in for zmlx itself, where a test is about the hook alone
FAKE_ZMLX = Path(__file__).with_name("fakes_zmlx")
SITE = ROOT / "sitecustomize"


@dataclass
class Result:
    """What a process left behind."""

    code: int
    out: str
    err: str


class Interpreter:
    """Starts fresh interpreters.

    The stand-ins come before zmlx on the path; our package is reached through a link, so that
    nothing else of the checkout is importable.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.packages = folder / "packages"
        self.packages.mkdir()
        (self.packages / "zmlx_autopatch").symlink_to(ROOT / "zmlx_autopatch")

    def environment(self, *before: Path | str, hook: bool = True, **variables: str | None):
        """Return an environment; `before` goes on PYTHONPATH after the hook's folder."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("ZMLX_")}
        path = [SITE] if hook else []
        path += [*before, FAKES, FAKE_ZMLX, self.packages]
        environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
        for name, value in variables.items():
            if value is None:
                environment.pop(name, None)
            else:
                environment[name] = value
        return environment

    def __call__(
        self,
        body: str,
        *arguments: str,
        flags: tuple[str, ...] = (),
        before: tuple[Path | str, ...] = (),
        hook: bool = True,
        close: str = "",
        **variables: str | None,
    ) -> Result:
        """Run a piece of Python and return what it left behind."""
        file = self.folder / "body.py"
        file.write_text(textwrap.dedent(body))
        command = [sys.executable, *flags, str(file), *arguments]
        if close:
            command = ["sh", "-c", f'exec "$@" {close}', "sh", *command]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=self.environment(*before, hook=hook, **variables),
            cwd=self.folder,
            timeout=60,
        )
        return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def python(tmp_path) -> Interpreter:
    return Interpreter(tmp_path)


@pytest.fixture
def zmlx_run(tmp_path):
    """Run `zmlx run` from the checkout, with the stand-in mlx-lm on the path."""

    def run(*arguments: str, cwd: Path | None = None, **variables: str | None) -> Result:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("ZMLX_")}
        environment["PYTHONPATH"] = os.pathsep.join([str(FAKES), str(ROOT)])
        for name, value in variables.items():
            if value is None:
                environment.pop(name, None)
            else:
                environment[name] = value
        code = (
            f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv[0] = 'zmlx';"
            "from zmlx.cli import main; main(prog_name='zmlx')"
        )
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, "run", *arguments]
            if sys.version_info >= (3, 11)
            else [sys.executable, "-c", code, "run", *arguments],
            capture_output=True,
            text=True,
            env=environment,
            cwd=cwd or tmp_path,
            timeout=60,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    return run
