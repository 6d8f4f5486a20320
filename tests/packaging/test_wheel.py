"""The wheel and the editable installation: what is in them, what is not, and that both hook."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

HOOKED = (
    "import sys, zmlx_autopatch;"
    "print(zmlx_autopatch.state()['installed'], sys.modules['sitecustomize'].__file__)"
)


class Environment:
    """A fresh virtual environment that sees this one's packages, but not the checkout."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder / "env", with_pip=False)
        self.folder = folder
        self.python = folder / "env" / "bin" / "python"
        self.site = next((folder / "env" / "lib").glob("python*/site-packages"))
        self.site.joinpath("dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def install(self, *what: str | Path) -> None:
        """Have pip install without dependencies and without a network."""
        options = ["-q", "--no-deps", "--no-index", "--no-build-isolation"]
        pip = [sys.executable, "-m", "pip", "--python", self.python, "install", *options]
        done = subprocess.run([*pip, *what], capture_output=True, text=True, env=self.variables())
        assert done.returncode == 0, done.stdout + done.stderr

    def variables(self) -> dict[str, str]:
        """Return our environment without what leads to the checkout."""
        return {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "ZMLX_"))}

    def run(self, *command: str | Path) -> str:
        """Run a program and return its stdout; nothing may stand on its stderr."""
        done = subprocess.run(
            command, capture_output=True, text=True, env=self.variables(), cwd=self.folder
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", folder, ROOT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("zmlx-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("installed"))
    environment.install(wheel)
    return environment


def files_of(folder: str, *suffixes: str) -> set[str]:
    """Return what lies in the checkout, relative to its root."""
    found = (path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes)
    return {path.relative_to(ROOT).as_posix() for path in found}


def test_contents(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"zmlx", "zmlx_autopatch"}
    assert "zmlx_autopatch/_site/sitecustomize.py" in names
    assert "zmlx_autopatch/_site/__init__.py" not in names
    assert not [name for name in names if name.endswith(".pth")]
    assert not [name for name in names if "__pycache__" in name]


@pytest.mark.parametrize(
    ("folder", "suffixes"),
    [
        ("zmlx", (".py",)),
        ("zmlx_autopatch", (".py",)),
        ("zmlx", (".toml",)),
        ("zmlx/backend", (".cpp", ".h")),
    ],
)
def test_everything_in_the_packages_is_in_the_wheel(wheel, folder, suffixes):
    expected = files_of(folder, *suffixes)
    assert expected
    assert expected <= set(zipfile.ZipFile(wheel).namelist())


def test_the_folder_of_the_start_up_file_is_no_package():
    assert sorted(path.name for path in (ROOT / "sitecustomize").glob("*[!_]")) == [
        "README.md",
        "sitecustomize.py",
    ]


def test_an_installed_zmlx_is_the_wheels(installed):
    places = "import zmlx, zmlx_autopatch; print(zmlx.__file__, zmlx_autopatch.__file__)"
    assert installed.run(installed.python, "-c", places).split() == [
        str(installed.site / "zmlx" / "__init__.py"),
        str(installed.site / "zmlx_autopatch" / "__init__.py"),
    ]


def test_python_alone_imports_nothing_of_ours(installed):
    assert not (installed.site / "sitecustomize.py").exists()
    assert not (installed.site / "sitecustomize").exists()
    loaded = "import sys; print([m for m in sys.modules if 'zmlx' in m or m == 'sitecustomize'])"
    assert installed.run(installed.python, "-c", loaded) == "[]"


def test_zmlx_run_hooks(installed):
    zmlx = installed.python.with_name("zmlx")
    file = installed.site / "zmlx_autopatch" / "_site" / "sitecustomize.py"
    assert installed.run(zmlx, "run", installed.python, "-c", HOOKED) == f"True {file}"


def test_an_editable_installation_hooks_from_the_checkout(tmp_path):
    environment = Environment(tmp_path)
    environment.install("-e", ROOT)
    zmlx = environment.python.with_name("zmlx")
    # The checkout is on the path now, and its folder `sitecustomize` is a namespace package there:
    # the import system runs nothing for it.
    loaded = "import sys; print([m for m in sys.modules if 'zmlx' in m])"
    assert environment.run(environment.python, "-c", loaded) == "[]"
    code = "import os, zmlx_autopatch; print(zmlx_autopatch.state()['installed'])"
    code += "; print(os.environ['PYTHONPATH'])"
    assert environment.run(zmlx, "run", environment.python, "-c", code).split() == [
        "True",
        str(ROOT / "sitecustomize"),
    ]
