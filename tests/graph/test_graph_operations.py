"""A traced step, run from its graph, gives the very bits of the stock forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import QuantizedKVCache, RotatingKVCache, make_prompt_cache
from upstream import installed_types
from zoo.build import FORMS, made
from zoo.configs import FAILURES, runnable

from zmlx.graph.nodes import Graph, Node, Value
from zmlx.graph.operations import UnknownOperation, run
from zmlx.graph.step import Step
from zmlx.graph.trace import TraceError, trace

PROMPT = mx.array([[11, 95, 3, 152, 27]])
TOKEN = mx.array([[64]])

#: Types whose step cannot be traced, and the reason that `TraceError` gives.
UNTRACED = {
    # Lists the chosen experts in Python.
    "dbrx": r"reads what an array holds",
}


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """Call what mlx-lm compiles as it is.

    On a CPU the compiled GELU of a bfloat16 differs from its operations in the last bit.
    """
    mx.disable_compile()
    yield
    mx.enable_compile()


def same(a: mx.array, b: mx.array) -> bool:
    floats = mx.issubdtype(a.dtype, mx.floating)
    equal = mx.array_equal(a, b, equal_nan=floats) if a.shape == b.shape else mx.array(False)
    return a.dtype == b.dtype and bool(equal)


def assert_same(found: list[mx.array], expected: list[mx.array]) -> None:
    assert len(found) == len(expected)
    assert [same(a, b) for a, b in zip(found, expected, strict=True)] == [True] * len(expected)


def prefilled(name: str, form: str, cache: Callable[[int], Any] | None = None) -> Step:
    model = made(name, form)
    caches = [cache(i) for i in range(len(model.layers))] if cache else make_prompt_cache(model)
    mx.eval(model(PROMPT, cache=caches))
    return Step(model, caches)


def fails(name: str, form: str) -> bool:
    """Return whether the stock model raises for a lone sequence."""
    return any(
        "alone" in failure.runs and failure.dtype in str(FORMS[form][0])
        for failure in FAILURES.get(name, ())
    )


@pytest.mark.parametrize("form", ["float32", "bfloat16-4bit"])
@pytest.mark.parametrize("name", runnable())
def test_a_step_of_every_type_runs_bit_for_bit(name: str, form: str) -> None:
    if fails(name, form):
        with pytest.raises(Exception, match="No Metal|inplace addition|only supports float32"):
            prefilled(name, form)
        return
    step = prefilled(name, form)
    arrays = step.arrays
    if name in UNTRACED:
        with pytest.raises(TraceError, match=UNTRACED[name]):
            trace(step, TOKEN, *arrays)
        return
    graph = trace(step, TOKEN, *arrays)
    assert_same(run(graph, [TOKEN, *arrays]), step(TOKEN, *arrays))
