"""What holds routed experts, and the kernels that replace their forward on each backend.

On the CPU one kernel takes gate, up and activation, and one takes the down projection, with the
weighted sum where that is found. On GPUs the same two are one call that is replayed; they also take
biases, further activations and experts without a gate. Calls with more chosen experts than pay for
it run the stock statements, at the price of one comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from zmlx.kernels.experts import (
    EXPERT_COMBINE,
    EXPERT_GLU,
    EXPERT_MATMUL,
    expert_outputs,
    expert_sum,
)
from zmlx.kernels.quantized import (
    GATHER_QUANTIZED_COMBINE,
    GATHER_QUANTIZED_GLU,
    GATHER_QUANTIZED_MATMUL,
)
from zmlx.kernels.spec import KernelSpec
from zmlx.kernels.vectors.fused import few_chosen
from zmlx.patch.activations import activation_bits, product_kernel
from zmlx.patch.forward import ForwardRefused, own_forward
from zmlx.patch.meaning import activation_of
from zmlx.patch.pattern import KernelUse, PatchConfig, library_class
from zmlx.patch.weights import (
    form,
    kernel_configuration,
    paired_form,
    parts,
    product_dtype,
    refusal,
)

_SWITCH = "mlx_lm.models.switch_layers"
#: layers of experts whose weights may be read
_LAYERS = ("QuantizedSwitchLinear", "SwitchLinear")
#: class of mlx-lm -> its gate (None where there is none), up and down
HOLDERS: dict[str, tuple[str | None, str, str]] = {
    "SwitchGLU": ("gate_proj", "up_proj", "down_proj"),
    "SwitchMLP": (None, "fc1", "fc2"),
}
#: what the CPU's kernels compute
_CPU_ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


class ExpertsRefused(Exception):
    """The kernels do not take these experts; the text says why."""


@dataclass(frozen=True)
class Experts:
    """Experts as they were examined.

    Attributes:
        names: attributes of gate (None where there is none), up and down.
        activation: the kernels' name of what lies between.
        module: class of the module that computes it.
        limit: tokens in one call above which the stock experts run; 0 is no limit.
        on_gpu: whether the kernels are those of GPUs, which take few chosen experts.
    """

    names: tuple[str | None, str, str]
    activation: str
    module: type
    limit: int
    on_gpu: bool

    def ready(self, experts: Any, x: mx.array, indices: mx.array) -> bool:
        """Whether the experts are still what was examined, and the kernels take the call."""
        if self.on_gpu and not few_chosen(x, indices):
            return False
        return (
            not experts._training
            and all(_is(experts[name], *_LAYERS) for name in self.names if name is not None)
            and type(experts.activation) is self.module
            and x.shape[:-1] == indices.shape[:-1]
            and (not self.limit or indices.size // indices.shape[-1] <= self.limit)
        )


def _is(module: Any, *names: str) -> bool:
    cls = library_class(module) if isinstance(module, nn.Module) else type(module)
    return cls.__module__ == _SWITCH and cls.__qualname__ in names


def holds_experts(module: Any) -> bool:
    """Return whether a module is one of mlx-lm's that hold routed experts."""
    return _is(module, *HOLDERS)


def examined(experts: nn.Module, config: PatchConfig) -> Experts:
    """Return what experts are.

    Raises:
        ExpertsRefused: the backend's kernels do not take them.
    """
    if config.options.get("fused_swiglu") is False:
        raise ExpertsRefused("fused_swiglu is off in the profile")
    names = HOLDERS[library_class(experts).__qualname__]
    try:
        activation_bits(config)
        own_forward(library_class(experts))
    except (ForwardRefused, ValueError) as refused:
        raise ExpertsRefused(str(refused)) from refused
    activation = activation_of(experts.activation, gated=names[0] is not None)
    if activation is None:
        name = type(experts.activation).__name__
        raise ExpertsRefused(f"activation {name} is none that the kernels compute")
    if config.backend == "cpu":
        if names[0] is None:
            raise ExpertsRefused("experts without a gate: the CPU kernels take those with one")
        if activation not in _CPU_ACTIVATIONS:
            raise ExpertsRefused(f"activation {activation}: there are CPU kernels for others only")
    for layer in names:
        reason = None if layer is None else _layer_refusal(experts.get(layer), config)
        if reason is not None:
            raise ExpertsRefused(f"{layer}: {reason}")
    limit = int(config.options.get("max_tokens") or 0)
    return Experts(names, activation, type(experts.activation), limit, config.backend != "cpu")


