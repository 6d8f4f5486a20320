"""What happened to a model, as data, as one line and as a page."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Candidate:
    """One module that a pattern looked at.

    Attributes:
        path: the module's path in the model; empty for the model as a whole.
        pattern: the pattern's name.
        chosen: whether the module is replaced.
        reason: what is different now, or why the stock forward stays.
        contract: "exact", "tighter" or "tolerant"; empty when the module was refused unseen.
        module: the module's class.
    """

    path: str
    pattern: str
    chosen: bool
    reason: str
    contract: str = ""
    module: str = ""


@dataclass
class PatchReport:
    """What was recognised, replaced and refused on one model, and why.

    Attributes:
        family: name of the model family, or "unknown".
        model_type: mlx-lm's name of the architecture.
        profile: name of the release policy.
        backend: "metal", "cuda" or "cpu".
        candidates: every module that a pattern looked at, in the model's order.
        notes: remarks on the whole, such as an explicit choice that overrode the safety table.
        seconds: time that planning, probing and replacing took.
        benchmarks: pattern -> measured time over stock time, from `smart_patch`.
    """

    family: str
    model_type: str
    profile: str
    backend: str
    candidates: tuple[Candidate, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    benchmarks: dict[str, float] = field(default_factory=dict)

    @property
    def patched_count(self) -> int:
        """Number of modules that were replaced."""
        return sum(self.pattern_counts.values())

    @property
    def pattern_counts(self) -> dict[str, int]:
        """Pattern -> number of modules that it replaced."""
        return dict(Counter(c.pattern for c in self.candidates if c.chosen))

    @property
    def skipped(self) -> list[str]:
        """One line for each refused module: path, pattern, reason."""
        return [f"{c.path or 'model'}: {c.pattern}: {c.reason}" for c in self.refused]

    @property
    def refused(self) -> tuple[Candidate, ...]:
        """The candidates that keep the stock forward."""
        return tuple(c for c in self.candidates if not c.chosen)

    @property
    def fusion_wrapped_count(self) -> int:
        """Number of traced functions that were fused; this version traces none."""
        return 0

    @property
    def fusion_skipped(self) -> list[str]:
        """Traced functions that were not fused; this version traces none."""
        return []

    def line(self) -> str:
        """Return the one line that a user sees."""
        where = f"{self.model_type or 'model'} (family {self.family}, profile {self.profile})"
        if self.patched_count:
            counts = ", ".join(f"{name} {n}" for name, n in sorted(self.pattern_counts.items()))
            kept = f", {len(self.refused)} kept stock" if self.refused else ""
            return (
                f"zmlx: {self.patched_count} modules of {where} run fused on {self.backend}: "
                f"{counts}{kept} [{self.seconds:.2f} s]"
            )
        return f"zmlx: {where} keeps its stock forward: {self._why_nothing()}"

    def summary(self) -> str:
        """Return the whole report as text, refusals grouped by reason."""
        lines = [self.line(), *(f"  note: {note}" for note in self.notes)]
        for chosen, title in ((True, "replaced"), (False, "kept stock")):
            groups: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
            for candidate in self.candidates:
                if candidate.chosen is chosen:
                    key = (candidate.pattern, candidate.reason)
                    groups[key].append(candidate.path or "model")
            for (pattern, reason), paths in groups.items():
                shown = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
                lines.append(f"  {title}: {pattern}: {reason} ({shown})")
        for name, ratio in self.benchmarks.items():
            lines.append(f"  measured: {name}: {ratio:.3f} of the time without it")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the report as data that `json` can write."""
        return {
            **asdict(self),
            "candidates": [asdict(candidate) for candidate in self.candidates],
            "patched_count": self.patched_count,
            "pattern_counts": self.pattern_counts,
        }

    def _why_nothing(self) -> str:
        reasons = Counter(candidate.reason for candidate in self.refused)
        if not reasons:
            return "no module in it is one that a pattern replaces"
        reason, count = reasons.most_common(1)[0]
        others = f" (and {len(reasons) - 1} other reasons)" if len(reasons) > 1 else ""
        return f"{reason}{others}" if count else reason


#: The name of earlier interfaces.
PatchResult = PatchReport
