"""Collect what `zmlx doctor` shows; nothing is judged here."""

from __future__ import annotations

import os
import sys
from typing import Any

from zmlx.bench import environment
from zmlx.bench.loading import load_checkpoint
from zmlx.doctor import hook
from zmlx.profile import ProfileError, resolve_policy
from zmlx_autopatch import variables

Facts = dict[str, Any]

_SWITCHES = ("0", "1")


def examine(model: str | None = None) -> Facts:
    """Return everything that there is to know, JSON types only.

    Args:
        model: a checkpoint whose plan is made too, without reading its weights.

    Raises:
        zmlx.bench.loading.LoadError: the model cannot be loaded.
    """
    # First, because importing mlx-lm lowers the limit of open files.
    facts: Facts = {"python": python(), **environment.describe()}
    facts["variables"] = variable_table()
    facts["profile"] = profile()
    facts["backend"] = backend()
    facts["native"] = native() if facts["backend"]["name"] == "cpu" else {"state": "not used"}
    facts["hook"] = hook.look()
    if model is not None and not facts["backend"]["error"]:
        facts["model"] = plan(model)
        facts["native"] = native() if facts["backend"]["name"] == "cpu" else facts["native"]
    return facts


def python() -> Facts:
    """Return the interpreter, the flags that matter, PYTHONPATH and the limit of open files."""
    return {
        "executable": sys.executable,
        "prefix": sys.prefix,
        "pythonpath": os.environ.get("PYTHONPATH", ""),
        "flags": [
            name
            for name in ("isolated", "ignore_environment", "no_site", "safe_path")
            if getattr(sys.flags, name, False)
        ],
        "open_files": open_files(),
    }


def open_files() -> int:
    """Return the soft limit of open files; -1 when there is none, 0 where it is unknown."""
    try:
        import resource  # noqa: PLC0415 - there is none on Windows
    except ImportError:
        return 0
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return -1 if soft == resource.RLIM_INFINITY else soft


def variable_table() -> list[Facts]:
    """Return name, value, default, meaning and what is wrong with it, for every variable."""
    rows = []
    for name, (values, default, meaning) in variables.TABLE.items():
        value = os.environ.get(name)
        rows.append(
            {
                "name": name,
                "value": value,
                "values": values,
                "default": default,
                "meaning": meaning,
                "error": _variable_error(name, values),
            }
        )
    return rows


def _variable_error(name: str, values: str) -> str:
    """Return why a variable's value is not taken, or an empty string."""
    try:
        if values == "0 or 1" and variables.text(name):
            variables.choice(name, _SWITCHES)
        elif values == "a number":
            variables.count(name)
        elif values == "off, line or debug":
            variables.choice(name, ("off", "line", "debug"))
    except variables.VariableError as error:
        return str(error)
    return ""


def profile() -> Facts:
    """Return the release policy in force and where it comes from."""
    try:
        policy = resolve_policy()
    except (ProfileError, variables.VariableError) as error:
        return {"name": "", "error": str(error)}
    return {
        "name": policy.name,
        "source": policy.sources.get("profile", ""),
        "admits": sorted(policy.admits),
        "notes": list(policy.notes),
        "error": "",
    }


def backend() -> Facts:
    """Return MLX's backend, its device, and a GPU that MLX does not use."""
    try:
        from zmlx import backend as own  # noqa: PLC0415 - it imports MLX, which may be broken

        name = own.current()
        device = environment.accelerator()
    except (ImportError, RuntimeError, OSError) as error:
        return {"name": "", "device": "", "idle_gpu": "", "error": str(error)}
    idle = environment.nvidia_gpu() if name == "cpu" else ""
    return {"name": name, "device": device, "idle_gpu": idle, "error": ""}


def native() -> Facts:
    """Return the state of the native CPU library, without building it."""
    from zmlx.backend.cpu import native as library  # noqa: PLC0415 - only where MLX loads

    facts: Facts = {"cache": str(library.cache_folder()), "threads": None}
    try:
        found = library.find()
        facts |= {"library": str(found.library), "compiler": found.compiler}
        if not found.present:
            return {**facts, "state": "not built"}
        module = library.load()
    except (library.NativeUnavailable, variables.VariableError) as refusal:
        return {**facts, "state": "unavailable", "reason": str(refusal)}
    return {
        **facts,
        "state": "built",
        "threads": module.num_threads(),
        "kernels": str(module.kernels()),
        "available": [str(name) for name in module.available_kernels()],
    }


def plan(model: str) -> Facts:
    """Return what would be replaced in a model; its weights are not read."""
    network, _ = load_checkpoint(model, lazy=True)
    from mlx.utils import tree_flatten  # noqa: PLC0415 - only where MLX loads

    from zmlx.patch import patch, unpatch  # noqa: PLC0415

    parameters: Any = tree_flatten(network.parameters())
    size = sum(array.nbytes for _, array in parameters)
    facts: Facts = {"path": model, "bytes": size, "available_bytes": environment.available_bytes()}
    try:
        report = vars(patch(network))["_zmlx_patch_result"]
    except (ProfileError, variables.VariableError, ValueError) as error:
        return {**facts, "error": str(error), "report": None, "line": "", "quantized": False}
    finally:
        unpatch(network)
    return {
        **facts,
        "error": "",
        "quantized": any("scales" in module for module in network.modules()),
        "line": report.line(),
        "summary": report.summary(),
        "report": report.to_json(),
    }
