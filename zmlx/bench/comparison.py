"""`zmlx.bench.compare`: functions that compute the same, timed side by side.

First the outputs are compared; a function whose outputs are wrong gets no speed-up. Then the calls
are timed in turn, warm and synchronised, in two ways: one call that is waited for (latency), and
many that are evaluated together (the time of a call where much is to do). Calls go round copies of
their inputs, more than fit into caches, so that GB/s can be set against the device's memory.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import cycle
from typing import Any

import mlx.core as mx
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from zmlx.bench import environment
from zmlx.bench.capsule import Capsule, Quantities, Run, collect
from zmlx.bench.ceiling import copy_bandwidth
from zmlx.console import wide_console
from zmlx.deprecation import takes_compute_dtype
from zmlx.testing.difference import Tolerance, mismatch
from zmlx.testing.inputs import Case, ShapeLike, cases, widened
from zmlx.tuning.arrays import arrays
from zmlx.tuning.timing import Call, batch_size, bytes_of, finish, in_turn

#: what a run of a comparison gives in a capsule
QUANTITIES: Quantities = {
    "call": ("us", False),
    "latency": ("us", False),
    "bandwidth": ("GB/s", True),
}
#: How far outputs may be from the baseline's; widened to the dtype as `zmlx.testing` does.
_TOLERANCE = Tolerance(atol=1e-4, rtol=1e-4)
#: Bytes of inputs that calls go round, and how many copies that makes at most.
_WORKING_SET = 2**28
_MOST_COPIES = 64
#: Seconds that the timed rounds of one case take at most, as long as three were made.
_BUDGET = 10.0
#: Seconds after which warming up ends.
_WARM = 1.0


@dataclass(frozen=True)
class Row:
    """One implementation with inputs of one shape and dtype.

    Attributes:
        subject: dtype and shapes.
        implementation: its name.
        failure: what it raised; empty when it ran.
        difference: how its outputs differ from the baseline's; empty when they do not.
        bytes: of inputs and outputs of a call.
        calls: how many were evaluated together for `call_seconds`.
        call_seconds: of one call among many, every round.
        latency_seconds: of one call that is waited for, every round.
    """

    subject: str
    implementation: str
    failure: str = ""
    difference: str = ""
    bytes: int = 0
    calls: int = 0
    call_seconds: tuple[float, ...] = ()
    latency_seconds: tuple[float, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether it ran and its outputs are right."""
        return not self.failure and not self.difference

    @property
    def call(self) -> float | None:
        """Median seconds of one call among many."""
        return statistics.median(self.call_seconds) if self.call_seconds else None

    @property
    def latency(self) -> float | None:
        """Median seconds of one call that is waited for."""
        return statistics.median(self.latency_seconds) if self.latency_seconds else None

    @property
    def bandwidth(self) -> float | None:
        """Bytes of inputs and outputs per second, by the median call."""
        return self.bytes / self.call if self.call else None


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured.

    Attributes:
        rows: one for each case and implementation.
        baseline: name of the implementation that speed-ups are against.
        ceiling: bytes per second that a copy reads and writes here.
        settings: the arguments of `compare`.
    """

    rows: tuple[Row, ...]
    baseline: str
    ceiling: float
    settings: Mapping[str, Any] = field(default_factory=dict)

    def speedup(self, row: Row) -> float | None:
        """Return the baseline's median call over a row's; None where either is not right."""
        base = next(
            r for r in self.rows if (r.subject, r.implementation) == (row.subject, self.baseline)
        )
        if not (base.ok and row.ok and base.call and row.call):
            return None
        return base.call / row.call

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON types: rows with all rounds, in seconds and bytes."""
        return {
            "baseline": self.baseline,
            "ceiling_bytes_per_second": self.ceiling,
            "settings": dict(self.settings),
            "environment": environment.describe(),
            "rows": [
                {
                    **asdict(row),
                    "ok": row.ok,
                    "median_call_seconds": row.call,
                    "median_latency_seconds": row.latency,
                    "bytes_per_second": row.bandwidth,
                    "speedup": self.speedup(row),
                }
                for row in self.rows
            ],
        }

    def runs(self) -> list[Run]:
        """Return the runs of a capsule with `QUANTITIES`, of the rows that are right.

        The baseline comes first, so that the capsule's ratio is that of the last implementation to
        it.
        """
        right = [row for row in self.rows if row.ok]
        right.sort(key=lambda row: row.implementation != self.baseline)
        return [
            Run(
                subject=row.subject,
                variant=row.implementation,
                repeat=number,
                values={
                    "call": call * 1e6,
                    "latency": latency * 1e6,
                    "bandwidth": row.bytes / call / 1e9,
                },
            )
            for row in right
            for number, (call, latency) in enumerate(
                zip(row.call_seconds, row.latency_seconds, strict=False)
            )
        ]

    def capsule(self, title: str, notes: Sequence[str] = ()) -> Capsule:
        """Return a capsule of this comparison, made now; what is wrong stands in its notes.

        Raises:
            ValueError: no row is right.
        """
        runs = self.runs()
        if not runs:
            raise ValueError("nothing that was compared gave right outputs")
        wrong = [
            f"{row.subject}, {row.implementation}: {row.failure or row.difference}"
            for row in self.rows
            if not row.ok
        ]
        ceiling = f"a copy reads and writes {self.ceiling / 1e9:,.0f} GB/s"
        return collect(title, runs, QUANTITIES, notes=(*notes, ceiling, *wrong))

    def table(self) -> Table:
        """Return a table with a row for each case and implementation."""
        names = ("", "implementation", "us a call (p20 - p80)", "us when waited for", "GB/s")
        columns = (*names, "of a copy", f"x {self.baseline}", "outputs")
        result = Table(
            title=f"medians; a copy reads and writes {self.ceiling / 1e9:,.0f} GB/s here",
            title_justify="left",
        )
        for number, name in enumerate(columns):
            plain = number < 2 or name == "outputs"
            result.add_column(Text(name), justify="left" if plain else "right", no_wrap=number < 2)
        before = ""
        for row in self.rows:
            if before and row.subject != before:
                result.add_section()
            label = "" if row.subject == before else row.subject
            result.add_row(*map(Text, (label, *self._cells(row))))
            before = row.subject
        return result

    def _cells(self, row: Row) -> list[str]:
        if row.call is None or row.latency is None or row.bandwidth is None:
            return [row.implementation, "", "", "", "", "", row.failure]
        speedup = self.speedup(row)
        return [
            row.implementation,
            f"{_digits(row.call * 1e6)} ({_spread(row.call_seconds)})",
            _digits(row.latency * 1e6),
            _digits(row.bandwidth / 1e9),
            f"{row.bandwidth / self.ceiling:.0%}",
            f"{speedup:.2f}" if speedup is not None else "",
            row.difference or ("baseline" if row.implementation == self.baseline else "same"),
        ]


