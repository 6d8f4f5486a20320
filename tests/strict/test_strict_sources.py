"""Every Metal source of the toolkit passes the strict look, as it is launched.

The strict look takes the emulator's place: whatever is called is looked at with the dtypes,
shapes and templates of its launch, and gives zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from zmlx import autograd, msl
from zmlx.api import elementwise, map_reduce, reduce
from zmlx.authoring.elementwise import binary, unary
from zmlx.authoring.functions import FUNCTIONS
from zmlx.backend import launch, strict
from zmlx.backend.definition import Definition
from zmlx.backend.strict import launch as strict_launch
from zmlx.catalog.configurations import configurations, in_words
from zmlx.kernels.spec import KernelSpec, all_specs

SOURCES = {name: spec for name, spec in all_specs().items() if "emulator" in spec.backends()}
FLOATS = (mx.float32, mx.float16, mx.bfloat16)


def _axpy(dtype: mx.Dtype) -> Any:
    from zmlx import metal

    kernel = metal.kernel(
        name="strict_axpy",
        input_names=["a", "x", "y"],
        output_names=["out"],
        source="""
            uint i = thread_position_in_grid.x;
            out[i] = T(float(a) * float(x[i]) + float(y[i]));
        """,
    )
    x = mx.ones((100,), dtype)
    return kernel(
        2.0,
        x,
        x,
        template=[("T", dtype)],
        grid=(100, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(100,)],
        output_dtypes=[dtype],
    )


def _with_gradient(function: Callable[..., mx.array], dtype: mx.Dtype, inputs: int) -> Any:
    arrays = [mx.full((100,), 0.5, dtype) for _ in range(inputs)]
    places = list(range(inputs))
    return function(*arrays), mx.grad(lambda *a: function(*a).sum(), places)(*arrays)


def _reduction(dtype: mx.Dtype) -> Any:
    row_max = reduce(init="-INFINITY", update="max(acc, v)", name="strict_max")
    mean = reduce(init="0", update="acc + v", finalize="acc / d", name="strict_mean")
    x = mx.ones((4, 100), dtype)
    return row_max(x), mean(x)


def _softmax(dtype: mx.Dtype) -> Any:
    softmax = map_reduce(
        pass1={"init": "-INFINITY", "update": "max(acc1, x)", "reduce": "max(a, b)"},
        pass2={"init": "0.0f", "update": "acc2 + exp(x - s1)", "reduce": "a + b"},
        write="exp(x - s1) / s2",
        name="strict_softmax",
    )
    return softmax(mx.ones((4, 100), dtype))


def _binary(dtype: mx.Dtype) -> Any:
    mul = autograd.binary_from_expr(
        name="strict_mul", fwd_expr="a * b", vjp_lhs_expr="g * b", vjp_rhs_expr="g * a"
    )
    return _with_gradient(mul, dtype, 2)


def _with_header(dtype: mx.Dtype) -> Any:
    silu = elementwise("kk_silu(x) * kk_sigmoid(x)", name="strict_silu", header=msl.DEFAULT_HEADER)
    return _with_gradient(silu, dtype, 1)


#: name -> a call with a dtype that launches kernels; functions that write Metal stand here too
CALLS: dict[str, Callable[[mx.Dtype], Any]] = {
    "metal.kernel": _axpy,
    "api.reduce": _reduction,
    "api.map_reduce": _softmax,
    "autograd.binary_from_expr": _binary,
    "msl.DEFAULT_HEADER": _with_header,
}


@pytest.fixture(autouse=True)
def _strict_backend(monkeypatch):
    monkeypatch.setenv("ZMLX_BACKEND", "emulator")
    monkeypatch.setitem(launch._BACKENDS, "emulator", "zmlx.backend.strict")
    launch.forget()
    before = _looks_taken()
    yield
    assert _looks_taken() > before, "nothing was launched"
    launch.forget()


def _looks_taken() -> int:
    taken = strict_launch._looked.cache_info()
    return taken.hits + taken.misses


def _looks(spec: KernelSpec) -> list[dict[str, Any]]:
    """Return configurations with one for each text: lengths of rows do not change it."""
    chosen: dict[str, dict[str, Any]] = {}
    for configuration in configurations(spec, "emulator"):
        kind = in_words({k: v for k, v in configuration.items() if k != "length"})
        chosen.setdefault(kind, configuration)
    return list(chosen.values())


@pytest.mark.parametrize("name", SOURCES)
def test_kernels_of_the_registry(name):
    spec = SOURCES[name]
    kernel = spec.implementation("emulator")
    for configuration in _looks(spec):
        sample = spec.sample(**configuration)
        kernel(*sample.args, **sample.kwargs)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_functions_that_write_metal(name, dtype):
    mx.eval(CALLS[name](dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_formulas(name, dtype):
    function = FUNCTIONS[name]
    make = {1: unary, 2: binary}[function.arguments]
    formula = f"{name}({', '.join(('x',) if function.arguments == 1 else ('a', 'b'))})"
    operation = make(name="strict_function", expr=formula)
    arrays = [mx.full((100,), 0.5, dtype) for _ in range(function.arguments)]
    mx.eval(operation(*arrays))
    if function.partials:
        mx.eval(_with_gradient(operation, dtype, function.arguments))


def test_a_fault_is_refused():
    kernel = launch.launcher(
        Definition("wrong", ("x",), ("out",), "thread float* p = x; out[0] = p[0];"), "emulator"
    )
    with pytest.raises(strict.Refused, match=r"kernel 'wrong':\n  source:1:15: cannot initialize"):
        kernel(
            inputs=[mx.zeros((100,))],
            output_shapes=[(1,)],
            output_dtypes=[mx.float32],
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
        )
