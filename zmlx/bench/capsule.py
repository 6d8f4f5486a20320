"""Capsules: JSON files with everything that a speed claim rests on.

A capsule holds every raw run; medians and ratios are computed when it is read, never stored alone.
It names the hardware, the operating system, the versions, the command, and for each patched model
the report of what was replaced.
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
import sys
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from zmlx.bench import environment

SCHEMA = 1
#: quantity -> unit and whether more is better
Quantities = dict[str, tuple[str, bool]]
#: what a timed generation gives
GENERATION: Quantities = {
    "prefill": ("tokens/s", True),
    "decode": ("tokens/s", True),
    "peak_memory": ("bytes", False),
}


class CapsuleError(ValueError):
    """A file is not a capsule; the text names the file, the key and what is wrong."""


@dataclass(frozen=True)
class Run:
    """One measurement.

    Attributes:
        subject: what was measured, such as a model.
        variant: which of the compared ones, such as "stock" or "zmlx".
        repeat: number of the run of this subject and variant, from 0.
        values: quantity -> value in the capsule's unit.
        samples: name -> the single numbers behind the values, such as the seconds of each step.
    """

    subject: str
    variant: str
    repeat: int
    values: dict[str, float]
    samples: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Capsule:
    """A benchmark, with all that is needed to judge it or to run it again.

    Attributes:
        title: what was measured, in one line.
        runs: every run, in the order in which they ran.
        quantities: quantity -> (unit, whether more is better).
        command: the command line that made the capsule.
        environment: `zmlx.bench.environment.describe()`.
        plans: subject -> the report of the patched model, as JSON.
        notes: remarks, such as the prompt's length.
        created: time in UTC, ISO 8601.
        schema: version of this format.
    """

    title: str
    runs: tuple[Run, ...]
    quantities: Quantities
    command: str
    environment: dict[str, Any]
    plans: dict[str, dict[str, Any]]
    notes: tuple[str, ...] = ()
    created: str = ""
    schema: int = SCHEMA

    def subjects(self) -> list[str]:
        """Return the subjects in the order of their first run."""
        return list(dict.fromkeys(run.subject for run in self.runs))

    def variants(self) -> list[str]:
        """Return the variants in the order of their first run."""
        return list(dict.fromkeys(run.variant for run in self.runs))

    def values(self, subject: str, variant: str, quantity: str) -> list[float]:
        """Return one quantity of every run of a subject and variant."""
        return [
            run.values[quantity]
            for run in self.runs
            if run.subject == subject and run.variant == variant and quantity in run.values
        ]

    def median(self, subject: str, variant: str, quantity: str) -> float | None:
        """Return the median over the runs, or None when there is no run."""
        values = self.values(subject, variant, quantity)
        return statistics.median(values) if values else None


def collect(
    title: str,
    runs: list[Run],
    quantities: Quantities,
    *,
    plans: dict[str, dict[str, Any]] | None = None,
    notes: tuple[str, ...] = (),
) -> Capsule:
    """Make a capsule of runs that were made just now, in this process."""
    return Capsule(
        title=title,
        runs=tuple(runs),
        quantities=quantities,
        command=_command_line(),
        environment=environment.describe(),
        plans=plans or {},
        notes=notes,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def write(capsule: Capsule, file: Path) -> Path:
    """Write a capsule as JSON, making the folder; return the file.

    Raises:
        CapsuleError: the capsule is not one that `read` would take.
    """
    content = asdict(capsule)
    _check(json.loads(json.dumps(content)), file)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return file


def read(file: Path) -> Capsule:
    """Read a capsule.

    Raises:
        CapsuleError: there is no such file, it is not JSON, or it is not a capsule.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CapsuleError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CapsuleError(f"{file}: not JSON: {error}") from error
    _check(content, file)
    return Capsule(
        **{
            **content,
            "runs": tuple(Run(**run) for run in content["runs"]),
            "quantities": {k: (unit, more) for k, (unit, more) in content["quantities"].items()},
            "notes": tuple(content["notes"]),
        }
    )


def _command_line() -> str:
    """Return this process's command as it was typed, without the folder of the script."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or not sys.argv[0].endswith(".py"):
        return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    module = spec.name.removesuffix(".__main__")
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


_KEYS: dict[str, type] = {
    "title": str,
    "runs": list,
    "quantities": dict,
    "command": str,
    "environment": dict,
    "plans": dict,
    "notes": list,
    "created": str,
    "schema": int,
}
_RUN_KEYS: dict[str, type] = {
    "subject": str,
    "variant": str,
    "repeat": int,
    "values": dict,
    "samples": dict,
}
_ENVIRONMENT_KEYS: dict[str, type] = {
    "hardware": dict,
    "os": str,
    "versions": dict,
    "variables": dict,
}


def _check(content: Any, file: Path) -> None:
    """Raise CapsuleError unless the content is what this version writes."""
    if isinstance(content, dict) and content.get("schema") not in (None, SCHEMA):
        raise CapsuleError(f"{file}: schema {content['schema']!r}: this zmlx reads {SCHEMA}")
    _check_keys(content, _KEYS, file, "capsule")
    _check_keys(content["environment"], _ENVIRONMENT_KEYS, file, "environment")
    if not content["runs"]:
        raise CapsuleError(f"{file}: runs: empty; a capsule holds at least one raw run")
    for name, entry in content["quantities"].items():
        if not (isinstance(entry, list) and [type(e) for e in entry] == [str, bool]):
            raise CapsuleError(f"{file}: quantities.{name}: expected [unit, more is better]")
    for number, run in enumerate(content["runs"]):
        where = f"runs[{number}]"
        _check_keys(run, _RUN_KEYS, file, where)
        unknown = set(run["values"]) - set(content["quantities"])
        if unknown or not run["values"]:
            problem = f"{sorted(unknown)[0]!r} is not among the quantities" if unknown else "empty"
            raise CapsuleError(f"{file}: {where}.values: {problem}")
        for name, value in run["values"].items():
            _check_number(value, file, f"{where}.values.{name}")
        for name, samples in run["samples"].items():
            if not isinstance(samples, list):
                raise CapsuleError(f"{file}: {where}.samples.{name}: expected a list of numbers")
            for value in samples:
                _check_number(value, file, f"{where}.samples.{name}")


def _check_keys(content: Any, keys: dict[str, type], file: Path, where: str) -> None:
    if not isinstance(content, dict):
        raise CapsuleError(f"{file}: {where}: expected an object, found {type(content).__name__}")
    for key, kind in keys.items():
        if key not in content:
            raise CapsuleError(f"{file}: {where}: {key!r} is missing")
        if type(content[key]) is not kind:
            found = type(content[key]).__name__
            raise CapsuleError(f"{file}: {where}.{key}: expected {kind.__name__}, found {found}")
    unknown = set(content) - set(keys)
    if unknown:
        allowed = ", ".join(keys)
        raise CapsuleError(f"{file}: {where}: unknown key {sorted(unknown)[0]!r}; known: {allowed}")


def _check_number(value: Any, file: Path, where: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:
        raise CapsuleError(f"{file}: {where}: {value!r} is not a finite number of 0 or more")
