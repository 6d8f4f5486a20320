"""What every kernel of the catalog must pass, and ways to break one so that it must not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from unittest import mock

import mlx.core as mx

from zmlx.backend import current
from zmlx.backend.signature import dtype_name
from zmlx.catalog.configurations import configurations
from zmlx.kernels import calling
from zmlx.kernels import spec as kernels
from zmlx.kernels.calling import bound, several
from zmlx.kernels.spec import KernelSpec, Sample, all_specs, relative_error

SPECS = all_specs()
#: float32 rounding, in units of an output's largest element: a sum of a thousand terms and an exp
ROUNDING = 1e-6

Alter = Callable[[mx.array], mx.array]


def backends(spec: KernelSpec) -> list[str]:
    """Return the backends of a kernel that can run here."""
    here = {"cpu", "emulator"} if current() == "cpu" else {current()}
    return [backend for backend in spec.backends() if backend in here]


def cases(*, source: bool = False, gradient: bool = False) -> list[tuple[str, str]]:
    """Return (kernel, backend) pairs that can run here."""
    return [
        (name, backend)
        for name, spec in SPECS.items()
        for backend in backends(spec)
        if not (source and backend == "cpu") and not (gradient and spec.gradient is None)
    ]


def close(values: object, truths: object, spec: KernelSpec) -> None:
    values, truths = several(values), several(truths)
    assert len(values) == len(truths)
    for value, truth in zip(values, truths, strict=True):
        assert (value.shape, value.dtype) == (truth.shape, truth.dtype)
        error = relative_error(value, truth)
        assert error <= spec.tolerance[dtype_name(truth.dtype)], error


def is_float(array: object) -> bool:
    return isinstance(array, mx.array) and mx.issubdtype(array.dtype, mx.floating)


# The checks


def check_probe(spec: KernelSpec, backend: str) -> None:
    """Every configuration agrees with its reference."""
    for configuration in configurations(spec, backend):
        assert spec.probe(backend, **configuration) is None, configuration


def check_written(spec: KernelSpec, backend: str) -> None:
    """Every element of every output is written: one that is not stays NaN."""
    with altered(init_value=float("nan")):
        for configuration in configurations(spec, backend):
            sample = spec.sample(**configuration)
            kernel = spec.implementation(backend)
            for value in several(kernel(*sample.args, **sample.kwargs)):
                assert not mx.any(mx.isnan(value)).item(), configuration
            close(kernel(*sample.args, **sample.kwargs), truth_of(spec, sample), spec)


def check_strided(spec: KernelSpec, backend: str) -> None:
    """Arguments that are not row contiguous, in memory with others in between."""
    for configuration in configurations(spec, backend)[-1:]:
        sample = spec.sample(**configuration)
        strided = [
            None if arg is None else mx.stack([arg, arg + 1], axis=-1)[..., 0]
            for arg in sample.args
        ]
        mx.eval(strided)
        value = spec.implementation(backend)(*strided, **sample.kwargs)
        close(value, truth_of(spec, sample), spec)


def check_rounding(spec: KernelSpec, backend: str) -> None:
    """Contract tighter: as close to a wider truth as rounding once, up to float32 rounding."""
    for configuration in configurations(spec, backend):
        sample = spec.sample(**configuration)
        kernel = spec.implementation(backend)
        values = several(kernel(*sample.args, **sample.kwargs))
        mx.eval(values)
        with mx.stream(mx.cpu):
            wide = [arg.astype(mx.float64) if is_float(arg) else arg for arg in sample.args]
            truths = several(spec.reference(*wide, **sample.kwargs))
            for value, truth in zip(values, truths, strict=True):
                if not is_float(value):
                    assert mx.array_equal(value, truth), configuration
                    continue
                assert truth.dtype == mx.float64
                best = truth.astype(value.dtype).astype(mx.float64)
                allowed = largest(best - truth) + ROUNDING * largest(truth)
                assert largest(value.astype(mx.float64) - truth) <= allowed, configuration


def check_gradient(spec: KernelSpec, backend: str) -> None:
    """The gradient of each argument agrees with that of the reference."""
    for configuration in configurations(spec, backend):
        sample = spec.sample(**configuration)
        call = bound(spec, sample.kwargs)
        arrays = list(sample.args)
        cotangents = [
            mx.random.normal(out.shape, key=mx.random.key(7)).astype(out.dtype)
            for out in several(call.reference(*arrays))
        ]
        with running_on(backend):
            _, found = mx.vjp(listed(call), arrays, cotangents)
            mx.eval(found)
        close(found, mx.vjp(listed(call.reference), arrays, cotangents)[1], spec)


def check_compiled(spec: KernelSpec, backend: str) -> None:
    """Under mx.compile, twice, with other values the second time."""
    sample = spec.sample(**configurations(spec, backend)[0])
    places = [i for i, arg in enumerate(sample.args) if is_float(arg)]

    def call(function, *floats):
        given = list(sample.args)
        for place, value in zip(places, floats, strict=True):
            given[place] = value
        return several(function(*given, **sample.kwargs))

    kernel = spec.implementation(backend) if spec.fused else spec
    with running_on(backend):
        function = mx.compile(partial(call, kernel))
        for factor in (1, 0.5):
            floats = [sample.args[place] * factor for place in places]
            close(function(*floats), call(spec.reference, *floats), spec)


def listed(function: Callable) -> Callable:
    return lambda *arrays: several(function(*arrays))


def running_on(backend: str) -> AbstractContextManager:
    """Let calls choose this backend."""
    return mock.patch.object(calling, "for_kernels", return_value=backend)


CHECKS = {
    "probe": (check_probe, cases()),
    "written": (check_written, cases(source=True)),
    "strided": (check_strided, cases(source=True)),
    "rounding": (check_rounding, cases(source=True)),
    "gradient": (check_gradient, cases(source=True, gradient=True)),
    "compiled": (check_compiled, cases(source=True)),
}
#: (check, kernel, backend), each a test
ALL = [(check, *case) for check, (_, found) in CHECKS.items() for case in found]


def run(check: str, name: str, backend: str) -> None:
    forget()
    CHECKS[check][0](SPECS[name], backend)


def truth_of(spec: KernelSpec, sample: Sample) -> object:
    return spec.reference(*sample.args, **sample.kwargs)


def largest(array: mx.array) -> float:
    return mx.max(mx.abs(array)).item()


# Sabotage


def one_element(y: mx.array) -> mx.array:
    """Move the last element by five percent of the largest one."""
    flat = y.flatten()
    flat[-1] += mx.max(mx.abs(flat)) * 0.05
    return flat.reshape(y.shape)


SABOTAGES: dict[str, Alter] = {
    "zeros": mx.zeros_like,
    "five percent": lambda y: (y * 1.05).astype(y.dtype),
    "nan": lambda y: (y * float("nan")).astype(y.dtype),
    "one element": one_element,
}


def forget() -> None:
    """Drop whatever holds a kernel, sabotaged or not."""
    calling.forget()
    kernels._probe.cache_clear()


@contextmanager
def altered(alter: Alter = lambda y: y, **arguments: object) -> Iterator[None]:
    """Let every kernel return altered outputs, or launch with other arguments."""

    # What is there now, which may be altered already.
    compile_launch = kernels.launcher

    def launching(definition, backend):
        launch = compile_launch(definition, backend)
        return lambda **given: [alter(out) for out in launch(**{**given, **arguments})]

    native = KernelSpec._native

    def natively(spec):
        function = native(spec)

        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            if isinstance(result, list):
                return [alter(out) for out in result]
            return alter(result)

        return call

    forget()
    with (
        mock.patch.object(kernels, "launcher", launching),
        mock.patch.object(KernelSpec, "_native", natively),
    ):
        try:
            yield
        finally:
            forget()
