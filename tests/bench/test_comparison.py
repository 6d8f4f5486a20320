"""`zmlx.bench.compare`: right outputs first, then fair timings, a table and JSON."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import mlx.core as mx
import pytest

import zmlx.bench
from zmlx.bench import ceiling, comparison
from zmlx.bench.capsule import read, write
from zmlx.bench.comparison import QUANTITIES
from zmlx.bench.report import report
from zmlx.tuning import timing


@pytest.fixture(autouse=True)
def small_copies(monkeypatch):
    monkeypatch.setattr(ceiling, "COPIED", 2**22)
    ceiling._measured.cache_clear()
    yield
    ceiling._measured.cache_clear()


def sleeping(seconds, function=lambda x: x * 2):
    def call(*inputs):
        time.sleep(seconds)
        return function(*inputs)

    return call


def compared(implementations, shapes=((4, 8),), **change):
    given = {"warmup": 1, "iters": 3, "show": False, **change}
    return zmlx.bench.compare(implementations, shapes, **given)


def row_of(result, name, subject=None):
    return next(
        row for row in result.rows if row.implementation == name and subject in (None, row.subject)
    )


def test_the_function_and_not_a_module_is_there():
    assert callable(zmlx.bench.compare)
    code = (
        "import zmlx.bench.report, sys; assert 'mlx.core' not in sys.modules;"
        "import zmlx.bench; zmlx.bench.compare.__call__; import zmlx.bench.comparison;"
        "print(type(zmlx.bench.compare).__name__)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "function\n"
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        zmlx.bench.other  # noqa: B018


def test_times_are_of_one_call_and_the_speedup_is_against_the_last(virtual_time, monkeypatch):
    monkeypatch.setattr(comparison, "copy_bandwidth", lambda: 1e9)
    result = compared({"fast": sleeping(0.002), "slow": sleeping(0.006)})
    fast, slow = row_of(result, "fast"), row_of(result, "slow")
    assert fast.call == fast.latency == pytest.approx(0.002)
    assert slow.call == slow.latency == pytest.approx(0.006)
    assert result.speedup(fast) == pytest.approx(3)
    assert result.speedup(slow) == 1.0
    assert len(fast.call_seconds) == len(fast.latency_seconds) == 3


def test_small_calls_are_timed_in_batches(virtual_time, monkeypatch):
    monkeypatch.setattr(comparison, "copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr(timing, "finish", sleeping(100e-6, timing.finish))
    result = compared({"a": sleeping(10e-6), "b": sleeping(20e-6)})
    for row, seconds in zip(result.rows, (10e-6, 20e-6), strict=True):
        assert row.calls >= 50
        assert row.call < row.latency
        assert row.latency == pytest.approx(seconds + 100e-6)
        assert row.call == pytest.approx(seconds + 100e-6 / row.calls)
        assert row.ok


def test_real_calls_have_times():
    result = compared({"a": lambda x: x + 1, "b": lambda x: 1 + x})
    for row in result.rows:
        assert row.calls >= 4
        assert 0 < row.call < 0.1
        assert 0 < row.latency < 0.1
        assert row.ok


def test_bytes_are_those_of_inputs_and_outputs():
    result = compared({"a": lambda x, y: [x + y, x > y]}, [(4, 8)], n_inputs=2)
    assert result.rows[0].bytes == 3 * 4 * 32 + 32
    assert result.rows[0].bandwidth == pytest.approx(416 / result.rows[0].call)
    assert result.ceiling > 1e8


WRONG = {
    "zeros": lambda x: mx.zeros_like(x),
    "five percent": lambda x: x * 2.1,
    "nan": lambda x: x * mx.nan,
    "dtype": lambda x: (x * 2).astype(mx.float16),
    "shape": lambda x: (x * 2).flatten(),
    "outputs": lambda x: [x * 2, x],
}


@pytest.mark.parametrize("kind", WRONG)
def test_no_speedup_for_wrong_outputs(kind, capsys):
    result = compared({"wrong": WRONG[kind], "right": sleeping(0.003)}, show=True)
    row = row_of(result, "wrong")
    assert not row.ok
    assert row.call is not None
    assert result.speedup(row) is None
    assert result.speedup(row_of(result, "right")) == 1.0
    text = capsys.readouterr().out
    assert "differ:" in text or "outputs, right has" in text
    assert result.to_json()["rows"][0]["speedup"] is None
    assert {run.variant for run in result.runs()} == {"right"}


def test_rounding_of_16_bits_is_right_either_way():
    def in_float32(x):
        return mx.softmax(x.astype(mx.float32), axis=-1).astype(x.dtype)

    result = compared(
        {"tighter": in_float32, "mlx": lambda x: mx.softmax(x, axis=-1)},
        [(4, 1000)],
        dtypes=[mx.bfloat16, mx.float16, mx.float32],
    )
    assert all(row.ok for row in result.rows), [row.difference for row in result.rows]
    assert [row.subject for row in result.rows][::2] == [
        "bfloat16 (4, 1000)",
        "float16 (4, 1000)",
        "float32 (4, 1000)",
    ]


def test_one_that_raises_has_a_reason_and_no_time(capsys):
    result = compared({"bad": lambda x: 1 / 0, "good": lambda x: x * 2}, show=True)
    bad = row_of(result, "bad")
    assert bad.failure == "ZeroDivisionError: division by zero"
    assert bad.call is None
    assert result.speedup(bad) is None
    assert "division by zero" in capsys.readouterr().out
    result = compared({"good": lambda x: x * 2, "bad": lambda x: 1 / 0})
    assert "not checked: bad raised" in row_of(result, "good").difference
    assert result.speedup(row_of(result, "good")) is None
    with pytest.raises(ValueError, match="nothing that was compared"):
        result.capsule("none")
    with pytest.raises(RuntimeError, match=r"every implementation raised(.|\n)*division"):
        compared({"bad": lambda x: 1 / 0})


def test_the_table_is_on_stdout(capsys):
    compared({"ours": lambda x: x * 2, "mlx": lambda x: x + x}, [(4, 8), (3,)], show=True)
    out, err = capsys.readouterr()
    for text in ("float32 (4, 8)", "float32 (3,)", "ours", "x mlx", "GB/s", "same", "baseline"):
        assert text in out
    assert err == ""


def test_json_and_capsule_hold_every_round(tmp_path, capsys):
    result = compared({"ours": sleeping(0.001), "mlx": sleeping(0.002)})
    content = json.loads(json.dumps(result.to_json()))
    assert content["baseline"] == "mlx"
    assert len(content["rows"][0]["call_seconds"]) == 3
    assert content["settings"] == {"warmup": 1, "iters": 3, "seed": 42, "n_inputs": 1}
    capsule = read(write(result.capsule("ops", ["a note"]), tmp_path / "ops.json"))
    assert capsule.variants() == ["mlx", "ours"]
    assert capsule.quantities == QUANTITIES
    assert len(capsule.values("float32 (4, 8)", "ours", "call")) == 3
    assert capsule.values("float32 (4, 8)", "ours", "call")[0] >= 1000
    assert capsule.notes[0] == "a note"
    report(tmp_path / "ops.json")
    assert "ours / mlx" in capsys.readouterr().out


def test_inputs_do_not_stay_in_caches():
    seen = []
    compared({"a": lambda x: seen.append(x) or x + 1}, [(256, 1024)], iters=5)
    assert len({memory_of(x) for x in seen}) > 8


def memory_of(array):
    import numpy as np

    return np.array(array, copy=False).__array_interface__["data"][0]


def test_empty_inputs_are_timed_too():
    result = compared({"a": lambda x: x * 2, "b": lambda x: x + x}, [(0,), ()])
    assert all(row.ok for row in result.rows)
    assert row_of(result, "a", "float32 (0,)").bandwidth == 0.0


@pytest.mark.parametrize(
    "bad",
    [
        {"implementations": {}},
        {"shapes": []},
        {"shapes": [5]},
        {"iters": 0},
        {"warmup": 0},
        {"n_inputs": 0},
        {"dtypes": []},
    ],
    ids=lambda bad: next(iter(bad)),
)
def test_bad_arguments(bad):
    given = {"implementations": {"a": lambda x: x}, "shapes": [(3,)], "show": False, **bad}
    with pytest.raises(ValueError, match=r"at least one|expected a tuple"):
        zmlx.bench.compare(given.pop("implementations"), given.pop("shapes"), **given)


def test_the_ceiling_is_measured_once():
    first = ceiling.copy_bandwidth()
    assert first == ceiling.copy_bandwidth()
    assert 1e8 < first < 1e14
    assert ceiling._gpu_seconds() > 0  # the same operations run on the CPU
