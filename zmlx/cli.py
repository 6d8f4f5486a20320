"""The `zmlx` command: a table of subcommands, each imported only when it is called.

`zmlx run` must start at once and must not import MLX, so nothing heavy is imported here.
"""

from __future__ import annotations

import click

from zmlx.lazygroup import LazyGroup
from zmlx.version import __version__

#: subcommand -> (module:attribute, one-line help)
COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("zmlx_autopatch.launch.command:run", "Start a command whose models are patched."),
    "doctor": ("zmlx.doctor.command:doctor", "Explain this environment and what zmlx does in it."),
    "validate": ("zmlx.validate.command:validate", "Compare stock and patched on one model."),
    "bench": ("zmlx.bench.command:bench", "Measure models; read capsules."),
    "profile": ("zmlx.profile.command:profile", "Show the release policy in force."),
    "family": ("zmlx.family.command:family", "Explain how a model is recognised."),
    "kernels": ("zmlx.catalog.command:kernels", "List, show or run the kernels of the catalog."),
    "native": ("zmlx.backend.cpu.command:native", "Build, describe or clear the CPU kernels."),
    "tune": ("zmlx.tuning.command:tune", "List, show or clear the results of tuning."),
}


@click.group(
    cls=LazyGroup, table=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, prog_name="zmlx")
def main() -> None:
    """Drop-in runtime for mlx-lm: fused kernels with no code change."""
