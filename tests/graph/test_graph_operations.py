"""A traced step, run from its graph, gives the very bits of the stock forward."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from zoo.build import FORMS, made
from zoo.configs import FAILURES, runnable

from zmlx.graph.operations import run
from zmlx.graph.step import Step
from zmlx.graph.trace import TraceError, trace

PROMPT = mx.array([[11, 95, 3, 152, 27]])
TOKEN = mx.array([[64]])

#: Types whose step cannot be traced, and the reason that `TraceError` gives.
UNTRACED: dict[str, str] = {}


def same(a: mx.array, b: mx.array) -> bool:
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and bool(mx.array_equal(a, b, equal_nan=mx.issubdtype(a.dtype, mx.floating)))
    )


@pytest.mark.parametrize("form", ["float32", "bfloat16-4bit"])
@pytest.mark.parametrize("name", runnable())
def test_a_step_of_every_type_runs_bit_for_bit(name: str, form: str) -> None:
    model = made(name, form)
    cache = make_prompt_cache(model)
    mx.eval(model(PROMPT, cache=cache))
    step = Step(model, cache)
    arrays = step.arrays
    expected = step(TOKEN, *arrays)
    mx.eval(expected)
    graph = trace(step, TOKEN, *arrays)
    found = run(graph, [TOKEN, *arrays])
    assert len(found) == len(expected)
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
