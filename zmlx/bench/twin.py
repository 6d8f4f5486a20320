"""A second model object with the same arrays, so that stock and patched stand side by side.

Patching a model anew for every run would also record its programs anew; two objects let each keep
what it has compiled, with one copy of the weights.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn


def twin(model: nn.Module) -> nn.Module:
    """Return a model with modules of its own that hold the arrays of another.

    Args:
        model: any module; it is not changed. A module that it holds twice is one in the twin, too.
    """
    made: dict[int, Any] = {}

    def copied(value: Any) -> Any:
        if isinstance(value, nn.Module):
            if id(value) not in made:
                new = made[id(value)] = value.__class__.__new__(value.__class__)
                vars(new).update(vars(value))
                new._no_grad = set(value._no_grad)
                for name, part in value.items():
                    dict.__setitem__(new, name, copied(part))
            return made[id(value)]
        if isinstance(value, mx.array):
            return copy(value)  # the same memory behind an object of its own
        if isinstance(value, dict):
            return {name: copied(part) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(copied(part) for part in value)
        return value

    result: nn.Module = copied(model)
    return result
