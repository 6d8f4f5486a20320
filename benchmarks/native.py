"""Speed of the native CPU kernels against the stock operations.

Every figure is the median of several runs over weights that together exceed the processor's caches,
as they do in a model: a weight that was used a moment ago is not in the cache when its turn comes
again. GB/s counts the bytes of the weights (values, scales and biases) that one call reads.

    python benchmarks/native.py decode --shape 2048x8192 --bits 4
    python benchmarks/native.py prefill --tokens 512
    python benchmarks/native.py experts
    python benchmarks/native.py call
    python benchmarks/native.py errors
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from types import ModuleType
from typing import Any

import click
import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.table import Table

from zmlx.backend.cpu import native
from zmlx.patch.weights import SMALL_FLOATS

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
#: Bytes of weights that are used in turn.
WORKING_SET = 128 << 20

Weight = tuple[mx.array, mx.array, mx.array]


def median(call: Callable[[], mx.array], runs: int) -> float:
    """Return the median time of a call in seconds, after one that is not counted."""
    mx.eval(call())
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        mx.eval(call())
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def weights(shape: tuple[int, ...], bits: int, group: int, dtype: mx.Dtype) -> list[Weight]:
    """Return as many quantized weights of a shape as make up the working set."""
    first = mx.quantize(mx.random.normal(shape).astype(dtype), group, bits)
    mx.eval(first)
    copies = max(1, WORKING_SET // nbytes(first))
    made: list[Weight] = [first]
    for _ in range(copies - 1):
        made.append(tuple(mx.array(part) for part in first))
        mx.eval(made[-1])
    return made


def nbytes(weight: Weight) -> int:
    """Return the bytes that a weight takes."""
    return sum(part.nbytes for part in weight)


def in_turn(items: list[Weight]) -> Callable[[], Weight]:
    """Return a function that gives one weight after the other, round and round."""
    turns: Iterator[Weight] = cycle(items)
    return lambda: next(turns)


def sizes(text: str) -> tuple[int, int]:
    """Return K and N of `KxN`."""
    inputs, outputs = text.split("x")
    return int(inputs), int(outputs)


def show(title: str, rows: list[dict[str, object]], as_json: bool) -> None:
    """Print the rows of one table."""
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)


def options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that all commands have."""
    for option in reversed(
        [
            click.option("--shape", "shapes", multiple=True, default=["2048x8192"], help="KxN"),
            click.option("--bits", multiple=True, type=int, default=[4]),
            click.option("--group", type=int, default=64),
            click.option("--dtype", "dtypes", multiple=True, default=["bfloat16"]),
            click.option("--threads", multiple=True, type=int, default=[1, 2]),
            click.option("--kernels", "names", multiple=True, help="default: the best here"),
            click.option("--runs", type=int, default=20),
            click.option("--stock/--no-stock", default=True, help="time the stock operation too"),
            click.option("--json", "as_json", is_flag=True),
        ]
    ):
        command = option(command)
    return command


@click.group()
def main() -> None:
    """Time the native CPU kernels."""


def matmul_rows(
    library: ModuleType,
    tokens: int,
    shapes: tuple[str, ...],
    bits: tuple[int, ...],
    group: int,
    dtypes: tuple[str, ...],
    threads: tuple[int, ...],
    names: tuple[str, ...],
    runs: int,
    stock: bool,
) -> list[dict[str, object]]:
    """Time x @ w.T for every combination."""
    rows: list[dict[str, object]] = []
    for shape in shapes:
        inputs, outputs = sizes(shape)
        for dtype in dtypes:
            x = mx.random.normal((tokens, inputs)).astype(DTYPES[dtype])
            for width in bits:
                made = weights((outputs, inputs), width, group, DTYPES[dtype])
                turn, each = in_turn(made), nbytes(made[0])
                form = {"group_size": group, "bits": width}
                row: dict[str, object] = {"shape": shape, "dtype": dtype, "bits": width}
                base = None
                if stock:
                    base = median(lambda: mx.quantized_matmul(x, *turn(), **form), 1)  # noqa: B023
                for name in names:
                    library.set_kernels(name)
                    for count in threads:
                        library.set_num_threads(count)
                        took = median(
                            lambda: library.quantized_matmul(x, *turn(), **form),  # noqa: B023
                            runs,
                        )
                        flops = 2.0 * tokens * inputs * outputs
                        rows.append(
                            {
                                **row,
                                "kernels": name,
                                "threads": count,
                                "us": took * 1e6,
                                "GB/s": each / took / 1e9,
                                "Gflop/s": flops / took / 1e9,
                                "x stock": base / took if base else "-",
                            }
                        )
    return rows