def _layer_refusal(layer: Any, config: PatchConfig) -> str | None:
    if layer is None or not _is(layer, *_LAYERS):
        return f"{type(layer).__name__} is not a QuantizedSwitchLinear or SwitchLinear"
    biased = config.backend == "cpu" and "bias" in layer
    return refusal(layer) or ("has a bias" if biased else None)


@dataclass(frozen=True)
class Replacement:
    """What replaces the statements of experts.

    Attributes:
        key: what it depends on.
        uses: the kernels.
        call: takes the experts, x, indices and, of a weighted sum, weights.
    """

    key: tuple[Any, ...]
    uses: tuple[KernelUse, ...]
    make: Callable[[], Callable[..., mx.array]]


def outputs(module: nn.Module, experts: Experts, config: PatchConfig) -> Replacement:
    """Return what computes the outputs of every chosen expert: (experts, x, indices)."""
    if config.backend != "cpu":
        uses = (*_gated_uses(module, experts), *_down_uses(module, experts, EXPERT_MATMUL))
        return Replacement((), uses, lambda: _gpu_outputs(experts, config.backend))
    kernels = (GATHER_QUANTIZED_GLU, GATHER_QUANTIZED_MATMUL)
    gated, down = (product_kernel(spec, config) for spec in kernels)
    uses = (*_cpu_uses(module, experts, gated), *_cpu_down(module, experts, down))
    return Replacement((gated, down), uses, lambda: _cpu_outputs(experts, gated, down))


def weighted_sum(
    module: nn.Module, experts: Experts, config: PatchConfig, *, keeps_dtype: bool
) -> Replacement:
    """Return what computes their weighted sum: (experts, x, indices, weights)."""
    if config.backend != "cpu":
        uses = (*_gated_uses(module, experts), *_down_uses(module, experts, EXPERT_COMBINE))
        return Replacement((), uses, lambda: _gpu_sum(experts, config.backend, keeps_dtype))
    kernels = (GATHER_QUANTIZED_GLU, GATHER_QUANTIZED_COMBINE)
    gated, down = (product_kernel(spec, config) for spec in kernels)
    uses = (*_cpu_uses(module, experts, gated), *_cpu_down(module, experts, down))
    return Replacement((gated, down), uses, lambda: _cpu_sum(experts, gated, down, keeps_dtype))


def _gated_uses(module: nn.Module, experts: Experts) -> tuple[KernelUse, ...]:
    return tuple(
        KernelUse(EXPERT_GLU, {**_configuration(module[name]), "activation": experts.activation})
        for name in experts.names[:2]
        if name is not None
    )


def _down_uses(module: nn.Module, experts: Experts, spec: KernelSpec) -> tuple[KernelUse, ...]:
    return (KernelUse(spec, _configuration(module[experts.names[2]])),)


def _configuration(layer: Any) -> dict[str, Any]:
    configuration = kernel_configuration(layer, EXPERT_MATMUL)
    return {**configuration, "biased": "bias" in layer}


def _cpu_uses(module: nn.Module, experts: Experts, spec: KernelSpec) -> tuple[KernelUse, ...]:
    return tuple(
        KernelUse(spec, {**kernel_configuration(module[name]), "activation": experts.activation})
        for name in experts.names[:2]
        if name is not None
    )


