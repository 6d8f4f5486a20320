"""The names of `zmlx.autotune`: kernels and functions, remembered, saved and loaded."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass

import mlx.core as mx
import pytest

from zmlx.autotune import (
    AutotuneConfig,
    AutotunedFunction,
    AutotuneResult,
    autotune,
    autotune_kernel,
    get_autotuned_config,
    load_autotune_cache,
    save_autotune_cache,
)
from zmlx.tuning import TuningError
from zmlx.tuning.store import Store, default_store, read_results

SECONDS = {(32, 1, 1): 0.003, (64, 1, 1): 0.001, (8, 8, 1): 0.004}


@pytest.fixture(autouse=True)
def on_a_device(tmp_path, monkeypatch, virtual_time):
    """Tune as on a GPU: what is called here is a fake that sleeps."""
    monkeypatch.setenv("ZMLX_CACHE_DIR", str(tmp_path / "cache"))
    for module in ("kernel", "function"):
        monkeypatch.setattr(f"zmlx.tuning.{module}.for_kernels", lambda **_: "metal")


@dataclass(frozen=True)
class Spec:
    name: str = "fake"
    source: str = "out[0] = x[0];"
    output_names: tuple[str, ...] = ("out",)


class Kernel:
    """What `zmlx.metal.kernel` makes, as far as tuning sees it."""

    def __init__(self, spec=None, seconds=SECONDS):
        self.spec = spec or Spec()
        self.seconds = seconds
        self.calls = []

    def __call__(self, *, inputs, template, grid, threadgroup, output_shapes, output_dtypes):
        self.calls.append((threadgroup, template, grid))
        if threadgroup not in self.seconds:
            raise RuntimeError(f"{threadgroup} does not compile")
        values = dict(template or ())
        time.sleep(self.seconds[threadgroup] * (1 if values.get("N", 4) == 4 else 0.2))
        return [
            mx.zeros(shape, dtype)
            for shape, dtype in zip(output_shapes, output_dtypes, strict=True)
        ]


X = mx.ones((4, 16))


def config_of(kernel, x=X, **change):
    given = {"grid": (16, 4, 1), "threadgroup_candidates": list(SECONDS), "iters": 3, **change}
    return get_autotuned_config(kernel, inputs=[x], **given)


def test_the_fastest_configuration_of_a_kernel_is_found_and_remembered():
    kernel = Kernel()
    assert config_of(kernel) == AutotuneConfig((64, 1, 1), ())
    assert {call[2] for call in kernel.calls} == {(16, 4, 1)}
    again = Kernel()
    assert config_of(again).threadgroup == (64, 1, 1)
    assert again.calls == []
    config_of(Kernel(Spec(source="other")))
    config_of(kernel, mx.ones((4, 17)))
    assert len(default_store().all()) == 3


def test_templates_are_tried_with_every_threadgroup():
    kernel = Kernel()
    found = autotune_kernel(
        kernel,
        inputs=[X],
        grid=lambda config: (config.threadgroup[0], 4, 1),
        template_candidates=[{"T": mx.float32, "N": 4}, [("T", mx.float32), ("N", 8)]],
        threadgroup_candidates=[32, (64, 1, 1)],
        iters=3,
    )
    assert isinstance(found, AutotuneResult)
    assert found.best_config.to_list() == [("T", mx.float32), ("N", 8)]
    assert found.best_threadgroup() == (64, 1, 1)
    assert len(found.timings_ms) == 4
    assert all(isinstance(c, AutotuneConfig) and ms > 0 for c, ms in found.timings_ms.items())
    assert {call[2] for call in kernel.calls} == {(32, 4, 1), (64, 4, 1)}


def test_a_configuration_that_does_not_compile_is_dropped():
    found = autotune_kernel(
        Kernel(),
        inputs=[X],
        grid=(64, 1, 1),
        template_candidates=None,
        threadgroup_candidates=[(32, 1, 1), (1024, 1, 1)],
        iters=2,
    )
    assert found.best_threadgroup() == (32, 1, 1)
    assert found.dropped == {
        AutotuneConfig((1024, 1, 1)): "RuntimeError: (1024, 1, 1) does not compile"
    }


def test_when_none_compiles_the_errors_are_raised():
    with pytest.raises(TuningError, match=r"32x1x1: RuntimeError: \(32, 1, 1\) does not compile"):
        config_of(Kernel(seconds={}))


def test_autotune_kernel_searches_anew():
    slow = dict(SECONDS)
    config_of(Kernel(seconds=slow))
    slow[(64, 1, 1)] = 0.009
    found = autotune_kernel(
        Kernel(seconds=slow),
        inputs=[X],
        grid=(16, 4, 1),
        template_candidates=None,
        threadgroup_candidates=list(SECONDS),
        iters=3,
    )
    assert found.best_threadgroup() == (32, 1, 1)
    assert config_of(Kernel()).threadgroup == (32, 1, 1)


def test_outputs_are_like_the_first_input_unless_told():
    kernel = Kernel()
    config_of(kernel, output_shapes=[(3,)], output_dtypes=[mx.float16])
    with pytest.raises(ValueError, match="no input is an array"):
        get_autotuned_config(kernel, inputs=[1.0], grid=(1, 1, 1))


def test_a_kernel_whose_content_cannot_be_read_is_not_written_down():
    class Opaque(Kernel):
        def __init__(self):
            super().__init__()
            del self.spec

    kernel = Opaque()
    assert config_of(kernel).threadgroup == (64, 1, 1)
    count = len(kernel.calls)
    assert config_of(kernel).threadgroup == (64, 1, 1)
    assert len(kernel.calls) == count
    other = Opaque()
    config_of(other)
    assert other.calls
    assert default_store().all() == []


def test_no_search_where_time_says_nothing(monkeypatch):
    monkeypatch.setattr("zmlx.tuning.kernel.for_kernels", lambda **_: "emulator")
    kernel = Kernel()
    assert config_of(kernel).threadgroup == (32, 1, 1)
    assert config_of(kernel, threadgroup_candidates=None).threadgroup == (256, 1, 1)
    assert kernel.calls == []


def test_inside_a_trace_a_kernel_has_its_default_and_cannot_be_tuned():
    def function(x):
        assert config_of(Kernel(), x).threadgroup == (32, 1, 1)
        with pytest.raises(RuntimeError, match="inside a transformation"):
            autotune_kernel(
                Kernel(),
                inputs=[x],
                grid=(1, 1, 1),
                template_candidates=None,
                threadgroup_candidates=[32],
            )
        return x * 2

    mx.eval(mx.compile(function)(X))
    assert config_of(Kernel()).threadgroup == (64, 1, 1)


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"threadgroup_candidates": []}, "nothing to tune"),
        ({"threadgroup_candidates": [(0, 1, 1)]}, "from 1"),
        ({"threadgroup_candidates": [(64, 64, 1)]}, "4096 threads, 1024 at most"),
        ({"threadgroup_candidates": [(1, 2, 3, 4)]}, "one to three"),
        ({"template_candidates": []}, "nothing to tune"),
    ],
)
def test_candidates_that_are_none(bad, text):
    with pytest.raises(ValueError, match=text):
        config_of(Kernel(), **bad)


@pytest.mark.parametrize("bad", ["T", [("T",)], [("T", "float")], [(1, 2)]])
def test_templates_that_are_none(bad):
    with pytest.raises(TypeError, match="template"):
        config_of(Kernel(), template_candidates=[bad])


def test_a_decorated_function_finds_its_threadgroup():
    seen = []

    @autotune(threadgroups=[(32, 1, 1), (64, 1, 1)], iters=3)
    def double(x, *, factor=2, threadgroup):
        """Double it."""
        seen.append(threadgroup)
        time.sleep(SECONDS[threadgroup])
        return x * factor

    assert isinstance(double, AutotunedFunction)
    assert double.__doc__ == "Double it."
    assert mx.array_equal(double(X), X * 2)
    assert set(seen) == {(32, 1, 1), (64, 1, 1)}
    seen.clear()
    double(X + 1)
    assert seen == [(64, 1, 1)]
    double(X, factor=3)
    double(X[:1])
    assert len(double.results()) == 3
    assert double.results()[0].best_threadgroup() == (64, 1, 1)
    seen.clear()
    double(X, threadgroup=(32, 1, 1))
    assert seen == [(32, 1, 1)]


def test_clear_cache_forgets_on_disk_too():
    calls = []

    def make():
        @autotune(threadgroups=[32, 64], iters=2)
        def double(x, *, threadgroup):
            calls.append(threadgroup)
            return x * 2

        return double

    calls_of = make()
    # A list in the closure has content that changes; it is remembered where it is read first.
    calls_of(X)
    assert len(default_store().all()) == 1
    calls_of.clear_cache()
    assert default_store().all() == []
    assert calls_of.results() == []
    calls.clear()
    calls_of(X)
    assert len(calls) > 2


def test_templates_of_a_function():
    @autotune(threadgroups=[32], templates=[{"N": 1}, {"N": 2}], iters=3)
    def scaled(x, *, threadgroup, template):
        time.sleep(0.004 if dict(template)["N"] == 1 else 0.001)
        return [x * 2]

    scaled(X)
    assert scaled.results()[0].best_config.to_list() == [("N", 2)]


def test_a_method_can_be_tuned_when_its_object_has_content():
    class Layer(dict):
        @autotune(threadgroups=[32, 64], iters=2)
        def forward(self, x, *, threadgroup):
            return x * self["scale"]

    assert mx.array_equal(Layer(scale=3).forward(X), X * 3)


def test_the_device_may_be_left_out():
    @autotune(threadgroups=[32, 64], iters=2, device_aware=False)
    def double(x, *, threadgroup):
        return x * 2

    double(X)
    assert default_store().all()[0].subject.machine.device == ""


def test_a_function_that_holds_an_array_is_remembered_while_it_lives():
    weight = mx.ones((16,))
    seen = []

    def double(x, *, threadgroup):
        seen.append(threadgroup)
        return x * weight

    tuned = AutotunedFunction(double, [32, 64], iters=2)
    tuned(X)
    count = len(seen)
    tuned(X)
    assert len(seen) == count + 1
    assert default_store().all() == []
    tuned.clear_cache()
    tuned(X)
    assert len(seen) > count + 3


def test_decorating_without_brackets_is_an_error():
    with pytest.raises(TypeError, match="brackets"):

        @autotune
        def double(x, *, threadgroup):
            return x


def test_under_compile_a_function_has_its_default_until_it_is_tuned():
    seen = []

    def double(x, *, threadgroup):
        seen.append(threadgroup)
        time.sleep(SECONDS[threadgroup])
        return x * 2

    tuned = AutotunedFunction(double, [(32, 1, 1), (64, 1, 1)], iters=3)
    assert mx.array_equal(mx.compile(lambda x: tuned(x))(X), X * 2)
    assert seen == [(32, 1, 1)]
    tuned(X)
    seen.clear()
    assert mx.array_equal(mx.compile(lambda x: tuned(x) + 1)(X), X * 2 + 1)
    assert seen == [(64, 1, 1)]


def test_results_are_saved_and_loaded(tmp_path, monkeypatch):
    config_of(Kernel())
    assert save_autotune_cache() == default_store().file
    saved = save_autotune_cache(tmp_path / "kept" / "tuned.jsonl")
    assert len(read_results(saved)) == 1
    config_of(Kernel(Spec(source="other")))
    assert len(read_results(save_autotune_cache(str(saved)))) == 2

    monkeypatch.setenv("ZMLX_CACHE_DIR", str(tmp_path / "elsewhere"))
    assert load_autotune_cache() == 0
    assert load_autotune_cache(saved) == 2
    kernel = Kernel()
    assert config_of(kernel).threadgroup == (64, 1, 1)
    assert kernel.calls == []
    assert len(Store(default_store().file).all()) == 2


def test_loading_what_is_no_cache_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_autotune_cache(tmp_path / "missing")
    other = tmp_path / "other.txt"
    other.write_text("a poem\n")
    with pytest.raises(ValueError, match="1 of 1 lines are no tuning results"):
        load_autotune_cache(other)
    with pytest.raises(ValueError, match="no tuning results"):
        save_autotune_cache(other)
    assert other.read_text() == "a poem\n"


def test_importing_is_cheap():
    code = "import sys, zmlx.autotune; print('mlx_lm' in sys.modules, 'rich' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "False False\n"