@takes_compute_dtype
def compare(
    implementations: Mapping[str, Callable[..., Any]],
    shapes: Sequence[ShapeLike],
    *,
    dtypes: Sequence[mx.Dtype] | None = None,
    n_inputs: int = 1,
    warmup: int = 5,
    iters: int = 20,
    seed: int = 42,
    show: bool = True,
) -> Comparison:
    """Time functions that compute the same, after comparing their outputs; print a table to stdout.

    The last implementation is the baseline: speed-ups are against it, and outputs are right when
    they match its outputs, or those that it gives for inputs in float32. One that is wrong gets no
    speed-up; one that raises gets no time.

    Args:
        implementations: name -> function of `n_inputs` arrays, returning an array or several; two
            or more of them say most.
        shapes: each one shape for all inputs, or a tuple of `n_inputs` shapes.
        dtypes: of the inputs; None for float32.
        n_inputs: arrays that the functions take.
        warmup: calls of each before it is timed, one at least; they end after a second.
        iters: rounds in which each is timed once; they end after ten seconds, though not before
            the third.
        seed: of the inputs.
        show: whether to print the table.

    Returns:
        All that was measured; `.rows`, `.to_json()`, and `.capsule(title)` for a file.

    Raises:
        ValueError: there is nothing to compare, or a number is too small.
        TypeError: a dtype is none.
        RuntimeError: every implementation raised; the text gives the reasons.
    """
    if not implementations:
        raise ValueError("nothing to compare: give at least one implementation")
    if warmup < 1 or iters < 1:
        raise ValueError(f"warmup={warmup}, iters={iters}: at least one of each is needed")
    wanted = (mx.float32,) if dtypes is None else tuple(dtypes)
    every = cases(shapes, wanted, n_inputs=n_inputs, seed=seed, layouts=("contiguous",))
    ceiling = copy_bandwidth()
    rows: list[Row] = []
    with _progress() as progress:
        task = progress.add_task("timing", total=len(every) * len(implementations) * 2 * iters)
        for number, case in enumerate(every):
            rows += _compared(case, implementations, warmup, iters, partial(progress.advance, task))
            done = (number + 1) * len(implementations) * 2 * iters
            progress.update(task, completed=done)
    if all(row.failure for row in rows):
        reasons = "\n".join(f"  {r.subject}, {r.implementation}: {r.failure}" for r in rows)
        raise RuntimeError(f"every implementation raised\n{reasons}")
    settings = {"warmup": warmup, "iters": iters, "seed": seed, "n_inputs": n_inputs}
    result = Comparison(tuple(rows), list(implementations)[-1], ceiling, settings)
    if show:
        wide_console().print(result.table())
    return result


