"""The default number of threads: cores, affinity, cgroup limits, the variable."""

from __future__ import annotations

import os

import pytest

from zmlx.backend.cpu import threads
from zmlx_autopatch import variables


@pytest.fixture
def system(monkeypatch, tmp_path):
    """Stand in for /sys and /proc/self; return a function that writes their files."""
    monkeypatch.delenv("ZMLX_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "_SYSTEM", tmp_path / "sys")
    monkeypatch.setattr(threads, "_PROCESS", tmp_path / "proc")

    def write(path: str, text: str) -> None:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")

    return write


def hyperthreads(write, cores: int) -> None:
    for cpu in range(2 * cores):
        topology = f"sys/devices/system/cpu/cpu{cpu}/topology"
        write(f"{topology}/physical_package_id", "0")
        write(f"{topology}/core_id", str(cpu % cores))


def test_two_hyperthreads_are_one_core(system, monkeypatch):
    hyperthreads(system, 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert threads.default_threads() == 8


def test_affinity(system, monkeypatch):
    hyperthreads(system, 8)
    for cpus, cores in (({0, 8}, 1), ({0, 1, 2}, 3), ({3, 4, 11}, 2)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cpus=cpus: cpus)
        assert threads.default_threads() == cores


def test_without_a_topology_every_processor_counts(system, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 5})
    assert threads.default_threads() == 3


@pytest.mark.parametrize(
    ("limit", "cores"), [("50000 100000", 1), ("250000 100000", 3), ("max 100000", 8), ("?", 8)]
)
def test_cgroup_version_2(system, monkeypatch, limit, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    system("proc/cgroup", "0::/user/job")
    system("sys/fs/cgroup/user/job/cpu.max", limit)
    assert threads.default_threads() == cores


def test_the_group_above_limits_too(system, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    system("proc/cgroup", "0::/user/job")
    system("sys/fs/cgroup/user/job/cpu.max", "400000 100000")
    system("sys/fs/cgroup/cpu.max", "200000 100000")
    assert threads.default_threads() == 2


@pytest.mark.parametrize(("quota", "cores"), [("150000", 2), ("-1", 8)])
def test_cgroup_version_1(system, monkeypatch, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    system("proc/cgroup", "5:cpuset:/\n4:cpu,cpuacct:/job\n0::/")
    system("sys/fs/cgroup/cpu/job/cpu.cfs_quota_us", quota)
    system("sys/fs/cgroup/cpu/job/cpu.cfs_period_us", "100000")
    assert threads.default_threads() == cores


def test_the_variable_comes_first(system, monkeypatch):
    monkeypatch.setenv("ZMLX_NUM_THREADS", "5")
    assert threads.default_threads() == 5
    monkeypatch.setenv("ZMLX_NUM_THREADS", "-2")
    with pytest.raises(variables.VariableError, match="ZMLX_NUM_THREADS='-2'"):
        threads.default_threads()


def test_here():
    assert 1 <= threads.physical_cores(threads.usable_cpus()) <= (os.cpu_count() or 1)
