"""A comparison as a table, as JSON and as a capsule."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from zmlx.bench.capsule import GENERATION, Capsule, collect
from zmlx.bench.decode import plan_of, run_of
from zmlx.bench.generation import Generation
from zmlx.bench.logits import LogitsError
from zmlx.validate.compare import Comparison
from zmlx.validate.contract import contract_of, judge


def capsule_of(comparison: Comparison, subject: str, notes: tuple[str, ...] = ()) -> Capsule:
    """Return every raw run of a comparison, with the machine and the plan, as a capsule."""
    runs = [
        run_of(subject, variant, number, generation)
        for variant, generations in (("stock", comparison.stock), ("zmlx", comparison.patched))
        for number, generation in enumerate(generations)
    ]
    plans = {subject: plan_of(comparison.report)}
    return collect("zmlx validate", runs, GENERATION, plans=plans, notes=notes)


def to_json(comparison: Comparison, model: str) -> dict[str, Any]:
    """Return the comparison and the verdict as data that `json` can write."""
    breaches = judge(comparison)
    content = {
        "model": model,
        "contract": contract_of(comparison),
        "passed": not breaches,
        "breaches": breaches,
        "report": comparison.report.to_json(),
        "stock": [_run_json(run) for run in comparison.stock],
        "patched": [_run_json(run) for run in comparison.patched],
        "stock_error": _asdict(comparison.stock_error),
        "patched_error": _asdict(comparison.patched_error),
        "difference": _asdict(comparison.difference),
        "reference_dtype": comparison.reference_dtype,
        "reference_notes": comparison.reference_notes,
        "no_reference": comparison.no_reference,
        "identical_tokens": not comparison.divergences,
        "divergences": [asdict(divergence) for divergence in comparison.divergences],
        "stock_varies": comparison.stock_varies,
    }
    finite: dict[str, Any] = _finite(content)
    return finite


def _finite(content: Any) -> Any:
    """Return the content with null for NaN and infinity, which JSON does not have."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def show(comparison: Comparison, model: str, console: Console) -> None:
    """Print the table and the verdict."""
    console.print(_table(comparison, model))
    for line in _lines(comparison):
        console.print(line, markup=False, soft_wrap=True)


def _table(comparison: Comparison, model: str) -> Table:
    table = Table(title=model, title_justify="left")
    for name in ("", "stock", "zmlx", "zmlx / stock"):
        table.add_column(name, justify="left" if not name else "right")
    stock, patched = comparison.stock, comparison.patched
    for label, attribute in (("prefill", "prefill_rate"), ("decode", "decode_rate")):
        ours, theirs = ([getattr(r, attribute) for r in kind] for kind in (patched, stock))
        ratio = statistics.median(ours) / statistics.median(theirs)
        table.add_row(f"{label}, tokens/s", _spread(theirs), _spread(ours), f"{ratio:.2f}x")
    most, before = (max(r.peak_bytes for r in kind) / 2**20 for kind in (patched, stock))
    table.add_row("peak memory, MiB", f"{before:.1f}", f"{most:.1f}", f"{most / before:.3f}x")
    for label, attribute in (("RMS over spread", "rms"), ("largest over largest", "largest")):
        errors = [comparison.stock_error, comparison.patched_error]
        cells = ["-" if e is None else f"{getattr(e, attribute):.2e}" for e in errors]
        table.add_row(f"error, {label}", *cells, "")
    return table


def _lines(comparison: Comparison) -> list[str]:
    stock = comparison.stock[0]
    lines = [
        comparison.report.line(),
        f"prompt of {stock.prompt_tokens} tokens, {len(stock.tokens)} generated, "
        f"median of {len(comparison.stock)} runs (smallest - largest)",
    ]
    if comparison.reference_dtype:
        lines.append(f"errors of the logits are against a {comparison.reference_dtype} reference")
    if comparison.no_reference:
        lines.append(f"no reference: {comparison.no_reference}; errors were not judged")
    if comparison.stock_varies:
        lines.append("stock gave different tokens in different runs; divergences are not judged")
    if not comparison.divergences:
        lines.append(f"greedy tokens identical in all {len(comparison.patched)} runs")
    for d in comparison.divergences:
        truth = "" if d.reference_gap is None else f", the reference's {d.reference_gap:.2e}"
        lines.append(
            f"run {d.run} diverges at generated token {d.position}: stock {d.stock_token}, "
            f"zmlx {d.patched_token}; stock's logit gap {d.stock_gap:.2e}{truth}"
        )
    breaches = judge(comparison)
    contract = contract_of(comparison)
    lines += [f"BROKEN: {breach}" for breach in breaches] or [f"contract {contract} holds"]
    return lines


def _spread(values: list[float]) -> str:
    middle = f"{statistics.median(values):.4g}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.4g} - {max(values):.4g})"


def _run_json(run: Generation) -> dict[str, Any]:
    return {
        "tokens": list(run.tokens),
        "prefill_seconds": run.prefill_seconds,
        "step_seconds": list(run.step_seconds),
        "prefill_rate": run.prefill_rate,
        "decode_rate": run.decode_rate,
        "peak_bytes": run.peak_bytes,
        "has_nan": run.has_nan,
    }


def _asdict(error: LogitsError | None) -> dict[str, float] | None:
    return None if error is None else asdict(error)
