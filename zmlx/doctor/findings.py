"""Judge what was found: what is wrong, what slows a model down, and what to do about it.

Each rule reads the facts and yields findings; none looks at the machine itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from zmlx.doctor.examine import Facts

#: errors keep zmlx from working, warnings cost speed, notes are good to know
SEVERITIES = ("error", "warning", "note")
_FEW_FILES = 256
_PYTHON_FLAGS = {"isolated": "-I", "ignore_environment": "-E", "no_site": "-S"}


@dataclass(frozen=True)
class Finding:
    """One thing that the user may want to change.

    Attributes:
        severity: "error", "warning" or "note".
        what: what was found.
        advice: what to do; empty when there is nothing to do.
    """

    severity: str
    what: str
    advice: str = ""


def findings(facts: Facts) -> list[Finding]:
    """Return all findings, errors first, in the order of the rules."""
    found = [finding for rule in _RULES for finding in rule(facts)]
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


def _mlx(facts: Facts) -> Iterator[Finding]:
    backend, versions = facts["backend"], facts["versions"]
    if backend["error"]:
        yield Finding(
            "error",
            f"MLX does not load: {backend['error']}",
            "install an MLX with a backend: zmlx[cpu], zmlx[cuda13] or zmlx[cuda12] on Linux",
        )
    if not versions.get("mlx-lm"):
        yield Finding("error", "mlx-lm is not installed", "python -m pip install mlx-lm")
    if backend["idle_gpu"]:
        yield Finding(
            "warning",
            f"MLX runs on the CPU although there is a GPU: {backend['idle_gpu']}",
            "install zmlx[cuda13], or zmlx[cuda12] for a driver before 580",
        )
    if backend["name"] in ("metal", "cuda"):
        yield Finding(
            "note",
            f"this version has no {backend['name']} kernels yet: models keep their stock forward",
        )


def _variables(facts: Facts) -> Iterator[Finding]:
    for row in facts["variables"]:
        if row["error"]:
            yield Finding("error", row["error"], f"unset {row['name']} or give it such a value")
        elif row["name"] == "ZMLX_AUTOPATCH" and row["value"] == "0":
            yield Finding(
                "warning", "ZMLX_AUTOPATCH=0: every model stays as it was loaded", "unset it"
            )


def _profile(facts: Facts) -> Iterator[Finding]:
    profile = facts["profile"]
    if profile["error"]:
        yield Finding(
            "error",
            f"the release profile cannot be used: {profile['error']}",
            "correct the file, or choose another profile with --profile or ZMLX_PROFILE",
        )
    for note in profile.get("notes", ()):
        yield Finding("note", note)


def _python(facts: Facts) -> Iterator[Finding]:
    for flag in facts["python"]["flags"]:
        if flag in _PYTHON_FLAGS:
            yield Finding(
                "warning",
                f"this Python runs with {_PYTHON_FLAGS[flag]}, which keeps start-up files out",
                "start commands without that flag",
            )
    files = facts["python"]["open_files"]
    if 0 < files < _FEW_FILES:
        yield Finding(
            "warning",
            f"only {files} files may be open at once; a checkpoint of many parts needs more",
            "ulimit -n 2048",
        )


def _hook(facts: Facts) -> Iterator[Finding]:
    hook = facts["hook"]
    off = any(v["name"] == "ZMLX_AUTOPATCH" and v["value"] == "0" for v in facts["variables"])
    if not hook["alive"] and not off:
        yield Finding(
            "error",
            f"the start-up hook is not alive under `zmlx run`: {hook['reason']}",
            "reinstall zmlx into this environment; in a notebook call zmlx_autopatch.install()",
        )


def _native(facts: Facts) -> Iterator[Finding]:
    native = facts["native"]
    if native["state"] == "unavailable":
        yield Finding(
            "error",
            f"the CPU kernels cannot be used: {native['reason']}",
            "install a C++20 compiler (g++ or clang++) or name one in ZMLX_CXX, "
            "then `zmlx native build`",
        )
    elif native["state"] == "not built":
        yield Finding(
            "note",
            "the CPU kernels are not built yet; the first model that is loaded builds them",
            "`zmlx native build` does it now",
        )


def _cores(facts: Facts) -> Iterator[Finding]:
    hardware, threads = facts["hardware"], facts["native"].get("threads")
    cores = min(hardware["physical_cores"], hardware["usable_cores"])
    if threads is not None and 0 < threads < cores:
        yield Finding(
            "warning",
            f"the CPU kernels use {threads} of {cores} cores",
            "unset ZMLX_NUM_THREADS, or raise the limit of this container",
        )
    features = hardware["cpu_features"]
    if hardware["machine"] in ("x86_64", "AMD64") and "avx2" not in features:
        yield Finding("warning", "this CPU has no AVX2: the portable kernels are slow")


def _model(facts: Facts) -> Iterator[Finding]:
    model = facts.get("model")
    if model is None:
        return
    if model["error"]:
        yield Finding("error", f"no plan could be made: {model['error']}")
        return
    report = model["report"]
    refused = [c for c in report["candidates"] if not c["chosen"]]
    if not model["quantized"]:
        yield Finding(
            "warning",
            "the model is not quantized, and products with quantized weights are what is replaced",
            "quantize it: mlx_lm.convert --hf-path MODEL -q",
        )
    elif not report["patched_count"]:
        yield Finding("warning", "nothing would be replaced: " + model["line"].partition(": ")[2])
    reasons = Counter((c["pattern"], c["reason"]) for c in refused)
    for (pattern, reason), count in reasons.most_common(5):
        yield Finding("note", f"{count} modules keep their stock forward: {pattern}: {reason}")
    if 0 < model["available_bytes"] < model["bytes"]:
        need, free = model["bytes"] / 2**30, model["available_bytes"] / 2**30
        yield Finding(
            "warning",
            f"the weights take {need:.1f} GiB and {free:.1f} GiB are free: the system will swap",
            "use fewer bits, or a smaller model",
        )
    if report["patched_count"] and report["backend"] == "cpu":
        yield Finding(
            "note",
            "on a CPU, decode is bound by reading the weights: other programs on these cores, or "
            "a power limit, cost speed in proportion",
            f"`zmlx validate {model['path']}` measures stock and zmlx in turn",
        )


_RULES = (_mlx, _variables, _profile, _python, _hook, _native, _cores, _model)
