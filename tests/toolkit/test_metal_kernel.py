"""`zmlx.metal.kernel`: what it refuses, what it passes on, what it counts; and MLX's own view."""

from __future__ import annotations

import dataclasses
import types

import mlx.core as mx
import numpy as np
import pytest

from zmlx import metal
from zmlx.backend import launch
from zmlx.backend import metal as metal_backend
from zmlx.backend.definition import Definition
from zmlx.backend.names import ATTRIBUTES
from zmlx.metal import KernelStats, MetalKernel, MetalKernelSpec, kernel

SOURCE = "uint i = thread_position_in_grid.x; out[i] = T(x[i]) * s;"


class Recorder:
    """A backend whose launches note their arguments and give zeros."""

    def __init__(self):
        self.definitions, self.calls = [], []

    def compiled(self, definition):
        self.definitions.append(definition)

        def call(**arguments):
            self.calls.append(arguments)
            pairs = zip(arguments["output_shapes"], arguments["output_dtypes"], strict=True)
            return [mx.zeros(shape, dtype) for shape, dtype in pairs]

        return call


@pytest.fixture
def recorder(monkeypatch):
    """Put a recorder in the emulator's place, with empty caches before and after."""
    found = Recorder()
    monkeypatch.setenv("ZMLX_BACKEND", "emulator")
    modules = {"zmlx.backend.emulator": types.SimpleNamespace(compiled=found.compiled)}
    real = launch.import_module
    monkeypatch.setattr(launch, "import_module", lambda name: modules.get(name) or real(name))
    clear()
    yield found
    clear()


def clear():
    from zmlx.registry import clear_cache

    clear_cache()


def made(**changes):
    arguments = {
        "name": "scale",
        "input_names": ["x", "s"],
        "output_names": ["out"],
        "source": SOURCE,
        **changes,
    }
    return kernel(**arguments)


def arguments(**changes):
    return {
        "inputs": [mx.ones(9), 2.0],
        "template": [("T", mx.float32)],
        "grid": (9, 1, 1),
        "threadgroup": (32, 1, 1),
        "output_shapes": [(9,)],
        "output_dtypes": [mx.float32],
        **changes,
    }


def test_a_launch_passes_everything_on(recorder):
    stream = mx.default_stream(mx.cpu)
    given = arguments(init_value=1.5, verbose=True, stream=stream)
    k = made(header="// h", ensure_row_contiguous=False, atomic_outputs=True)
    assert [out.shape for out in k(**given)] == [(9,)]
    assert recorder.calls == [given]
    assert recorder.definitions == [
        Definition(
            name="scale",
            input_names=("x", "s"),
            output_names=("out",),
            source=SOURCE,
            header="// h",
            ensure_row_contiguous=False,
            atomic_outputs=True,
        )
    ]


def test_inputs_come_by_position_too(recorder):
    given = arguments()
    x, s = given.pop("inputs")
    made()(x, s, **given)
    assert list(recorder.calls[0]["inputs"]) == [x, s]
    with pytest.raises(TypeError, match="by position or by name"):
        made()(x, s, inputs=[x, s], **given)


def test_equal_kernels_are_one_and_compiled_once(recorder):
    first = made()
    assert made() is first
    assert made(source=SOURCE + " ") is not first
    alone = made(cache=False)
    assert alone is not first
    for k in (first, alone, first):
        k(**arguments())
    assert len(recorder.definitions) == 1
    assert (first.stats.run_count, alone.stats.run_count) == (2, 1)


