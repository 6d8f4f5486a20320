"""Which kernels a token runs on an NVIDIA GPU, and how long each takes, by PyTorch's profiler.

The profiler records every kernel of the process, whoever launched it. It needs PyTorch with CUDA
beside MLX, and slows down what runs after it, so benchmarks use it last.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from zmlx.backend import current

#: What a trace calls the work of a GPU: kernels, and copies and fills that are none.
_KERNEL = "kernel"
_WORK = (_KERNEL, "gpu_memcpy", "gpu_memset")
#: Characters of a kernel's name that are kept: templates make some of them pages long.
_NAME = 160


class NotRecorded(RuntimeError):
    """Kernels cannot be recorded here; the text says why."""


@dataclass(frozen=True)
class KernelTime:
    """One kernel of a token.

    Attributes:
        name: as the compiler named it, shortened.
        count: how often it runs for a token.
        microseconds: that all of them take together for a token; a kernel that is let in early, and
            waits for the one before, takes that time too.
    """

    name: str
    count: float
    microseconds: float


@dataclass(frozen=True)
class KernelTimes:
    """What the GPU does for a token.

    Attributes:
        rows: kernels by name, the longest first; copies and fills among them.
        kernels: how many kernels there are for a token, without copies and fills.
        microseconds: in which any of them runs, for a token; less than all where they overlap.
    """

    rows: tuple[KernelTime, ...]
    kernels: float
    microseconds: float


def why_not() -> str:
    """Return why kernels cannot be recorded in this process; empty when they can."""
    if current() != "cuda":
        return f"kernels are recorded by a profiler of CUDA; MLX runs on {current()} here"
    if find_spec("torch") is None:
        return "kernels are recorded by PyTorch's profiler, which is not installed"
    if not import_module("torch").cuda.is_available():
        return "kernels are recorded by PyTorch's profiler, and this PyTorch sees no GPU"
    return ""


def record(call: Callable[[], Any], tokens: int) -> KernelTimes:
    """Run a call twice under the profiler, which may miss what comes first, and take the second.

    Args:
        call: has `tokens` tokens computed; the device may go on when it returns.
        tokens: see `call`.

    Raises:
        NotRecorded: there is no profiler here, or it saw no kernel.
    """
    reason = why_not()
    if reason:
        raise NotRecorded(reason)
    torch, profiler = import_module("torch"), import_module("torch.profiler")
    for _ in range(2):
        # Waits for the whole device, so that all work of this call is recorded and no other.
        torch.cuda.synchronize()
        with profiler.profile(activities=[profiler.ProfilerActivity.CUDA]) as recorded:
            call()
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    return summed(events, tokens)


def summed(events: Iterable[Mapping[str, Any]], tokens: int) -> KernelTimes:
    """Sum up the events of a trace in Chrome's format.

    Args:
        events: "cat", "name", "ts" and "dur" in microseconds are read.
        tokens: by how many tokens they were made.

    Raises:
        NotRecorded: no kernel is among them.
    """
    totals: dict[str, list[float]] = {}
    spans: list[tuple[float, float]] = []
    kernels = 0
    for event in events:
        if event.get("cat") not in _WORK:
            continue
        kernels += event["cat"] == _KERNEL
        entry = totals.setdefault(str(event["name"])[:_NAME], [0.0, 0.0])
        entry[0] += 1
        entry[1] += float(event["dur"])
        spans.append((float(event["ts"]), float(event["ts"]) + float(event["dur"])))
    if not kernels:
        raise NotRecorded("PyTorch's profiler saw no kernel of this process")
    rows = (
        KernelTime(name, number / tokens, microseconds / tokens)
        for name, (number, microseconds) in totals.items()
    )
    ordered = sorted(rows, key=lambda row: row.microseconds, reverse=True)
    return KernelTimes(tuple(ordered), kernels / tokens, _covered(spans) / tokens)


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return how much lies in any of some spans."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
