"""A function of the library that selects experts, as one kernel: traced, not written anew.

What is launched is the graph of the very function (`zmlx.graph.tiny`), for the settings with which
it is called, so whatever it does (groups, biases, scales) is what the kernel does. Indices and ties
are those of MLX on a GPU, bit for bit, which sorts where a CPU only parts; sums are in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import mlx.core as mx

from zmlx.backend.replay import Replay
from zmlx.backend.vmapping import inside_vmap
from zmlx.graph.tiny import TinyProgram, tiny_program
from zmlx.graph.trace import TraceError, trace
from zmlx.kernels.calling import gradients_of, replay_of, several
from zmlx.kernels.spec import KernelSpec, Sample

#: Rows above which the function itself runs: one threadgroup computes all of them.
MOST_ROWS = 8

Select = Callable[..., tuple[mx.array, mx.array]]


def as_one_kernel(function: Select) -> Select:
    """Return a function that does the same by one launch, where that is possible.

    Args:
        function: takes logits (..., E) first, further arrays, and settings that can be hashed;
            returns arrays. Calls with more rows, or that no kernel can be made of, go to it.
    """

    def select(*given: Any, **named: Any) -> Any:
        logits = given[0] if given else None
        small = isinstance(logits, mx.array) and 0 < logits.size <= MOST_ROWS * logits.shape[-1]
        if not small or named or inside_vmap():
            return function(*given, **named)
        settings = tuple([None if isinstance(g, mx.array) else (g,) for g in given])
        arrays = [g for g in given if isinstance(g, mx.array)]
        form = tuple([(a.shape, a.dtype) for a in arrays])
        program = _program(function, settings, form, arrays)
        if program is None:
            return function(*given)
        key = (select, settings, form)
        return tuple(replay_of(key, partial(_made, function, settings, program))(None, arrays))

    return select


def _called(function: Select, settings: tuple[Any, ...], arrays: tuple[mx.array, ...]) -> Any:
    left = iter(arrays)
    return function(*[next(left) if setting is None else setting[0] for setting in settings])


#: (function, settings, shapes and dtypes) -> its kernel, or None where none can be made
_PROGRAMS: dict[Hashable, TinyProgram | None] = {}


def _program(
    function: Select, settings: tuple[Any, ...], form: tuple[Any, ...], arrays: list[mx.array]
) -> TinyProgram | None:
    key = (function, settings, form)
    if key not in _PROGRAMS:
        try:
            graph = trace(lambda *some: _called(function, settings, some), *arrays)
            _PROGRAMS[key] = tiny_program(graph.nodes, graph.inputs, graph.outputs, graph.constants)
        except (TraceError, ValueError):
            _PROGRAMS[key] = None
    return _PROGRAMS[key]


def _made(function: Select, settings: tuple[Any, ...], program: TinyProgram) -> Replay:
    def stock(*arrays: mx.array) -> Any:
        return _called(function, settings, arrays)

    def launched(*arrays: mx.array) -> Any:
        return tuple(program(*arrays))

    whole = mx.custom_function(launched)
    whole.vjp(lambda arrays, cotangents, _: gradients_of(stock, tuple(arrays), cotangents))
    return Replay(whole, launched)


def _reference(logits: mx.array, bias: mx.array, *, groups: int = 1) -> tuple[mx.array, mx.array]:
    """Select two experts as DeepSeek's models do; the order of MLX on a GPU is that of a sort."""
    scores = mx.sigmoid(logits.astype(mx.float32))
    chosen_by = scores + bias
    if groups > 1:
        parts = mx.unflatten(chosen_by, axis=-1, shape=(groups, -1))
        best = mx.sort(parts, axis=-1)[..., -2:].sum(axis=-1, keepdims=True)
        worst = mx.argsort(best, axis=-2)[..., : groups // 2, :]
        parts = mx.put_along_axis(parts, worst, mx.array(0.0), axis=-2)
        chosen_by = mx.flatten(parts, -2, -1)
    indices = mx.argsort(-chosen_by, axis=-1)[..., :2]
    weights = mx.take_along_axis(scores, indices, axis=-1)
    return indices, weights / weights.sum(axis=-1, keepdims=True)


def _sample(*, groups: int) -> Sample:
    logits = mx.random.normal((2, 16), key=mx.random.key(1))
    return Sample((logits, mx.random.normal((16,), key=mx.random.key(2)) / 4), {"groups": groups})


def _selected(logits: mx.array, bias: mx.array, groups: int) -> tuple[mx.array, mx.array]:
    return _reference(logits, bias, groups=groups)


def _fused(compile: Any, logits: mx.array, bias: mx.array, *, groups: int) -> list[mx.array]:
    form = tuple([(array.shape, array.dtype) for array in (logits, bias)])
    program = _program(_selected, (None, None, (groups,)), form, [logits, bias])
    if program is None:
        raise ValueError("no kernel can be made of the selection")
    return several(program(logits, bias))


#: Not in the catalog: the kernel is made of the function that a model calls. This one is like it.
SELECTION = KernelSpec(
    name="expert_selection",
    domain="moe",
    formula="the experts of the largest sigmoid(logits) + bias, of the best groups, and weights",
    shapes=("logits (..., E) float", "bias (E,) float", "indices, weights (..., k)"),
    reference=_reference,
    sample=_sample,
    contract={"metal": "tighter", "cuda": "tighter"},
    fused=_fused,
    tolerance={"float32": 1e-6, "uint32": 0.0},
)
