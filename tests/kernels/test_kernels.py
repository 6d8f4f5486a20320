"""Every kernel of the registry against its reference; and that a wrong one is noticed."""

from __future__ import annotations

import inspect
import itertools

import mlx.core as mx
import pytest

from zmlx.kernels import spec as kernels
from zmlx.kernels.spec import KernelSpec, KernelUnavailable, all_specs, register

SPECS = all_specs()

#: parameter of a sample -> the values that tests run through
VALUES = {
    "packing": (
        *(
            ("affine", group_size, bits)
            for group_size in (32, 64, 128)
            for bits in (2, 3, 4, 5, 6, 8)
        ),
        ("mxfp4", 32, 4),
        ("nvfp4", 16, 4),
        ("mxfp8", 32, 8),
        ("dense", 0, 0),
    ),
    "dtype": (mx.float32, mx.float16, mx.bfloat16),
    "scale_dtype": (mx.float32, mx.float16, mx.bfloat16),
    "activation": ("silu", "gelu", "gelu_tanh"),
    "traditional": (False, True),
}


def configurations(spec: KernelSpec) -> list[dict]:
    names = list(inspect.signature(spec.sample).parameters)
    return [
        dict(zip(names, values, strict=True))
        for values in itertools.product(*(VALUES[name] for name in names))
    ]


@pytest.fixture(autouse=True)
def fresh_probes():
    kernels._probe.cache_clear()
    yield
    kernels._probe.cache_clear()


@pytest.mark.parametrize("name", SPECS)
def test_every_configuration_passes_its_probe(name):
    spec = SPECS[name]
    for configuration in configurations(spec):
        assert spec.probe("cpu", **configuration) is None, configuration


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("sabotage", ["zeros", "five percent", "nan", "one element"])
def test_a_sabotaged_kernel_fails_every_probe(name, sabotage, monkeypatch):
    spec, implementation = SPECS[name], KernelSpec.implementation

    def sabotaged(self, backend):
        kernel = implementation(self, backend)

        def wrong(y):
            if sabotage == "one element":
                flat = y.flatten()
                flat[-1] += mx.max(mx.abs(flat)) * 0.05
                return flat.reshape(y.shape)
            return y * {"zeros": 0.0, "five percent": 1.05, "nan": float("nan")}[sabotage]

        def call(*args, **kwargs):
            result = kernel(*args, **kwargs)
            return [*result[:-1], wrong(result[-1])] if isinstance(result, list) else wrong(result)

        return call

    monkeypatch.setattr(KernelSpec, "implementation", sabotaged)
    for configuration in configurations(spec):
        reason = spec.probe("cpu", **configuration)
        assert reason is not None, configuration
        assert "failed its probe" in reason


@pytest.mark.parametrize("name", SPECS)
def test_specs_are_complete(name):
    spec = SPECS[name]
    assert spec.name == name
    assert spec.domain
    assert spec.formula
    assert spec.shapes
    with pytest.raises(KernelUnavailable, match=f"{name} has no metal kernel"):
        spec.implementation("metal")
    assert f"{name} has no metal kernel" in spec.probe("metal", **configurations(spec)[0])


def test_registration_refuses_bad_names_and_contracts():
    good = next(iter(SPECS.values()))
    for name in ("two words", "1st", "exp-fast", "é"):
        with pytest.raises(ValueError, match="not a C identifier"):
            register(KernelSpec(**{**vars(good), "name": name}))
    with pytest.raises(ValueError, match="registered already"):
        register(good)
    with pytest.raises(ValueError, match="unknown contract"):
        register(KernelSpec(**{**vars(good), "name": "other", "contract": {"cpu": "close"}}))
    assert set(all_specs()) == set(SPECS)
