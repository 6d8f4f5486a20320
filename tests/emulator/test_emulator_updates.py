"""Inputs that a kernel writes in place, and outputs that it may leave in part."""

from __future__ import annotations

import mlx.core as mx
import pytest

from zmlx.backend.definition import Definition
from zmlx.backend.emulator import faults
from zmlx.backend.launch import launcher

SOURCE = """
uint i = thread_position_in_grid.x;
device float* into = (device float*)kept;
into[(i + 2) * kept_strides[0]] += x[i];
out[i] = x[i] * 2.0f;
"""


def run(source=SOURCE, *, kept, size=4, **settings):
    settings = {"ensure_row_contiguous": False, "updated_inputs": ("kept",), **settings}
    definition = Definition("keeping", ("x", "kept"), ("out",), source, **settings)
    [out] = launcher(definition, "emulator")(
        inputs=[mx.arange(1.0, size + 1), kept],
        output_shapes=[(size,)],
        output_dtypes=[mx.float32],
        grid=(size, 1, 1),
        threadgroup=(size, 1, 1),
    )
    mx.eval(out)
    return out


def test_an_input_is_updated_and_the_rest_of_it_kept():
    kept = mx.full((16,), 10.0)
    mx.eval(kept)
    assert run(kept=kept).tolist() == [2, 4, 6, 8]
    assert kept.tolist() == [10, 10, 11, 12, 13, 14] + [10] * 10
    run(kept=kept)
    assert kept[:7].tolist() == [10, 10, 12, 14, 16, 18, 10]


def test_a_part_of_an_array_is_updated_where_it_lies():
    whole = mx.zeros((3, 20))
    mx.eval(whole)
    run(kept=whole[1, 1::2])
    assert whole[1].tolist() == [0] * 5 + [1, 0, 2, 0, 3, 0, 4] + [0] * 8
    assert not mx.any(whole[::2]).item()


def test_inputs_whose_elements_lie_between_each_other_s():
    whole = mx.zeros((2, 16))
    mx.eval(whole)
    kept, other = whole[0, ::2], whole[0, 1::2]
    definition = Definition(
        "keeping",
        ("kept", "other"),
        ("out",),
        """
        uint i = thread_position_in_grid.x;
        ((device float*)kept)[i * kept_strides[0]] = 1.0f;
        ((device float*)other)[i * other_strides[0]] = 2.0f;
        out[i] = 3.0f;
        """,
        ensure_row_contiguous=False,
        updated_inputs=("kept", "other"),
    )
    [out] = launcher(definition, "emulator")(
        inputs=[kept, other],
        output_shapes=[(8,)],
        output_dtypes=[mx.float32],
        grid=(8, 1, 1),
        threadgroup=(8, 1, 1),
    )
    assert out.tolist() == [3] * 8
    assert whole.tolist() == [[1, 2] * 8, [0] * 16]


def test_an_update_outside_is_a_fault():
    kept = mx.zeros((10,))
    with pytest.raises(faults.OutOfBounds, match="'kept', which has 10"):
        run(SOURCE.replace("i + 2", "i + 7"), kept=kept)


def test_threadgroups_that_update_the_same_are_a_fault():
    with pytest.raises(faults.Race, match="'kept'"):
        run(SOURCE.replace("(i + 2)", "0"), kept=mx.zeros((10,)))


def test_other_inputs_stay_read_only():
    with pytest.raises(faults.ReadOnly, match="writes element 0 of input 'x'"):
        run(SOURCE + "((device float*)x)[i] = 0.0f;", kept=mx.zeros((10,)), size=8)


def test_what_may_be_left():
    source = "if (thread_position_in_grid.x == 1) { out[1] = x[1] + kept[1]; }"
    assert run(source, kept=mx.ones(10), partial_outputs=True)[1].item() == 3
    with pytest.raises(faults.Unwritten):
        run(source, kept=mx.ones(10))


def test_definitions_that_cannot_be():
    with pytest.raises(ValueError, match=r"updated inputs \['y'\] are no inputs"):
        run(kept=mx.ones(10), updated_inputs=("y",))
    with pytest.raises(ValueError, match="updates inputs, of which it may get copies"):
        run(kept=mx.ones(10), ensure_row_contiguous=True)
