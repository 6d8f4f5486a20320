"""Inputs by address: which ones, what the text then says, and that it compiles."""

from __future__ import annotations

from collections import Counter

import mlx.core as mx
import pytest
from nvrtc_program import compile_program, is_missing
from places import stand_still

from zmlx.backend import cuda
from zmlx.backend.cuda import addresses
from zmlx.backend.cuda.launching import InForce, current, in_force
from zmlx.backend.definition import CudaBody, Definition

SOURCE = """
uint i = thread_position_in_grid.x;
out[i] = x[i] * weight[i] + bias[i % bias_shape[0]] + more[i];
"""


@pytest.fixture
def launches(monkeypatch):
    """What reaches `mx.fast.cuda_kernel`: its arguments, and the inputs of every launch."""
    made: list[dict] = []

    def cuda_kernel(**arguments):
        def launch(*, inputs, output_shapes, output_dtypes, **_):
            made.append({**arguments, "inputs": list(inputs)})
            return [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]

        return launch

    monkeypatch.setattr(mx.fast, "cuda_kernel", cuda_kernel)
    stand_still(monkeypatch)
    return made


def arrays() -> dict[str, mx.array]:
    return {
        "x": mx.ones(64),
        "weight": mx.ones(64, mx.bfloat16),
        "bias": mx.ones(64),
        "more": mx.ones(64, mx.uint32),
    }


def launched(definition: Definition, inputs: dict[str, mx.array]) -> None:
    cuda.compiled(definition)(
        inputs=list(inputs.values()),
        output_shapes=[(64,)],
        output_dtypes=[mx.float32],
        grid=(64, 1, 1),
        threadgroup=(64, 1, 1),
    )


@pytest.mark.parametrize("byhand", [False, True])
def test_constants_come_in_a_table(launches, byhand):
    inputs = arrays()
    own = (
        {"cuda": CudaBody("out[0] = x[0] * weight[0] + bias[bias_shape[0] - 1] + more[0];")}
        if byhand
        else {}
    )
    definition = Definition("scaled", tuple(inputs), ("out",), SOURCE, **own)
    held = addresses.Addresses([inputs["weight"], inputs["bias"], inputs["more"]])
    with in_force(InForce(held)):
        launched(definition, inputs)
    launched(definition, inputs)
    by_address, plain = launches[-2:]
    # The kernel asks for the shape of `bias`, which only an input has.
    assert by_address["input_names"] == ["x", "bias", addresses.TABLE]
    assert by_address["inputs"][:2] == [inputs["x"], inputs["bias"]]
    assert by_address["inputs"][2].tolist()[:3] == [1, 3, 0]
    assert "const __nv_bfloat16* const weight" in by_address["source"]
    assert "const uint32_t* const more" in by_address["source"]
    assert plain["input_names"] == list(inputs)
    assert addresses.TABLE not in plain["source"]


def test_one_constant_is_not_worth_a_table(launches):
    inputs = arrays()
    with in_force(InForce(addresses.Addresses([inputs["weight"]]))):
        launched(Definition("scaled", tuple(inputs), ("out",), SOURCE), inputs)
    assert launches[-1]["input_names"] == list(inputs)


def test_equal_arrays_are_not_the_same(launches):
    inputs = arrays()
    with in_force(InForce(addresses.Addresses(arrays().values()))):
        launched(Definition("scaled", tuple(inputs), ("out",), SOURCE), inputs)
    assert launches[-1]["input_names"] == list(inputs)


def test_what_has_no_address_is_passed_over(monkeypatch):
    stand_still(monkeypatch)
    odd = [mx.array(1.0), mx.zeros((0, 4)), mx.array([1j])]
    held = addresses.Addresses(odd)
    assert not any(map(held.knows, odd))


def test_the_block_ends_also_when_it_fails(launches):
    held = addresses.Addresses([mx.ones(4)])
    how = InForce(held)
    with pytest.raises(ZeroDivisionError), in_force(how):
        raise ZeroDivisionError
    assert current() is None


def test_forms_are_made_once(launches):
    inputs = arrays()
    definition = Definition("scaled", tuple(inputs), ("out",), SOURCE)
    held = addresses.Addresses([inputs["weight"], inputs["more"]])
    with in_force(InForce(held)):
        for _ in range(3):
            launched(definition, inputs)
    tables = {id(call["inputs"][-1]) for call in launches}
    assert len(tables) == 1
    assert Counter(call["source"] for call in launches).most_common(1)[0][1] == 3


@pytest.mark.skipif(is_missing(), reason="no nvidia-cuda-nvrtc (in the extra dev)")
def test_the_declarations_compile():
    dtypes = list(addresses._TYPES)
    names = [f"array{number}" for number in range(len(dtypes))]
    told = addresses._declarations(names, dtypes)
    body = " ".join(f"out[{number}] = float({name}[0]);" for number, name in enumerate(names))
    header = cuda.translated(Definition("a", ("x",), ("out",), "out[0] = x[0];")).header
    text = (
        f"__global__ void kernel(const uint64_t* {addresses.TABLE}, float* out) {{ {told} {body} }}"
    )
    assert compile_program(header, text) is None
