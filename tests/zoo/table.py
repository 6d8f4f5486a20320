"""Print what `patch` does to every model type as a Markdown table: `python -m zoo.table [TYPE]`.

Run it in `tests/`. Errors are root mean squares against the float64 truth on the same choices, over
the standard deviation of the logits, stock -> patched: a sequence; a long one; a ragged batch.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from upstream import installed_types
from zoo.build import FORMS, made, reference
from zoo.compare import Logits, alone, judge, long, ragged, run
from zoo.configs import CRASHES, NARROW

from zmlx.patch import PatchReport, patch, unpatch


def main(names: list[str]) -> None:
    """Print the table and, below it, the counts of each outcome."""
    columns = ["type", "family", "replaced (4-bit)", "refused", *FORMS]
    print("|", " | ".join(columns), "|")
    print("|", " | ".join("---" for _ in columns), "|")
    outcomes: Counter[str] = Counter()
    for name in names or list(installed_types()):
        cells = []
        for form in FORMS:
            model = made(name, form)
            cells.append(
                "; ".join(_errors(name, model, f, outcomes) for f in (alone, long, ragged))
            )
        report: PatchReport = patch(model)._zmlx_patch_result
        counts = ", ".join(f"{key} {n}" for key, n in sorted(report.pattern_counts.items()))
        print("|", " | ".join([name, report.family, counts or "-", _refused(report), *cells]), "|")
    print(f"\n{len(names or installed_types())} types; runs:", dict(outcomes))


def _errors(
    name: str, model: nn.Module, function: Callable[[nn.Module], Logits], outcomes: Counter[str]
) -> str:
    if name in CRASHES and not mx.is_available(mx.gpu):
        outcomes["stock crashes"] += 1
        return "stock crashes"
    try:
        stock = run(function, model)
    except Exception:
        outcomes["stock raises"] += 1
        return "stock raises"
    truth = reference(model, mx.float32 if name in NARROW else mx.float64)
    patched = run(function, patch(model))
    unpatch(model)
    verdict = judge(function, truth, stock, patched)
    outcomes["broken" if verdict.complaints() else "held"] += 1
    if (patched.logits == stock.logits).all():
        outcomes["bit-identical to stock"] += 1
    mark = f" **{', '.join(verdict.complaints())}**" if verdict.complaints() else ""
    return f"{verdict.stock.rms:.1e} -> {verdict.patched.rms:.1e}{mark}"


def _refused(report: PatchReport) -> str:
    reasons = Counter((c.pattern, c.reason) for c in report.refused)
    return "; ".join(f"{n} {key}: {why}" for (key, why), n in reasons.items()) or "-"


if __name__ == "__main__":
    main(sys.argv[1:])
