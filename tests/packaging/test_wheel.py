"""The wheel and the editable installation: what is in them, what is not, and that both hook."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from zmlx.backend.cpu import build, native

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

    def run(self, *command: str | Path, **variables: str) -> str:
        """Run a program and return its stdout; nothing may stand on its stderr."""
        env = {**self.variables(), **variables}
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=self.folder)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.strip()


def built_wheel(folder: Path, **variables: str) -> Path:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", folder, ROOT]
    env = {**os.environ, **variables}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("zmlx-*.whl"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return built_wheel(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("installed"))
    environment.install(wheel)
    return environment


@pytest.fixture(scope="module")
def native_wheel(tmp_path_factory) -> Path:
    """Build a wheel with the compiled kernels, those that the other tests have."""
    native.load()
    return built_wheel(tmp_path_factory.mktemp("native"), HATCH_BUILD_HOOK_ENABLE_CUSTOM="1")


@pytest.fixture(scope="module")
def shipped(native_wheel, tmp_path_factory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("shipped"))
    environment.install(native_wheel)
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
    assert not [name for name in names if name.endswith((".so", build.MANIFEST))]
    assert wheel.name.endswith("-py3-none-any.whl")


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


# With the compiled kernels


def test_a_wheel_with_the_kernels_is_for_this_python_and_platform(native_wheel):
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    platform = sysconfig.get_platform().replace("-", "_")
    assert native_wheel.name.endswith(f"-{python}-{python}-{platform}.whl")
    archive = zipfile.ZipFile(native_wheel)
    files = {name for name in archive.namelist() if name.startswith("zmlx/backend/cpu/lib/")}
    assert {name.rpartition("/")[2] for name in files} == {build.file_name(), build.MANIFEST}
    about = {Path(name).name: archive.read(name).decode() for name in archive.namelist()[-6:]}
    assert "Root-Is-Purelib: false" in about["WHEEL"]
    # pip then brings the mlx that the kernels fit.
    assert f"Requires-Dist: mlx=={build.mlx_version()}\n" in about["METADATA"]


#: As in a container: no compiler, and nowhere to keep a library.
BARE = {"PATH": "/nonexistent", "HOME": "/proc/nonexistent", "ZMLX_NUM_THREADS": "2"}


def test_its_kernels_run_where_there_is_no_compiler(shipped):
    product = """
import mlx.core as mx
from zmlx.backend.cpu import native
library = native.load()
w = mx.quantize(mx.ones((2, 64)), 64, 4)
print(library.__file__, library.quantized_matmul(mx.ones((1, 64)), *w, group_size=64, bits=4))
"""
    library = shipped.site / native.BUNDLED.relative_to(ROOT) / build.file_name()
    output = shipped.run(shipped.python, "-c", product, **BARE)
    assert output == f"{library} array([[64, 64]], dtype=float32)"
    info = json.loads(
        shipped.run(shipped.python.with_name("zmlx"), "native", "info", "--json", **BARE)
    )
    assert (info["library"], info["built"], info["threads"]) == (str(library), True, 2)
    assert info["kernels"] == native.load().info()["kernels"]


def test_its_kernels_are_refused_by_another_mlx(shipped):
    patched = """
import mlx.core as mx, mlx.nn as nn
mx.__version__ = "0.99"
from mlx_lm.models import llama
from zmlx.patch import patch
sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 64}
model = llama.Model(llama.ModelArgs("llama", num_hidden_layers=1, rms_norm_eps=1e-5, **sizes))
nn.quantize(model)
patch(model)
print(model(mx.array([[1, 2]])).shape, model._zmlx_patch_result.summary())
"""
    output = shipped.run(shipped.python, "-c", patched, **BARE)
    assert output.startswith("(1, 2, 64)")
    assert (
        f"the one in the package was built for mlx {build.mlx_version()}, and mlx 0.99 is "
        "installed; no C++ compiler found"
    ) in output
