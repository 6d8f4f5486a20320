"""Stock against patched generation of one model, in turn, as runs of a capsule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.nn as nn

from zmlx.backend.cuda import library
from zmlx.bench.capsule import Run
from zmlx.bench.generation import Generation, generate
from zmlx.patch import PatchReport, patch, unpatch


def measure(
    model: nn.Module,
    prompt: Sequence[int],
    *,
    subject: str,
    stock_tokens: int,
    tokens: int,
    runs: int,
    on_run: Callable[[str], None] | None = None,
) -> tuple[list[Run], PatchReport]:
    """Time a model stock and patched, in turn, with one copy of the weights.

    Args:
        model: a loaded model; it is unpatched afterwards.
        prompt: token ids.
        subject: the model's name in the capsule.
        stock_tokens: tokens that a stock run generates, two or more; fewer where stock is slow.
        tokens: tokens that a patched run generates, two or more.
        runs: runs of each kind.
        on_run: called with "stock" or "zmlx" before each run.

    Returns:
        The runs in the order in which they ran, and the report of the patched model.
    """
    result: list[Run] = []
    try:
        _warm_up(unpatch(model), prompt)
        report: PatchReport = vars(patch(model))["_zmlx_patch_result"]
        library.wait()
        _warm_up(model, prompt)
        for number in range(runs):
            # The order alternates, so that a drift of the machine meets both.
            for variant in ("stock", "zmlx") if number % 2 == 0 else ("zmlx", "stock"):
                if on_run is not None:
                    on_run(variant)
                if variant == "stock":
                    generation = generate(unpatch(model), prompt, stock_tokens)
                else:
                    generation = generate(patch(model), prompt, tokens)
                result.append(run_of(subject, variant, number, generation))
    finally:
        unpatch(model)
    return result, report


def run_of(subject: str, variant: str, repeat: int, generation: Generation) -> Run:
    """Return one timed generation as a run of a capsule with the quantities `GENERATION`."""
    return Run(
        subject=subject,
        variant=variant,
        repeat=repeat,
        values={
            "prefill": generation.prefill_rate,
            "decode": generation.decode_rate,
            "peak_memory": float(generation.peak_bytes),
        },
        samples={
            "prefill_seconds": [generation.prefill_seconds],
            "step_seconds": list(generation.step_seconds),
        },
    )


def plan_of(report: PatchReport) -> dict[str, Any]:
    """Return a report as a capsule keeps it: modules with the same fate stand in one entry."""
    content = report.to_json()
    groups: dict[tuple[Any, ...], list[str]] = {}
    for candidate in report.candidates:
        fate = (candidate.pattern, candidate.chosen, candidate.contract, candidate.reason)
        groups.setdefault(fate, []).append(candidate.path)
    content["candidates"] = [
        {
            "pattern": pattern,
            "chosen": chosen,
            "contract": contract,
            "reason": reason,
            "count": len(paths),
            "paths": " ".join(paths),
        }
        for (pattern, chosen, contract, reason), paths in groups.items()
    ]
    return content


def _warm_up(model: nn.Module, prompt: Sequence[int]) -> None:
    """Compile what is compiled on first use."""
    generate(model, prompt[:1], 2)
