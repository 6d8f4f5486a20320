"""What kernels cost around their computing.

    python benchmarks/kernels/launch.py

times a call of a kernel written in Metal's language, on CUDA, against the same kernel written by
hand for `mx.fast.cuda_kernel`: the time to build one node of the graph in Python, and the time to
evaluate it (MLX looks the kernel up by a hash of its text and encodes it; these kernels compute
next to nothing). One run is a chain of calls, each on the last one's output. Variants take turns.
Writes every run to benchmarks/capsules/launch-cuda.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
from rich.console import Console
from rich.table import Table

from zmlx.backend.definition import Definition
from zmlx.backend.launch import launcher
from zmlx.bench.capsule import Capsule, Quantities, Run, collect, write

CAPSULES = Path(__file__).parents[1] / "capsules"
QUANTITIES: Quantities = {"build": ("us", False), "evaluate": ("us", False)}
BARE, OURS, COMPILED = "bare cuda_kernel", "Metal source", "Metal source, mx.compile"

HEADER = "\n".join(
    f"inline float step_{k}(float x) {{ return metal::exp(x * {k}.5f) + {k}.0f; }}"
    for k in range(25)
)


@dataclass(frozen=True)
class Subject:
    """A kernel twice: in Metal's language and for CUDA by hand; its first input is the chain's."""

    name: str
    metal: str
    cuda: str
    size: int = 1024
    more: tuple[Any, ...] = ()
    header: str = ""
    cuda_header: str = ""

    def launch(self, by_hand: bool) -> Callable[[mx.array], mx.array]:
        """Return one call as a function of the chain's array."""
        names = tuple("xyzw"[: 1 + len(self.more)])
        if by_hand:
            kernel: Any = mx.fast.cuda_kernel(
                name="launch",
                input_names=list(names),
                output_names=["out"],
                source=self.cuda,
                header=self.cuda_header,
            )
        else:
            kernel = launcher(
                Definition("launch", names, ("out",), source=self.metal, header=self.header), "cuda"
            )
        more, grid, shapes = list(self.more), (self.size, 1, 1), [(self.size,)]
        dtypes, group, template = [mx.float32], (256, 1, 1), [("N", self.size)]

        def call(x: mx.array) -> mx.array:
            return kernel(
                inputs=[x, *more],
                output_shapes=shapes,
                output_dtypes=dtypes,
                grid=grid,
                threadgroup=group,
                template=template,
            )[0]

        return call


def subjects() -> list[Subject]:
    """Return what is timed."""
    at = "uint i = thread_position_in_grid.x;"
    by_hand = "unsigned i = blockIdx.x * blockDim.x + threadIdx.x;"
    others = tuple(mx.full((1024,), float(k)) for k in range(3))
    mx.eval(others)
    return [
        Subject("one input", f"{at} out[i] = x[i] + 1;", f"{by_hand} out[i] = x[i] + 1;"),
        Subject(
            "four inputs",
            f"{at} out[i] = x[i] + y[i] * z[i] - w[i];",
            f"{by_hand} out[i] = x[i] + y[i] * z[i] - w[i];",
            more=others,
        ),
        Subject(
            "a number as input",
            f"{at} out[i] = x[i] + y;",
            f"{by_hand} out[i] = x[i] + y[0];",
            more=(mx.array(1.0),),
        ),
        Subject(
            "cut grid",
            f"{at} out[i] = x[i] + 1;",
            f"{by_hand} if (i < N) out[i] = x[i] + 1;",
            size=1000,
        ),
        Subject(
            "header of 2 kB",
            f"{at} out[i] = step_3(x[i]);",
            f"{by_hand} out[i] = step_3(x[i]);",
            header=HEADER,
            cuda_header=HEADER.replace("inline", "__device__ inline").replace("metal::exp", "expf"),
        ),
    ]


def timed(chain: Callable[[mx.array], mx.array], x: mx.array, calls: int) -> dict[str, float]:
    """Return microseconds for each call of a chain."""
    mx.synchronize()
    started = time.perf_counter()
    y = chain(x)
    built = time.perf_counter()
    mx.eval(y)
    mx.synchronize()
    done = time.perf_counter()
    return {"build": (built - started) / calls * 1e6, "evaluate": (done - built) / calls * 1e6}


def runs_of(subject: Subject, calls: int, repeats: int) -> list[Run]:
    """Time the variants of a subject in turn, after a run of each that is not counted."""

    def chain_of(call: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
        def chain(x: mx.array) -> mx.array:
            for _ in range(calls):
                x = call(x)
            return x

        return chain

    ours = chain_of(subject.launch(by_hand=False))
    chains = {
        BARE: chain_of(subject.launch(by_hand=True)),
        OURS: ours,
        COMPILED: mx.compile(ours),
    }
    x = mx.zeros((subject.size,))
    mx.eval(x)
    runs = []
    names = list(chains)
    for repeat in range(-2, repeats):
        first = repeat % len(chains)  # each variant comes after each other one
        for variant in (*names[first:], *names[:first]):
            values = timed(chains[variant], x, calls)
            if repeat >= 0:
                runs.append(Run(subject.name, variant, repeat, values))
    return runs


def show(capsule: Capsule) -> None:
    """Print medians, and what ours adds to a bare call."""
    table = Table("kernel", "variant", "build us", "evaluate us", "both", "over bare")
    for subject in capsule.subjects():
        base = 0.0
        for variant in capsule.variants():
            build, run = (capsule.median(subject, variant, q) or 0.0 for q in QUANTITIES)
            base = base or build + run
            over = f"{100 * ((build + run) / base - 1):+.0f} %"
            row = f"{build:.2f}", f"{run:.2f}", f"{build + run:.2f}", over
            table.add_row(subject, variant, *row)
    Console().print(table)


@click.command(context_settings={"show_default": True})
@click.option("--calls", type=click.IntRange(min=1), default=200, help="Calls in a chain.")
@click.option("--runs", "repeats", type=click.IntRange(min=1), default=61, help="Runs of each.")
@click.option("--capsule", type=click.Path(path_type=Path), default=CAPSULES / "launch-cuda.json")
def main(calls: int, repeats: int, capsule: Path) -> None:
    """What a call costs beside a bare one of mx.fast.cuda_kernel."""
    if not mx.cuda.is_available():
        raise click.ClickException("no CUDA device")
    runs = [run for subject in subjects() for run in runs_of(subject, calls, repeats)]
    made = collect(
        "Launches of kernels: Metal source against a bare mx.fast.cuda_kernel",
        runs,
        QUANTITIES,
        notes=(f"chains of {calls} calls, microseconds for each call",),
    )
    show(made)
    click.echo(f"every run: {write(made, capsule)}", err=True)


if __name__ == "__main__":
    main()
