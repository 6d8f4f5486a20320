"""Bytes that decoding one token reads: of the weights that are used, and of the cache.

Experts count as often as a token chooses one of them. How many that is, and whether the embedding
is also the output projection, is seen from a step of the model, which is built and not evaluated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of weights that one step with one token reads.

    Args:
        model: an mlx-lm model that is not patched; experts are mlx-lm's switch layers. Nothing of
            it is evaluated.

    Returns:
        Every parameter once, but of experts the chosen ones only, and of an embedding one row
        unless the logits are computed with it.
    """
    experts = _experts(model)
    total = 0.0
    with _watched(experts) as chosen, _watched_embeddings(model) as as_output:
        model(mx.zeros((1, 1), mx.int32), cache=make_prompt_cache(model))
    spared = {id(layer): chosen.get(id(layer), 0) / layer.num_experts for layer in experts}
    for layer in _embeddings(model):
        if id(layer) not in as_output:
            spared[id(layer)] = 1 / layer.weight.shape[0]
    for _, layer in model.named_modules():
        own = sum(value.nbytes for value in layer.values() if isinstance(value, mx.array))
        total += own * spared.get(id(layer), 1.0)
    return round(total)


def cache_bytes(cache: Sequence[Any]) -> int:
    """Return the bytes of what a prompt cache holds, without what it keeps free for later."""
    total = 0
    for layer in cache:
        keys, filled = getattr(layer, "keys", None), layer.size()
        if hasattr(layer, "caches"):
            total += cache_bytes(layer.caches)
        elif isinstance(keys, mx.array) and filled:
            # Keys and values come with room for more.
            total += (keys.nbytes + layer.values.nbytes) * filled // keys.shape[-2]
        else:
            arrays: Any = tree_flatten(layer.state)
            total += sum(value.nbytes for _, value in arrays if isinstance(value, mx.array))
    return total


def parameter_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters; nothing is evaluated."""
    parameters: Any = tree_flatten(model.parameters())
    return sum(value.nbytes for _, value in parameters)


def _experts(model: nn.Module) -> list[Any]:
    kinds = (SwitchLinear, QuantizedSwitchLinear)
    return [layer for _, layer in model.named_modules() if isinstance(layer, kinds)]


def _embeddings(model: nn.Module) -> list[Any]:
    kinds = (nn.Embedding, nn.QuantizedEmbedding)
    return [layer for _, layer in model.named_modules() if isinstance(layer, kinds)]


@contextmanager
def _watched(layers: Sequence[Any]) -> Iterator[dict[int, int]]:
    """Note how many experts each layer is asked for; by the identity of the layer."""
    chosen: dict[int, int] = {}

    def watching(kind: Any) -> type:
        def call(self: Any, x: mx.array, indices: mx.array, *rest: Any, **named: Any) -> mx.array:
            chosen[id(self)] = chosen.get(id(self), 0) + indices.size
            result: mx.array = kind.__call__(self, x, indices, *rest, **named)
            return result

        return type(kind.__name__, (kind,), {"__call__": call})

    with _classes(layers, watching):
        yield chosen


@contextmanager
def _watched_embeddings(model: nn.Module) -> Iterator[set[int]]:
    """Note which embeddings give the logits; by their identity."""
    used: set[int] = set()

    def watching(kind: Any) -> type:
        def as_linear(self: Any, x: mx.array) -> mx.array:
            used.add(id(self))
            result: mx.array = kind.as_linear(self, x)
            return result

        return type(kind.__name__, (kind,), {"as_linear": as_linear})

    with _classes(_embeddings(model), watching):
        yield used


@contextmanager
def _classes(layers: Sequence[Any], kind_of: Any) -> Iterator[None]:
    """Give layers another class for a while."""
    before = [type(layer) for layer in layers]
    try:
        for layer in layers:
            layer.__class__ = kind_of(type(layer))
        yield
    finally:
        for layer, kind in zip(layers, before, strict=True):
            layer.__class__ = kind
