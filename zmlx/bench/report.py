"""`zmlx bench report CAPSULE`: what a capsule holds, as a table."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from zmlx.bench.capsule import Capsule, CapsuleError, read
from zmlx.console import wide_console

#: Columns of text that the table with the spread of the runs takes.
_WIDE = 100


def table(capsule: Capsule, *, spread: bool = True) -> Table:
    """Return a table with a row for each subject and quantity.

    A column for each variant shows the median and, in brackets, the smallest and largest run; the
    last column the ratio of the last variant to the first, above 1 when the last one is better.

    Args:
        capsule: what to show.
        spread: whether the smallest and largest run are shown.
    """
    variants = capsule.variants()
    result = Table(title=capsule.title, title_justify="left")
    for name in ("", "median of the runs"):
        result.add_column(name, no_wrap=True)
    for name in (*variants, *([f"{variants[-1]} / {variants[0]}"] if len(variants) > 1 else [])):
        result.add_column(name, justify="right", no_wrap=True)
    for subject in capsule.subjects():
        label = subject
        for quantity, (unit, more) in capsule.quantities.items():
            cells = [_cell(capsule.values(subject, v, quantity), unit, spread) for v in variants]
            if not any(cells):
                continue
            row = [label, f"{quantity.replace('_', ' ')}, {_shown_unit(unit)}", *cells]
            if len(variants) > 1:
                row.append(_ratio(capsule, subject, variants, quantity, more))
            result.add_row(*row)
            label = ""
        result.add_section()
    return result


def environment_lines(capsule: Capsule) -> list[str]:
    """Return what the capsule ran on, in three lines."""
    hardware, versions = capsule.environment["hardware"], capsule.environment["versions"]
    gib = hardware.get("memory_bytes", 0) / 2**30
    cores = f"{hardware.get('usable_cores', '?')} usable cores, {gib:.0f} GiB"
    gpu = f", {hardware['accelerator']}" if hardware.get("accelerator") else ""
    software = ", ".join(f"{name} {value}" for name, value in versions.items() if value)
    return [
        f"{hardware.get('cpu', '?')}, {cores}{gpu}; {capsule.environment['os']}",
        software,
        f"{capsule.created}: {capsule.command}",
    ]


def report(path: str | Path) -> None:
    """Print a capsule to stdout.

    Args:
        path: the capsule's file.

    Raises:
        CapsuleError: it is not a capsule.
    """
    show(read(Path(path)))


def show(capsule: Capsule, console: Console | None = None) -> None:
    """Print a capsule's table, notes and environment; by default to stdout."""
    console = console or wide_console()
    console.print(table(capsule, spread=console.width >= _WIDE))
    for line in (*capsule.notes, *environment_lines(capsule)):
        console.print(line, markup=False, soft_wrap=True)


def main() -> None:
    """Run `python -m zmlx.bench.report`."""
    command(prog_name="python -m zmlx.bench.report")


@click.command(name="report")
@click.argument("capsule", type=click.Path(path_type=Path))
def command(capsule: Path) -> None:
    """Print the table of a CAPSULE file: medians of all runs, with their spread."""
    try:
        report(capsule)
    except CapsuleError as error:
        print(f"zmlx bench report: {error}", file=sys.stderr)
        sys.exit(2)


def _cell(values: list[float], unit: str, spread: bool) -> str:
    if not values:
        return ""
    shown = [_shown(value, unit) for value in values]
    middle = _digits(statistics.median(shown))
    if not spread or len(shown) == 1:
        return middle
    return f"{middle} ({_digits(min(shown))} - {_digits(max(shown))})"


def _ratio(capsule: Capsule, subject: str, variants: list[str], quantity: str, more: bool) -> str:
    first = capsule.median(subject, variants[0], quantity)
    last = capsule.median(subject, variants[-1], quantity)
    if not first or not last:
        return ""
    return f"{last / first if more else first / last:.2f}x"


def _shown(value: float, unit: str) -> float:
    return value / 2**20 if unit == "bytes" else value


def _shown_unit(unit: str) -> str:
    return "MiB" if unit == "bytes" else unit


def _digits(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


if __name__ == "__main__":
    main()
