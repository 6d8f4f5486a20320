"""The command `zmlx run`.

It becomes the user's command (exec), rather than starting it as a child: process id, exit code,
signals, terminal and argument zero are then what they are without zmlx. It imports neither MLX nor
mlx-lm: importing mlx-lm lowers the limit of open files, for good, and takes seconds.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import NoReturn

import click

from zmlx.profile import ProfileError, resolve_policy
from zmlx_autopatch.launch.environment import command_environment
from zmlx_autopatch.launch.resolve import (
    NotExecutable,
    NotFound,
    foreign_interpreter,
    is_installed,
    resolve,
    startup_is_disabled,
)
from zmlx_autopatch.speech import say

NOT_FOUND, NOT_EXECUTABLE = 127, 126


@click.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": False})
@click.option("--profile", metavar="P", help="Release profile: stable, fast, edge or your own.")
@click.option("--quiet", is_flag=True, help="Print nothing, not even the line about a model.")
@click.option("--strict", is_flag=True, help="Fail where a model would stay as it was loaded.")
@click.argument("command")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(
    profile: str | None, quiet: bool, strict: bool, command: str, arguments: tuple[str, ...]
) -> NoReturn:
    """Start COMMAND; models that it loads run fused kernels.

    COMMAND is a console script (mlx_lm.generate), a module, a Python file, or a program. What
    stands after it is passed on as it is.
    """
    if profile is not None:
        try:
            resolve_policy(profile)
        except ProfileError as error:
            raise click.UsageError(str(error)) from error
    environment = command_environment(os.environ, profile=profile, quiet=quiet, strict=strict)
    try:
        argv = resolve(command, _with_ranks(command, list(arguments), environment))
    except NotFound as error:
        _stop(str(error), NOT_FOUND)
    except NotExecutable as error:
        _stop(str(error), NOT_EXECUTABLE)
    if not quiet:
        _warn(argv)
    _become(argv, environment)


def _warn(argv: list[str]) -> None:
    flag = startup_is_disabled(argv)
    if flag is not None:
        say(f"zmlx: python {flag} runs without start-up files: models stay as they are loaded")
    if not is_installed("zmlx_autopatch"):
        say(
            "zmlx: zmlx is in the current folder, but not installed: models stay as they are loaded"
        )
    other = foreign_interpreter(argv)
    if other is not None:
        say(f"zmlx: {argv[0]} is run by {other}: install zmlx there, or its models stay stock")


def _become(argv: list[str], environment: dict[str, str]) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    try:
        os.execve(argv[0], argv, environment)
    except OSError as error:
        _stop(f"{argv[0]}: {error.strerror}", NOT_EXECUTABLE)


def _with_ranks(command: str, arguments: list[str], environment: dict[str, str]) -> list[str]:
    """Have `mlx.launch` give our variables to the ranks that it starts on other machines."""
    if os.path.basename(command) != "mlx.launch":
        return arguments
    names = ["PYTHONPATH", *sorted(name for name in environment if name.startswith("ZMLX_"))]
    ours = [part for name in names for part in ("--env", f"{name}={environment[name]}")]
    return [*ours, *arguments]


def _stop(reason: str, code: int) -> NoReturn:
    print(f"zmlx run: {reason}", file=sys.stderr)
    sys.exit(code)
