"""`zmlx tune`: the results that tuning remembers on disk."""

from __future__ import annotations

import json
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from zmlx.console import wide_console
from zmlx.tuning.store import Result, default_store

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def tune() -> None:
    """List, show or clear the results of tuning."""


@tune.command("list")
@_json
def list_results(as_json: bool) -> None:
    """List what was tuned, with the choice that was found."""
    results = default_store().all()
    if as_json:
        click.echo(json.dumps([result.to_json() for result in results], indent=2))
        return
    if not results:
        click.echo(f"zmlx: nothing is tuned yet in {default_store().file}", err=True)
        return
    table = Table("kernel", "inputs", "best", "ms", "of", "device", "backend", "mlx", "zmlx")
    for result in results:
        where = result.subject.machine
        cells = (
            result.subject.kernel,
            result.subject.inputs,
            result.best,
            f"{result.timings_ms[result.best]:.4g}",
            str(len(result.subject.candidates)),
            where.device or "any",
            where.backend,
            where.mlx,
            where.zmlx,
        )
        table.add_row(*map(Text, cells))
    wide_console().print(table)


@tune.command()
@click.argument("kernel")
@_json
def show(kernel: str, as_json: bool) -> None:
    """Show every candidate's time, or why it was left out, for the kernels of that name."""
    results = [r for r in default_store().all() if r.subject.kernel == kernel]
    if not results:
        names = sorted({result.subject.kernel for result in default_store().all()})
        known = f"tuned are: {', '.join(names)}" if names else "nothing is tuned yet"
        raise click.ClickException(f"no results for {kernel!r}; {known}")
    if as_json:
        click.echo(json.dumps([result.to_json() for result in results], indent=2))
        return
    for result in results:
        where = result.subject.machine
        table = Table(
            "candidate",
            "ms",
            "",
            title=Text(f"{kernel}: {result.subject.inputs}"),
            caption=Text(
                f"{where.device or 'any device'}, {where.backend}, mlx {where.mlx}, "
                f"zmlx {where.zmlx}, content {result.subject.content}"
            ),
            title_justify="left",
            caption_justify="left",
        )
        for row in _rows(result):
            table.add_row(*map(Text, row))
        wide_console().print(table)


@tune.command()
@_json
def clear(as_json: bool) -> None:
    """Remove every result; kernels are tuned again when they are next called."""
    store = default_store()
    try:
        count = store.clear()
    except OSError as error:
        raise click.ClickException(f"{store.file}: {error.strerror}") from error
    if as_json:
        click.echo(json.dumps({"removed": count, "file": str(store.file)}))
    else:
        click.echo(f"removed {count} from {store.file}")


def _rows(result: Result) -> list[tuple[Any, ...]]:
    """Return a row for each candidate: label, time, and whether it is the best or why it is out."""
    return [
        (
            label,
            f"{result.timings_ms[label]:.4g}" if label in result.timings_ms else "",
            "best" if label == result.best else result.dropped.get(label, ""),
        )
        for label in result.subject.candidates
    ]
