"""What a pattern is: it recognises a module, proposes a class for it, and that is all.

A replacement is a subclass of the module's own class, put in place by assigning `__class__`. MLX
calls a module through its type, so an attribute on the instance would never be called; and with a
class swap isinstance, parameter names, quantisation, LoRA and saving stay what they were.
"""

from __future__ import annotations

import copy
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any

import mlx.nn as nn

from zmlx.kernels.spec import CONTRACTS, KernelSpec


@dataclass(frozen=True)
class KernelUse:
    """A kernel that a proposal would call, in the configuration in which it would call it."""

    spec: KernelSpec
    configuration: Mapping[str, Any]


@dataclass(frozen=True)
class Proposal:
    """A replacement that a pattern offers for one module.

    Attributes:
        key: what the new class depends on beside the module's class; hashable.
        namespace: builds the members of the new class from the module's class.
        kernels: the kernels it calls; each is probed before the proposal is accepted.
        note: what will be different, in a few words.
    """

    key: tuple[Any, ...]
    namespace: Callable[[type], dict[str, Any]]
    kernels: tuple[KernelUse, ...]
    note: str


@dataclass(frozen=True)
class Refused:
    """A module that looks like the pattern's, and why it keeps the stock forward."""

    reason: str


@dataclass(frozen=True)
class PatchConfig:
    """How a pattern is applied.

    Attributes:
        backend: "metal", "cuda" or "cpu".
        options: the pattern's options as the profile resolved them.
        admits: the contracts that the profile admits; a pattern that has the choice keeps to them.
        threadgroup: threads of a GPU threadgroup, or "auto".
        verbose: whether the whole report is printed.
    """

    backend: str = "cpu"
    options: Mapping[str, Any] = field(default_factory=dict)
    admits: frozenset[str] = frozenset(CONTRACTS)
    threadgroup: int | str = 256
    verbose: bool = False


class PatchPattern(ABC):
    """Base of the patterns; an instance named PATTERN in a file of `patterns/` is registered."""

    #: patterns with a lower order look at a model first; blocks come before the parts they hold
    order: int = 1
    #: why it is tried only where it is named, by a caller or in a profile's `include`; empty for a
    #: pattern that is always tried
    opt_in: str = ""

    @abstractmethod
    def name(self) -> str:
        """Return the pattern's name, which is its file's."""

    @abstractmethod
    def examine(
        self, module: nn.Module, path: str, parent: nn.Module | None, config: PatchConfig
    ) -> Proposal | Refused | None:
        """Decide about one module without touching it; None when the pattern is not about it."""

    def matches(self, module: nn.Module, name: str, parent: nn.Module | None = None) -> bool:
        """Return whether the pattern would replace this module."""
        return isinstance(self.examine(module, name, parent, PatchConfig()), Proposal)

    def apply(self, module: nn.Module, config: PatchConfig | None = None) -> nn.Module:
        """Replace one module's forward in place and return the module.

        Raises:
            ValueError: the pattern does not match.
        """
        verdict = self.examine(module, "", None, config or PatchConfig())
        if not isinstance(verdict, Proposal):
            reason = verdict.reason if verdict else "it is not what this pattern replaces"
            raise ValueError(f"{self.name()} does not apply to {type(module).__name__}: {reason}")
        swap(module, verdict, self.name())
        return module


@cache
def patterns() -> dict[str, PatchPattern]:
    """Import every pattern's file and return name -> pattern, in the order of application.

    Blocks come before the parts they hold.
    """
    package = import_module("zmlx.patch.patterns")
    found = {
        module.name: import_module(f"zmlx.patch.patterns.{module.name}").PATTERN
        for module in pkgutil.iter_modules(package.__path__)
    }
    return dict(sorted(found.items(), key=lambda item: (item[1].order, item[0])))


#: Where a replaced module keeps what its class remembers: neither copied nor saved with the
#: module, and gone with the class.
STATE = "_zmlx_state"

#: (class, pattern, key) -> the subclass that replaces it
_GENERATED: dict[tuple[Any, ...], type] = {}


def swap(module: nn.Module, proposal: Proposal, pattern: str) -> None:
    """Give a module the proposal's class; nothing else about the module changes."""
    base = type(module)
    key = (base, pattern, proposal.key)
    if key not in _GENERATED:
        members = {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "_zmlx_original": base,
            "_zmlx_pattern": pattern,
            "__deepcopy__": _deepcopy,
            "__reduce_ex__": _reduce_ex,
            **proposal.namespace(base),
        }
        _GENERATED[key] = type(base.__name__, (base,), members)
    module.__class__ = _GENERATED[key]


@contextmanager
def as_library(module: nn.Module) -> Iterator[None]:
    """Give a module and all below it the library's own classes until the block ends.

    Other threads may call the modules meanwhile: both forwards are right.
    """
    replaced = {id(m): m for _, m in module.named_modules() if original_class(m) is not None}
    classes = [(m, type(m)) for m in replaced.values()]
    try:
        for m, cls in classes:
            m.__class__ = vars(cls)["_zmlx_original"]
        yield
    finally:
        for m, cls in classes:
            m.__class__ = cls


def put_back(module: nn.Module) -> bool:
    """Give a module its own class again; return whether it was replaced."""
    original = original_class(module)
    if original is None:
        return False
    module.__class__ = original
    vars(module).pop(STATE, None)
    return True


def original_class(module: nn.Module) -> type | None:
    """Return the class that a replaced module had before, or None for one that is not replaced."""
    return vars(type(module)).get("_zmlx_original")


def library_class(module: nn.Module) -> type:
    """Return a module's class as the library made it, whether it is replaced or not."""
    return original_class(module) or type(module)


def pattern_of(module: nn.Module) -> str | None:
    """Return the name of the pattern that replaced a module, or None."""
    return vars(type(module)).get("_zmlx_pattern")


def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    """Copy a replaced module; the copy is replaced too."""
    base = type(self)._zmlx_original
    duplicate = base.__new__(base)
    memo[id(self)] = duplicate
    for name, value in self.items():
        dict.__setitem__(duplicate, name, copy.deepcopy(value, memo))
    duplicate.__dict__.update(copy.deepcopy(_attributes(self), memo))
    duplicate.__class__ = type(self)
    return duplicate


def _reduce_ex(self: Any, protocol: Any) -> Any:
    """Pickle a replaced module as the library's own, so that a reader needs no zmlx."""
    original = type(self)._zmlx_original
    return dict.__new__, (original,), _attributes(self), None, iter(self.items())


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return a replaced module's attributes without what its class remembers."""
    return {name: value for name, value in vars(module).items() if name != STATE}
