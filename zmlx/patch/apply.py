"""Carry out a plan, wholly or not at all, and take it back."""

from __future__ import annotations

import mlx.nn as nn

from zmlx.patch.pattern import put_back, swap
from zmlx.patch.plan import Plan


def apply_plan(plan: Plan) -> None:
    """Swap the class of every chosen module.

    If anything is raised on the way, KeyboardInterrupt included, every module is what it was.
    """
    done: list[tuple[nn.Module, type]] = []
    try:
        for module, proposal, pattern in plan.proposals:
            before = type(module)
            done.append((module, before))
            swap(module, proposal, pattern)
    except BaseException:
        for module, before in reversed(done):
            module.__class__ = before
        raise


def restore(model: nn.Module) -> int:
    """Give every replaced module of a model its own class again; return how many there were."""
    return sum(put_back(module) for _, module in model.named_modules())
