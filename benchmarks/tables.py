"""Put the figures of the capsules into docs/CPU.md and docs/CUDA.md.

    python benchmarks/tables.py

Each table stands between two comments with the name of its capsule and is made anew.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

from zmlx.bench.capsule import Capsule, Run, read

CAPSULES = Path(__file__).parent / "capsules"
DOCS = Path(__file__).parents[1] / "docs"


def rows(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def head(*cells: str) -> Iterator[str]:
    yield rows(*cells)
    yield "|" + "---|" * len(cells)


def digits(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def bandwidth(capsule: Capsule) -> Iterator[str]:
    """One row for each format, one column for each number of threads; the machine's best first."""
    variants = capsule.variants()
    machine, *subjects = capsule.subjects()
    yield from head("weights, GB/s", *variants)
    best = [max(capsule.values(machine, name, "read")) for name in variants]
    yield rows(machine, *map(digits, best))
    for subject in subjects:
        cells = []
        for name in variants:
            share = capsule.median(subject, name, "of_the_machine")
            cells.append(f"{digits(capsule.median(subject, name, 'read'))} ({share:.0f} %)")
        yield rows(subject, *cells)
    given = [
        statistics.median(run.values["processor"] for run in capsule.runs if run.variant == name)
        for name in variants
    ]
    yield from warning(min(given))


def sharing(capsule: Capsule) -> Iterator[str]:
    """One row for each way of starting processes."""
    yield from head("", "threads", "tokens/s", "of ideal", "tokens for a second of a core")
    for subject in capsule.subjects():

        def middle(quantity: str, subject: str = subject) -> float | None:
            return capsule.median(subject, "zmlx", quantity)

        share = middle("of_ideal")
        yield rows(
            subject,
            digits(middle("threads")),
            digits(middle("decode")),
            "" if share is None else f"{share:.0f} %",
            digits(middle("per_core_second")),
        )

    alone = capsule.median("1 process, 1 thread", "zmlx", "cores_used")
    yield from warning(100 * (alone or 0))


def warning(given: float) -> Iterator[str]:
    """A line when threads had a processor for too small a part of the time, in percent."""
    if given < 90:
        yield ""
        yield f"**The machine was busy**: threads had a processor for {given:.0f} % of the time."


def text(capsule: Capsule) -> Iterator[str]:
    """One row for each checkpoint, and a line for each difference."""
    yield from head(
        "checkpoint", "identical tokens", "first difference", "error of logits (rms)", "largest gap"
    )
    for subject in capsule.subjects():
        own = [run for run in capsule.runs if run.subject == subject]
        written = int(sum(run.values["tokens"] for run in own))
        same = int(sum(run.values["identical"] for run in own))
        error = statistics.median(run.values["logits_error"] for run in own)
        gap = max(run.values["largest_gap"] for run in own)
        firsts = [first_difference(run) for run in own]
        shown = ", ".join(firsts) if any(first != "none" for first in firsts) else "none"
        gap_shown = f"{gap:.2g}" if same < written else "-"
        yield rows(subject, f"{same} of {written}", shown, f"{error:.1g}", gap_shown)
    yield ""
    yield from (f"- {note}" for note in capsule.notes[1:])


def first_difference(run: Run) -> str:
    first = int(run.values["identical_from_the_start"])
    return "none" if first == run.values["tokens"] else str(first)


def launches(capsule: Capsule) -> Iterator[str]:
    """One row for each kernel, two columns for each variant: microseconds to build, to evaluate."""
    variants = capsule.variants()
    yield from head("a call, us", *variants, "over bare")
    for subject in capsule.subjects():
        cells, both = [], []
        for name in variants:
            build, run = (capsule.median(subject, name, q) or 0 for q in ("build", "evaluate"))
            cells.append(f"{build:.2f} + {run:.2f}")
            both.append(build + run)
        yield rows(subject, *cells, f"{100 * (both[1] / both[0] - 1):+.0f} %")


def operations(capsule: Capsule) -> Iterator[str]:
    """One row for each operation, dtype and shape."""
    yield from head("operation", "mlx, us", "zmlx, us", "mlx / zmlx", "zmlx, GB/s")
    for subject in capsule.subjects():
        stock, ours = (capsule.median(subject, name, "call") or 0 for name in ("mlx", "zmlx"))
        speed = capsule.median(subject, "zmlx", "bandwidth")
        yield rows(subject, digits(stock), digits(ours), f"{stock / ours:.2f}", digits(speed))
    yield ""
    yield from (f"- {note}" for note in capsule.notes)


#: capsule -> the page that shows it, and how
TABLES: dict[str, tuple[str, Callable[[Capsule], Iterator[str]]]] = {
    "bandwidth-cpu": ("CPU.md", bandwidth),
    "sharing-cpu": ("CPU.md", sharing),
    "text-cpu": ("CPU.md", text),
    "launch-cuda": ("CUDA.md", launches),
    "ops-cuda": ("CUDA.md", operations),
}


def main() -> None:
    for name, (file, table) in TABLES.items():
        page = (DOCS / file).read_text(encoding="utf-8")
        capsule = read(CAPSULES / f"{name}.json")
        hardware = capsule.environment["hardware"]
        gpu = f"{hardware['accelerator']}, " if hardware.get("accelerator") else ""
        where = f"{gpu}{hardware['cpu']}, {hardware['usable_cores']} cores, {capsule.created[:10]}"
        made = "\n".join([*table(capsule), "", f"({where}; every run: [capsule]"])
        made += f"(../benchmarks/capsules/{name}.json).)\n"
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        page, count = block.subn(lambda found, new=made: found[1] + new + found[2], page)
        assert count == 1, f"{file}: no place for {name}"
        (DOCS / file).write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
