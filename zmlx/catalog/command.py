"""`zmlx kernels`: the catalog as a table, a kernel as it is compiled, its samples run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import click
import mlx.core as mx
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from zmlx.backend import current, for_kernels
from zmlx.backend.definition import Definition
from zmlx.catalog import page as pages
from zmlx.catalog.configurations import configurations
from zmlx.catalog.run import Run
from zmlx.catalog.run import run as run_kernel
from zmlx.console import wide_console
from zmlx.kernels.calling import bound
from zmlx.kernels.spec import SOURCE_BACKENDS, KernelSpec, Sample, all_specs
from zmlx_autopatch.variables import VariableError


class UsageProblem(click.ClickException):
    """What was asked for is not there."""

    exit_code = 2


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def kernels() -> None:
    """List, show or run the kernels of the catalog."""


@kernels.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--markdown", is_flag=True, help="Print docs/KERNELS.md.")
@click.option("--domain", help="Only kernels of this domain, such as norms.")
def list_command(as_json: bool, markdown: bool, domain: str | None) -> None:
    """List every kernel: what it computes, how it runs, what it promises."""
    specs = all_specs()
    domains = sorted({spec.domain for spec in specs.values()})
    if domain is not None and domain not in domains:
        raise UsageProblem(f"no kernel is of domain {domain!r}; there are {', '.join(domains)}")
    specs = {name: spec for name, spec in specs.items() if domain in (None, spec.domain)}
    if as_json:
        click.echo(json.dumps([facts(spec) for spec in specs.values()], indent=1))
        return
    if markdown:
        click.echo(pages.page(specs), nl=False)
        return
    grid = Table("kernel", "domain", "formula", "runs as", "contract", "gradient")
    for spec in specs.values():
        grid.add_row(
            *(Text(cell) for cell in (spec.name, spec.domain, spec.formula)),
            ", ".join(pages.ways(spec)),
            pages.contracts(spec),
            pages.gradient(spec),
        )
    wide_console().print(grid)


def facts(spec: KernelSpec) -> dict[str, Any]:
    """Return what is known of a kernel, for people and for machines."""
    return {
        "name": spec.name,
        "domain": spec.domain,
        "formula": spec.formula,
        "shapes": list(spec.shapes),
        "runs_as": pages.ways(spec),
        "contract": dict(spec.contract),
        "gradient": pages.gradient(spec),
        "tolerance": dict(spec.tolerance),
    }


@kernels.command()
@click.argument("name")
@click.option(
    "--backend",
    type=click.Choice(SOURCE_BACKENDS),
    help="Whose text to show; the default is the one that runs here, or metal.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(name: str, backend: str | None, as_json: bool) -> None:
    """Show kernel NAME: its formula, arguments and contract, and the text that is compiled."""
    spec = find(name)
    known = facts(spec)
    if spec.definition is not None or spec.fused is not None:
        here = current()
        backend = backend or (here if here in SOURCE_BACKENDS else "metal")
        known |= {"backend": backend, "text": compiled_text(spec, backend)}
    elif backend is not None:
        raise UsageProblem(f"{name} has no source; it runs as {', '.join(pages.ways(spec))}")
    if as_json:
        click.echo(json.dumps(known, indent=1))
        return
    text = known.pop("text", None)
    grid = Table(show_header=False, box=None)
    for key, value in known.items():
        if isinstance(value, dict):
            value = "; ".join(f"{inner}: {v}" for inner, v in value.items())
        lines = [str(line) for line in value] if isinstance(value, list) else [str(value)]
        for number, line in enumerate(lines):
            grid.add_row("" if number else key.replace("_", " "), Text(line))
    wide_console().print(grid)
    if text is not None:
        click.echo(f"\n{text}", nl=False)


def compiled_text(spec: KernelSpec, backend: str) -> str:
    """Return the text that a backend compiles for the first sample of a kernel."""
    sample = spec.sample(**configurations(spec)[0])
    mx.eval([arg for arg in sample.args if isinstance(arg, mx.array)])
    text = import_module(f"zmlx.backend.{backend}").text
    if spec.fused is not None:
        launches = _launches(spec.fused, sample)
        return "\n".join(str(text(definition, **given)) for definition, given in launches)
    assert spec.definition is not None
    return str(text(spec.definition, **bound(spec, sample.kwargs).arguments(sample.args)))


def _launches(fused: Callable[..., Any], sample: Sample) -> list[tuple[Definition, dict[str, Any]]]:
    """Return what a call would launch, each with the arguments of its launch."""
    found: list[tuple[Definition, dict[str, Any]]] = []

    def compile(definition: Definition) -> Callable[..., list[mx.array]]:
        def launch(**given: Any) -> list[mx.array]:
            found.append((definition, given))
            outputs = zip(given["output_shapes"], given["output_dtypes"], strict=True)
            return [mx.zeros(shape, dtype) for shape, dtype in outputs]

        return launch

    fused(compile, *sample.args, **sample.kwargs)
    return found


def find(name: str) -> KernelSpec:
    """Return a kernel by its name.

    Raises:
        UsageProblem: there is none.
    """
    specs = all_specs()
    if name not in specs:
        raise UsageProblem(f"no kernel is named {name!r}; `zmlx kernels list` has their names")
    return specs[name]


@kernels.command()
@click.argument("name")
@click.option(
    "--backend",
    type=click.Choice((*SOURCE_BACKENDS, "cpu")),
    help="Where to run; the default is the backend in force.",
)
@click.option("--repeats", type=click.IntRange(min=1), default=5, help="Timed calls of each [5].")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def run(name: str, backend: str | None, repeats: int, as_json: bool) -> None:
    """Run kernel NAME on its samples against its reference.

    Exit code 1 says that a result is wrong, 2 that it cannot run here. Samples are small: times
    are of a launch and not of memory traffic.
    """
    spec = find(name)
    backend = backend or in_force(spec)
    if backend not in spec.backends():
        raise UsageProblem(f"{name} has no {backend} kernel; it has {', '.join(spec.backends())}")
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=len(configurations(spec)))
        runs = run_kernel(spec, backend, repeats=repeats, advance=lambda: progress.advance(task))
    wrong = [run for run in runs if run.fault]
    if as_json:
        result = {"name": name, "backend": backend, "runs": [run.to_json() for run in runs]}
        click.echo(json.dumps(result, indent=1))
    else:
        wide_console().print(_table(name, backend, runs))
    sys.exit(1 if wrong else 0)


def in_force(spec: KernelSpec) -> str:
    """Return the backend on which a kernel runs now.

    Raises:
        UsageProblem: it is the reference, to which there is nothing to compare.
    """
    try:
        backend = for_kernels(has_reference=True)
    except VariableError as error:
        raise UsageProblem(str(error)) from error
    if backend == "reference" and spec.native:
        return "cpu"
    if backend == "reference":
        raise UsageProblem(
            f"{spec.name} runs as its reference here, which is what it is compared to; "
            "take --backend emulator"
        )
    return backend


def _table(name: str, backend: str, runs: list[Run]) -> Table:
    grid = Table("sample", "error", "allowed", "kernel", "reference", "result")
    grid.title = f"{name} on {backend}"
    for run in runs:
        grid.add_row(
            Text(run.configuration),
            f"{run.error:.1e}",
            f"{run.allowed:.0e}",
            _microseconds(run.kernel_us),
            _microseconds(run.reference_us),
            Text(run.fault or "ok"),
        )
    return grid


def _microseconds(time: float | None) -> str:
    return "" if time is None else f"{time:.0f} us"