def test_outputs_of_no_elements_launch_nothing(recorder):
    given = arguments(inputs=[mx.ones((0,)), 1.0], output_shapes=[(0,)], grid=(0, 1, 1))
    (out,) = made()(**given)
    assert (out.shape, out.dtype) == ((0,), mx.float32)
    assert recorder.calls == []
    with pytest.raises(ValueError, match="grid=\\(0, 1, 1\\); each number must be from 1"):
        made()(**arguments(grid=(0, 1, 1)))


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"inputs": [mx.ones(9)]}, ValueError, "inputs has 1 elements; it takes 2 (x, s)"),
        ({"inputs": ["a", 2.0]}, TypeError, "input 'x' is a str; give an mx.array or a number"),
        ({"inputs": [np.ones(9), 2.0]}, TypeError, "input 'x' is a ndarray"),
        ({"inputs": mx.ones(2)}, TypeError, "inputs is array; give a list"),
        ({"output_shapes": [(9,), (9,)]}, ValueError, "output_shapes has 2 elements; it takes 1"),
        ({"output_shapes": [9]}, TypeError, "output shape 9; give a tuple of ints"),
        ({"output_shapes": [(-1,)]}, ValueError, "output shape (-1,); each number"),
        ({"output_dtypes": []}, ValueError, "output_dtypes has 0 elements; it takes 1 (out)"),
        ({"output_dtypes": ["float32"]}, TypeError, "output_dtypes holds 'float32'"),
        ({"grid": (9, 1)}, TypeError, "grid=(9, 1); give three ints"),
        ({"grid": (9, 1, 1.0)}, TypeError, "grid=(9, 1, 1.0); give three ints"),
        ({"grid": 9}, TypeError, "grid=9; give three ints"),
        ({"grid": (-9, 1, 1)}, ValueError, "grid=(-9, 1, 1); each number must be from 1"),
        ({"grid": (1 << 31, 1, 1)}, ValueError, "to 2^31 - 1"),
        ({"threadgroup": (0, 1, 1)}, ValueError, "threadgroup=(0, 1, 1); each number"),
        ({"threadgroup": (32, 33, 1)}, ValueError, "has 1056 threads; at most 1024"),
        ({"template": [("T", 1.5)]}, TypeError, "template parameter 'T' is 1.5; give an mx.Dtype"),
        ({"template": [("T", "float")]}, TypeError, "template parameter 'T' is 'float'"),
        ({"template": [("2T", 1)]}, ValueError, "template: '2T' is not a C identifier"),
        ({"template": [("x", 1)]}, ValueError, "template parameter 'x' names something else"),
        ({"template": [("T", 1), ("T", 2)]}, ValueError, "'T' names something else"),
        ({"template": [("T", 1 << 31)]}, ValueError, "T=2147483648 needs more than 32 bits"),
        ({"template": {"T": 1}}, TypeError, "give a list of (name, value) pairs"),
        ({"template": ["T"]}, TypeError, "give a list of (name, value) pairs"),
    ],
)
def test_bad_arguments_of_a_launch(changes, error, text, recorder):
    with pytest.raises(error) as caught:
        made()(**arguments(**changes))
    assert text in str(caught.value)
    assert "kernel 'scale'" in str(caught.value)
    assert recorder.calls == []
    assert made().stats.run_count == 0


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"name": "my kernel"}, ValueError, "kernel: 'my kernel' is not a C identifier"),
        ({"name": "1st"}, ValueError, "is not a C identifier"),
        ({"name": "é"}, ValueError, "is not a C identifier"),
        ({"name": ""}, ValueError, "is not a C identifier"),
        ({"name": 3}, TypeError, "the name is 3, a int; give a string"),
        ({"name": "kernel"}, ValueError, "'kernel' is a word of the Metal"),
        ({"input_names": "xs"}, TypeError, "input_names='xs' is a string; give a list"),
        ({"output_names": "out"}, TypeError, "output_names='out' is a string; give a list"),
        ({"output_names": []}, ValueError, "has no outputs"),
        ({"input_names": ["x", "x"]}, ValueError, "'x' names two arrays"),
        ({"input_names": ["x", "out"]}, ValueError, "'out' names two arrays"),
        ({"input_names": ["x", "x_shape"]}, ValueError, "'x_shape' is the shape of input 'x'"),
        ({"input_names": ["out_ndim", "out"], "output_names": ["y"]}, ValueError, "the ndim of"),
        ({"input_names": ["x", "device"]}, ValueError, "'device' is a word of the Metal"),
        ({"input_names": ["x", "half"]}, ValueError, "'half' is a word of the Metal"),
        *[({"input_names": ["x", name]}, ValueError, f"'{name}' is a word") for name in ATTRIBUTES],
        ({"source": "  "}, ValueError, "its source is empty"),
        ({"source": None}, TypeError, "source is a NoneType; give a string"),
        ({"header": b""}, TypeError, "header is a bytes; give a string"),
    ],
)
def test_bad_definitions(changes, error, text):
    with pytest.raises(error) as caught:
        made(**changes)
    assert text in str(caught.value)


def test_specs_and_stats_have_the_public_fields():
    names = [field.name for field in dataclasses.fields(MetalKernelSpec)]
    assert names == [
        "name",
        "input_names",
        "output_names",
        "source",
        "header",
        "requested_ensure_row_contiguous",
        "ensure_row_contiguous",
        "atomic_outputs",
    ]
    assert [field.name for field in dataclasses.fields(KernelStats)] == [
        "compile_time_ms",
        "run_count",
        "total_run_time_ms",
        "contiguity_launches",
        "contiguity_checks",
        "contiguity_unknown_inputs",
        "non_row_contiguous_inputs",
        "launches_with_non_row_contiguous",
        "copy_risk_launches",
        "copy_risk_inputs",
    ]
    spec = made(ensure_row_contiguous=False).spec
    assert (spec.requested_ensure_row_contiguous, spec.ensure_row_contiguous) == (False, False)
    assert MetalKernel(spec).spec == spec
    assert repr(MetalKernel(spec)) == "MetalKernel(scale: x, s -> out)"


