"""`zmlx native`: build, describe or clear the native CPU kernels."""

from __future__ import annotations

import json
import sys
import time

import click
from rich.console import Console
from rich.table import Table

from zmlx.backend.cpu import native as library


@click.group()
def native() -> None:
    """Build, describe or clear the CPU kernels."""


@native.command()
def build() -> None:
    """Compile the kernels now, if they are not there yet."""
    started = time.perf_counter()
    try:
        module = library.load()
    except library.NativeUnavailable as refusal:
        raise click.ClickException(str(refusal)) from refusal
    click.echo(f"{module.__file__}")
    click.echo(f"zmlx: ready after {time.perf_counter() - started:.1f} s", err=True)


@native.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(as_json: bool) -> None:
    """Say which kernels there are, where, and how they were built."""
    facts = describe()
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    table = Table(show_header=False, box=None)
    for key, value in facts.items():
        table.add_row(key, ", ".join(value) if isinstance(value, list) else str(value))
    Console(file=sys.stdout, soft_wrap=True).print(table)


@native.command()
def clear() -> None:
    """Remove the compiled kernels from the cache folder."""
    click.echo(f"removed {library.clear()} from {library.cache_folder()}")


def describe() -> dict[str, object]:
    """Return what is known of the library, without building it."""
    facts: dict[str, object] = {"cache": str(library.cache_folder())}
    try:
        spec = library.describe()
        facts |= {"compiler": spec.compiler, "version": spec.version, "key": spec.key}
        facts |= {"library": str(spec.library), "built": spec.library.is_file()}
        if spec.library.is_file() or library.BUNDLED.is_dir():
            module = library.load()
            facts |= {
                "loaded": str(module.__file__),
                "kernels": module.kernels(),
                "available": module.available_kernels(),
                "threads": module.num_threads(),
            }
    except library.NativeUnavailable as refusal:
        facts["unavailable"] = str(refusal)
    return facts
