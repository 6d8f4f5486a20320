"""Arrays inside nested lists, tuples and dictionaries."""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten


def leaves(tree: Any) -> list[tuple[str, Any]]:
    """Return (place, value) of everything in a tree, such as ("0.weight", array)."""
    return cast(list[tuple[str, Any]], tree_flatten(tree))


def arrays(tree: Any) -> list[mx.array]:
    """Return the arrays in a tree, in their order."""
    return [leaf for _, leaf in leaves(tree) if isinstance(leaf, mx.array)]
