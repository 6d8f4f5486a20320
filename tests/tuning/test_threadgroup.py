"""`best_threadgroup`: searched once, remembered, never evaluated while a function is traced.

The launches are fakes that sleep, so that it is known which is the fastest.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from zmlx.backend.definition import Definition
from zmlx.tuning import NoContent, TuningError, best_threadgroup
from zmlx.tuning.store import default_store
from zmlx.tuning.threadgroup import forget

KERNEL = Definition("scale", ("x",), ("y",), "y[0] = 2 * x[0];")
TESTS = Path(__file__).parents[1]
MILLISECONDS = {64: 4, 128: 1, 256: 3}


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch, virtual_time):
    monkeypatch.setenv("ZMLX_CACHE_DIR", str(tmp_path))
    forget()
    yield
    forget()


class Fake:
    """A launch that takes as long as it is told to, and counts."""

    def __init__(self, x, milliseconds=MILLISECONDS):
        self.x = x
        self.milliseconds = milliseconds
        self.calls = 0

    def __call__(self, threads):
        self.calls += 1
        if threads not in self.milliseconds:
            raise RuntimeError(f"no kernel with {threads} threads")
        time.sleep(self.milliseconds[threads] * 1e-3)
        return [self.x * 2]


def tuned(x, fake=None, *, definition=KERNEL, backend="metal", candidates=(64, 128, 256), key=()):
    fake = fake or Fake(x)
    return best_threadgroup(
        definition, backend, inputs=[x, 2.0], launch=fake, candidates=candidates, key=key
    )


def test_the_fastest_is_found_and_remembered():
    x = mx.ones((8,))
    fake = Fake(x)
    assert tuned(x, fake) == 128
    searched = fake.calls
    assert searched >= 9
    assert tuned(x, fake) == 128
    forget()  # as in the next process
    assert tuned(x, fake) == 128
    assert fake.calls == searched


def test_a_lookup_is_quick():
    x = mx.ones((8,))
    tuned(x)
    started = time.process_time()
    for _ in range(1000):
        tuned(x)
    assert time.process_time() - started < 0.5


@pytest.mark.parametrize(
    "change",
    [
        {"x": mx.ones((9,))},
        {"x": mx.ones((8, 1))},
        {"x": mx.ones((8,), mx.float16)},
        {"definition": replace(KERNEL, source="y[0] = x[0] * 2;")},
        {"backend": "cuda"},
        {"candidates": (128, 256)},
        {"key": ("axis", 0)},
        {"key": mx.float32},
    ],
    ids=["size", "rank", "dtype", "source", "backend", "candidates", "key", "key dtype"],
)
def test_what_a_result_belongs_to(change):
    tuned(mx.ones((8,)))
    given = {"x": mx.ones((8,)), **change}
    fake = Fake(given["x"])
    tuned(given.pop("x"), fake, **given)
    assert fake.calls > 0


def test_one_that_fails_is_not_picked_and_its_error_is_kept():
    x = mx.ones((8,))
    assert tuned(x, Fake(x, {128: 4, 256: 2})) == 256
    (result,) = default_store().all()
    assert result.dropped == {"64": "RuntimeError: no kernel with 64 threads"}
    assert set(result.timings_ms) == {"128", "256"}


def test_all_that_fail_raise_and_nothing_is_remembered():
    x = mx.ones((8,))
    with pytest.raises(TuningError, match=r"scale: none of 3(.|\n)*no kernel with 256 threads"):
        tuned(x, Fake(x, {}))
    assert default_store().all() == []
    assert tuned(x) == 128


@pytest.mark.parametrize("backend", ["emulator", "reference"])
def test_nothing_is_timed_where_time_says_nothing(backend):
    x = mx.ones((8,))
    fake = Fake(x)
    assert tuned(x, fake, backend=backend) == 256
    assert tuned(x, fake, backend=backend, candidates=(32, 64)) == 64
    assert tuned(x, fake, backend=backend, candidates=(512, 1024)) == 512
    assert fake.calls == 0
    assert default_store().all() == []


@pytest.mark.parametrize("bad", [(), (0,), (2048,), (1.5,), (True,)])
def test_candidates_must_be_numbers_of_threads(bad):
    with pytest.raises(ValueError, match="threadgroup"):
        tuned(mx.ones((8,)), candidates=bad)


def test_a_key_is_made_of_contents():
    with pytest.raises(NoContent):
        tuned(mx.ones((8,)), key=object())


TRANSFORMS = {
    "compile": lambda f: mx.compile(f),
    "compile-shapeless": lambda f: mx.compile(f, shapeless=True),
    "grad": lambda f: mx.grad(lambda x: f(x).sum()),
    "value_and_grad": lambda f: lambda x: mx.value_and_grad(lambda v: f(v).sum())(x)[1],
    "vmap": lambda f: mx.vmap(f),
    "jvp": lambda f: lambda x: mx.jvp(f, [x], [x])[1][0],
    "compile-grad": lambda f: mx.compile(mx.grad(lambda x: f(x).sum())),
    "grad-vmap": lambda f: mx.grad(lambda x: mx.vmap(f)(x).sum()),
    "checkpoint": lambda f: mx.grad(lambda x: mx.checkpoint(f)(x).sum()),
}


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_while_a_function_is_traced_nothing_runs_and_a_later_call_tunes(kind):
    x = mx.ones((4, 8))
    fakes, chosen = [], []

    def function(v):
        inner = v * 3  # a tracer that is not an input itself
        fakes.append(Fake(inner))
        chosen.append(tuned(inner, fakes[-1]))
        return inner * 2

    mx.eval(TRANSFORMS[kind](function)(x))
    assert chosen
    assert set(chosen) == {256}
    assert sum(fake.calls for fake in fakes) == 0
    assert default_store().all() == []

    chosen.clear()
    function(x)
    if kind == "vmap" or kind == "grad-vmap":
        function(x[0])  # the shape that is seen inside
    assert set(chosen) == {128}

    chosen.clear()
    mx.eval(TRANSFORMS[kind](function)(x + 1))
    assert set(chosen) <= {128}


def test_what_is_remembered_is_used_inside_a_new_trace():
    x = mx.ones((8,))
    tuned(x)
    forget()
    seen = []

    def function(v):
        seen.append(tuned(v))
        return v * 2

    mx.eval(mx.compile(function)(x))
    assert seen == [128]


def test_a_launch_that_reads_a_tracer_waits_too():
    x = mx.ones((8,))

    def function(v):
        assert (
            best_threadgroup(
                KERNEL,
                "metal",
                inputs=[x],  # concrete; what the launch reads is not
                launch=lambda n: [v * 2],
                candidates=(64, 256),
                key=(),
            )
            == 256
        )
        return v * 2

    mx.eval(mx.compile(function)(x))
    assert default_store().all() == []


def test_inputs_that_were_not_evaluated_are_no_tracers():
    x = mx.ones((8,)) * 3 + 1
    assert tuned(x) == 128


def test_an_error_behind_the_inputs_is_their_error(monkeypatch):
    def broken(arrays):
        raise RuntimeError("[metal::malloc] Attempting to allocate too much")

    monkeypatch.setattr(mx, "async_eval", broken)
    with pytest.raises(RuntimeError, match="too much"):
        tuned(mx.ones((8,)))


def test_threads_that_come_at_once_search_once():
    x = mx.ones((8,))
    mx.eval(x)
    fakes = [Fake(mx.ones((8,))) for _ in range(4)]
    mx.eval([fake.x for fake in fakes])
    chosen, failures = [], []

    def work(fake):
        try:
            stream = mx.new_stream(mx.cpu)
            with mx.stream(stream):
                chosen.append(tuned(fake.x, fake))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(fake,)) for fake in fakes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert chosen == [128] * 4
    assert sum(fake.calls > 0 for fake in fakes) == 1


PROCESS = """
import sys, time
import mlx.core as mx
from virtual_time import VirtualTime
from zmlx.backend.definition import Definition
from zmlx.tuning import best_threadgroup
virtual = VirtualTime()
time.perf_counter, time.sleep = virtual.perf_counter, virtual.sleep
sys.stdin.readline()
chosen = []
for size in range(1, 6):
    x = mx.ones((size,))
    def launch(threads):
        time.sleep({64: 4, 128: 1, 256: 3}[threads] * 1e-3)
        return [x * 2]
    for name in ("shared", sys.argv[1]):
        kernel = Definition(name, ("x",), ("y",), "y[0] = 2 * x[0];")
        chosen.append(best_threadgroup(
            kernel, "metal", inputs=[x], launch=launch, candidates=(64, 128, 256), key=()))
print(set(chosen))
"""


def test_processes_that_tune_at_once_lose_nothing():
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, name],
            env={**os.environ, "PYTHONPATH": str(TESTS)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate(timeout=60)[0].strip() for process in processes] == ["{128}"] * 2
    results = default_store().all()
    assert len(results) == 15
    assert len(default_store().file.read_text().splitlines()) >= 15
    assert {result.best for result in results} == {"128"}


def test_a_damaged_file_means_tuning_again(capsys):
    x = mx.ones((8,))
    tuned(x)
    file = default_store().file
    file.write_text("{ damaged")
    forget()
    subject = default_store().all()[0].subject
    other = Fake(mx.ones((3,)))
    assert tuned(other.x, other) == 128
    assert capsys.readouterr().err.count("\n") == 1
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert subject.inputs not in [line["subject"]["inputs"] for line in lines[1:]]
    assert len(lines) >= 1