def _compared(
    case: Case,
    implementations: Mapping[str, Callable[..., Any]],
    warmup: int,
    iters: int,
    advance: Callable[[], None],
) -> list[Row]:
    """Return the rows of one case."""
    inputs = case.inputs()
    outputs, failures = _outputs(implementations, inputs)
    judge = _Judge(case, outputs, implementations)
    differences = {name: judge.difference(name) for name in outputs}
    bytes_each = {name: bytes_of([inputs, result]) for name, result in outputs.items()}
    del outputs, judge
    calls = _calls({name: implementations[name] for name in bytes_each}, inputs)
    _warm_up(calls, warmup)
    counts = {name: batch_size(call) for name, call in calls.items()}
    latency = _rounds(calls, dict.fromkeys(calls, 1), iters, advance)
    # Where one call fills a batch it has been timed.
    small = {name: call for name, call in calls.items() if counts[name] > 1}
    together = latency | _rounds(small, counts, iters, advance)
    return [
        Row(
            subject=case.subject(),
            implementation=name,
            failure=failures.get(name, ""),
            difference=differences.get(name, ""),
            bytes=bytes_each.get(name, 0),
            calls=counts.get(name, 0),
            call_seconds=tuple(together.get(name, ())),
            latency_seconds=tuple(latency.get(name, ())),
        )
        for name in implementations
    ]


def _outputs(
    implementations: Mapping[str, Callable[..., Any]], inputs: list[mx.array]
) -> tuple[dict[str, list[mx.array]], dict[str, str]]:
    """Call each once; return the outputs of those that ran, and what the others raised."""
    outputs: dict[str, list[mx.array]] = {}
    failures: dict[str, str] = {}
    for name, function in implementations.items():
        try:
            outputs[name] = arrays(finish(function(*inputs)))
        except Exception as error:  # noqa: BLE001 - whatever it is, it stands in the table
            failures[name] = f"{type(error).__name__}: {error}"
    return outputs, failures


class _Judge:
    """Says how outputs differ from the baseline's, or from its outputs for inputs in float32."""

    def __init__(
        self,
        case: Case,
        outputs: Mapping[str, list[mx.array]],
        implementations: Mapping[str, Callable[..., Any]],
    ) -> None:
        self.outputs = outputs
        self.dtype = case.dtype
        self.baseline = list(implementations)[-1]
        self.wide: list[mx.array] | None = None
        inputs = case.inputs()
        if self.baseline in outputs and widened(inputs)[0].dtype != case.dtype:
            # It may take one dtype only; then its own outputs are all there is to go by.
            found, _ = _outputs({self.baseline: implementations[self.baseline]}, widened(inputs))
            self.wide = found.get(self.baseline)

    def difference(self, name: str) -> str:
        """Return how the outputs of an implementation differ; empty when they do not."""
        if name == self.baseline:
            return ""
        if self.baseline not in self.outputs:
            return f"not checked: {self.baseline} raised"
        like, got = self.outputs[self.baseline], self.outputs[name]
        if len(got) != len(like):
            return f"{len(got)} outputs, {self.baseline} has {len(like)}"
        for truths in (like, self.wide):
            if truths is None or len(truths) != len(like):
                continue
            found = [
                mismatch(value, truth, kind, self.dtype, _TOLERANCE)
                for value, truth, kind in zip(got, truths, like, strict=True)
            ]
            wrong = [entry.summary() for entry in found if entry is not None]
            if not wrong:
                return ""
        return f"differ: {wrong[0]}"


def _calls(
    implementations: Mapping[str, Callable[..., Any]], inputs: list[mx.array]
) -> dict[str, Call]:
    """Return calls that go round copies of the inputs."""
    copies = min(_MOST_COPIES, max(1, math.ceil(_WORKING_SET / max(1, bytes_of(inputs)))))
    every = [inputs, *([x + mx.zeros_like(x) for x in inputs] for _ in range(copies - 1))]
    finish(every)

    def call(function: Callable[..., Any], turns: Any) -> Any:
        return function(*next(turns))

    return {name: partial(call, f, cycle(every)) for name, f in implementations.items()}


def _warm_up(calls: Mapping[str, Call], warmup: int) -> None:
    for call in calls.values():
        started = time.perf_counter()
        for _ in range(warmup):
            finish(call())
            if time.perf_counter() - started > _WARM:
                break


def _rounds(
    calls: Mapping[str, Call], counts: Mapping[str, int], iters: int, advance: Callable[[], None]
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {}
    for name, taken in in_turn(calls, counts=counts, rounds=iters, budget=_BUDGET / 2):
        seconds.setdefault(name, []).append(taken)
        advance()
    return seconds


def _progress() -> Progress:
    """Return a bar on stderr that is gone afterwards, and is not there without a terminal."""
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def _spread(seconds: Sequence[float]) -> str:
    ends = statistics.quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else seconds
    return f"{_digits(ends[0] * 1e6)} - {_digits(ends[-1] * 1e6)}"


def _digits(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"
