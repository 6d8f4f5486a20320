"""What a kernel is: a `KernelSpec`, registered once, from which probes, tests and docs follow."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any, cast

import mlx.core as mx

from zmlx.backend.cpu import native

#: How far a replacement may be from the operations it replaces (design: Contract).
CONTRACTS = ("exact", "tighter", "tolerant")


class KernelUnavailable(RuntimeError):
    """A kernel cannot run on this backend; the text says why."""


@dataclass(frozen=True)
class Sample:
    """Arguments for one call of a kernel, small enough to run anywhere."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class KernelSpec:
    """A fused operation and what is promised of it.

    Attributes:
        name: a C identifier, unique in the registry.
        domain: the page of the catalog it stands on, such as "quant" or "moe".
        formula: what is computed, in one line of mathematics.
        shapes: inputs and output with shapes and dtypes, one line each.
        reference: the same in plain MLX operations, accumulated in float32 or wider: the truth.
        sample: builds small arguments for a configuration (keyword arguments such as `bits`).
        contract: backend -> contract, for the backends that have an implementation.
        native: name of the function in the native CPU library, when there is one.
        tolerance: largest error against the reference, relative to its largest element, by the
            name of the output's dtype; what a probe and the generated tests hold it to.
    """

    name: str
    domain: str
    formula: str
    shapes: tuple[str, ...]
    reference: Callable[..., Any]
    sample: Callable[..., Sample]
    contract: Mapping[str, str]
    native: str | None = None
    tolerance: Mapping[str, float] = field(
        default_factory=lambda: {"float32": 1e-5, "bfloat16": 8e-3, "float16": 1e-3}
    )

    def implementation(self, backend: str) -> Callable[..., mx.array]:
        """Return the fused function of a backend; it takes the reference's arguments.

        It returns an array, or a list of them as the reference does.

        Raises:
            KernelUnavailable: there is none, or it cannot be built here.
        """
        if backend != "cpu" or self.native is None:
            raise KernelUnavailable(f"{self.name} has no {backend} kernel")
        try:
            library = native.load()
        except native.NativeUnavailable as error:
            raise KernelUnavailable(str(error)) from error
        return getattr(library, self.native)  # type: ignore[no-any-return]

    def probe(self, backend: str, **configuration: Any) -> str | None:
        """Run the kernel once on tiny arrays against its reference.

        Kernels fail late, inside the user's generate; this makes them fail early.

        Returns:
            None when the kernel may be used, else the reason why not.
        """
        return _probe(self, backend, tuple(sorted(configuration.items(), key=lambda item: item[0])))

    def __hash__(self) -> int:
        return hash(self.name)


#: name -> spec; filled when a kernel's module is imported
_SPECS: dict[str, KernelSpec] = {}


def register(spec: KernelSpec) -> KernelSpec:
    """Add a kernel to the registry and return it.

    Raises:
        ValueError: the name is not a C identifier or is taken, or a contract is unknown.
    """
    if not (spec.name.isascii() and spec.name.isidentifier()):
        raise ValueError(f"kernel name {spec.name!r} is not a C identifier")
    if spec.name in _SPECS:
        raise ValueError(f"a kernel named {spec.name!r} is registered already")
    unknown = set(spec.contract.values()) - set(CONTRACTS)
    if unknown:
        raise ValueError(f"kernel {spec.name!r}: unknown contract {sorted(unknown)}")
    _SPECS[spec.name] = spec
    return spec


def all_specs() -> dict[str, KernelSpec]:
    """Import every kernel module and return name -> spec, sorted by name."""
    package = import_module("zmlx.kernels")
    for module in pkgutil.iter_modules(package.__path__):
        import_module(f"zmlx.kernels.{module.name}")
    return dict(sorted(_SPECS.items()))


def relative_error(value: mx.array, truth: mx.array) -> float:
    """Return max |value - truth| / max |truth|; NaN when either holds one."""
    truth = truth.astype(mx.float32)
    scale = mx.maximum(mx.max(mx.abs(truth)), 1e-30)
    error = mx.max(mx.abs(value.astype(mx.float32) - truth)) / scale
    return cast(float, error.item())


@cache
def _probe(
    spec: KernelSpec, backend: str, configuration: tuple[tuple[str, Any], ...]
) -> str | None:
    try:
        kernel = spec.implementation(backend)
        sample = spec.sample(**dict(configuration))
        values = _several(kernel(*sample.args, **sample.kwargs))
        # Made anew: a kernel that rewrites a graph may have used it up.
        sample = spec.sample(**dict(configuration))
        truths = _several(spec.reference(*sample.args, **sample.kwargs))
        for value, truth in zip(values, truths, strict=True):
            if value.shape != truth.shape:
                return f"{spec.name} gave shape {value.shape} where {truth.shape} is right"
            error = relative_error(value, truth)
            limit = spec.tolerance[str(value.dtype).rpartition(".")[2]]
            if not error <= limit:
                return f"{spec.name} failed its probe: error {error:.1e}, allowed {limit:.0e}"
    except Exception as failure:  # noqa: BLE001 - whatever a kernel raises here, it is refused for
        return f"{spec.name} failed its probe: {failure}"
    return None


def _several(result: Any) -> list[mx.array]:
    return list(result) if isinstance(result, list | tuple) else [result]
