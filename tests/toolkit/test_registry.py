"""`zmlx.registry`: compiled kernels of the process, and a table that users keep."""

from __future__ import annotations

import dataclasses
import time

import pytest

from zmlx import registry
from zmlx.backend import launch
from zmlx.metal import kernel
from zmlx.registry import KernelEntry, KernelRegistry


@pytest.fixture(autouse=True)
def empty():
    registry.clear_cache()
    yield
    registry.clear_cache()


def make(name, **changes):
    arguments = {"input_names": ["x"], "output_names": ["y"], "source": "y[0] = x[0];", **changes}
    return kernel(name=name, **arguments)


def test_compiled_kernels_are_listed_and_cleared():
    assert (registry.list_kernels(), registry.cache_size()) == ([], 0)
    first = make("second")
    assert registry.cache_size() == 0, "made, and not compiled yet"
    # Metal's kernels can be made anywhere; they are launched on Metal alone.
    for name, source in (
        ("second", "y[0] = x[0];"),
        ("first", "y[0] = 1;"),
        ("first", "y[0] = 2;"),
    ):
        launch.launcher(make(name, source=source).spec.definition(), "metal")
    assert registry.list_kernels() == ["first", "second"]
    assert registry.cache_size() == 3
    assert make("second") is first
    registry.clear_cache()
    assert (registry.list_kernels(), registry.cache_size()) == ([], 0)
    assert make("second") is not first


def entries():
    found = KernelRegistry()
    for name, pattern, has_vjp, tags in (
        ("silu", "unary", True, {"activation"}),
        ("add", "binary", True, set()),
        ("argmax", "reduce", False, {"index"}),
        ("relu", "unary", False, {"activation"}),
    ):
        found.register(KernelEntry(name, pattern=pattern, has_vjp=has_vjp, tags=tags))
    return found


def test_an_entry_has_the_public_fields_and_counts_uses():
    names = [field.name for field in dataclasses.fields(KernelEntry)]
    assert names == ["name", "ir_node", "pattern", "has_vjp", "run_count", "last_used", "tags"]
    entry = KernelEntry("exp")
    assert (entry.run_count, entry.last_used, entry.tags) == (0, 0.0, set())
    before = time.time()
    entry.touch()
    entry.touch()
    assert entry.run_count == 2
    assert before <= entry.last_used <= time.time()


def test_entries_are_found():
    found = entries()
    assert found.size() == 4
    assert found.list_kernels() == ["add", "argmax", "relu", "silu"]
    assert found.list_kernels(tag="activation") == ["relu", "silu"]
    assert found.list_kernels(tag="none") == []
    assert [entry.name for entry in found.by_pattern("unary")] == ["relu", "silu"]
    assert [entry.name for entry in found.with_vjp()] == ["add", "silu"]
    assert found.get("silu").pattern == "unary"
    assert found.get("gelu") is None
    found.get("silu").touch()
    found.get("relu").touch()
    found.get("relu").touch()
    assert [entry.name for entry in found.hottest(2)] == ["relu", "silu"]
    assert len(found.hottest()) == 4
    assert found.summary() == {
        "total": 4,
        "with_vjp": 2,
        "runs": 3,
        "patterns": {"binary": 1, "reduce": 1, "unary": 2},
    }


def test_entries_are_replaced_and_cleared():
    found = entries()
    found.register(KernelEntry("silu", pattern="other"))
    assert (found.size(), found.get("silu").pattern) == (4, "other")
    found.clear()
    assert (found.size(), found.list_kernels(), found.summary()["total"]) == (0, [], 0)


def test_what_is_refused():
    with pytest.raises(TypeError, match="got a str; give a KernelEntry"):
        KernelRegistry().register("silu")
    with pytest.raises(ValueError, match="n=-1; give how many entries"):
        entries().hottest(-1)
