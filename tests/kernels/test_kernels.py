"""Every kernel of the registry against its reference; and that a wrong one is noticed."""

from __future__ import annotations

import pytest
from kernels.checks import ALL, CHECKS, SABOTAGES, SPECS, altered, backends, forget, run

from zmlx.backend import current
from zmlx.catalog.configurations import configurations
from zmlx.kernels.spec import KernelSpec, KernelUnavailable, all_specs, register


@pytest.fixture(autouse=True)
def fresh():
    forget()
    yield
    forget()


@pytest.mark.parametrize(("check", "name", "backend"), ALL)
def test_every_kernel_passes(check, name, backend):
    run(check, name, backend)


@pytest.mark.parametrize("sabotage", SABOTAGES)
@pytest.mark.parametrize(("check", "name", "backend"), ALL)
def test_a_sabotaged_kernel_fails(check, name, backend, sabotage):
    with altered(SABOTAGES[sabotage]), pytest.raises(AssertionError):
        CHECKS[check][0](SPECS[name], backend)


@pytest.mark.parametrize("sabotage", SABOTAGES)
@pytest.mark.parametrize("name", SPECS)
def test_a_sabotaged_kernel_fails_every_probe(name, sabotage):
    spec = SPECS[name]
    with altered(SABOTAGES[sabotage]):
        for backend in backends(spec):
            for configuration in configurations(spec, backend):
                reason = spec.probe(backend, **configuration)
                assert reason is not None, configuration
                assert "failed its probe: error" in reason


def test_every_kernel_runs_somewhere_here():
    able = {n for n, spec in SPECS.items() if spec.definition or spec.fused or current() == "cpu"}
    assert {name for name, spec in SPECS.items() if backends(spec)} == able
    assert {name for _, name, _ in ALL} == able


@pytest.mark.parametrize("name", SPECS)
def test_specs_are_complete(name):
    spec = SPECS[name]
    assert spec.name == name
    assert spec.domain
    assert spec.formula
    assert spec.shapes
    assert spec.contract
    if spec.definition is None and spec.fused is None:
        with pytest.raises(KernelUnavailable, match=f"{name} has no metal kernel"):
            spec.implementation("metal")
        assert f"{name} has no metal kernel" in spec.probe("metal", **configurations(spec)[0])
    if spec.native is None:
        with pytest.raises(KernelUnavailable, match=f"{name} has no cpu kernel"):
            spec.implementation("cpu")


def test_registration_refuses_bad_names_and_contracts():
    good = SPECS["rms_norm"]
    for name in ("two words", "1st", "exp-fast", "é"):
        with pytest.raises(ValueError, match="not a C identifier"):
            register(KernelSpec(**{**vars(good), "name": name}))
    with pytest.raises(ValueError, match="registered already"):
        register(good)
    for changes, text in (
        ({"contract": {"cpu": "close"}}, "unknown contract"),
        ({"contract": {"metal": "exact"}}, r"no kernel for \['metal'\]"),
        ({"native": None}, "neither a source nor a native function"),
        ({"definition": SPECS["rmsnorm"].definition}, "a source and a geometry go together"),
    ):
        with pytest.raises(ValueError, match=text):
            register(KernelSpec(**{**vars(good), "name": "other", **changes}))
    assert set(all_specs()) == set(SPECS)
