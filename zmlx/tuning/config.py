"""What can be chosen for a launch: the threadgroup and the values of a template."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from zmlx.backend.definition import Template
from zmlx.backend.signature import dtype_name
from zmlx.tuning.store import Result

#: Threads along x that are tried where nobody says which.
THREADGROUPS = (32, 64, 128, 256, 512, 1024)
#: Threads that a threadgroup can have at most.
_MOST_THREADS = 1024

#: A threadgroup as callers write it: threads along x, or along x, y and z.
Threadgroup = int | Sequence[int]
#: A template as callers write it.
TemplateLike = Template | Mapping[str, Any]


@dataclass(frozen=True)
class AutotuneConfig:
    """One way to launch a kernel.

    Attributes:
        threadgroup: threads along x, y and z.
        template: (name, value) pairs; a value is a dtype, an int or a bool.
    """

    threadgroup: tuple[int, int, int]
    template: tuple[tuple[str, Any], ...] = ()

    def to_list(self) -> list[tuple[str, Any]]:
        """Return the template as `mx.fast.metal_kernel` takes it."""
        return list(self.template)

    def label(self) -> str:
        """Return it as text; two configurations share it only when they are equal."""
        values = [f"{name}={_value_text(value)}" for name, value in self.template]
        return " ".join(["x".join(map(str, self.threadgroup)), *values])


@dataclass(frozen=True)
class AutotuneResult:
    """What a search among configurations found.

    Attributes:
        best_config: the fastest.
        timings_ms: configuration -> median of one call in milliseconds, of those that ran.
        dropped: configuration -> why it was left out: its error, or that its outputs differ.
    """

    best_config: AutotuneConfig
    timings_ms: dict[AutotuneConfig, float]
    dropped: dict[AutotuneConfig, str] = field(default_factory=dict)

    def best_threadgroup(self) -> tuple[int, int, int]:
        """Return the threadgroup of the fastest configuration."""
        return self.best_config.threadgroup


def configurations(
    threadgroups: Iterable[Threadgroup] | None, templates: Iterable[TemplateLike | None] | None
) -> list[AutotuneConfig]:
    """Return every threadgroup with every template, in their order, without doubles.

    Args:
        threadgroups: None for `THREADGROUPS`.
        templates: None for no template.

    Raises:
        ValueError: there is no candidate, or a threadgroup is none.
        TypeError: a template is neither a mapping nor (name, value) pairs.
    """
    sizes = THREADGROUPS if threadgroups is None else tuple(threadgroups)
    values = [()] if templates is None else [pairs(template) for template in templates]
    found = [AutotuneConfig(_three(size), template) for template in values for size in sizes]
    if not found:
        raise ValueError("nothing to tune: no threadgroup or no template is given")
    return list(dict.fromkeys(found))


def usual(choices: Sequence[AutotuneConfig]) -> AutotuneConfig:
    """Return the one that is taken where nothing is measured: 256 threads, else the first."""
    return next((choice for choice in choices if choice.threadgroup == (256, 1, 1)), choices[0])


def named(result: Result, choices: Mapping[str, AutotuneConfig]) -> AutotuneResult:
    """Return a result with configurations in place of their labels."""
    return AutotuneResult(
        choices[result.best],
        {choices[label]: ms for label, ms in result.timings_ms.items()},
        {choices[label]: why for label, why in result.dropped.items()},
    )


def pairs(template: TemplateLike | None) -> tuple[tuple[str, Any], ...]:
    """Return a template as (name, value) pairs.

    Raises:
        TypeError: it is neither a mapping nor pairs.
    """
    entries = template.items() if isinstance(template, Mapping) else template or ()
    found = []
    for entry in entries:
        if not (isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[0], str)):
            raise TypeError(f"template {template!r}: expected (name, value) pairs or a mapping")
        if not isinstance(entry[1], mx.Dtype | int):
            raise TypeError(f"template {entry[0]}={entry[1]!r}: expected a dtype, an int or a bool")
        found.append((entry[0], entry[1]))
    return tuple(found)


def _three(size: Threadgroup) -> tuple[int, int, int]:
    numbers = (size,) if isinstance(size, int) else tuple(size)
    if not 1 <= len(numbers) <= 3 or any(type(n) is not int or n < 1 for n in numbers):
        raise ValueError(f"threadgroup {size!r}: expected one to three whole numbers from 1")
    x, y, z = (*numbers, 1, 1)[:3]
    if x * y * z > _MOST_THREADS:
        raise ValueError(f"threadgroup {size!r}: {x * y * z} threads, {_MOST_THREADS} at most")
    return x, y, z


def _value_text(value: Any) -> str:
    return dtype_name(value) if isinstance(value, mx.Dtype) else str(value)
