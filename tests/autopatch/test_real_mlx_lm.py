"""The hook against the installed mlx-lm: what the stand-ins assume, and one run from end to end."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import mlx_lm
import mlx_lm.utils
import pytest
from zoo.disk import make_checkpoint

from zmlx.backend.cpu import native
from zmlx_autopatch.boundaries import BOUNDARIES


def test_the_boundaries_exist_and_return_the_model_first():
    assert inspect.isfunction(mlx_lm.utils.load)
    for boundary in BOUNDARIES:
        function = getattr(importlib.import_module(boundary.module), boundary.name)
        assert inspect.isfunction(function), boundary
        assert not inspect.isgeneratorfunction(function)
        assert "model, tokenizer" in inspect.getsource(function)


def test_every_module_that_binds_the_loader_takes_it_from_utils():
    """So one hook on mlx_lm.utils, fired before they are imported, covers them all."""
    holders = []
    for info in pkgutil.walk_packages(mlx_lm.__path__, "mlx_lm."):
        if ".models." in info.name or info.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(info.name)
        except ImportError:  # a dependency that is not installed, such as lm_eval
            continue
        for name, value in vars(sys.modules[info.name]).items():
            if value is mlx_lm.utils.load:
                holders.append((info.name, name))
    assert {"mlx_lm.generate", "mlx_lm.server", "mlx_lm.chat", "mlx_lm.convert"} <= {
        module for module, _ in holders
    }
    assert callable(mlx_lm.generate)
    assert not inspect.ismodule(mlx_lm.generate)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    return make_checkpoint(folder, model_type="llama", quantize={"bits": 4, "group_size": 32})


@pytest.fixture(autouse=True)
def reachable(monkeypatch):
    """Have children find this checkout, installed or not."""
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))


#: The console script, as a user's shell finds it.
SCRIPT = Path(sysconfig.get_path("scripts")) / "mlx_lm.generate"
STOCK = (sys.executable, str(SCRIPT))
OURS = (sys.executable, "-m", "zmlx", "run", "mlx_lm.generate")


def generate(*command: str, model, **variables: str):
    arguments = ["--model", str(model), "--prompt", "hello", "--max-tokens", "5", "--verbose", "F"]
    return subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
        timeout=120,
    )


def test_generate_under_zmlx_run(checkpoint):
    native.load()  # or the child would say that it compiles
    stock = generate(*STOCK, model=checkpoint)
    ours = generate(*OURS, model=checkpoint)
    assert (stock.returncode, ours.returncode) == (0, 0), ours.stderr
    assert ours.stdout == stock.stdout
    lines = [line for line in ours.stderr.splitlines() if line.startswith("zmlx: ")]
    assert len(lines) == 1
    assert "modules of llama (family llama, profile stable) run fused" in lines[0]


def test_autopatch_off_and_a_broken_profile_leave_the_model(checkpoint, tmp_path):
    off = generate(*OURS, model=checkpoint, ZMLX_AUTOPATCH="0")
    assert (off.returncode, "zmlx" in off.stderr) == (0, False)
    broken = generate(*OURS, model=checkpoint, ZMLX_PROFILE="nope")
    assert broken.returncode == 0
    assert broken.stdout == off.stdout
    assert "zmlx: the model stays as it was loaded: ProfileError: profile 'nope'" in broken.stderr
    strict = generate(*OURS[:-1], "--strict", OURS[-1], model=checkpoint, ZMLX_PROFILE="nope")
    assert strict.returncode == 1
    assert "ProfileError" in strict.stderr


def test_a_missing_model_is_mlx_lms_own_error(tmp_path):
    missing = tmp_path / "no such model"
    stock = generate(*STOCK, model=missing, HF_HUB_OFFLINE="1")
    ours = generate(*OURS, model=missing, HF_HUB_OFFLINE="1")
    assert ours.returncode == stock.returncode != 0
    assert ours.stderr.splitlines()[-1] == stock.stderr.splitlines()[-1]
    assert "zmlx: " not in ours.stderr


def test_a_model_loaded_by_a_program_carries_its_report(checkpoint):
    code = (
        f"import mlx_lm; model, _ = mlx_lm.load({str(checkpoint)!r});"
        "print(model._zmlx_patch_result.patched_count > 0)"
    )
    done = subprocess.run(
        [*OURS[:-1], sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "True\n"
