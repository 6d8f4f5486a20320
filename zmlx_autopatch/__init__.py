"""The start-up hook of zmlx: models loaded in this process are recognised and patched.

`bootstrap` is what `zmlx run` has the interpreter call; `install` is the same for a notebook:

    import zmlx_autopatch
    zmlx_autopatch.install()

Importing this package loads `os` and `sys` and nothing else; zmlx itself is imported when a model
has been loaded, and wrapt when the library that loads it is imported.
"""

from __future__ import annotations

__all__ = ["bootstrap", "install", "state", "uninstall"]


def install() -> bool:
    """Watch the loaders of models in this process; a second call does nothing.

    Returns:
        Whether the hook is installed: not so where ZMLX_AUTOPATCH is 0.

    Raises:
        zmlx_autopatch.variables.VariableError: ZMLX_AUTOPATCH is neither 0 nor 1.
    """
    from zmlx_autopatch import hook  # noqa: PLC0415 - start-up pays for what it uses

    return hook.install()


def uninstall() -> None:
    """Watch no more, and give the loaders back; models that were patched stay so."""
    from zmlx_autopatch import hook  # noqa: PLC0415

    hook.uninstall()


def bootstrap() -> None:
    """Install the hook at the start of an interpreter, for the start-up file, which reports errors.

    It takes no arguments and never will: the start-up file may be of another version of zmlx.
    """
    install()


def state() -> dict[str, object]:
    """Return what the hook has seen in this process, as data that `json` can write.

    Keys: `installed` (bool), `targets` (modules waited for), `seen` (those imported), `wrapped`
    (loaders), `lacking` (loader -> why it is not wrapped), `loads`, `patched` (modules of models),
    `error` (the last one, or empty).
    """
    from zmlx_autopatch.record import STATE  # noqa: PLC0415

    return STATE.as_dict()
