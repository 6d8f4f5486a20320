"""The machine and the software that a measurement ran on."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from zmlx.version import __version__
from zmlx_autopatch import variables
from zmlx_autopatch.launch.environment import tunables

#: x86 and ARM features that decide which CPU kernels run, as the kernel names them
_FEATURES = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vbmi",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "asimd",
    "asimddp",
    "bf16",
    "i8mm",
    "sve",
)
_CPUINFO = Path("/proc/cpuinfo")


def describe() -> dict[str, Any]:
    """Return hardware, operating system, versions and the variables of zmlx that are set.

    Returns:
        {"hardware": {...}, "os": text, "versions": {...}, "variables": {...}}; JSON types only.
        Sizes are in bytes.
    """
    return {
        "hardware": hardware(),
        "os": platform.platform(),
        "versions": versions(),
        "variables": {
            name: os.environ[name]
            for name in (*variables.TABLE, "GLIBC_TUNABLES")
            if name in os.environ
        },
    }


def as_under_zmlx_run() -> None:
    """Start this program again in the environment that `zmlx run` gives, if it is another.

    That is: with large pages for the weights, unless GLIBC_TUNABLES decides about them.
    """
    asked = os.environ.get("GLIBC_TUNABLES")
    if sys.platform == "linux" and tunables(asked) != asked:
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "GLIBC_TUNABLES": tunables(asked)})


def hardware() -> dict[str, Any]:
    """Return CPU, features, cores, memory and accelerator."""
    return {
        "cpu": _cpu_name(),
        "machine": platform.machine(),
        "cpu_features": cpu_features(),
        "logical_cores": os.cpu_count() or 0,
        "usable_cores": usable_cores(),
        "physical_cores": _physical_cores(),
        "memory_bytes": memory_bytes(),
        "accelerator": accelerator(),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python, of the packages and of the C++ compiler; empty: absent."""
    found = {"python": platform.python_version(), "zmlx": __version__}
    for package in ("mlx", "mlx-lm", "nanobind", "wrapt", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = ""
    found["compiler"] = compiler()[1]
    return found


def compiler() -> tuple[str, str]:
    """Return path and first line of `--version` of the C++ compiler; empty when there is none."""
    wanted = variables.text("ZMLX_CXX")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        path = shutil.which(name)
        if path is None:
            continue
        ran = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
        lines = ran.stdout.splitlines()
        if ran.returncode == 0 and lines:
            return path, lines[0]
    return "", ""


def cpu_features() -> list[str]:
    """Return the features of the CPU that zmlx's kernels ask for."""
    if sys.platform == "darwin":
        return ["asimd"] if platform.machine() == "arm64" else []
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", _cpuinfo(), re.MULTILINE)
    present = set(match.group(1).split()) if match else set()
    return [feature for feature in _FEATURES if feature in present]


def usable_cores() -> int:
    """Return the number of logical cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int:
    """Return the machine's memory in bytes, or 0 when the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0


def available_bytes() -> int:
    """Return the memory that is free for this process, or the whole when it is unknown."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
        if match:
            return int(match.group(1)) * 1024
    return memory_bytes()


def accelerator() -> str:
    """Return the GPU that MLX uses, or an empty string."""
    import mlx.core as mx  # noqa: PLC0415 - the rest of this module works without MLX

    if mx.default_device() == mx.Device(mx.cpu):
        return ""
    return str(mx.device_info().get("device_name", "GPU"))


def nvidia_gpu() -> str:
    """Return name and driver of the first NVIDIA GPU that the system tool reports, or nothing."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    command = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = ran.stdout.strip().splitlines()
    return lines[0] if ran.returncode == 0 and lines else ""


def _cpuinfo() -> str:
    return _CPUINFO.read_text(encoding="utf-8", errors="replace") if _CPUINFO.exists() else ""


def _cpu_name() -> str:
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        return ran.stdout.strip() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return match.group(1).strip() if match else platform.machine()


def _physical_cores() -> int:
    """Return the number of distinct cores, counted once for all their threads."""
    packages = re.findall(r"^physical id\s*:\s*(\d+)$", _cpuinfo(), re.MULTILINE)
    cores = re.findall(r"^core id\s*:\s*(\d+)$", _cpuinfo(), re.MULTILINE)
    if cores and len(cores) == len(packages):
        return len(set(zip(packages, cores, strict=True)))
    return os.cpu_count() or 0
