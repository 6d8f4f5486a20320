"""Put the figures of the capsules into pages of docs/ and README.md.

    python benchmarks/tables.py

Each table stands between two comments, of which the first has its name, and is made anew. A table
whose capsule or whose place is not there is left out, with a line on stderr.
"""

from __future__ import annotations

import os
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from zmlx.bench.capsule import Capsule, Run, read

CAPSULES = Path(__file__).parent / "capsules"
ROOT = Path(__file__).parents[1]


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


def speeds(capsule: Capsule) -> Iterator[str]:
    """One row for each model, one column for each thing that users wait for."""
    named = workloads_of(capsule)
    labels = list(dict.fromkeys(label for labels in named.values() for label in labels))
    yield from head("tokens/s, stock and zmlx", *map(titled, labels))
    for name in named:
        yield rows(name, *(pair(capsule, f"{name}, {label}") for label in labels))


def first_speeds(capsule: Capsule) -> Iterator[str]:
    """One row for each model: decode of one sequence after the first context."""
    yield from head("decode, tokens/s", "stock mlx-lm", "under zmlx", "")
    for name, labels in workloads_of(capsule).items():
        stock, ours = both(capsule, f"{name}, {labels[0]}", "decode")
        if stock and ours:
            yield rows(name, digits(stock), digits(ours), f"{ours / stock:.1f}x")


def token_times(capsule: Capsule) -> Iterator[str]:
    """Two rows for each model and context, stock and patched: where a token's time goes."""
    columns = ("Python", "encoding", "GPU", "kernels", "GB read", "of the limit")
    yield from head("model", "after", "", "us a token", *columns)
    for name, labels in workloads_of(capsule).items():
        for label in labels:
            subject = f"{name}, {label}"
            for variant in capsule.variants() if label.startswith("context ") else ():
                yield rows(
                    name, label.removeprefix("context "), variant, *parts(capsule, subject, variant)
                )


def parts(capsule: Capsule, subject: str, variant: str) -> Iterator[str]:
    def middle(quantity: str) -> float | None:
        return capsule.median(subject, variant, quantity)

    rate, limit = middle("decode"), middle("of_the_limit")
    yield digits(1e6 / rate if rate else None)
    yield from (digits(middle(name)) for name in ("python", "encoding", "gpu", "kernels"))
    sizes = middle("weights"), middle("cache")
    yield "" if None in sizes else f"{sum(size or 0 for size in sizes) / 1e9:.2f}"
    yield "" if limit is None else f"{limit:.0f} %"


def patches(capsule: Capsule) -> Iterator[str]:
    """One row for each model: what patching takes and changes besides the speed."""
    yield from head(
        "model",
        "patching, s",
        "modules",
        "peak memory of decode",
        "logits off, stock",
        "zmlx",
    )
    for name, labels in workloads_of(capsule).items():
        growth = []
        for label in (label for label in labels if label.startswith("context ")):
            stock, ours = both(capsule, f"{name}, {label}", "peak_memory")
            growth += [100 * (ours / stock - 1)] if stock and ours else []
        seconds, modules = (capsule.median(name, "zmlx", q) for q in ("patching", "modules"))
        errors = both(capsule, f"{name}, {labels[0]}", "logits_error")
        yield rows(
            name,
            digits(seconds),
            digits(modules),
            f"{max(growth):+.1f} %" if growth else "",
            *("" if error is None else f"{digits(error)} %" for error in errors),
        )


def choices(capsule: Capsule) -> Iterator[str]:
    """One row for each number and length of rows, one column for each function."""
    names = list(dict.fromkeys(subject.partition(", ")[0] for subject in capsule.subjects()))
    shapes = list(dict.fromkeys(subject.partition(", ")[2] for subject in capsule.subjects()))
    yield from head("logits", *(f"{name}, us" for name in names))
    for shape in shapes:
        count, _, length = shape.partition(" x ")
        cells = []
        for name in names:
            stock, ours = (
                capsule.median(f"{name}, {shape}", variant, "gpu") or 0
                for variant in ("mlx-lm", "zmlx")
            )
            cells.append(f"{digits(stock)}, {digits(ours)} ({stock / ours:.1f}x)")
        yield rows(f"{count} row{'s' if count != '1' else ''} of {length}", *cells)


def workloads_of(capsule: Capsule) -> dict[str, list[str]]:
    """Return model -> labels of what was measured of it."""
    found: dict[str, list[str]] = {}
    for subject in capsule.subjects():
        name, comma, label = subject.rpartition(", ")
        if comma:
            found.setdefault(name, []).append(label)
    return found


def both(capsule: Capsule, subject: str, quantity: str) -> tuple[float | None, float | None]:
    return capsule.median(subject, "stock", quantity), capsule.median(subject, "zmlx", quantity)


def pair(capsule: Capsule, subject: str) -> str:
    stock, ours = both(capsule, subject, "prefill" if ", prefill " in subject else "decode")
    if not stock or not ours:
        return ""
    return f"{digits(stock)}, {digits(ours)} ({ours / stock:.2f}x)"


def titled(label: str) -> str:
    kind, _, size = label.partition(" ")
    return f"{'after' if kind == 'context' else kind} {int(size):,}"


@dataclass(frozen=True)
class Place:
    """A table: its name between the comments, its page, its capsule, and how it is made."""

    name: str
    page: str
    capsule: str
    table: Callable[[Capsule], Iterator[str]]


_MODELS = "models-cuda.json"
PLACES = (
    Place("bandwidth-cpu", "docs/CPU.md", "bandwidth-cpu.json", bandwidth),
    Place("sharing-cpu", "docs/CPU.md", "sharing-cpu.json", sharing),
    Place("text-cpu", "docs/CPU.md", "text-cpu.json", text),
    Place("text-cuda", "docs/CUDA.md", "text-cuda.json", text),
    Place("launch-cuda", "docs/CUDA.md", "launch-cuda.json", launches),
    Place("ops-cuda", "docs/CUDA.md", "ops-cuda.json", operations),
    Place("models-cuda", "README.md", _MODELS, first_speeds),
    Place("models-cuda", "docs/CUDA.md", _MODELS, speeds),
    Place("model-times-cuda", "docs/CUDA.md", _MODELS, token_times),
    Place("model-patches-cuda", "docs/CUDA.md", _MODELS, patches),
    Place("samplers-cuda", "docs/DECODE.md", "samplers-cuda.json", choices),
)


def block(place: Place, file: Path) -> str:
    """Return what stands between the comments."""
    capsule = read(file)
    hardware = capsule.environment["hardware"]
    gpu = f"{hardware['accelerator']}, " if hardware.get("accelerator") else ""
    where = f"{gpu}{hardware['cpu']}, {hardware['usable_cores']} cores, {capsule.created[:10]}"
    link = Path(os.path.relpath(file, (ROOT / place.page).parent)).as_posix()
    return "\n".join([*place.table(capsule), "", f"({where}; every run: [capsule]({link}).)\n"])


def main() -> None:
    for place in PLACES:
        page, file = ROOT / place.page, CAPSULES / place.capsule
        between = re.compile(rf"(<!-- {place.name} -->\n).*?(<!-- end -->)", re.DOTALL)
        old = page.read_text(encoding="utf-8")
        if not file.is_file() or not between.search(old):
            missing = f"no <!-- {place.name} -->" if file.is_file() else f"no {file.name} yet"
            print(f"{place.page}: {missing}", file=sys.stderr)
            continue
        made = block(place, file)
        new = between.sub(lambda found, made=made: found[1] + made + found[2], old)
        page.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