@pytest.mark.usefixtures("recorder")
def test_what_is_counted():
    k = made()
    k(**arguments())
    k(**arguments(inputs=[1.0, 2.0]))
    assert dataclasses.asdict(k.stats) == {
        "compile_time_ms": k.stats.compile_time_ms,
        "run_count": 2,
        "total_run_time_ms": 0.0,
        "contiguity_launches": 1,
        "contiguity_checks": 1,
        "contiguity_unknown_inputs": 1,
        "non_row_contiguous_inputs": 0,
        "launches_with_non_row_contiguous": 0,
        "copy_risk_launches": 1,
        "copy_risk_inputs": 1,
    }
    assert k.stats.compile_time_ms > 0
    strided = made(ensure_row_contiguous=False)
    strided(**arguments())
    assert (strided.stats.contiguity_checks, strided.stats.copy_risk_inputs) == (1, 0)
    k.timed(**arguments())
    assert (k.stats.run_count, k.stats.total_run_time_ms > 0) == (3, True)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.int8])
def test_examine_looks_at_the_layout(dtype):
    x = mx.ones((3, 4), dtype)
    cases = [x, x.T, x[:, 1:], x[1:], x[:1].T, mx.broadcast_to(x[:1], (3, 4)), mx.ones((), dtype)]
    k = made(cache=False)
    assert k.examine(*cases) == [True, False, False, True, True, False, True]
    assert (k.stats.contiguity_checks, k.stats.contiguity_unknown_inputs) == (7, 0)
    assert (k.stats.non_row_contiguous_inputs, k.stats.launches_with_non_row_contiguous) == (3, 1)


def test_a_stream_on_the_cpu_means_the_emulator(recorder, monkeypatch):
    class Gpu:
        type = mx.DeviceType.gpu

    monkeypatch.delenv("ZMLX_BACKEND")
    monkeypatch.setattr(mx, "default_device", Gpu)
    made()(**arguments(stream=mx.cpu))
    assert len(recorder.calls) == 1


def test_the_metal_backend_asks_mlx_once(monkeypatch):
    calls = []
    monkeypatch.setattr(mx.fast, "metal_kernel", lambda **given: calls.append(given) or len)
    clear()
    definition = made(header="// h", atomic_outputs=True, ensure_row_contiguous=False).spec
    definition = definition.definition()
    assert launch.launcher(definition, "metal") is launch.launcher(definition, "metal") is len
    assert calls == [
        {
            "name": "scale",
            "input_names": ["x", "s"],
            "output_names": ["out"],
            "source": SOURCE,
            "header": "// h",
            "ensure_row_contiguous": False,
            "atomic_outputs": True,
        }
    ]
    clear()


@pytest.mark.skipif(mx.metal.is_available(), reason="shows what happens without Metal")
def test_mlx_without_metal_refuses_to_launch():
    call = metal_backend.compiled(made().spec.definition())
    with pytest.raises(RuntimeError, match="No Metal back-end"):
        call(**arguments())


def test_mlx_takes_our_arguments_and_writes_the_text():
    text = metal_backend.text(made(header="// first\n").spec.definition(), **arguments())
    assert text.startswith("// first\ntemplate <typename T>\n[[kernel]] void custom_kernel_scale_")
    assert "const device float* x [[buffer(0)]]" in text
    assert "const constant float& s [[buffer(1)]]" in text
    assert f"{SOURCE}\n}}" in text
    small = metal_backend.text(made().spec.definition(), **arguments(inputs=[mx.ones(7), 2.0]))
    assert "const constant float* x [[buffer(0)]]" in small
    atomic = metal_backend.text(made(atomic_outputs=True).spec.definition(), **arguments())
    assert "device atomic<float>* out" in atomic


def test_mlx_agrees_on_what_is_wrong():
    definition = made().spec.definition()
    for changes in ({"inputs": [mx.ones(9)]}, {"output_dtypes": []}, {"template": [("T", 1.5)]}):
        with pytest.raises(ValueError, match="metal_kernel"):
            metal_backend.text(definition, **arguments(**changes))


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="backend 'opencl' runs no Metal source; one of metal"):
        launch.launcher(made().spec.definition(), "opencl")


def test_compute_dtype_is_taken_and_ignored():
    with pytest.warns(DeprecationWarning, match="kernel: compute_dtype is ignored"):
        one = made(compute_dtype=mx.float16)
    with pytest.warns(DeprecationWarning, match="compute_dtype_key is ignored"):
        two = made(compute_dtype_key="x")
    assert one is two is made(compute_dtype=None) is made()
    assert metal.kernel.__name__ == "kernel"
