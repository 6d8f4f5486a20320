"""Decide what would be replaced in a model, and why not the rest, without touching it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.nn as nn

from zmlx.kernels.spec import KernelSpec, prepare_all
from zmlx.patch.pattern import (
    PatchConfig,
    PatchPattern,
    Proposal,
    Refused,
    pattern_of,
)
from zmlx.patch.report import Candidate

if TYPE_CHECKING:
    from zmlx.family import Family
    from zmlx.profile import Policy


@dataclass(frozen=True)
class Request:
    """What the caller asked for, beside the profile.

    Attributes:
        patterns: the patterns, in order of application.
        explicit: whether the caller named them; then the safety table is overridden.
        backend: "metal", "cuda" or "cpu".
        threadgroup: threads of a GPU threadgroup, or "auto".
        max_tokens: overrides the option `moe_mlp.max_tokens`; None leaves it.
        verbose: whether the whole report is printed.
    """

    patterns: Sequence[PatchPattern]
    explicit: bool
    backend: str
    threadgroup: int | str = 256
    max_tokens: int | None = None
    verbose: bool = False


@dataclass(frozen=True)
class Plan:
    """Every candidate with its reason, and the proposals of the chosen ones."""

    candidates: tuple[Candidate, ...]
    proposals: tuple[tuple[nn.Module, Proposal, str], ...]


def make_plan(
    model: nn.Module,
    family: Family,
    policy: Policy,
    request: Request,
    beside: Iterable[tuple[KernelSpec, Mapping[str, Any]]] = (),
) -> Plan:
    """Examine every module with every pattern that is wanted.

    Patterns with `opt_in` are wanted where the caller or the profile names them.

    Args:
        model: a loaded model; it is not changed.
        family: what the model is.
        policy: what the release profile admits.
        request: what the caller asked for.
        beside: kernels and their configurations that will be probed after this, and are compiled
            together with those that are probed here.

    Returns:
        A plan whose candidates stand in the order of the model's modules.
    """
    candidates: list[tuple[int, Candidate]] = []
    proposals: dict[int, tuple[nn.Module, Proposal, str]] = {}
    examined = list(_examined(model, family, policy, request))
    probed = (use for found in examined for use in found.judge.to_be_probed(found.verdict))
    prepare_all(request.backend, chain(probed, beside))
    for position, path, module, judge, verdict in examined:
        if isinstance(verdict, Proposal) and position in proposals:
            verdict = Refused(f"{proposals[position][2]} replaces this module")
        chosen, contract, reason = judge(verdict)
        name = type(module).__name__
        candidate = Candidate(path, judge.pattern, chosen, reason, contract, name)
        candidates.append((position, candidate))
        if chosen and isinstance(verdict, Proposal):
            proposals[position] = (module, verdict, judge.pattern)
    candidates.sort(key=lambda item: item[0])
    return Plan(tuple(c for _, c in candidates), tuple(proposals.values()))


class _Examined(NamedTuple):
    """What one pattern says of one module."""

    position: int
    path: str
    module: nn.Module
    judge: _Judge
    verdict: Proposal | Refused


def _examined(
    model: nn.Module, family: Family, policy: Policy, request: Request
) -> Iterator[_Examined]:
    modules = list(_modules(model))
    for pattern in request.patterns:
        if pattern.opt_in and not (request.explicit or policy.names(pattern.name(), family.name)):
            continue
        judge = _Judge(pattern.name(), family, policy, request)
        for position, (path, module, parent) in enumerate(modules):
            verdict = pattern.examine(module, path, parent, judge.config)
            if verdict is not None:
                yield _Examined(position, path, module, judge, verdict)


class _Judge:
    """Accepts or refuses the verdicts of one pattern on one model."""

    def __init__(self, pattern: str, family: Family, policy: Policy, request: Request) -> None:
        options = dict(policy.options(pattern, family.name))
        if pattern == "moe_mlp" and request.max_tokens is not None:
            options["max_tokens"] = request.max_tokens
        self.config = PatchConfig(
            request.backend, options, policy.admits, request.threadgroup, request.verbose
        )
        self.pattern, self._family, self._policy = pattern, family, policy
        self._backend, self._explicit = request.backend, request.explicit

    def __call__(self, verdict: Proposal | Refused) -> tuple[bool, str, str]:
        """Return whether it is chosen, its contract, and the reason."""
        if isinstance(verdict, Refused):
            return False, "", verdict.reason
        contract, objection = self._admitted(verdict)
        if not contract:
            return False, "", f"no kernel for {self._backend} yet"
        if objection is not None and not self._explicit:
            return False, contract, objection
        for use in verdict.kernels:
            failure = use.spec.probe(self._backend, **use.configuration)
            if failure is not None:
                return False, contract, failure
        override = "" if objection is None else f" (asked for by name, although {objection})"
        return True, contract, verdict.note + override

    def to_be_probed(
        self, verdict: Proposal | Refused
    ) -> Iterator[tuple[KernelSpec, Mapping[str, Any]]]:
        """Yield the kernels that decide on a verdict, with their configurations."""
        if isinstance(verdict, Refused):
            return
        contract, objection = self._admitted(verdict)
        if contract and (objection is None or self._explicit):
            for use in verdict.kernels:
                yield use.spec, use.configuration

    def _admitted(self, verdict: Proposal) -> tuple[str, str | None]:
        """Return the contract of all kernels, empty where there is none, and what is against it."""
        contract = _weakest([use.spec.contract.get(self._backend, "") for use in verdict.kernels])
        return contract, self._objection(contract) if contract else None

    def _objection(self, contract: str) -> str | None:
        """Return why the safety table or the profile keeps this pattern out, or None."""
        refusal = self._family.refusals.get(self.pattern)
        if refusal is not None and (not refusal.backends or self._backend in refusal.backends):
            return f"family {self._family.name} refuses it: {refusal.reason} ({refusal.evidence})"
        allowed, why = self._policy.allows(self.pattern, contract, self._family.name)
        return None if allowed else why


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module | None]]:
    """Yield path, module and parent of every module but the model itself, each once.

    The class of the model itself stays: other programs assign to it.
    """
    named = dict(model.named_modules())
    seen = {id(model)}
    for path, module in sorted(named.items(), key=lambda item: item[0]):
        if id(module) in seen or pattern_of(module) is not None:
            continue
        seen.add(id(module))
        yield path, module, named.get(path.rpartition(".")[0])


def _weakest(contracts: list[str]) -> str:
    """Return the weakest of some contracts; empty when a kernel has none on this backend."""
    order = ("", "tolerant", "tighter", "exact")
    return min(contracts, key=order.index)
