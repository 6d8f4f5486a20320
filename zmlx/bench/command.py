"""`zmlx bench`: measure models, count their kernels, read capsules."""

from __future__ import annotations

import click

from zmlx.lazygroup import LazyGroup

#: subcommand -> (module:attribute, one-line help); reading a capsule needs no MLX
COMMANDS: dict[str, tuple[str, str]] = {
    "model": ("zmlx.bench.model:model", "Measure models stock and patched, in turn."),
    "dispatches": ("zmlx.bench.dispatches:command", "Count the kernels that a token launches."),
    "report": ("zmlx.bench.report:command", "Print the table of a capsule."),
}


@click.group(
    name="bench",
    cls=LazyGroup,
    table=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"]},
)
def bench() -> None:
    """Measure models, count their kernels, and read the capsules that benchmarks write."""
