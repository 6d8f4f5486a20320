"""The fastest launch of a compiled kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx

from zmlx.backend import for_kernels
from zmlx.deprecation import takes_compute_dtype
from zmlx.tuning.choose import choose
from zmlx.tuning.config import (
    AutotuneConfig,
    AutotuneResult,
    TemplateLike,
    Threadgroup,
    configurations,
    named,
    usual,
)
from zmlx.tuning.identity import NoContent, Subject, digest, inputs_text, machine, text_of
from zmlx.tuning.store import Memory, default_store
from zmlx.tuning.threadgroup import TUNED_BACKENDS

#: Threads along x, y and z, or a function from the configuration to them.
Grid = Sequence[int] | Callable[[AutotuneConfig], Sequence[int]]

#: kernels whose content cannot be read -> their results, for as long as the kernel lives
_OPAQUE: WeakKeyDictionary[Any, Memory] = WeakKeyDictionary()


@takes_compute_dtype
def get_autotuned_config(
    kernel: Callable[..., Sequence[mx.array]],
    *,
    inputs: Sequence[Any],
    grid: Grid,
    template_candidates: Iterable[TemplateLike | None] | None = None,
    threadgroup_candidates: Iterable[Threadgroup] | None = None,
    output_shapes: Sequence[Sequence[int]] | None = None,
    output_dtypes: Sequence[mx.Dtype] | None = None,
    warmup: int = 3,
    iters: int = 10,
) -> AutotuneConfig:
    """Return the fastest configuration of a kernel, remembered or searched for now.

    Remembered per shapes, dtypes, grid, device, versions and the kernel's content. The content of a
    bare `mx.fast.metal_kernel` cannot be read, so it is searched for at every call; give a
    `zmlx.metal.kernel`. On the emulator, and inside `mx.compile`, `mx.grad` and `mx.vmap` while
    nothing is remembered, it is the default at once: the first configuration with 256 threads, else
    the first.

    Args:
        kernel: a `zmlx.metal.kernel`, or what `mx.fast.metal_kernel` returns.
        inputs: arrays and numbers, in the order of the kernel's inputs.
        grid: threads along x, y and z, or a function from an `AutotuneConfig` to them.
        template_candidates: templates to try, each (name, value) pairs or a mapping; default none.
        threadgroup_candidates: threadgroups to try, each (x, y, z) or x; default 32 to 1,024.
        output_shapes: default the first input's shape, for each output.
        output_dtypes: default the first input's dtype, for each output.
        warmup: calls of each configuration before it is timed.
        iters: how often each is timed.

    Raises:
        ValueError: no candidate, or the outputs' shapes are missing and no input is an array.
        zmlx.tuning.TuningError: no configuration can run; the text gives every reason.
    """
    task = _Task(
        kernel,
        inputs,
        grid,
        configurations(threadgroup_candidates, template_candidates),
        output_shapes,
        output_dtypes,
    )
    if task.backend not in TUNED_BACKENDS:
        return task.usual
    found = task.run(warmup=warmup, rounds=iters, anew=False)
    return found.best_config if found is not None else task.usual


@takes_compute_dtype
def autotune_kernel(
    kernel: Callable[..., Sequence[mx.array]],
    *,
    inputs: Sequence[Any],
    grid: Grid,
    template_candidates: Iterable[TemplateLike | None] | None,
    threadgroup_candidates: Iterable[Threadgroup] | None,
    output_shapes: Sequence[Sequence[int]] | None = None,
    output_dtypes: Sequence[mx.Dtype] | None = None,
    warmup: int = 3,
    iters: int = 10,
) -> AutotuneResult:
    """Search for the fastest configuration of a kernel now, wherever it runs, and remember it.

    The arguments are those of `get_autotuned_config`, which then finds the result. On the emulator
    the timings are the emulator's.

    Raises:
        ValueError: as `get_autotuned_config`.
        RuntimeError: called inside `mx.compile`, `mx.grad` or `mx.vmap`.
        zmlx.tuning.TuningError: no configuration can run; the text gives every reason.
    """
    task = _Task(
        kernel,
        inputs,
        grid,
        configurations(threadgroup_candidates, template_candidates),
        output_shapes,
        output_dtypes,
    )
    found = task.run(warmup=warmup, rounds=iters, anew=True)
    if found is None:
        raise RuntimeError(
            f"{task.name}: nothing can be timed inside a transformation, such as mx.compile; "
            "tune outside, or call get_autotuned_config"
        )
    return found


class _Task:
    """One kernel with its inputs and the configurations to try."""

    def __init__(
        self,
        kernel: Callable[..., Sequence[mx.array]],
        inputs: Sequence[Any],
        grid: Grid,
        choices: list[AutotuneConfig],
        output_shapes: Sequence[Sequence[int]] | None,
        output_dtypes: Sequence[mx.Dtype] | None,
    ) -> None:
        spec = getattr(kernel, "spec", None)
        self.kernel = kernel
        self.name = str(getattr(spec, "name", "kernel"))
        self.inputs = list(inputs)
        self.choices = {choice.label(): choice for choice in choices}
        self.grids = {
            label: tuple(grid(choice) if callable(grid) else grid)
            for label, choice in self.choices.items()
        }
        self.usual = usual(choices)
        self.backend = for_kernels(has_reference=False)
        count = len(getattr(spec, "output_names", ("out",)))
        self.shapes = output_shapes or [tuple(self._first().shape)] * count
        self.dtypes = output_dtypes or [self._first().dtype] * count

    def run(self, *, warmup: int, rounds: int, anew: bool) -> AutotuneResult | None:
        """Return what is remembered or found; None inside a function transformation."""
        subject, store = self._subject()
        result = choose(
            subject,
            {label: partial(self._launch, label) for label in self.choices},
            inputs=self.inputs,
            default=self.usual.label(),
            store=store,
            warmup=warmup,
            rounds=rounds,
            anew=anew,
        )
        return None if result is None else named(result, self.choices)

    def _first(self) -> mx.array:
        for value in self.inputs:
            if isinstance(value, mx.array):
                return value
        raise ValueError(
            f"{self.name}: no input is an array, so give output_shapes and output_dtypes"
        )

    def _launch(self, label: str) -> Sequence[mx.array]:
        choice = self.choices[label]
        return self.kernel(
            inputs=self.inputs,
            template=choice.to_list() or None,
            grid=self.grids[label],
            threadgroup=choice.threadgroup,
            output_shapes=self.shapes,
            output_dtypes=self.dtypes,
        )

    def _subject(self) -> tuple[Subject, Memory]:
        """Return what the result belongs to, and where it is remembered."""
        store: Memory = default_store()
        try:
            content = digest(self.kernel)
        except NoContent:
            content, store = "", _memory(self.kernel)
        outputs = text_of(([list(shape) for shape in self.shapes], list(self.dtypes)))
        grids = text_of(list(dict.fromkeys(self.grids.values())))
        return Subject(
            machine=machine(self.backend),
            kernel=self.name,
            content=content,
            inputs=f"{inputs_text(self.inputs)}; {outputs}; grid {grids}",
            candidates=tuple(self.choices),
        ), store


def _memory(kernel: Any) -> Memory:
    """Return where results of a kernel without readable content are kept: beside the kernel."""
    try:
        return _OPAQUE.setdefault(kernel, Memory())
    except TypeError:  # no weak references to it: whoever has it next may be another kernel
        return Memory()
