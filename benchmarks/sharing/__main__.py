"""Decode of SmolLM2-135M with more threads, with less of a processor, and two processes at once.

    python benchmarks/sharing

Each row of the table is one process or two, started with a number of threads, on some cores or in a
control group with a limit. All decode in turn, several times; two of a row at the same time. "Of
ideal" compares with what perfect sharing would give: n threads with n times one thread; a part of a
core with that part of what one whole core gives; two processes together with one alone. Tokens for
each second of a core fall where threads burn time that others could use. A limit takes the right to
make control groups (root); without it those rows are missing and a note says why. Writes every run
to benchmarks/capsules/sharing-cpu.json.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
from cgroup import NoLimit, limited
from rich.console import Console

from zmlx.backend.cpu import native
from zmlx.backend.cpu.threads import usable_cpus
from zmlx.bench.capsule import Quantities, Run, collect, write
from zmlx.bench.environment import as_under_zmlx_run
from zmlx.bench.report import show
from zmlx.demo.prepare import prepare
from zmlx.demo.smollm import DemoUnavailable

WORKER = Path(__file__).parent / "worker.py"
CAPSULES = Path(__file__).parents[1] / "capsules"
ONE_CORE = "1 process on one core"
QUANTITIES: Quantities = {
    "decode": ("tokens/s", True),
    "of_ideal": ("%", True),
    "cores_used": ("cores", False),
    "per_core_second": ("tokens", True),
    "threads": ("of each process", True),
}


@dataclass(frozen=True)
class Start:
    """How one process is started.

    Attributes:
        threads: ZMLX_NUM_THREADS; None lets the library decide.
        core: the only processor that it may use; None is all.
        limit: processors' worth of time that it gets; None is all.
    """

    threads: int | None = None
    core: int | None = None
    limit: float | None = None


@dataclass(frozen=True)
class Case:
    """What runs at the same time, and what it is compared with.

    Attributes:
        name: the row of the table.
        starts: one for each process.
        base: the case that it is compared with.
        factor: how much faster than that one it would be at best.
    """

    name: str
    starts: tuple[Start, ...]
    base: str
    factor: float = 1.0


@dataclass
class Worker:
    """A process that waits for work; `facts` is what it said when it was ready."""

    process: subprocess.Popen[str]
    facts: dict[str, Any] = field(default_factory=dict)

    def answer(self) -> dict[str, Any]:
        """Return the next line of what it says."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise click.ClickException(f"a process ended with {self.process.wait()}")
        content: dict[str, Any] = json.loads(line)
        return content

    def ask(self, seconds: float) -> None:
        """Have it decode; `answer` waits for the end."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()


def cases(threads: int, cores: list[int], limits: tuple[float, ...]) -> Iterator[Case]:
    """Yield what is measured on a machine with some threads by default and some processors."""
    alone = f"1 process, {threads} threads"
    for count in range(1, threads + 1):
        name = f"1 process, {count} threads" if count > 1 else "1 process, 1 thread"
        yield Case(name, (Start(count),), "1 process, 1 thread", count)
    yield Case(ONE_CORE, (Start(core=cores[0]),), ONE_CORE)
    if threads > 1:
        crowd = Start(threads, core=cores[0])
        yield Case(f"{ONE_CORE}, {threads} threads", (crowd,), ONE_CORE)
    for limit in limits:
        name = f"limit of {limit:g} cores"
        yield Case(name, (Start(limit=limit),), ONE_CORE, limit)
        if threads > 1:
            many = Start(threads, limit=limit)
            yield Case(f"{name}, {threads} threads", (many,), ONE_CORE, limit)
    if threads > 1:
        yield Case("2 processes", (Start(), Start()), alone)
        yield Case("2 processes, 1 thread each", (Start(1), Start(1)), alone)
        pinned = tuple(Start(core=core) for core in cores[:2])
        yield Case("2 processes, a core each", pinned, alone)


@contextmanager
def started(start: Start, checkpoint: Path) -> Iterator[Worker]:
    """Start a process and wait until it is ready; end it afterwards.

    Raises:
        NoLimit: it wants a limit that nobody here can set.
    """
    environment = {k: v for k, v in os.environ.items() if k != "ZMLX_NUM_THREADS"}
    if start.threads is not None:
        environment["ZMLX_NUM_THREADS"] = str(start.threads)
    command = [sys.executable, str(WORKER), str(checkpoint)]
    if start.core is not None:
        command = ["taskset", "-c", str(start.core), *command]
    with ExitStack() as stack:
        if start.limit is not None:
            file = stack.enter_context(limited(start.limit))
            # It joins before it runs, so that it finds its limit when it chooses its threads.
            command = ["sh", "-c", f'echo $$ > {file} && exec "$@"', "sh", *command]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        try:
            worker = Worker(process)
            worker.facts = worker.answer()
            yield worker
        finally:
            process.kill()
            process.wait()


def measured(case: Case, workers: list[Worker], number: int, seconds: float) -> Run:
    """Have all processes of a case decode at the same time."""
    for worker in workers:
        worker.ask(seconds)
    answers = [worker.answer() for worker in workers]
    rates = [len(answer["steps"]) / sum(answer["steps"]) for answer in answers]
    cores = sum(answer["cores"] for answer in answers)
    return Run(
        subject=case.name,
        variant="zmlx",
        repeat=number,
        values={
            "decode": sum(rates),
            "cores_used": cores,
            "per_core_second": sum(rates) / cores,
            "threads": float(workers[0].facts["threads"]),
        },
        samples={
            "decode_of_each": rates,
            **{f"step_seconds_{n}": answer["steps"] for n, answer in enumerate(answers)},
        },
    )


def against_ideal(runs: list[Run], chosen: list[Case]) -> list[Run]:
    """Add what part of the ideal each run reached."""

    of = {case.name: case for case in chosen}
    result = []
    for run in runs:
        case, values = of[run.subject], dict(run.values)
        if case.base in of:
            base = [r.values["decode"] for r in runs if r.subject == case.base]
            ideal = statistics.median(base) * case.factor
            values["of_ideal"] = 100 * values["decode"] / ideal
        result.append(replace(run, values=values))
    return result


@click.command(context_settings={"show_default": True})
@click.option("--runs", "repeats", type=click.IntRange(min=1), default=5, help="Runs of each.")
@click.option("--seconds", type=click.FloatRange(min=0.5), default=5.0, help="Length of a run.")
@click.option("--limit", "limits", multiple=True, type=float, default=(0.5,), help="Cores.")
@click.option("--case", "words", multiple=True, help="Only cases whose name holds this.")
@click.option("--shape", default="dense", help="dense or moe.")
@click.option("--dtype", default="bfloat16")
@click.option("--folder", type=click.Path(path_type=Path), help="Where the checkpoints lie.")
@click.option("--capsule", type=click.Path(path_type=Path), default=CAPSULES / "sharing-cpu.json")
def main(
    repeats: int,
    seconds: float,
    limits: tuple[float, ...],
    words: tuple[str, ...],
    shape: str,
    dtype: str,
    folder: Path | None,
    capsule: Path,
) -> None:
    """Measure decode with more threads, less of a processor and beside another process."""
    as_under_zmlx_run()
    home = folder or Path(tempfile.gettempdir()) / "zmlx-sharing-benchmark"
    try:
        checkpoint = prepare(home, shape, dtype)
    except DemoUnavailable as error:
        sys.exit(str(error))
    notes = [f"mlx-lm's generate_step; a run lasts {seconds:g} s, a text 65 tokens"]
    running: list[tuple[Case, list[Worker]]] = []
    made: list[Run] = []
    threads = native.load().num_threads()
    with ExitStack() as stack, Console(stderr=True).status("") as status:
        for case in cases(threads, sorted(usable_cpus()), limits):
            if words and not any(word in case.name for word in words):
                continue
            status.update(f"starting: {case.name}")
            try:
                workers = [stack.enter_context(started(each, checkpoint)) for each in case.starts]
            except NoLimit as error:
                notes.append(f"{case.name}: not measured: {error}")
                continue
            running.append((case, workers))
        for number in range(repeats):
            for case, workers in running:
                status.update(f"{case.name}, run {number + 1} of {repeats}")
                made.append(measured(case, workers, number, seconds))
    runs = against_ideal(made, [case for case, _ in running])
    plans = {case.name: workers[0].facts["plan"] for case, workers in running[:1]}
    title = f"SmolLM2-135M-Instruct, {shape} {dtype}: decode with shared processors"
    result = collect(title, runs, QUANTITIES, plans=plans, notes=tuple(notes))
    write(result, capsule)
    show(result)


main()
