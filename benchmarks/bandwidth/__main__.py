"""How fast the native CPU kernels read weights, against how fast this machine reads memory.

    python benchmarks/bandwidth

One row of activations with a matrix of each format: the products of decode, whose time is that of
reading the weights. One run is one pass over many copies of a weight, which together exceed the
caches, as a model's weights do. GB/s counts values, scales and biases. The machine's own bandwidth
is the fastest of many plain sums over an array, with as many threads. On a quiet machine all
threads have their processors all of the time; a table where they did not is worth little. Writes
every run to benchmarks/capsules/bandwidth-cpu.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import mlx.core as mx
from formats import Format, Weight, copies, formats, nbytes
from reading import reader
from rich.console import Console

from zmlx.backend.cpu import native
from zmlx.bench.capsule import Quantities, Run, collect, write
from zmlx.bench.environment import as_under_zmlx_run
from zmlx.bench.report import show

CAPSULES = Path(__file__).parents[1] / "capsules"
QUANTITIES: Quantities = {
    "read": ("GB/s", True),
    "of_the_machine": ("%", True),
    "processor": ("% of the time", True),
}
MACHINE = "the machine, a plain sum"


def threads_of(count: int) -> str:
    return f"{count} thread" if count == 1 else f"{count} threads"


def rate_of(product: Callable[[Weight], mx.array], weights: list[Weight]) -> float:
    """Return GB/s of one pass over some weights."""
    started = time.perf_counter()
    mx.eval([product(weight) for weight in weights])
    return sum(map(nbytes, weights)) / (time.perf_counter() - started) / 1e9


def measured(
    name: str, repeats: int, threads: tuple[int, ...], rate: Callable[[int], float]
) -> list[Run]:
    """Return runs of a rate for every number of threads in turn, after one that is not counted."""
    made = []
    for number in range(-1, repeats):
        for count in threads:
            began, used = time.perf_counter(), time.process_time()
            values = {"read": rate(count)}
            given = (time.process_time() - used) / (time.perf_counter() - began) / count
            values["processor"] = 100 * given
            if number >= 0:
                made.append(Run(name, threads_of(count), number, values))
    return made


def against_machine(runs: list[Run]) -> list[Run]:
    """Add each run's share of the machine's bandwidth with as many threads."""
    best: dict[str, float] = {}
    for run in runs:
        if run.subject == MACHINE:
            best[run.variant] = max(best.get(run.variant, 0.0), run.values["read"])
    return [
        replace(
            run,
            values={
                **run.values,
                "of_the_machine": 100 * run.values["read"] / best[run.variant],
            },
        )
        for run in runs
    ]


@click.command(context_settings={"show_default": True})
@click.option("--shape", default="2048x8192", help="KxN of a weight.")
@click.option("--format", "words", multiple=True, help="Only formats whose name holds this.")
@click.option("--threads", multiple=True, type=int, help="Default: 1 to all.")
@click.option("--runs", "repeats", type=click.IntRange(min=1), default=9, help="Runs of each.")
@click.option("--mib", type=click.IntRange(min=1), default=256, help="Weights together, in MiB.")
@click.option("--capsule", type=click.Path(path_type=Path), default=CAPSULES / "bandwidth-cpu.json")
def main(
    shape: str,
    words: tuple[str, ...],
    threads: tuple[int, ...],
    repeats: int,
    mib: int,
    capsule: Path,
) -> None:
    """Measure every format of weights."""
    as_under_zmlx_run()
    library = native.load()
    counts = threads or tuple(range(1, library.num_threads() + 1))
    inputs, outputs = (int(size) for size in shape.split("x"))
    dense = mx.random.normal((outputs, inputs))
    machine = reader(mib << 20)

    def format_runs(chosen: Format) -> list[Run]:
        options = chosen.options()
        x = mx.random.normal((1, inputs)).astype(chosen.dtype)
        mx.eval(x)
        weights = copies(chosen.weight(dense), mib << 20)

        def rate(count: int) -> float:
            library.set_num_threads(count)
            return rate_of(lambda weight: library.quantized_matmul(x, *weight, **options), weights)

        return measured(chosen.name, repeats, counts, rate)

    wanted = [each for each in formats() if not words or any(word in each.name for word in words)]
    with Console(stderr=True).status(MACHINE) as status:
        made = measured(MACHINE, 2 * repeats, counts, machine)
        for each in wanted:
            status.update(each.name)
            made += format_runs(each)
        # Again, so that a machine that was slower at first is not held against itself.
        status.update(MACHINE)
        made += [
            replace(run, repeat=run.repeat + 2 * repeats)
            for run in measured(MACHINE, 2 * repeats, counts, machine)
        ]
    notes = (
        f"weights of K x N = {shape}, {mib} MiB of each format; kernels: {library.kernels()}",
        "of the machine: share of the fastest plain sum with as many threads",
    )
    title = "Weights read by one-row products, against the machine's read bandwidth"
    result = collect(title, against_machine(made), QUANTITIES, notes=notes)
    write(result, capsule)
    show(result)


main()
