"""Mixtures of experts that compute a known dense model's function, so that their answer is known.

Each takes a dense llama checkpoint and gives a mixtral one:

- `distinct_experts`: expert e holds the e-th slice of the feed-forward neurons, the router is zero
  and all experts are chosen, each with weight 1 / E; the down projections are scaled by E. A wrong,
  missing or repeated expert changes the sum.
- `identical_experts`: every expert is the whole feed-forward block, the router is random and
  chooses two; whatever it chooses, the weights sum to one. A wrong weight changes the sum.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from zmlx.demo.smollm import Checkpoint

EXPERTS = 4
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def distinct_experts(dense: Checkpoint, experts: int = EXPERTS) -> Checkpoint:
    """Split the neurons of every feed-forward block among the experts.

    Args:
        dense: a 4-bit llama checkpoint with groups of 32.
        experts: number of experts E, all of which the router chooses. The block's width must be a
            multiple of 32 E, so that no group of the down projection is cut.

    Returns:
        A mixtral checkpoint: the dense function, up to rounding (exactly scaled when E is a power
        of two).

    Raises:
        ValueError: the width is not such a multiple.
    """
    width, group = dense.config["intermediate_size"], dense.config["quantization"]["group_size"]
    if width % (group * experts):
        raise ValueError(
            f"{experts} experts: the feed-forward width {width} is not a multiple of "
            f"{group} * {experts}"
        )

    def expert_arrays(name: str, kind: str, array: mx.array) -> mx.array:
        if name != "down_proj":
            return array.reshape(experts, -1, array.shape[-1])
        sliced = array.reshape(array.shape[0], experts, -1).swapaxes(0, 1)
        return sliced if kind == "weight" else sliced * experts

    def router(hidden: int, layer: int) -> mx.array:
        return mx.zeros((experts, hidden))

    return _mixtral(dense, expert_arrays, router, experts, experts, width // experts)


def identical_experts(dense: Checkpoint, experts: int = EXPERTS, top_k: int = 2) -> Checkpoint:
    """Give every expert the whole feed-forward block, and the router random weights.

    Args:
        dense: a llama checkpoint.
        experts: number of experts.
        top_k: number of experts that the router chooses.

    Returns:
        A mixtral checkpoint: the dense function, up to rounding.
    """

    def expert_arrays(name: str, kind: str, array: mx.array) -> mx.array:
        return mx.contiguous(mx.broadcast_to(array[None], (experts, *array.shape)))

    def router(hidden: int, layer: int) -> mx.array:
        return mx.random.normal((experts, hidden), scale=hidden**-0.5, key=mx.random.key(layer))

    width = dense.config["intermediate_size"]
    return _mixtral(dense, expert_arrays, router, experts, top_k, width)


def _mixtral(
    dense: Checkpoint, expert_arrays: Any, router: Any, experts: int, top_k: int, width: int
) -> Checkpoint:
    """Return the checkpoint with each `mlp` replaced by a routed block."""
    config = {
        **dense.config,
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": experts,
        "num_experts_per_tok": top_k,
        "intermediate_size": width,
    }
    weights: dict[str, mx.array] = {}
    for name, array in dense.weights.items():
        layer, mark, rest = name.partition(".mlp.")
        if not mark:
            weights[name] = array
            continue
        projection, kind = rest.split(".")
        block = f"{layer}.block_sparse_moe"
        weights[f"{block}.switch_mlp.{rest}"] = expert_arrays(projection, kind, array)
        gate = router(dense.config["hidden_size"], int(layer.rpartition(".")[2]))
        weights[f"{block}.gate.weight"] = gate.astype(_activations(dense))
    return Checkpoint(weights, config, dense.metadata)


def _activations(dense: Checkpoint) -> mx.Dtype:
    return dense.weights["model.norm.weight"].dtype
