"""Every environment variable of zmlx, in one table, read here and nowhere else.

Imported by the start-up bootstrap, so it may import `os` and nothing heavier.
`zmlx doctor` and docs/VARIABLES.md print this table.
"""

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

#: name -> (values, default, meaning)
TABLE: "dict[str, tuple[str, str, str]]" = {
    "ZMLX_AUTOPATCH": ("0 or 1", "1", "0 leaves every model as it was loaded"),
    "ZMLX_PROFILE": ("a profile's name", "", "release policy; `zmlx run --profile` sets it"),
    "ZMLX_STRICT": ("0 or 1", "0", "1 raises where zmlx would keep the stock model and say why"),
    "ZMLX_LOG": ("off, line or debug", "line", "what goes to stderr when a model is loaded"),
    "ZMLX_CACHE_DIR": ("a folder", "~/.cache/zmlx", "compiled kernels and tuning results"),
    "ZMLX_BACKEND": (
        "auto, metal, cuda, emulator or reference",
        "auto",
        "where kernels with a Metal source run; auto: on MLX's device, on CPUs their references",
    ),
    "ZMLX_NUM_THREADS": ("a number", "physical cores", "threads of the native CPU kernels"),
    "ZMLX_QWEN_FUSED_SWIGLU": ("0 or 1", "", "alias of option moe_mlp.fused_swiglu, family qwen"),
    "ZMLX_QWEN_ROUTER_ARGPARTITION_LOGITS": (
        "0 or 1",
        "",
        "alias of option moe_mlp.router_argpartition_logits, family qwen",
    ),
    "ZMLX_QWEN_ROUTER_ARGPARTITION_LOGITS_TOPK": (
        "0 or 1",
        "",
        "alias of option moe_mlp.router_argpartition_logits_topk, family qwen",
    ),
    "ZMLX_CLANG": ("a program", "clang", "clang 14 or later, which looks at Metal text for tests"),
    "ZMLX_CXX": (
        "a compiler",
        "c++, g++ or clang++",
        "compiler of native code: CPU kernels, what launches recorded steps",
    ),
}


class VariableError(ValueError):
    """A variable of zmlx holds a value that it does not take."""


def text(name: str) -> str:
    """Return the variable's value, or its default's empty string; `name` must be in `TABLE`."""
    if name not in TABLE:
        raise KeyError(f"{name} is not a variable of zmlx; known: {', '.join(TABLE)}")
    return os.environ.get(name, "").strip()


def foreign(name: str) -> "str | None":
    """Return a variable that is not zmlx's, where zmlx has to do as its owner does."""
    return os.environ.get(name)


def peeker(name: str) -> "Callable[[], object]":
    """Return a function that tells cheaply whether a variable has changed.

    It gives what the environment holds for the variable, in whatever form; equal answers mean that
    the variable is what it was. `os.environ.get` encodes and decodes at each call and takes ten
    times as long, which shows where a kernel is launched.
    """
    if name not in TABLE:
        raise KeyError(f"{name} is not a variable of zmlx; known: {', '.join(TABLE)}")
    stored = getattr(os.environ, "_data", None)
    if not isinstance(stored, dict):  # another Python than CPython
        return lambda: os.environ.get(name)
    key = os.environ.encodekey(name)
    get = stored.get
    return lambda: get(key)


def flag(name: str) -> bool:
    """Return a 0/1 variable; an unset or empty one has its default.

    Raises:
        VariableError: the value is neither 0 nor 1.
    """
    value = text(name) or TABLE[name][1]
    if value not in ("0", "1"):
        raise VariableError(f"{name}={value!r}: expected 0 or 1")
    return value == "1"


def choice(name: str, allowed: "tuple[str, ...]") -> str:
    """Return a variable that takes one of `allowed`; an unset or empty one has its default.

    Raises:
        VariableError: the value is not one of `allowed`.
    """
    value = text(name) or TABLE[name][1]
    if value not in allowed:
        raise VariableError(f"{name}={value!r}: expected one of {', '.join(allowed)}")
    return value


def count(name: str) -> "int | None":
    """Return a positive whole number, or None when the variable is unset or empty.

    Raises:
        VariableError: the value is not a positive whole number.
    """
    value = text(name)
    if not value:
        return None
    if not value.isdigit() or int(value) == 0:
        raise VariableError(f"{name}={value!r}: expected a positive whole number")
    return int(value)


def config_folder() -> str:
    """Return the folder of the user's own configuration, which need not exist.

    It is `zmlx` in XDG_CONFIG_HOME, or in `~/.config` where that is unset or not absolute.
    """
    base = os.environ.get("XDG_CONFIG_HOME", "")
    if not os.path.isabs(base):
        base = os.path.join(os.path.expanduser("~"), ".config")
    return os.path.join(base, "zmlx")
