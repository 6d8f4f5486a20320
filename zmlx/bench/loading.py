"""Load a checkpoint for a tool, with errors that a user can act on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.nn as nn


class LoadError(RuntimeError):
    """A model cannot be loaded; the text is one line that names it and the reason."""


def load_checkpoint(model: str, *, lazy: bool = False) -> tuple[nn.Module, Any]:
    """Load a model and its tokenizer as mlx-lm does.

    Args:
        model: a checkpoint folder, or a name that mlx-lm fetches from a hub.
        lazy: leave the weights on disk until they are used.

    Raises:
        LoadError: the folder is no checkpoint, or mlx-lm cannot load it.
    """
    folder = Path(model).expanduser()
    looks_local = model.startswith((".", "/", "~")) or folder.exists()
    if looks_local and not (folder / "config.json").is_file():
        raise LoadError(
            f"{model}: no config.json there; give the folder of an MLX checkpoint or a hub name"
        )
    # After that check, because importing mlx-lm takes seconds.
    from mlx_lm import load  # noqa: PLC0415

    try:
        loaded: Any = load(str(folder) if looks_local else model, lazy=lazy)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise LoadError(f"{model}: mlx-lm cannot load it: {lines[0]}") from error
    network, tokenizer = loaded[:2]
    return network, tokenizer
