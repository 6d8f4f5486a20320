"""`threadgroup="auto"`: the best number of threads in a threadgroup, for one kernel and shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx

from zmlx.backend.definition import Definition
from zmlx.tuning.choose import choose
from zmlx.tuning.identity import Subject, content_of, inputs_text, machine, text_of
from zmlx.tuning.store import default_store

#: Backends where a kernel's time says something about a device.
TUNED_BACKENDS = ("metal", "cuda")
#: The number that is taken where nothing is measured, if it is among the candidates.
USUAL = 256

#: what a call was given -> the choice; nothing that is remembered costs a second look at the disk
_CHOSEN: dict[Any, int] = {}


def best_threadgroup(
    definition: Definition,
    backend: str,
    *,
    inputs: Sequence[Any],
    launch: Callable[[int], list[mx.array]],
    candidates: Sequence[int],
    key: Any,
) -> int:
    """Return the number of threads in a threadgroup with which a kernel runs fastest here.

    The first call for a kernel, shapes, dtypes and key times every candidate and remembers the
    result: in this process, and under ZMLX_CACHE_DIR for the next one. Later calls look it up.
    Inside `mx.compile`, `mx.grad` and `mx.vmap`, where nothing may be evaluated, it is what is
    remembered or the default, and the first call outside searches. On the emulator and on
    references nothing is searched: their time says nothing about a device.

    Args:
        definition: the kernel. Its whole content belongs to the result: another source, header or
            name is tuned anew.
        backend: where it runs, as `zmlx.backend.for_kernels` gives it.
        inputs: arrays (any shape and dtype) and numbers of the launch; shapes and dtypes count.
        launch: launches the kernel with that many threads in a threadgroup and returns its outputs
            lazily. It is called often, and must read nothing but `inputs`.
        candidates: numbers of threads to try, one or more.
        key: whatever else the launch depends on, such as the axis or template values: plain values,
            dtypes, and tuples of them.

    Returns:
        One of the candidates. The default is 256 if that is one, else the largest below it, else
        the smallest.

    Raises:
        ValueError: there are no candidates.
        zmlx.tuning.TuningError: every candidate failed; the text gives every reason.
        zmlx.tuning.NoContent: the key holds something other than plain values.
    """
    usual = usual_threadgroup(candidates)
    if backend not in TUNED_BACKENDS:
        return usual
    kinds = tuple((v.shape, v.dtype) if isinstance(v, mx.array) else type(v) for v in inputs)
    asked = (definition, backend, kinds, tuple(candidates), key)
    if asked in _CHOSEN:
        return _CHOSEN[asked]
    subject = Subject(
        machine=machine(backend),
        kernel=definition.name,
        content=content_of(definition),
        inputs=f"{inputs_text(inputs)}; {text_of(key)}",
        candidates=tuple(str(number) for number in candidates),
    )
    result = choose(
        subject,
        {str(number): partial(launch, number) for number in candidates},
        inputs=inputs,
        default=str(usual),
        store=default_store(),
    )
    if result is None:
        return usual
    return _CHOSEN.setdefault(asked, int(result.best))


def usual_threadgroup(candidates: Sequence[int]) -> int:
    """Return the candidate that is taken where nothing is measured.

    Raises:
        ValueError: there are no candidates, or one is no number of threads.
    """
    if not candidates:
        raise ValueError("tuning a threadgroup needs at least one number of threads to try")
    for number in candidates:
        if type(number) is not int or not 1 <= number <= 1024:
            raise ValueError(f"threadgroup of {number!r} threads: expected 1 to 1024")
    below = [number for number in candidates if number <= USUAL]
    return max(below) if below else min(candidates)


def forget() -> None:
    """Forget the choices of this process, which then looks at the disk again."""
    _CHOSEN.clear()
