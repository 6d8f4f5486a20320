"""Where kernels run: by the default device, a launch's stream and ZMLX_BACKEND, at each call."""

from __future__ import annotations

import mlx.core as mx
import pytest

from zmlx import backend
from zmlx.backend import current, for_kernels
from zmlx_autopatch import variables
from zmlx_autopatch.variables import VariableError


class Gpu:
    type = mx.DeviceType.gpu


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    monkeypatch.delenv("ZMLX_BACKEND", raising=False)
    backend.forget()
    yield
    monkeypatch.undo()
    backend.forget()


@pytest.fixture
def on_cpu():
    with mx.stream(mx.cpu):
        yield


def on_gpu(monkeypatch, *, metal):
    monkeypatch.setattr(mx, "default_device", Gpu)
    monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
    backend.forget()


@pytest.mark.usefixtures("on_cpu")
def test_the_cpu_takes_references_and_else_the_emulator():
    assert current() == "cpu"
    assert for_kernels(has_reference=True) == "reference"
    assert for_kernels(has_reference=False) == "emulator"


@pytest.mark.parametrize(("metal", "name"), [(True, "metal"), (False, "cuda")])
def test_a_gpu_takes_its_own(metal, name, monkeypatch):
    on_gpu(monkeypatch, metal=metal)
    assert current() == name
    assert for_kernels(has_reference=True) == for_kernels(has_reference=False) == name


def test_a_change_of_the_default_device_is_seen_by_the_next_call(monkeypatch):
    on_gpu(monkeypatch, metal=True)
    assert for_kernels(has_reference=True) == "metal"
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    assert for_kernels(has_reference=True) == "reference"
    assert current() == "cpu"
    monkeypatch.setattr(mx, "default_device", Gpu)
    assert for_kernels(has_reference=True) == "metal"


@pytest.mark.parametrize("place", [mx.cpu, mx.Device(mx.cpu), mx.new_stream(mx.cpu)])
def test_a_stream_on_the_cpu_goes_before_the_default_device(place, monkeypatch):
    on_gpu(monkeypatch, metal=True)
    assert for_kernels(has_reference=False, stream=place) == "emulator"


def test_a_change_of_the_variable_is_seen_by_the_next_call(monkeypatch, on_cpu):
    assert for_kernels(has_reference=True) == "reference"
    monkeypatch.setenv("ZMLX_BACKEND", "emulator")
    assert for_kernels(has_reference=True) == "emulator"
    monkeypatch.setenv("ZMLX_BACKEND", "reference")
    assert for_kernels(has_reference=True) == "reference"
    monkeypatch.setenv("ZMLX_BACKEND", "")
    assert for_kernels(has_reference=False) == "emulator"
    monkeypatch.delenv("ZMLX_BACKEND")
    assert for_kernels(has_reference=True) == "reference"


@pytest.mark.usefixtures("on_cpu")
def test_what_is_not_here_is_refused_each_time(monkeypatch):
    for name in ("metal", "cuda"):
        monkeypatch.setenv("ZMLX_BACKEND", name)
        for _ in range(2):
            with pytest.raises(VariableError, match=f"ZMLX_BACKEND={name}: MLX's default .* cpu"):
                for_kernels(has_reference=True)
    monkeypatch.setenv("ZMLX_BACKEND", "gpu")
    with pytest.raises(VariableError, match="expected one of auto, metal"):
        for_kernels(has_reference=True)
    monkeypatch.setenv("ZMLX_BACKEND", "reference")
    with pytest.raises(VariableError, match="no reference"):
        for_kernels(has_reference=False)


def test_peeking_sees_changes_and_wants_a_known_variable(monkeypatch):
    peek = variables.peeker("ZMLX_LOG")
    monkeypatch.setenv("ZMLX_LOG", "line")
    first = peek()
    assert peek() == first
    monkeypatch.setenv("ZMLX_LOG", "debug")
    assert peek() != first
    with pytest.raises(KeyError, match="HOME is not a variable of zmlx"):
        variables.peeker("HOME")