@main.command()
@click.option("--tokens", type=int, default=1)
@options
def decode(tokens: int, names: tuple[str, ...], as_json: bool, **choices: object) -> None:
    """Few rows of activations: the time to read the weights."""
    library = native.load()
    rows = matmul_rows(library, tokens, names=names or (library.kernels(),), **choices)  # type: ignore[arg-type]
    show(f"{tokens} row(s)", rows, as_json)


@main.command()
@click.option("--tokens", type=int, default=512)
@options
def prefill(tokens: int, names: tuple[str, ...], as_json: bool, **choices: object) -> None:
    """Many rows of activations: the rate of multiplications."""
    library = native.load()
    rows = matmul_rows(library, tokens, names=names or (library.kernels(),), **choices)  # type: ignore[arg-type]
    show(f"{tokens} rows", rows, as_json)


@main.command()
@click.option("--tokens", "counts", type=int, multiple=True, default=[1, 4, 128])
@click.option("--experts", "total", type=int, default=32)
@click.option("--top-k", type=int, default=4)
@click.option("--hidden", type=int, default=2048)
@click.option("--intermediate", type=int, default=1792)
@click.option("--dtype", default="bfloat16", type=click.Choice(list(DTYPES)))
@click.option("--threads", multiple=True, type=int, default=[1, 2])
@click.option("--stock/--no-stock", default=True)
@click.option("--json", "as_json", is_flag=True)
def experts(
    counts: tuple[int, ...],
    total: int,
    top_k: int,
    hidden: int,
    intermediate: int,
    dtype: str,
    threads: tuple[int, ...],
    stock: bool,
    as_json: bool,
) -> None:
    """Routed experts: gate, up, SwiGLU, down and the weighted sum."""
    library, kind, form = native.load(), DTYPES[dtype], {"group_size": 64, "bits": 4}
    both = {f"{side}_{key}": value for side in ("gate", "up") for key, value in form.items()}
    gate, up = (
        mx.quantize(mx.random.normal((total, intermediate, hidden)).astype(kind), 64, 4)
        for _ in range(2)
    )
    down = mx.quantize(mx.random.normal((total, hidden, intermediate)).astype(kind), 64, 4)
    mx.eval(gate, up, down)
    each = (nbytes(gate) + nbytes(up) + nbytes(down)) / total
    rows: list[dict[str, object]] = []
    for tokens in counts:
        x = mx.random.normal((tokens, hidden)).astype(kind)
        shares = mx.softmax(mx.random.normal((tokens, top_k)), axis=-1)
        mx.eval(x, shares)

        def routed() -> mx.array:
            return mx.argsort(mx.random.uniform(shape=(tokens, total)), axis=-1)[:, :top_k]  # noqa: B023

        def ours() -> mx.array:
            chosen = routed()
            h = library.gather_quantized_glu(x, chosen, *gate, *up, activation="silu", **both)  # noqa: B023
            return library.gather_quantized_combine(h, chosen, shares, *down, **form)  # noqa: B023

        def theirs() -> mx.array:
            chosen = routed()
            wide = mx.expand_dims(x, (-2, -3))  # noqa: B023
            g = mx.gather_qmm(wide, *gate, rhs_indices=chosen, transpose=True, **form)
            u = mx.gather_qmm(wide, *up, rhs_indices=chosen, transpose=True, **form)
            y = mx.gather_qmm(
                g * mx.sigmoid(g) * u, *down, rhs_indices=chosen, transpose=True, **form
            )
            return (y.squeeze(-2) * shares[..., None]).sum(axis=-2)  # noqa: B023

        base = median(theirs, 1) if stock and tokens <= 16 else None
        for count in threads:
            library.set_num_threads(count)
            took = median(ours, 15)
            read = each * min(total, tokens * top_k)
            flops = 6.0 * tokens * top_k * hidden * intermediate
            rows.append(
                {
                    "tokens": tokens,
                    "threads": count,
                    "us": took * 1e6,
                    "GB/s (at most)": read / took / 1e9,
                    "Gflop/s": flops / took / 1e9,
                    "x stock": base / took if base else "-",
                }
            )
    show(f"{top_k} of {total} experts, {hidden} x {intermediate}, {dtype}", rows, as_json)


