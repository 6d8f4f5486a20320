"""The environment of the command: our folder on PYTHONPATH, and the options as variables."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
#: Where the start-up file is: inside of the installed package, or beside it in a checkout.
_SITES = (_PACKAGE / "_site", _PACKAGE.parent / "sitecustomize")


def site_folder() -> str:
    """Return the folder that holds sitecustomize.py.

    Raises:
        FileNotFoundError: the installation lacks it.
    """
    for folder in _SITES:
        if (folder / "sitecustomize.py").is_file():
            return str(folder)
    raise FileNotFoundError(f"zmlx is not installed whole: no sitecustomize.py in {_SITES[0]}")


def python_path(current: str | None) -> str:
    """Return PYTHONPATH with our folder first and once.

    Other entries stay as they are, also empty ones, which stand for the current folder.
    """
    ours = site_folder()
    entries = current.split(os.pathsep) if current else []
    kept = [entry for entry in entries if not (entry and _same(entry, ours))]
    return os.pathsep.join([ours, *kept])


#: glibc's switch for memory in large pages where the system leaves that to programs (`madvise`).
_LARGE_PAGES = "glibc.malloc.hugetlb"


def tunables(current: str | None) -> str:
    """Return GLIBC_TUNABLES with large pages for large blocks, unless the user has decided.

    Weights are read from end to end for every token; with pages of 4 KiB a processor then looks
    addresses up all the time. It has to be asked for before a process starts.
    """
    if not current:
        return f"{_LARGE_PAGES}=1"
    names = [entry.partition("=")[0] for entry in current.split(":")]
    return current if _LARGE_PAGES in names else f"{current}:{_LARGE_PAGES}=1"


def command_environment(
    environ: Mapping[str, str], *, profile: str | None, quiet: bool, strict: bool
) -> dict[str, str]:
    """Return the environment in which the command runs.

    Options that are not given leave what is set: the innermost `zmlx run` wins.
    """
    changed = {**environ, "PYTHONPATH": python_path(environ.get("PYTHONPATH"))}
    if sys.platform == "linux" and environ.get("ZMLX_AUTOPATCH") != "0":
        changed["GLIBC_TUNABLES"] = tunables(environ.get("GLIBC_TUNABLES"))
    if profile is not None:
        changed["ZMLX_PROFILE"] = profile
    if quiet:
        changed["ZMLX_LOG"] = "off"
    if strict:
        changed["ZMLX_STRICT"] = "1"
    return changed


def _same(one: str, other: str) -> bool:
    return os.path.normcase(os.path.abspath(one)) == os.path.normcase(os.path.abspath(other))
