"""Recorded steps: what is recorded, where everything lies, and that it computes the step.

Without a GPU the launches run one by one in the emulator, each on what the plan says and nothing
else.
"""

from __future__ import annotations

import copy
import re
import struct
from types import SimpleNamespace

import mlx.core as mx
import pytest
from emulated_cuda import emulate_cuda
from mlx_lm.models.cache import make_prompt_cache
from simulated_recording import SimulatedRecording, arguments_of
from zoo.build import build

from zmlx.backend.cuda import addresses
from zmlx.backend.cuda.addresses import Addresses
from zmlx.backend.cuda.jit_module import KernelText, module_of
from zmlx.backend.cuda.recording import BUFFER, BYTES
from zmlx.backend.extension import NativeUnavailable
from zmlx.graph import building, layout, lending
from zmlx.graph.caches import Layout
from zmlx.graph.launches import Launch
from zmlx.graph.planning import _told, steps
from zmlx.graph.program import DecodeProgram, traced_step
from zmlx.graph.replayed import Replayed
from zmlx.kernels import attention_launch

PROMPT = mx.array([[11, 95, 3, 152, 27, 64, 118]])
TOKENS = (71, 8, 133, 40)


@pytest.fixture
def recordings(monkeypatch):
    """Every recording that is made, as it is simulated."""
    made: list[SimulatedRecording] = []

    def recorded(self, launches):
        made.append(SimulatedRecording(self._parts, steps(self._parts, launches.constants)))
        return made[-1]

    monkeypatch.setattr(Replayed, "_recorded", recorded)
    return made


def prompted(model, prompt=PROMPT):
    cache = make_prompt_cache(model)
    mx.eval(model(prompt, cache=cache))
    return cache


def program_of(model, cache, monkeypatch, **options):
    """Return a program of a model's body, as on CUDA."""

    def forward(tokens, caches):
        return model.model(tokens, cache=caches)

    emulate_cuda(monkeypatch)
    layout = Layout.of(cache)
    return DecodeProgram(traced_step(forward, layout, tried=False), layout, **options), forward


def far(found, truth):
    return (mx.abs(found - truth).max() / mx.abs(truth).max()).item()


def check_steps(model, monkeypatch, tokens=TOKENS):
    """Check steps of a recorded program against the forward; return the program."""
    cache = prompted(model)
    stock = copy.deepcopy(cache)
    program, forward = program_of(model, cache, monkeypatch, recorded=True)
    for token in tokens:
        array = mx.array([[token]])
        assert far(program(array, cache), forward(array, stock)) < 1e-5
    return program


