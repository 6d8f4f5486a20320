"""The table of the calls that return a finished model.

A boundary is the outermost call that loads a model: adapters, sharding and other libraries' own
patches are done when it returns. Read at the start of every interpreter, so it imports nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing takes longer to import than this package does to start
    from collections.abc import Callable
    from typing import Any


class Boundary:
    """A function or method that loads a model.

    Attributes:
        module: the module that defines it.
        name: its name there; for a method `Class.method`.
        model: takes the model out of what it returned and of the instance that it is a method of
            (None for a function).
    """

    def __init__(self, module: str, name: str, model: Callable[[Any, Any], Any]) -> None:
        self.module = module
        self.name = name
        self.model = model

    @property
    def origin(self) -> str:
        """The dotted name."""
        return f"{self.module}.{self.name}"


def _first(result: Any, instance: Any) -> Any:
    """Return the model of `(model, tokenizer)` or `(model, tokenizer, config)`."""
    return result[0]


BOUNDARIES = [
    Boundary("mlx_lm.utils", "load", _first),
    Boundary("mlx_lm.utils", "sharded_load", _first),
]
