r"""Run the kernels of decode steps and of the catalog a few times: for NVIDIA's compute-sanitizer.

    compute-sanitizer --kernel-name kns=custom_kernel --tool memcheck \
        python tests/cuda/sanitized.py
    compute-sanitizer --kernel-name kns=custom_kernel --tool racecheck \
        python tests/cuda/sanitized.py

The models have two or three layers of the published sizes, few experts and a small vocabulary: the
kernels are those of the whole models. The catalog's run on the samples on which they are probed.
Names of shapes, or `catalog`, may be given; without any all six shapes and the catalog run. No
prompt goes through them: racecheck ends with an exception in what MLX runs for a prompt of GLM's,
whichever kernels it watches.
"""

from __future__ import annotations

import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from zmlx.backend.cuda import library
from zmlx.bench import shapes
from zmlx.bench.twin import twin
from zmlx.catalog.configurations import configurations
from zmlx.kernels.spec import all_specs
from zmlx.patch import patch

CATALOG = "catalog"
#: Positions before the steps, and steps.
FILLED = 40
STEPS = 6
SMALLER = {"vocab_size": 1024, "num_hidden_layers": 2}
#: What has fewer layers, or as many experts as a token takes and some more.
CUT = {
    "num_experts": 12,
    "num_local_experts": 6,
    "n_routed_experts": 6,
    "layer_types": ["sliding_attention", "full_attention"],
    "full_attn_idxs": [2],
}


def small(name: str) -> dict[str, object]:
    """Return the configuration of a shape with few layers."""
    config = {**shapes.SHAPES[name], **SMALLER}
    config.update({key: value for key, value in CUT.items() if key in config})
    if "full_attn_idxs" in config:
        config["num_hidden_layers"] = 3
    return config


def made(name: str) -> nn.Module:
    """Return a model of random weights, of a shape with few layers."""
    shapes.SHAPES["sanitized"] = small(name)
    if name in shapes.EXPERTS:
        shapes.EXPERTS["sanitized"] = shapes.EXPERTS[name]
    try:
        return shapes.random_model("sanitized")
    finally:
        del shapes.SHAPES["sanitized"]
        shapes.EXPERTS.pop("sanitized", None)


def filled(model: nn.Module) -> list[Any]:
    """Return caches of random keys and values after a first token."""
    caches = make_prompt_cache(model)
    mx.eval(model(mx.array([[1]]), cache=caches))
    for number, cache in enumerate(caches):
        if getattr(cache, "keys", None) is not None:
            first = cache.keys[..., :1, :], cache.values[..., :1, :]
            cache.update_and_fetch(*(like(part, number) for part in first))
    mx.eval([cache.state for cache in caches])
    return caches


def like(row: mx.array, seed: int) -> mx.array:
    """Return more random positions like one."""
    shape = (*row.shape[:2], FILLED - 1, row.shape[3])
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(row.dtype)


def apart(name: str) -> float:
    """Return how far a patched model's logits are from stock's, relative, over some steps."""
    stock = made(name)
    models = (stock, patch(twin(stock)))
    library.wait()  # or steps would not be recorded yet
    caches = [filled(model) for model in models]
    worst = 0.0
    for token in range(STEPS):
        found = [
            model(mx.array([[token]]), cache=cache).astype(mx.float32)
            for model, cache in zip(models, caches, strict=True)
        ]
        error = mx.square(found[1] - found[0]).mean() / mx.square(found[0]).mean()
        worst = max(worst, mx.sqrt(error).item())
    return worst


def faults(backend: str) -> list[str]:
    """Return what is wrong with the catalog's kernels, in all their configurations."""
    return [
        fault
        for spec in all_specs().values()
        if backend in spec.contract
        for configuration in configurations(spec, backend)
        if (fault := spec.probe(backend, **configuration)) is not None
    ]


def main() -> None:
    """Run the shapes and say how far they are from stock; run the catalog and say what is wrong."""
    for name in sys.argv[1:] or (*shapes.SHAPES, CATALOG):
        if name == CATALOG:
            print(f"{name}: {'; '.join(faults('cuda')) or 'right'}", flush=True)
        else:
            print(f"{name}: {apart(name):.2%} from stock", flush=True)


if __name__ == "__main__":
    main()
