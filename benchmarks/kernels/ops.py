"""Operations made from formulas against MLX's own, on the device that runs here.

    python benchmarks/kernels/ops.py

Elementwise formulas, reductions of rows and operations in two passes, float32 and bfloat16, in
shapes of decoding, of prompts and of vocabularies. MLX's own is the single operation where it has
one, else the operations under `mx.compile`. Writes every run to
benchmarks/capsules/ops-BACKEND.json.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import click
import mlx.core as mx

from zmlx import elementwise, rowwise
from zmlx.api import map_reduce, reduce
from zmlx.backend import current
from zmlx.bench import compare
from zmlx.bench.capsule import Run, collect, write
from zmlx.bench.comparison import QUANTITIES
from zmlx.bench.report import show

CAPSULES = Path(__file__).parents[1] / "capsules"
OURS, STOCK = "zmlx", "mlx"
SHAPES = ((1, 4096), (4096, 4096), (32, 131072))
DTYPES = (mx.float32, mx.bfloat16)

Function = Callable[..., mx.array]


@dataclass(frozen=True)
class Operation:
    """The same operation twice."""

    name: str
    ours: Function
    stock: Function
    inputs: int = 1


@mx.compile
def _silu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(x)


@mx.compile
def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


def _rms_norm() -> Function:
    """Make x / sqrt(mean(x^2) + 1e-5) as one pass over rows."""
    made: dict[int, Function] = {}

    def rms_norm(x: mx.array) -> mx.array:
        d = x.shape[-1]
        if d not in made:
            made[d] = rowwise.map_reduce(
                name="rms_norm",
                d=d,
                pass1_init="0.0f",
                pass1_update="acc1 + x * x",
                pass1_reduce_op="a + b",
                pass2_init="0.0f",
                pass2_update="acc2",
                pass2_reduce_op="a + b",
                write_expr="x * rsqrt(s1 / d + 1e-5f)",
            )
        return made[d](x)

    return rms_norm


def operations() -> list[Operation]:
    """Return what is timed."""
    softmax = map_reduce(
        pass1={"init": "-INFINITY", "update": "max(acc1, x)", "reduce": "max(a, b)"},
        pass2={"init": "0.0f", "update": "acc2 + exp(x - s1)", "reduce": "a + b"},
        write="exp(x - s1) / s2",
        threadgroup="auto",
    )
    return [
        Operation("exp", elementwise("exp(x)"), mx.exp),
        Operation("silu", elementwise("x / (1 + exp(-x))"), _silu),
        Operation(
            "swiglu",
            elementwise.map(name="swiglu", expr="g / (1 + exp(-g)) * u", input_names=["g", "u"]),
            _swiglu,
            inputs=2,
        ),
        Operation("sum", reduce(init="0.0f", update="acc + v"), lambda x: x.sum(axis=-1)),
        Operation("max", reduce(init="-INFINITY", update="max(acc, v)"), lambda x: x.max(axis=-1)),
        Operation("softmax", softmax, lambda x: mx.softmax(x, axis=-1, precise=True)),
        Operation("rms_norm", _rms_norm(), lambda x: mx.fast.rms_norm(x, None, 1e-5)),
    ]


@click.command(context_settings={"show_default": True})
@click.option("--runs", type=click.IntRange(min=3), default=15, help="Rounds of each.")
@click.option("--only", multiple=True, help="Names of operations; all by default.")
@click.option("--capsule", type=click.Path(path_type=Path))
def main(runs: int, only: tuple[str, ...], capsule: Path | None) -> None:
    """Time operations made from formulas against MLX's own."""
    made: list[Run] = []
    wrong: list[str] = []
    ceiling = 0.0
    for operation in operations():
        if only and operation.name not in only:
            continue
        for shape in SHAPES:
            result = compare(
                {OURS: operation.ours, STOCK: operation.stock},
                [shape],
                dtypes=DTYPES,
                n_inputs=operation.inputs,
                iters=runs,
                show=False,
            )
            ceiling = result.ceiling
            name = operation.name
            made += [replace(run, subject=f"{name} {run.subject}") for run in result.runs()]
            wrong += [
                f"{name} {row.subject}, {row.implementation}: {row.failure or row.difference}"
                for row in result.rows
                if not row.ok
            ]
    notes = (f"a copy reads and writes {ceiling / 1e9:,.0f} GB/s", *wrong)
    backend = current()
    result = collect(
        f"Operations from formulas against MLX's, {backend}", made, QUANTITIES, notes=notes
    )
    show(result)
    path = write(result, capsule or CAPSULES / f"ops-{backend}.json")
    click.echo(f"every run: {path}", err=True)


if __name__ == "__main__":
    main()
