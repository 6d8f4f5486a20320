"""What every run begins with, how pytest-xdist spreads the suite, and what tests share."""

from __future__ import annotations

import os
from typing import Any

import mlx_preamble
import pytest
from virtual_time import VirtualTime

#: files whose tests share what is slow to make: one process runs them, or those of one parameter
SHARED = (
    "tests/native/test_arm64.py",
    "tests/native/test_sanitizers.py",
    "tests/packaging/test_wheel.py",
)


def group_of(nodeid: str) -> str:
    """Return the name of the group of tests that one process runs."""
    file, _, test = nodeid.partition("::")
    return f"{file}[{test.partition('[')[2]}" if file in SHARED else nodeid


def pytest_configure(config: pytest.Config) -> None:
    """Do once what all processes gain from."""
    # Tests compare with float32, which MLX's products on CUDA are not by default.
    os.environ.setdefault("MLX_ENABLE_TF32", "0")
    if not hasattr(config, "workerinput"):
        mlx_preamble.precompile()


@pytest.fixture
def virtual_time(monkeypatch: pytest.MonkeyPatch) -> VirtualTime:
    """Let only `time.sleep` take time, which it does not wait for."""
    virtual = VirtualTime()
    monkeypatch.setattr("time.perf_counter", virtual.perf_counter)
    monkeypatch.setattr("time.sleep", virtual.sleep)
    return virtual


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep groups together. (xdist's own groups, by marks, do nothing with pytest 9.)"""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return Groups(config, log)
