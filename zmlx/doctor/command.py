"""`zmlx doctor [MODEL]`: exit code 0 when all is well, 1 when something is wrong, 2 on bad use."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from zmlx.bench.loading import LoadError
from zmlx.console import wide_console
from zmlx.doctor.examine import Facts, examine
from zmlx.doctor.findings import Finding, findings

_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}


@click.command(name="doctor", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(model: str | None, as_json: bool) -> None:
    """Explain this environment, and why MODEL is not faster.

    MODEL is what mlx_lm.load takes; its weights are not read. Exit code 1 says that something
    keeps zmlx from working.
    """
    console = Console(stderr=True)
    try:
        with console.status("looking"):
            facts = examine(model)
    except LoadError as error:
        print(f"zmlx doctor: {error}", file=sys.stderr)
        sys.exit(2)
    found = findings(facts)
    if as_json:
        print(json.dumps({**facts, "findings": [asdict(finding) for finding in found]}, indent=1))
    else:
        _show(facts, found)
    sys.exit(1 if any(finding.severity == "error" for finding in found) else 0)


def _show(facts: Facts, found: list[Finding]) -> None:
    console = wide_console()
    for title, rows in _sections(facts).items():
        console.print(Text(title, style="bold"))
        table = Table(show_header=False, box=None, padding=(0, 1, 0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(name, Text(value or "-"))
        console.print(table)
    _show_variables(facts, console)
    if "model" in facts and facts["model"].get("summary"):
        console.print(Text("plan", style="bold"))
        console.print(Text(facts["model"]["summary"]), soft_wrap=True)
    console.print(Text("why is my model not faster" if "model" in facts else "findings", "bold"))
    for finding in found:
        console.print(Text(f"  {finding.severity}: ", _STYLES[finding.severity]), end="")
        console.print(Text(finding.what), soft_wrap=True)
        if finding.advice:
            console.print(Text(f"    -> {finding.advice}"), soft_wrap=True)
    if not found:
        console.print("  nothing is wrong")


def _sections(facts: Facts) -> dict[str, list[tuple[str, str]]]:
    """Return title -> rows of name and text."""
    hardware, python, native = facts["hardware"], facts["python"], facts["native"]
    profile, backend, hook = facts["profile"], facts["backend"], facts["hook"]
    return {
        "environment": [
            ("python", f"{facts['versions']['python']} ({python['executable']})"),
            ("os", facts["os"]),
            ("cpu", hardware["cpu"]),
            ("features", " ".join(hardware["cpu_features"])),
            ("cores", f"{hardware['physical_cores']} physical, {hardware['usable_cores']} usable"),
            ("memory", f"{hardware['memory_bytes'] / 2**30:.1f} GiB"),
            ("open files", _limit(python["open_files"])),
            ("PYTHONPATH", python["pythonpath"]),
            ("Python's flags", " ".join(python["flags"])),
        ],
        "versions": [(name, value) for name, value in facts["versions"].items()],
        "zmlx": [
            ("backend", _joined(backend["name"], backend["device"], backend["error"])),
            ("CPU kernels", _joined(native["state"], native.get("reason"), native.get("library"))),
            ("instructions", _joined(native.get("kernels", ""), *native.get("available", []))),
            ("threads", str(native.get("threads") or "")),
            ("profile", profile["error"] or f"{profile['name']} (from {profile['source']})"),
            ("hook", "alive" if hook["alive"] else f"not alive: {hook['reason']}"),
        ],
    }


def _show_variables(facts: Facts, console: Console) -> None:
    console.print(Text("variables", style="bold"))
    table = Table(box=None, padding=(0, 1, 0, 2))
    for name in ("name", "value", "default", "meaning"):
        table.add_column(name, no_wrap=name == "name", overflow="fold")
    for row in facts["variables"]:
        value = "-" if row["value"] is None else row["value"]
        table.add_row(row["name"], Text(value), Text(row["default"]), Text(row["meaning"]))
    console.print(table)


def _limit(files: int) -> str:
    return {-1: "no limit", 0: "unknown"}.get(files, str(files))


def _joined(first: str, *others: Any) -> str:
    present = [str(other) for other in others if other]
    return f"{first} ({'; '.join(present)})" if present else first
