"""`zmlx bench`: count kernels, read capsules."""

from __future__ import annotations

import click

from zmlx.bench.dispatches import command as dispatches_command
from zmlx.bench.report import command as report_command


@click.group(name="bench", context_settings={"help_option_names": ["-h", "--help"]})
def bench() -> None:
    """Count a model's kernels, and read the capsules that benchmarks write."""


bench.add_command(dispatches_command)
bench.add_command(report_command)
