"""Kernels of a token from a profiler's trace, and the reasons where there is none."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from zmlx.bench import kernel_times
from zmlx.bench.kernel_times import NotRecorded, record, summed, why_not

EVENTS = [
    {"cat": "kernel", "name": "qmv", "ts": 30.0, "dur": 4.0},
    {"cat": "kernel", "name": "qmv", "ts": 10.0, "dur": 6.0},
    {"cat": "kernel", "name": "norm", "ts": 16.0, "dur": 1.0},
    {"cat": "gpu_memcpy", "name": "copy", "ts": 40.0, "dur": 12.0},
    {"cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 0.0, "dur": 100.0},
    {"name": "process_name", "ph": "M"},
]


def test_events_are_summed_by_name_for_one_token():
    times = summed(EVENTS, tokens=2)
    assert times.kernels == 1.5
    assert times.microseconds == 11.5
    rows = [(row.name, row.count, row.microseconds) for row in times.rows]
    assert rows == [("copy", 0.5, 6.0), ("qmv", 1.0, 5.0), ("norm", 0.5, 0.5)]


@pytest.mark.parametrize(
    ("spans", "covered"),
    [
        ([(0, 4), (3, 4)], 7),  # the second one is let in before the first has ended
        ([(0, 10), (2, 3)], 10),
        ([(5, 1), (0, 2), (1, 2)], 4),
        ([(0, 2), (0, 2)], 2),
    ],
)
def test_time_in_which_several_run_counts_once(spans, covered):
    events = [{"cat": "kernel", "name": "k", "ts": at, "dur": lasts} for at, lasts in spans]
    times = summed(events, tokens=1)
    assert times.microseconds == covered
    assert times.rows[0].microseconds == sum(lasts for _, lasts in spans)


def test_a_trace_without_kernels_is_no_zero():
    with pytest.raises(NotRecorded, match="saw no kernel"):
        summed(EVENTS[3:], tokens=1)


def test_the_reason_is_the_backend_or_the_package(monkeypatch):
    monkeypatch.setattr(kernel_times, "current", lambda: "metal")
    assert "MLX runs on metal here" in why_not()
    monkeypatch.setattr(kernel_times, "current", lambda: "cuda")
    monkeypatch.setattr(kernel_times, "find_spec", lambda name: None)
    assert "not installed" in why_not()
    with pytest.raises(NotRecorded, match="not installed"):
        record(lambda: None, 1)


@pytest.fixture
def torch(monkeypatch):
    """A PyTorch whose profiler writes what `work` holds when its block ends."""
    log = SimpleNamespace(work=[], traces=[], synchronised=0)

    class Profile:
        def __init__(self, activities):
            assert activities == ["cuda"]

        def __enter__(self):
            log.work.clear()
            return self

        def __exit__(self, *_):
            self.events = list(log.work)
            log.traces.append(self.events)

        def export_chrome_trace(self, file):
            with open(file, "w") as out:
                json.dump({"traceEvents": self.events}, out)

    def synchronize():
        log.synchronised += 1

    package, profiler = ModuleType("torch"), ModuleType("torch.profiler")
    package.cuda = SimpleNamespace(is_available=lambda: True, synchronize=synchronize)
    profiler.profile = Profile
    profiler.ProfilerActivity = SimpleNamespace(CUDA="cuda")
    monkeypatch.setitem(sys.modules, "torch", package)
    monkeypatch.setitem(sys.modules, "torch.profiler", profiler)
    monkeypatch.setattr(kernel_times, "find_spec", lambda name: object())
    monkeypatch.setattr(kernel_times, "current", lambda: "cuda")
    return log


def test_the_second_of_two_calls_is_taken_and_waited_for(torch):
    calls = []

    def call():
        calls.append(torch.synchronised)
        torch.work += EVENTS[: 1 + 2 * (len(calls) - 1)]

    times = record(call, tokens=1)
    # Before each call the device has been waited for, and once more after it.
    assert calls == [1, 3]
    assert torch.synchronised == 4
    assert [len(trace) for trace in torch.traces] == [1, 3]
    assert times.kernels == 3
    assert times.microseconds == 11.0


def test_a_pytorch_without_gpu_is_a_reason(torch):
    sys.modules["torch"].cuda.is_available = lambda: False
    assert "sees no GPU" in why_not()
