"""`zmlx native`: build, describe or clear the native CPU kernels."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from zmlx.backend.cpu import native as library


@click.group()
def native() -> None:
    """Build, describe or clear the CPU kernels."""


@native.command()
@click.option(
    "--into",
    type=click.Path(file_okay=False, path_type=Path),
    help="Put the library into this folder, to ship it; by default into the cache.",
)
def build(into: Path | None) -> None:
    """Compile the kernels now, if they are not there yet; print the library's path."""
    started = time.perf_counter()
    try:
        if into is None:
            library.forget()
            path = str(library.load().__file__)
        else:
            into.mkdir(parents=True, exist_ok=True)
            path = str(library.put_into(into))
    except (library.NativeUnavailable, OSError) as refusal:
        raise click.ClickException(str(refusal)) from refusal
    click.echo(path)
    click.echo(f"zmlx: ready after {time.perf_counter() - started:.1f} s", err=True)


@native.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(as_json: bool) -> None:
    """Say which kernels there are, where, and how they were built; builds nothing."""
    facts = describe()
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    for key, value in facts.items():
        text = ", ".join(value) if isinstance(value, list) else str(value)
        click.echo(f"{key:<12}{text}")


@native.command()
def clear() -> None:
    """Remove the compiled kernels from the cache folder."""
    click.echo(f"removed {library.clear()} from {library.cache_folder()}")


def describe() -> dict[str, object]:
    """Return what is known of the library, without building it.

    The keys are `cache`; `library`, `built`, `compiler` and `version` unless this machine can have
    no library; `bundled`, why a library in the package is not used; those of the library's own
    `info()` when it is built; and `unavailable`, the reason, when something is missing.
    """
    facts: dict[str, object] = {"cache": str(library.cache_folder())}
    try:
        found = library.find()
        facts |= {"library": str(found.library), "built": found.present}
        facts |= {"compiler": found.compiler, "version": found.version}
        if found.bundled:
            facts["bundled"] = found.bundled
        if found.present:
            facts |= library.load().info()
    except library.NativeUnavailable as refusal:
        facts["unavailable"] = str(refusal)
    return facts
