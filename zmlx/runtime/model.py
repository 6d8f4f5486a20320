"""`patch` and `unpatch`: from a loaded model to one with fused layers and a report, and back."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any, TypeVar

import mlx.nn as nn

from zmlx import backend
from zmlx.backend.cuda import library
from zmlx.family import Family, detect
from zmlx.patch.apply import apply_plan, restore
from zmlx.patch.pattern import PatchPattern
from zmlx.patch.pattern import patterns as all_patterns
from zmlx.patch.plan import Request, make_plan
from zmlx.patch.report import Candidate, PatchReport
from zmlx.profile import Policy, resolve_policy
from zmlx.runtime import sampling

ModelT = TypeVar("ModelT", bound=nn.Module)

#: Where a model keeps its report.
RESULT = "_zmlx_patch_result"

MODES = ("inference", "training")
#: The pattern of models that choose their tokens with our kernels, too.
_STEPS = "decode_step"


def patch(
    model: ModelT,
    *,
    mode: str | None = None,
    profile: str | None = None,
    patterns: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    threadgroup: int | str = 256,
    moe_fused_swiglu_max_tokens: int | None = None,
    fusion: bool = False,
    verbose: bool = False,
    **legacy: Any,
) -> ModelT:
    """Replace layers of a model by fused ones, as far as the profile admits and the model is known.

    The family is detected, every module is examined, each kernel is probed once on tiny arrays, and
    then all chosen modules are replaced at once. Weights, parameter names and the model's own class
    stay. Calling it again replaces the earlier plan by the new one.

    Args:
        model: a loaded mlx-lm model.
        mode: "inference" (default) or "training". Replaced layers in training mode run the stock
            operations; "training" adds the patterns whose gradient saves memory, of which there
            are none on this backend yet.
        profile: name of a release profile; None resolves it (`zmlx.profile.resolve_policy`).
        patterns: names of the only patterns to try. An explicit choice overrides the profile and
            the safety table, and the report says so.
        exclude: names of patterns not to try.
        threadgroup: threads of a GPU threadgroup, or "auto" to tune it.
        moe_fused_swiglu_max_tokens: tokens in a call above which stock experts run.
        fusion: tracing of whole forwards; not in this version.
        verbose: print the whole report to stderr.
        legacy: `fusion_*` options and the deprecated `compute_dtype`, which is ignored.

    Returns:
        The model, with its `PatchReport` as `_zmlx_patch_result`.

    Raises:
        ValueError: an unknown pattern, mode or option, or `fusion=True`.
        zmlx.profile.ProfileError: the profile does not exist or its file is wrong.
    """
    _check_legacy(legacy, fusion)
    if mode is not None and mode not in MODES:
        raise ValueError(f"mode {mode!r}: expected one of {', '.join(MODES)}")
    request = Request(
        patterns=_chosen(patterns, exclude),
        explicit=patterns is not None,
        backend=backend.current(),
        threadgroup=threadgroup,
        max_tokens=moe_fused_swiglu_max_tokens,
        verbose=verbose,
    )
    policy = resolve_policy(profile)
    report = _replace(model, policy, request)
    if verbose:
        print(report.summary(), file=sys.stderr)
    return model


def unpatch(model: ModelT) -> ModelT:
    """Give every replaced module its own class again and drop the report; return the model."""
    restore(model)
    sampling.release(model)
    vars(model).pop(RESULT, None)
    return model


def patch_loaded(model: nn.Module, *, origin: str) -> PatchReport:
    """Patch a model that was just loaded, as the start-up hook does.

    Args:
        model: what the loader returned.
        origin: dotted name of the loader, for the report.

    Returns:
        The report, which is also on the model. A model that has one is left alone.

    Raises:
        Exception: whatever went wrong; the model is then as it was loaded.
    """
    known: PatchReport | None = vars(model).get(RESULT)
    if known is not None:
        return known
    request = Request(patterns=_chosen(None, None), explicit=False, backend=backend.current())
    report = _replace(model, resolve_policy(), request, f"loaded by {origin}")
    return report


def _replace(model: nn.Module, policy: Policy, request: Request, *notes: str) -> PatchReport:
    started = time.perf_counter()
    before = {id(module): type(module) for _, module in model.named_modules()}
    earlier = vars(model).get(RESULT)
    unpatch(model)
    try:
        report = _planned(model, policy, request, notes)
    except BaseException:
        for _, module in model.named_modules():
            module.__class__ = before[id(module)]
        if earlier is not None:
            setattr(model, RESULT, earlier)
        raise
    report.seconds = time.perf_counter() - started
    setattr(model, RESULT, report)
    if _STEPS in report.pattern_counts:
        if request.backend == "cuda":
            library.begin()
        sampling.use(model, request.backend)
    return report


def _planned(
    model: nn.Module, policy: Policy, request: Request, notes: Sequence[str]
) -> PatchReport:
    family = detect(model=model)
    report = PatchReport(family.name, family.model_type, policy.name, request.backend)
    if family.name == "unknown" and not request.explicit:
        report.candidates = (_unknown(family),)
        report.notes = tuple(notes)
        return report
    steps = any(pattern.name() == _STEPS for pattern in request.patterns)
    beside = sampling.to_be_probed(request.backend) if steps else []
    plan = make_plan(model, family, policy, request, beside)
    apply_plan(plan)
    report.candidates = plan.candidates
    report.notes = tuple(notes)
    return report


def _unknown(family: Family) -> Candidate:
    evidence = "; ".join(family.because) or "no evidence"
    return Candidate("", "family", False, f"no family that we know: {evidence}")


def _chosen(names: Sequence[str] | None, exclude: Sequence[str] | None) -> tuple[PatchPattern, ...]:
    known = all_patterns()
    for name in (*(names or ()), *(exclude or ())):
        if name not in known:
            raise ValueError(f"unknown pattern {name!r}; known: {', '.join(sorted(known))}")
    wanted = known if names is None else [name for name in known if name in names]
    return tuple(known[name] for name in wanted if name not in (exclude or ()))


def _check_legacy(legacy: dict[str, Any], fusion: bool) -> None:
    """Accept the options of earlier interfaces that change nothing; refuse the others."""
    if fusion:
        raise ValueError("fusion=True: this version does not trace models; leave fusion out")
    for name in ("compute_dtype", "compute_dtype_key"):
        if legacy.pop(name, None) is not None:
            warnings.warn(
                f"{name} is ignored: sums run in float32", DeprecationWarning, stacklevel=3
            )
    for name in ("fusion_validate", "fusion_patterns", "fusion_rtol", "fusion_atol"):
        legacy.pop(name, None)
    if legacy:
        raise TypeError(f"patch() got unknown options: {', '.join(sorted(legacy))}")
