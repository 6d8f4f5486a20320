"""`zmlx bench`: read capsules."""

from __future__ import annotations

import click

from zmlx.bench.report import command as report_command


@click.group(name="bench", context_settings={"help_option_names": ["-h", "--help"]})
def bench() -> None:
    """Read the capsules that benchmarks write."""


bench.add_command(report_command)
