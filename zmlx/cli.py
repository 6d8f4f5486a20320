"""The `zmlx` command: a table of subcommands, each imported only when it is called.

`zmlx run` must start at once and must not import MLX, so nothing heavy is imported here.
"""

from __future__ import annotations

from importlib import import_module

import click

from zmlx.version import __version__

#: subcommand -> (module:attribute, one-line help)
COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("zmlx_autopatch.launch.command:run", "Start a command whose models are patched."),
    "doctor": ("zmlx.doctor.command:doctor", "Explain this environment and what zmlx does in it."),
    "validate": ("zmlx.validate.command:validate", "Compare stock and patched on one model."),
    "bench": ("zmlx.bench.command:bench", "Read the capsules that benchmarks write."),
    "profile": ("zmlx.profile.command:profile", "Show the release policy in force."),
    "family": ("zmlx.family.command:family", "Explain how a model is recognised."),
    "kernels": ("zmlx.catalog.command:kernels", "List, show or run the kernels of the catalog."),
    "native": ("zmlx.backend.cpu.command:native", "Build, describe or clear the CPU kernels."),
    "tune": ("zmlx.tuning.command:tune", "List, show or clear the results of tuning."),
}


class LazyGroup(click.Group):
    """A click group that imports a subcommand when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one subcommand, or None when there is no such name."""
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name][0].split(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of subcommands without importing any of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry[1]) for name, entry in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="zmlx")
def main() -> None:
    """Drop-in runtime for mlx-lm: fused kernels with no code change."""
