"""What a kernel is: a `KernelSpec`, registered once, from which probes, tests and docs follow."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from typing import Any, cast

import mlx.core as mx

from zmlx.backend import current, for_kernels, vmapping
from zmlx.backend.cpu import native
from zmlx.backend.cuda.side_by_side import side_by_side
from zmlx.backend.definition import Definition, Launch
from zmlx.backend.launch import launcher
from zmlx.backend.signature import dtype_name
from zmlx.kernels.calling import Geometry, bound, native_serves, several

#: Backends that run a Metal source.
SOURCE_BACKENDS = ("metal", "cuda", "emulator")
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

    A spec is called with arrays and, by name, options. It runs where kernels run now: on a GPU or
    in the emulator from its source, on the CPU as its native function, if there is one and it is
    built, and else as its reference.

    Attributes:
        name: a C identifier, unique in the registry.
        domain: the page of the catalog it stands on, such as "quant" or "moe".
        formula: what is computed, in one line of mathematics.
        shapes: inputs and output with shapes and dtypes, one line each.
        reference: the same in plain MLX operations, accumulated in float32 or wider: the truth.
            Given float64 arrays, on the CPU, it computes in float64 if the kernel has a source.
        sample: builds small arguments for a configuration (keyword arguments such as `bits`).
        values: parameter of the sample -> values that tests run through, for parameters that are
            this kernel's own; the common ones are in `zmlx.catalog.configurations`.
        contract: backend -> contract, for the backends that have an implementation; what is
            promised of "metal" and "cuda" the emulator holds too.
        definition: the Metal source with its names. Its inputs are the array arguments and then
            options, by their names, as numbers.
        geometry: takes the arguments, checks their shapes and dtypes, and lays out the launch. It
            must not depend on what arrays hold; options that are only its own have defaults. The
            kernel's name is put before the text of its errors.
        finish: makes the result of the launch's outputs and of the array arguments, where the
            outputs are not the result, such as sums of which each threadgroup has a part.
        gradient: takes the array arguments as a tuple, the cotangent and the output (tuples if
            there are several) and, by name, the options; returns a gradient for each array
            argument. Without it the reference is differentiated.
        no_gradient: why there is none; asking for one raises with these words.
        batched: for each array argument whether it may have further leading axes, which the
            outputs then have too; so `mx.vmap` is one launch. Without it the reference is mapped.
        native: name of the function in the native CPU library, when there is one.
        fused: takes what compiles a `Definition` and then the reference's arguments, and returns
            the result; for kernels whose source and launch depend on their arguments, in place of
            `definition` and `geometry`.
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
    definition: Definition | None = None
    geometry: Callable[..., Geometry] | None = None
    finish: Callable[[list[mx.array], tuple[mx.array, ...]], Any] | None = None
    gradient: Callable[..., Any] | None = None
    no_gradient: str = ""
    batched: tuple[bool, ...] = ()
    native: str | None = None
    fused: Callable[..., Any] | None = None
    values: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    tolerance: Mapping[str, float] = field(
        default_factory=lambda: {"float32": 1e-5, "bfloat16": 8e-3, "float16": 1e-3}
    )

    def __call__(self, *arrays: mx.array, **options: Any) -> Any:
        """Compute, lazily, where kernels run now.

        It can be differentiated, mapped over batches and compiled. For a kernel with no source
        the arguments are those of the reference, and its result is not differentiable where its
        native function or its fused one runs.

        Returns:
            An array, or a tuple of them.

        Raises:
            TypeError: an argument is no array, or has a dtype that the kernel does not take.
            ValueError: the shapes do not fit.
        """
        if self.definition is not None:
            return bound(self, options)(*arrays)
        if self.fused is not None and (backend := for_kernels(has_reference=True)) != "reference":
            return self.implementation(backend)(*arrays, **options)
        if current() == "cpu" and native_serves(self):
            return self.implementation("cpu")(*arrays, **options)
        return self.reference(*arrays, **options)

    def backends(self) -> tuple[str, ...]:
        """Return the backends for which there is an implementation, here or elsewhere."""
        native_ones = ("cpu",) if self.native else ()
        return (*native_ones, *(SOURCE_BACKENDS if self.definition or self.fused else ()))

    def implementation(self, backend: str) -> Callable[..., mx.array]:
        """Return the fused function of a backend; it takes the reference's arguments.

        It returns an array, or a list or tuple of them as the reference does. It has no gradient.

        Raises:
            KernelUnavailable: there is none, or it cannot be built here.
        """
        if backend not in self.backends():
            raise KernelUnavailable(f"{self.name} has no {backend} kernel")
        if backend == "cpu":
            return self._native()
        if self.fused is not None:
            return partial(self.fused, _compiler(backend))
        launch = self.launch(backend)
        return lambda *arrays, **options: bound(self, options).launched(launch, arrays)

    def launch(self, backend: str) -> Launch:
        """Return the compiled source.

        Raises:
            KernelUnavailable: there is no source.
        """
        if self.definition is None:
            raise KernelUnavailable(f"{self.name} has no {backend} kernel")
        return launcher(self.definition, backend)

    def _native(self) -> Callable[..., mx.array]:
        try:
            library = native.load()
        except native.NativeUnavailable as error:
            raise KernelUnavailable(str(error)) from error
        return getattr(library, self.native or "")  # type: ignore[no-any-return]

    def probe(self, backend: str, **configuration: Any) -> str | None:
        """Run the kernel once on tiny arrays against its reference.

        Kernels fail late, inside the user's generate; this makes them fail early.

        Returns:
            None when the kernel may be used, else the reason why not.
        """
        return _probe(self, backend, tuple(sorted(configuration.items(), key=lambda item: item[0])))

    def prepare(self, backend: str, **configuration: Any) -> None:
        """Launch what a probe would, without running it: kernels for CUDA are compiled by that."""
        _prepare(self, backend, tuple(sorted(configuration.items(), key=lambda item: item[0])))

    def __hash__(self) -> int:
        return hash(self.name)


def prepare_all(backend: str, uses: Iterable[tuple[KernelSpec, Mapping[str, Any]]]) -> None:
    """Have the kernels that are to be probed compiled beside each other, where that takes long.

    Args:
        backend: where they run.
        uses: kernels and their configurations; nothing is read of them where there is no need.
    """
    if backend == "cuda":
        with side_by_side():
            for spec, configuration in uses:
                spec.prepare(backend, **configuration)


#: name -> spec; filled when a kernel's module is imported
_SPECS: dict[str, KernelSpec] = {}


def register(spec: KernelSpec) -> KernelSpec:
    """Add a kernel to the registry and return it.

    Raises:
        ValueError: the name is not a C identifier or is taken, a contract is unknown or for a
            backend without an implementation, or there is no implementation at all.
    """
    if not (spec.name.isascii() and spec.name.isidentifier()):
        raise ValueError(f"kernel name {spec.name!r} is not a C identifier")
    if spec.name in _SPECS:
        raise ValueError(f"a kernel named {spec.name!r} is registered already")
    if (spec.definition is None) != (spec.geometry is None):
        raise ValueError(f"kernel {spec.name!r}: a source and a geometry go together; give both")
    if not spec.backends():
        raise ValueError(f"kernel {spec.name!r} has neither a source nor a native function")
    unknown = set(spec.contract.values()) - set(CONTRACTS)
    if unknown:
        raise ValueError(f"kernel {spec.name!r}: unknown contract {sorted(unknown)}")
    elsewhere = set(spec.contract) - set(spec.backends())
    if elsewhere:
        raise ValueError(f"kernel {spec.name!r} has no kernel for {sorted(elsewhere)}")
    if spec.definition is not None:
        vmapping.install()
    _SPECS[spec.name] = spec
    return spec


def all_specs() -> dict[str, KernelSpec]:
    """Import every kernel module and return name -> spec, sorted by name."""
    package = import_module("zmlx.kernels")
    for module in pkgutil.iter_modules(package.__path__):
        import_module(f"zmlx.kernels.{module.name}")
    return dict(sorted(_SPECS.items()))


@cache
def _compiler(backend: str) -> Callable[[Definition], Launch]:
    """Return what compiles for a backend: one object, by which recorded calls are known."""
    return lambda definition: launcher(definition, backend)


def relative_error(value: mx.array, truth: mx.array) -> float:
    """Return max |value - truth| / max |truth|; NaN when either holds one."""
    truth = truth.astype(mx.float32)
    scale = mx.maximum(mx.max(mx.abs(truth)), 1e-30)
    error = mx.max(mx.abs(value.astype(mx.float32) - truth)) / scale
    return cast(float, error.item())


@dataclass(frozen=True)
class Deviation:
    """How far one output of a kernel is from its reference's.

    Attributes:
        error: largest error relative to the reference's largest element; NaN for another shape.
        allowed: what the kernel's tolerance allows.
        fault: what is wrong, empty if nothing is.
    """

    error: float
    allowed: float
    fault: str = ""


def deviations(spec: KernelSpec, backend: str, configuration: Mapping[str, Any]) -> list[Deviation]:
    """Run a kernel on the sample of a configuration, and compare each output.

    Raises:
        KernelUnavailable: the kernel has no implementation for the backend here.
    """
    kernel = spec.implementation(backend)
    sample = spec.sample(**configuration)
    values = several(kernel(*sample.args, **sample.kwargs))
    # Made anew: a kernel that rewrites a graph may have used it up.
    sample = spec.sample(**configuration)
    truths = several(spec.reference(*sample.args, **sample.kwargs))
    if len(values) != len(truths):
        raise ValueError(f"it gave {len(values)} arrays where {len(truths)} are right")
    return [_deviation(spec, *pair) for pair in zip(values, truths, strict=True)]


def _deviation(spec: KernelSpec, value: mx.array, truth: mx.array) -> Deviation:
    allowed = spec.tolerance[dtype_name(truth.dtype)]
    nan = float("nan")
    if value.shape != truth.shape:
        fault = f"gave shape {value.shape} where {truth.shape} is right"
        return Deviation(nan, allowed, fault)
    if value.dtype != truth.dtype:
        return Deviation(nan, allowed, f"gave {value.dtype} where {truth.dtype} is right")
    error = relative_error(value, truth)
    if not error <= allowed:
        return Deviation(error, allowed, f"error {error:.1e}, allowed {allowed:.0e}")
    return Deviation(error, allowed)


@cache
def _prepare(spec: KernelSpec, backend: str, configuration: tuple[tuple[str, Any], ...]) -> None:
    sample = spec.sample(**dict(configuration))
    with suppress(Exception):  # which the probe tells
        spec.implementation(backend)(*sample.args, **sample.kwargs)


@cache
def _probe(
    spec: KernelSpec, backend: str, configuration: tuple[tuple[str, Any], ...]
) -> str | None:
    try:
        faults = [d.fault for d in deviations(spec, backend, dict(configuration)) if d.fault]
    except Exception as failure:  # noqa: BLE001 - whatever a kernel raises here, it is refused for
        faults = [str(failure)]
    return f"{spec.name} failed its probe: {faults[0]}" if faults else None
