"""`import zmlx` is cheap, and what it promises is there when it is asked for."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest

import zmlx

#: Modules that are still to be written; a test fails when one of them is there.
PENDING: set[str] = set()


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_importing_zmlx_imports_neither_mlx_nor_its_own_modules():
    done = python("import sys, zmlx; print(*sorted(n for n in sys.modules if 'mlx' in n))")
    loaded = [name for name in done.stdout.split() if not name.startswith("_")]
    assert loaded == ["zmlx", "zmlx.version"], done.stdout + done.stderr


def test_modules_are_attributes_in_a_fresh_interpreter():
    done = python("import zmlx; print(zmlx.metal.kernel.__name__, zmlx.registry.cache_size())")
    assert done.stdout.split() == ["kernel", "0"], done.stderr


@pytest.mark.parametrize("name", sorted({*zmlx._MODULES, *zmlx._NAMES}))
def test_every_public_name_is_there(name):
    module = zmlx._NAMES.get(name, f"zmlx.{name}").removeprefix("zmlx.")
    if module in PENDING:
        assert find_spec(f"zmlx.{module}") is None, f"{module} is there: take it out of PENDING"
    else:
        assert getattr(zmlx, name) is not None
    assert name in dir(zmlx)


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="module 'zmlx' has no attribute 'jitt'"):
        zmlx.jitt  # noqa: B018
    assert not hasattr(zmlx, "utils")
