"""Tuning results in a file of the user's choice, to carry them to another machine of the kind."""

from __future__ import annotations

import os
from pathlib import Path

from zmlx.tuning.store import default_store, read_results, write_results


def save_autotune_cache(path: str | os.PathLike[str] | None = None) -> Path:
    """Write the tuning results that are remembered here to a file.

    Results are on disk as soon as they are found; this is for a copy of them. Results that are in
    the file already stay, unless there are newer ones.

    Args:
        path: the file; None for the one in ZMLX_CACHE_DIR, where they are already.

    Returns:
        The file.

    Raises:
        OSError: it cannot be written.
        ValueError: there is a file with something else in it.
    """
    store = default_store()
    if path is None:
        return store.file
    file = Path(path).expanduser()
    write_results(file, [*(read_results(file) if file.exists() else []), *store.all()])
    return file


def load_autotune_cache(path: str | os.PathLike[str] | None = None) -> int:
    """Remember the results in a file that `save_autotune_cache` wrote.

    Those of other devices and versions are remembered too and used where they belong.

    Args:
        path: the file; None for the one in ZMLX_CACHE_DIR, which is read anew.

    Returns:
        How many results the file holds.

    Raises:
        OSError: it cannot be read; a missing file too, unless it is the one in ZMLX_CACHE_DIR.
        ValueError: a line of it is no tuning result.
    """
    store = default_store()
    if path is None:
        return len(store.all())
    results = read_results(Path(path).expanduser())
    store.add(*results)
    return len(results)
