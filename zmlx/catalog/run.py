"""A kernel's samples on a backend against its reference: errors and times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx

from zmlx.catalog.configurations import configurations, in_words
from zmlx.kernels.calling import several
from zmlx.kernels.spec import Deviation, KernelSpec, deviations


@dataclass(frozen=True)
class Run:
    """One configuration of a kernel.

    Attributes:
        configuration: in words.
        error: the largest error of its outputs, relative to the reference's largest element.
        allowed: what the kernel's tolerance allows.
        fault: what is wrong, empty if nothing is.
        kernel_us: median microseconds of a call of the kernel, evaluated.
        reference_us: the same of its reference.
    """

    configuration: str
    error: float
    allowed: float
    fault: str
    kernel_us: float | None = None
    reference_us: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the run as JSON holds it, where an error that is no number is null."""
        return {**asdict(self), "error": self.error if self.error == self.error else None}


def run(
    spec: KernelSpec,
    backend: str,
    *,
    repeats: int = 5,
    advance: Callable[[], object] = lambda: None,
) -> list[Run]:
    """Run every configuration of a kernel; `advance` is called after each.

    A kernel that cannot run gives runs with a fault.
    """
    runs = []
    with _device_of(backend):
        for configuration in configurations(spec, backend):
            runs.append(_run(spec, backend, configuration, repeats))
            advance()
    return runs


def _device_of(backend: str) -> AbstractContextManager[Any]:
    """Let what is called inside run where the backend is, also on a machine with a GPU."""
    return mx.stream(mx.cpu) if backend in ("cpu", "emulator") else nullcontext()


def _run(spec: KernelSpec, backend: str, configuration: Mapping[str, Any], repeats: int) -> Run:
    words = in_words(configuration)
    try:
        worst = _worst(deviations(spec, backend, configuration))
        kernel_us = _time(spec.implementation(backend), spec, configuration, repeats)
        reference_us = _time(spec.reference, spec, configuration, repeats)
    except Exception as failure:  # noqa: BLE001 - whatever a kernel raises is the run's fault
        return Run(words, float("nan"), float("nan"), str(failure) or repr(failure))
    return Run(words, worst.error, worst.allowed, worst.fault, kernel_us, reference_us)


def _worst(found: list[Deviation]) -> Deviation:
    return max(found, key=lambda deviation: (bool(deviation.fault), deviation.error))


def _time(
    function: Callable[..., Any], spec: KernelSpec, configuration: Mapping[str, Any], repeats: int
) -> float:
    times = []
    for _ in range(repeats):
        sample = spec.sample(**configuration)
        mx.eval([arg for arg in sample.args if isinstance(arg, mx.array)])
        mx.synchronize()
        started = time.perf_counter()
        mx.eval(several(function(*sample.args, **sample.kwargs)))
        times.append((time.perf_counter() - started) * 1e6)
    return statistics.median(times)
