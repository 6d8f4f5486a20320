"""Every Metal source of the toolkit passes the strict look, as it is launched.

The strict look takes the emulator's place: whatever is called is looked at with the dtypes,
shapes and templates of its launch, and gives zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from zmlx.backend import launch, strict
from zmlx.backend.definition import Definition
from zmlx.catalog.configurations import configurations, in_words
from zmlx.kernels.spec import KernelSpec, all_specs

SOURCES = {name: spec for name, spec in all_specs().items() if spec.definition is not None}
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


#: name -> a call with a dtype that launches kernels; functions that write Metal stand here too
CALLS: dict[str, Callable[[mx.Dtype], Any]] = {"metal.kernel": _axpy}


@pytest.fixture(autouse=True)
def _strict_backend(monkeypatch):
    monkeypatch.setenv("ZMLX_BACKEND", "emulator")
    monkeypatch.setitem(launch._BACKENDS, "emulator", "zmlx.backend.strict")
    launch.forget()
    yield
    launch.forget()


def _looks(spec: KernelSpec) -> list[dict[str, Any]]:
    """Return configurations with one for each text: lengths of rows do not change it."""
    chosen: dict[str, dict[str, Any]] = {}
    for configuration in configurations(spec):
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