@main.command()
def call() -> None:
    """What one call costs in Python, without computing anything."""
    library, form = native.load(), {"group_size": 64, "bits": 4}
    x = mx.random.normal((1, 64))
    w = mx.quantize(mx.random.normal((64, 64)), 64, 4)
    e = mx.quantize(mx.random.normal((2, 64, 64)), 64, 4)
    both = {f"{side}_{key}": value for side in ("gate", "up") for key, value in form.items()}
    chosen, shares = mx.array([[1, 0]], dtype=mx.uint32), mx.ones((1, 2))
    h = mx.random.normal((1, 2, 64))
    calls: dict[str, Callable[[], mx.array]] = {
        "mx.quantized_matmul": lambda: mx.quantized_matmul(x, *w, **form),
        "quantized_matmul": lambda: library.quantized_matmul(x, *w, **form),
        "quantized_glu": lambda: library.quantized_glu(x, *w, *w, activation="silu", **both),
        "gather_quantized_glu": lambda: library.gather_quantized_glu(
            x, chosen, *e, *e, activation="silu", **both
        ),
        "gather_quantized_combine": lambda: library.gather_quantized_combine(
            h, chosen, shares, *e, **form
        ),
    }
    rows: list[dict[str, object]] = []
    for name, run in calls.items():
        best = min(timed(run, 2000) for _ in range(5))
        rows.append({"call": name, "us": best * 1e6})
    show("building one lazy operation", rows, False)


@main.command()
@click.option("--tokens", type=int, default=1)
@click.option("--inputs", type=int, default=2048)
@click.option("--group", type=int, default=64)
@click.option("--json", "as_json", is_flag=True)
def errors(tokens: int, inputs: int, group: int, as_json: bool) -> None:
    """Root mean square error against float64, relative to the result: stock and native."""
    library = native.load()
    rows: list[dict[str, object]] = []
    for dtype, kind in DTYPES.items():
        x = mx.random.normal((tokens, inputs), key=mx.random.key(1)).astype(kind)
        dense = mx.random.normal((256, inputs), key=mx.random.key(2)).astype(kind)
        for name, form in stored_forms(group).items():
            weight, truth = stored(dense, form)
            truth = in_float64(x) @ truth.T
            if form["mode"] == "dense":
                y = x @ weight[0].T
            else:
                y = mx.quantized_matmul(x, *weight, transpose=True, **form)
            ours = library.quantized_matmul(x, *weight, **form)
            short = library.quantized_matmul_a8(x, *weight, **form)
            size = np.sqrt(np.mean(truth**2))
            off = {
                which: float(np.sqrt(np.mean((in_float64(out) - truth) ** 2)) / size)
                for which, out in (("stock", y), ("native", ours), ("native, 8 bits", short))
            }
            rows.append({"dtype": dtype, "weights": name, **off})
    show(f"{tokens} row(s), K = {inputs}, groups of {group} where they are free", rows, as_json)


def stored_forms(group: int) -> dict[str, dict[str, Any]]:
    """Return how weights may be stored, by name."""
    forms: dict[str, dict[str, Any]] = {
        f"{bits} bits": {"group_size": group, "bits": bits, "mode": "affine"}
        for bits in (2, 3, 4, 5, 6, 8)
    }
    for mode, (size, bits) in SMALL_FLOATS.items():
        forms[mode] = {"group_size": size, "bits": bits, "mode": mode}
    return {**forms, "dense": {"group_size": 0, "bits": 0, "mode": "dense"}}


def stored(
    dense: mx.array, form: dict[str, Any]
) -> tuple[tuple[mx.array, ...], np.ndarray[Any, Any]]:
    """Return a weight in a form, and its very values."""
    if form["mode"] == "dense":
        return (dense,), in_float64(dense)
    weight = tuple(mx.quantize(dense, **form))
    if form["mode"] == "affine":
        return weight, dequantized(weight, form)  # type: ignore[arg-type]
    return weight, in_float64(mx.dequantize(*weight, **form, dtype=mx.float32))


def in_float64(array: mx.array) -> np.ndarray[Any, Any]:
    """Return an array's values without loss."""
    return np.array(array.astype(mx.float32)).astype(np.float64)


def dequantized(weight: Weight, form: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Return s * q + b in float64."""
    w, scales, biases = weight
    ones = mx.ones(scales.shape, mx.float32)
    q = in_float64(mx.dequantize(w, ones, mx.zeros_like(ones), **form))
    size = int(form["group_size"])
    wide = [np.repeat(in_float64(part), size, axis=-1) for part in (scales, biases)]
    return np.asarray(q * wide[0] + wide[1])


def timed(run: Callable[[], mx.array], count: int) -> float:
    """Return the seconds that one of `count` calls takes."""
    started = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - started) / count


if __name__ == "__main__":
    main()