MODELS = {
    "llama": {},
    "qwen3_moe": {},
    "lfm2": {},
    # Sliding windows; a layer norm before products with biases; attention beside the MLP.
    "gemma3_text": {},
    "starcoder2": {},
    "cohere2": {},
    # What its kernels read are parts of what others made.
    "glm4_moe_lite": {"dtype": mx.bfloat16, "quantize": {"bits": 4, "group_size": 32}},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_recorded_step_is_the_step(name, recordings, monkeypatch):
    model = build(name, **MODELS[name])
    cache = prompted(model)
    plain, stock = copy.deepcopy(cache), copy.deepcopy(cache)
    program, forward = program_of(model, cache, monkeypatch, recorded=True)
    other = DecodeProgram(program.traced, program.layout)
    for number, token in enumerate(TOKENS):
        tokens = mx.array([[token]])
        found, truth = program(tokens, cache), other(tokens, plain)
        # The same kernels: a value that is read from another place would show.
        assert far(found, truth) == 0, number
        assert far(found, forward(tokens, stock)) < (0.1 if "dtype" in MODELS[name] else 1e-5)
    # The first step of a form is MLX's; the second is compared with it.
    assert [recording.runs for recording in recordings] == [len(TOKENS)]
    assert recordings[0].found.size < sum(
        value.size * value.dtype.size
        for node in recordings[0].parts.launches
        for value in node.outputs
    )


def test_two_caches_take_turns(recordings, monkeypatch):
    model = build("llama")
    caches = [prompted(model), prompted(model, PROMPT[:, :4])]
    stock = copy.deepcopy(caches)
    program, forward = program_of(model, caches[0], monkeypatch, recorded=True)
    for token in TOKENS:
        tokens = mx.array([[token]])
        found = [program(tokens, cache) for cache in caches]
        truth = [forward(tokens, cache) for cache in stock]
        assert all(far(f, t) < 1e-5 for f, t in zip(found, truth, strict=True))
    [recording] = recordings
    assert recording.runs == 2 * len(TOKENS)


def test_each_cache_has_counters_of_its_own(recordings, monkeypatch):
    """Steps of two caches may run at once: what counts who is last must not be the same memory."""
    model = build("llama")
    caches = [prompted(model), prompted(model, PROMPT[:, :4])]
    program, _ = program_of(model, caches[0], monkeypatch, recorded=True)
    counted = []
    right = attention_launch._checked
    monkeypatch.setattr(attention_launch, "_checked", lambda c, n: counted.append(c) or right(c, n))
    for token in TOKENS[:3]:
        for cache in caches:
            mx.eval(program(mx.array([[token]]), cache))
    layers = len(caches[0])
    # MLX's own recording, for all steps, and ours: none of them keeps counters.
    assert len(counted) == 2 * layers
    [recording] = recordings
    for node, arguments in arguments_of(recording.parts, recording.found):
        names = node.arguments[0].kernel.input_names
        given = [argument for argument in arguments if argument.base != BYTES]
        for name, argument in zip(names, given, strict=False):
            assert name != "counters" or argument.base == BUFFER
    mine = [lending.lend(cache).counters for cache in caches]
    assert mine[0] is not mine[1]
    assert not any(mx.any(counters).item() for counters in mine)


def test_larger_buffers_are_another_recording(recordings, monkeypatch):
    monkeypatch.setattr(lending, "ROOM", 8)
    monkeypatch.setattr(lending, "_LEAST", 1)
    monkeypatch.setattr(building, "_KEPT", 1)
    program = check_steps(build("llama"), monkeypatch, TOKENS * 3)
    # One token, then eight, then three.
    assert [recording.runs for recording in recordings] == [8, 3]
    assert [r._recording for r in program._replay._chosen.values()] == recordings[1:]


def test_each_kernel_is_given_what_its_signature_says(recordings, monkeypatch):
    """MLX writes the signature: a pointer for each array, and what the text asks of its layout."""
    model = build("qwen3_moe")
    cache = prompted(model)
    program, _ = program_of(model, cache, monkeypatch, recorded=True)
    for token in TOKENS[:2]:
        program(mx.array([[token]]), cache)
    [recording] = recordings
    kinds = {"int": 4, "Shape": 40, "Strides": 80}
    asked = set()
    for node, (launch, arguments) in zip(
        recording.parts.launches, recording.found.launches, strict=True
    ):
        kernel = launch.kernel
        outputs = tuple(f"made{number}" for number in range(len(node.outputs)))
        text = KernelText(kernel.name, kernel.input_names, outputs, kernel.source, "")
        given = [(value.dtype, value.ndim) for value in node.inputs]
        module = module_of(text, given, launch.dtypes, launch.template or ())
        signature = module.text.partition("__global__ void")[2].partition(") {")[0]
        lines = signature.splitlines()[1:]
        assert len(lines) == len(arguments)
        for line, argument in zip(lines, arguments, strict=True):
            kind = line.rstrip(",").split()[-2]
            assert len(argument.value) == kinds.get(kind, 0), line
            assert (argument.base == BYTES) == (kind in kinds), line
            asked.add(kind)
    assert "Strides" in asked


def test_shapes_and_strides_are_what_MLX_passes():
    at = layout.transposed(layout.whole((2, 3, 4)), (1, 0, 2))
    assert struct.unpack("=10i", _told(at, "shape")) == (3, 2, 4, *[0] * 7)
    assert struct.unpack("=10q", _told(at, "strides")) == (4, 12, 1, *[0] * 7)
    assert struct.unpack("=i", _told(at, "ndim")) == (3,)


def test_a_grid_is_laid_out_as_MLX_does_it():
    launch = Launch(None, (), (), (100, 3, 1), (32, 8, 1), None)
    assert (launch.blocks, launch.block) == ((4, 1, 1), (32, 3, 1))


def test_a_recording_that_gives_other_numbers_is_not_used(recordings, monkeypatch, capsys):
    right = SimulatedRecording.__call__

    def wrong(self, inputs, buffers):
        return [mx.roll(result, 1) for result in right(self, inputs, buffers)]

    monkeypatch.setattr(SimulatedRecording, "__call__", wrong)
    check_steps(build("llama"), monkeypatch)
    assert recordings[0].runs == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("zmlx: a decode step is not recorded: its graph differs from MLX's")


def test_a_step_that_cannot_be_recorded_is_built_by_MLX(monkeypatch, capsys):
    """Products of float32 with every head's own matrix are MLX's."""
    monkeypatch.setattr(building.speech, "level", lambda: "debug")
    check_steps(build("deepseek_v3"), monkeypatch)
    said = capsys.readouterr().err
    assert said.count("is not recorded") == 1
    assert "Matmul" in said
    assert "have to be inputs" not in said


@pytest.fixture
def tables(monkeypatch):
    """The constants of every table of addresses that is made, and whether one has been moved."""
    state = SimpleNamespace(made=[], moved=False)

    class Watched(Addresses):
        def __init__(self, arrays):
            super().__init__(arrays)
            state.made.append(self)
            self.moved = lambda: state.moved and self is state.made[0]

    monkeypatch.setattr(building, "Addresses", Watched)
    return state


def test_steps_that_MLX_builds_take_constants_by_address(tables, monkeypatch):
    """Until MLX moves one, which it does when the host reads it: then they are looked up again."""
    model = build("deepseek_v3")
    cache = prompted(model)
    stock = copy.deepcopy(cache)
    program, forward = program_of(model, cache, monkeypatch, recorded=True)
    for number, token in enumerate((*TOKENS, *TOKENS)):
        tables.moved = number >= len(TOKENS)
        tokens = mx.array([[token]])
        assert far(program(tokens, cache), forward(tokens, stock)) < 1e-5
        # The first step takes them as inputs, the second is compared with such a one.
        assert len(tables.made) == (number > 0) + tables.moved


def test_nothing_is_given_by_address_that_nobody_watches(tables, monkeypatch, capsys):
    def missing(_):
        raise NativeUnavailable("no compiler")

    model = build("deepseek_v3")
    cache = prompted(model)
    program, _ = program_of(model, cache, monkeypatch, recorded=True)
    monkeypatch.setattr(addresses, "_watched", missing)
    monkeypatch.setattr(building.speech, "level", lambda: "debug")
    for token in TOKENS:
        program(mx.array([[token]]), cache)
    assert list(program._replay._chosen.values()) == [program._replay._compiled]
    said = capsys.readouterr().err
    assert re.search("constants of a decode step have to be inputs: .*no compiler", said)


def test_no_step_waits_for_the_compiler(recordings, monkeypatch):
    states = iter([True, True, False])
    monkeypatch.setattr(building.library, "is_being_built", lambda: next(states))
    program = check_steps(build("llama"), monkeypatch, TOKENS + TOKENS)
    # The first step of a form does not ask.
    assert [recording.runs for recording in recordings] == [2 * len(TOKENS) - 3 + 1]
    assert len(program._replay._chosen) == 1
