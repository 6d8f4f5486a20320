"""Which variant of a kernel a call takes, without a GPU: what reaches `mx.fast.cuda_kernel`."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from zmlx.backend.cuda import compiled
from zmlx.backend.definition import Definition


class Recorder:
    """Stands for `mx.fast.cuda_kernel`; keeps what it is given, makes and launches nothing."""

    def __init__(self) -> None:
        self.made: list[dict] = []
        self.calls: list[dict] = []

    def __call__(self, **arguments):
        self.made.append(arguments)

        def launch(**call):
            self.calls.append({**call, "names": arguments["input_names"]})
            return []

        return launch


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(mx.fast, "cuda_kernel", recorder)
    return recorder


def kernel(source: str = "out[thread_position_in_grid.x] = x[0] + y;", **settings):
    settings = {"input_names": ("x", "y"), "output_names": ("out",), **settings}
    return compiled(Definition(name="under_test", source=source, **settings))


def call(kernel, **changed):
    arguments = {
        "inputs": [mx.zeros(4), mx.zeros(4)],
        "output_shapes": [(4,)],
        "output_dtypes": [mx.float32],
        "grid": (64, 1, 1),
        "threadgroup": (32, 1, 1),
    }
    return kernel(**(arguments | changed))


def test_the_usual_call_goes_through_unchanged(recorder):
    k = kernel()
    call(k, template=[("T", mx.float16), ("N", 2)], init_value=1.0, verbose=True, stream=mx.cpu)
    assert len(recorder.made) == 1
    (given,) = recorder.calls
    assert given["names"] == ["x", "y"]
    assert given["grid"] == (64, 1, 1)
    assert given["threadgroup"] == (32, 1, 1)
    assert given["template"] == [("T", mx.float16), ("N", 2)]
    assert (given["init_value"], given["verbose"], given["stream"]) == (1.0, True, mx.cpu)


def test_variants_are_made_once(recorder):
    k = kernel()
    for _ in range(3):
        call(k)
        call(k, grid=(70, 1, 1))
        call(k, inputs=[mx.zeros(4), 2.5])
        call(k, grid=(70, 1, 1), inputs=[mx.zeros(4), mx.array(1.0)])
        call(k, template=[("N", -2)])
    assert [m["input_names"] for m in recorder.made] == [
        ["x", "y"],
        ["x", "y", "zmlx_grid"],
        ["x", "zmlx_y"],
        ["x", "zmlx_y", "zmlx_grid"],
        ["x", "y"],
    ]


@pytest.mark.parametrize(
    ("grid", "threadgroup", "cut"),
    [
        ((64, 1, 1), (32, 1, 1), False),
        ((65, 1, 1), (32, 1, 1), True),
        ((7, 1, 1), (32, 1, 1), False),
        ((7, 3, 1), (4, 4, 4), True),
        ((8, 3, 1), (4, 4, 4), False),
        ((0, 1, 1), (32, 1, 1), True),
    ],
)
def test_the_size_of_a_cut_grid_is_an_input(recorder, grid, threadgroup, cut):
    call(kernel(), grid=grid, threadgroup=threadgroup)
    (given,) = recorder.calls
    assert (given["names"][-1] == "zmlx_grid") == cut
    if cut:
        size = given["inputs"][-1]
        assert size.dtype == mx.int32
        assert tuple(np.array(size)) == grid
        assert given["grid"] == tuple(max(g, 1) for g in grid)


def test_negative_numbers_of_the_template_are_written_into_the_body(recorder):
    call(kernel(), template=[("T", mx.float32), ("N", -2), ("FLAG", True)])
    assert recorder.calls[0]["template"] == [("T", mx.float32), ("FLAG", True)]
    assert "constexpr int N = -2;" in recorder.made[-1]["source"]


def test_an_input_that_is_always_indexed_is_not_looked_at(recorder):
    k = kernel("out[0] = x[0] + y[0];")
    call(k, inputs=[2.0, 3.0])
    assert recorder.calls[0]["names"] == ["x", "y"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"threadgroup": (64, 32, 1)}, r"\(64, 32, 1\) has 2048 threads; 1 to 1024"),
        ({"threadgroup": (0, 1, 1)}, r"\(0, 1, 1\) has 0 threads"),
        ({"threadgroup": (-2, -2, 1), "grid": (3, 2, 1)}, "1 to 1024"),
        ({"grid": (-64, 1, 1)}, r"grid \(-64, 1, 1\) has a negative size"),
        ({"inputs": [mx.zeros(4)]}, r"takes 2 inputs \(x, y\), not 1"),
        ({"inputs": [mx.zeros(4)] * 3}, r"takes 2 inputs \(x, y\), not 3"),
    ],
)
def test_bad_launches_are_refused(recorder, changed, message):
    k = kernel()
    with pytest.raises(ValueError, match=message):
        call(k, **changed)
    assert not recorder.calls


def test_settings_reach_mlx(recorder):
    kernel(ensure_row_contiguous=False)
    assert recorder.made[0]["ensure_row_contiguous"] is False
    assert recorder.made[0]["name"] == "under_test"
    assert recorder.made[0]["output_names"] == ["out"]