def _cpu_down(module: nn.Module, experts: Experts, spec: KernelSpec) -> tuple[KernelUse, ...]:
    return (KernelUse(spec, kernel_configuration(module[experts.names[2]])),)


# On GPUs

_ABSENT = (None, None, None, None)


def _arrays(
    module: Any, names: tuple[str | None, str, str]
) -> tuple[list[mx.array | None], tuple[Any, Any, Any]]:
    """Return the four parts of each weight, and how each is stored."""
    arrays: list[mx.array | None] = []
    packings: list[Any] = []
    for name in names:
        if name is None:
            arrays += _ABSENT
            packings.append(None)
            continue
        layer = module[name]
        get = layer.get
        scales = get("scales")
        arrays += (layer["weight"], scales, get("biases"), get("bias"))
        dense = scales is None
        packings.append(("dense", 0, 0) if dense else (layer.mode, layer.group_size, layer.bits))
    return arrays, (packings[0], packings[1], packings[2])


def _gpu_outputs(experts: Experts, backend: str) -> Callable[..., mx.array]:
    kernel, names, activation = expert_outputs(backend), experts.names, experts.activation

    def call(module: Any, x: mx.array, indices: mx.array) -> mx.array:
        arrays, packings = _arrays(module, names)
        return kernel(x, indices, *arrays, activation=activation, packings=packings)

    return call


def _gpu_sum(experts: Experts, backend: str, keeps_dtype: bool) -> Callable[..., mx.array]:
    kernel, names, activation = expert_sum(backend), experts.names, experts.activation

    def call(module: Any, x: mx.array, indices: mx.array, weights: mx.array) -> mx.array:
        arrays, packings = _arrays(module, names)
        return kernel(
            x,
            indices,
            weights,
            *arrays,
            activation=activation,
            packings=packings,
            keeps_dtype=keeps_dtype,
        )

    return call


# On CPUs


def _cpu_gated(experts: Experts, spec: KernelSpec) -> Callable[[Any, mx.array, mx.array], mx.array]:
    """Return what computes the gated products (T, k, I) of the chosen experts."""
    kernel = spec.implementation("cpu")
    gate_name, up_name, _ = experts.names
    assert gate_name is not None

    def gated(module: Any, x: mx.array, indices: mx.array) -> mx.array:
        gate, up = module[gate_name], module[up_name]
        return kernel(
            x.reshape(-1, x.shape[-1]),
            indices.reshape(-1, indices.shape[-1]),
            *parts(gate),
            *parts(up),
            activation=experts.activation,
            **paired_form(gate, up),
        )

    return gated


def _cpu_outputs(experts: Experts, gated: KernelSpec, down: KernelSpec) -> Callable[..., mx.array]:
    hidden_of, gather = _cpu_gated(experts, gated), down.implementation("cpu")

    def call(module: Any, x: mx.array, indices: mx.array) -> mx.array:
        layer = module[experts.names[2]]
        hidden = hidden_of(module, x, indices)
        chosen = indices.reshape(-1, indices.shape[-1])
        y = gather(hidden[:, :, None, :], *parts(layer), chosen, **form(layer))
        return y.reshape(*indices.shape, y.shape[-1])

    return call


def _cpu_sum(
    experts: Experts, gated: KernelSpec, down: KernelSpec, keeps_dtype: bool
) -> Callable[..., mx.array]:
    hidden_of, combine = _cpu_gated(experts, gated), down.implementation("cpu")

    def call(module: Any, x: mx.array, indices: mx.array, weights: mx.array) -> mx.array:
        layer = module[experts.names[2]]
        hidden = hidden_of(module, x, indices)
        y = combine(
            hidden,
            indices.reshape(hidden.shape[:2]),
            weights.reshape(hidden.shape[:2]),
            *parts(layer),
            **form(layer),
        )
        y = y.reshape(*x.shape[:-1], y.shape[-1])
        return y.astype(product_dtype(hidden, layer)) if keeps_dtype else y

    return call
