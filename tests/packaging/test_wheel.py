"""The wheel: what is in it, what is not, and that an installed zmlx hooks."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(folder)]
    done = subprocess.run([*command, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("zmlx-*.whl"))


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"zmlx", "zmlx_autopatch"}
    assert "zmlx_autopatch/_site/sitecustomize.py" in names
    assert "zmlx_autopatch/_site/__init__.py" not in names
    assert not any("pth" in Path(name).suffix for name in names)
    for needed in (
        "zmlx/profile/builtin/stable.toml",
        "zmlx/family/families.toml",
        "zmlx/backend/cpu/source/kernels.h",
        "zmlx/backend/cpu/source/primitives.cpp",
    ):
        assert needed in names
    assert not any("__pycache__" in name or name.startswith("tests") for name in names)


def test_installed_in_a_fresh_environment(wheel, tmp_path):
    """The environment sees the packages of this one, but our code from the wheel alone."""
    folder = tmp_path / "env"
    venv.create(folder, system_site_packages=False, with_pip=False)
    python = folder / "bin" / "python"
    site = next((folder / "lib").glob("python*/site-packages"))
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), wheel],
        check=True,
        capture_output=True,
    )
    ours = next(p for p in sys.path if p.endswith("site-packages"))
    # What zmlx depends on; the checkout itself, installed as editable, must not be seen.
    (site / "dependencies.pth").write_text(ours + "\n")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*command: str) -> str:
        done = subprocess.run(
            [str(part) for part in command],
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    home = "import zmlx, zmlx_autopatch; print(zmlx.__file__); print(zmlx_autopatch.__file__)"
    assert all(line.startswith(str(site)) for line in run(python, "-c", home).splitlines())
    quiet = "import sys; print([m for m in sys.modules if 'zmlx' in m or m == 'sitecustomize'])"
    assert run(python, "-c", quiet) == "[]"
    hooked = (
        "import sys, zmlx_autopatch as z;"
        "print(z.state()['installed'], sys.modules['sitecustomize'].__file__)"
    )
    installed, file = run(python, "-m", "zmlx", "run", python, "-c", hooked).split()
    assert installed == "True"
    assert file == str(site / "zmlx_autopatch" / "_site" / "sitecustomize.py")
