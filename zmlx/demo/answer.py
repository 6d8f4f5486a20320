"""Ask a question through mlx-lm's own command, with and without `zmlx run` before it."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

QUESTION = "What is the capital of France?"
#: the line that mlx-lm prints before and after the text
_RULE = "=" * 10


class CommandFailed(RuntimeError):
    """The command did not end well; the text holds the end of its stderr."""


@dataclass(frozen=True)
class Answer:
    """What a command printed.

    Attributes:
        command: the command line as a user types it.
        text: the generated text.
        messages: lines of stderr that zmlx wrote.
    """

    command: str
    text: str
    messages: tuple[str, ...]


def ask(model: Path, *, patched: bool, question: str = QUESTION, max_tokens: int = 32) -> Answer:
    """Generate an answer greedily with `mlx_lm.generate`, in a process of its own.

    Args:
        model: a checkpoint folder.
        patched: whether `zmlx run` starts the command.
        question: the user's message; the model's chat template is applied.
        max_tokens: the longest answer.

    Raises:
        CommandFailed: the command's exit code is not 0, or it printed no text.
    """
    options = ["--model", str(model), "--prompt", question, "--temp", "0"]
    options += ["--max-tokens", str(max_tokens)]
    generate, start = _generate(), _zmlx()
    command = [*start, "run", *generate, *options] if patched else [*generate, *options]
    shown = ["zmlx", "run"] if patched else []
    line = shlex.join([*shown, "mlx_lm.generate", *options])
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    parts = ran.stdout.split(_RULE)
    if ran.returncode or len(parts) < 3:
        end = "\n".join(ran.stderr.splitlines()[-5:])
        raise CommandFailed(f"{line}\nexit code {ran.returncode}\n{end}")
    messages = tuple(line for line in ran.stderr.splitlines() if line.startswith("zmlx:"))
    return Answer(line, parts[1].strip(), messages)


def _generate() -> list[str]:
    """Return the console script of this environment, or the module where there is none."""
    script = _script("mlx_lm.generate")
    return [script] if script else [sys.executable, "-m", "mlx_lm", "generate"]


def _zmlx() -> list[str]:
    script = _script("zmlx")
    return [script] if script else [sys.executable, "-m", "zmlx"]


def _script(name: str) -> str | None:
    return shutil.which(name, path=str(Path(sys.executable).parent))
