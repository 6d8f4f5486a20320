"""`zmlx bench model`: what users wait for, stock against patched, and where its time goes."""

from __future__ import annotations

import gc
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import click
import mlx.core as mx
import mlx.nn as nn
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from zmlx import backend
from zmlx.bench.capsule import Capsule, Run, collect, write
from zmlx.bench.ceiling import read_bandwidth
from zmlx.bench.environment import available_bytes
from zmlx.bench.filling import fill
from zmlx.bench.kernel_times import KernelTimes
from zmlx.bench.loading import LoadError, load_checkpoint
from zmlx.bench.report import show
from zmlx.bench.shapes import SHAPES, unfilled_model
from zmlx.bench.suite import DEVICE, QUANTITIES, STOCK, Bench, Settings, Unmeasurable
from zmlx.bench.traffic import parameter_bytes
from zmlx.console import wide_console
from zmlx.profile import ProfileError, resolve_policy

_PARTS = ("batch", "prefill", "breakdown", "kernels")
#: Workload -> variant -> kernels, of one model.
_Kernels = dict[str, dict[str, KernelTimes]]


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        name: in the capsule.
        make: returns the model and how many token ids it has.
    """

    name: str
    make: Callable[[], tuple[nn.Module, int]]


@click.command(name="model", context_settings={"show_default": True})
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--shape", "shapes", multiple=True, metavar="NAME", help="A published shape.")
@click.option(
    "--context", "contexts", type=click.IntRange(min=2), multiple=True, default=(256, 8192)
)
@click.option("--runs", type=click.IntRange(min=1), default=5, help="Timed runs of each kind.")
@click.option("--tokens", type=click.IntRange(min=2), default=128, help="Tokens of a timed run.")
@click.option("--batch", "batches", type=click.IntRange(min=2), multiple=True, default=(8, 32))
@click.option("--prefill", type=click.IntRange(min=2), default=2048, help="Tokens of that prompt.")
@click.option("--profile", help="Release profile; the default is the one in force here.")
@click.option("--skip", multiple=True, type=click.Choice(_PARTS), help="What to leave out.")
@click.option("--kernels", "most", type=click.IntRange(min=0), default=0, help="Kernels to list.")
@click.option("--capsule", type=click.Path(path_type=Path), help="Write every raw run to a file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
def model(
    models: tuple[str, ...],
    shapes: tuple[str, ...],
    contexts: tuple[int, ...],
    runs: int,
    tokens: int,
    batches: tuple[int, ...],
    prefill: int,
    profile: str | None,
    skip: tuple[str, ...],
    most: int,
    capsule: Path | None,
    as_json: bool,
) -> None:
    """Measure models stock and patched, in turn, on the device that MLX uses.

    MODEL is the folder of a checkpoint; --shape takes random weights of a published shape instead.
    Measured are decode after each --context, with where a token's time goes, decode of a --batch
    of sequences after the first --context, reading of a --prefill prompt, peak memory and patching.

    The exit code is 1 when something fails on the patched model alone, 2 on bad use.
    """
    try:
        resolve_policy(profile)
    except ProfileError as error:
        _refuse(str(error))
    settings = Settings(
        contexts=tuple(dict.fromkeys(contexts)),
        runs=runs,
        tokens=tokens,
        batches=() if "batch" in skip else tuple(dict.fromkeys(batches)),
        prefill=0 if "prefill" in skip else prefill,
        profile=profile,
        breakdown="breakdown" not in skip,
    )
    session = Session(list(_sources(models, shapes)), settings, "kernels" not in skip, capsule)
    try:
        session.run()
    except (Unmeasurable, LoadError) as error:
        _refuse(str(error))
    result = session.capsule()
    if as_json:
        print(json.dumps(to_json(result, session.kernels), indent=1))
    else:
        show(result)
        session.show_kernels(most)
    for failure in session.failures:
        print(f"zmlx bench model: {failure}", file=sys.stderr)
    sys.exit(1 if session.failures else 0)


class Session:
    """One call of the command: some models, measured one after the other.

    Kernels are recorded when everything else is done, because a profiler slows what comes after;
    for that, all models but the last are made once more.

    Args:
        sources: the models.
        settings: what to measure.
        record: whether to record kernels.
        file: capsule that is written whenever a model is done; None for none.
    """

    def __init__(
        self, sources: Sequence[Source], settings: Settings, record: bool, file: Path | None
    ) -> None:
        self.sources = sources
        self.settings = settings
        self.record = record
        self.file = file
        self.runs: list[Run] = []
        self.plans: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []
        self.failures: list[str] = []
        self.kernels: dict[str, _Kernels] = {}
        self.bench: Bench | None = None
        self.console = Console(stderr=True, highlight=False)

    def run(self) -> None:
        """Measure everything.

        Raises:
            Unmeasurable: a model does not fit into memory, or is not sound.
            LoadError: a folder is no checkpoint.
        """
        if backend.current() == "cpu":
            self._say("no GPU here: this measures the CPU")
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        hidden = not self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=hidden) as progress:
            calls = self.settings.calls * len(self.sources)
            task = progress.add_task("measuring the device", total=calls)

            def on_call(text: str) -> None:
                progress.update(task, description=text, advance=1)

            bandwidth = read_bandwidth()
            self.runs.append(Run(DEVICE, STOCK, 0, {"bandwidth": bandwidth / 1e9}))
            for number, source in enumerate(self.sources):
                self._measure(self._made(source, bandwidth, on_call))
                progress.update(task, completed=self.settings.calls * (number + 1))
            if self.record:
                self._record(bandwidth, on_call)
            self.bench = None

    def capsule(self) -> Capsule:
        """Return all that was measured so far."""
        settings = self.settings
        note = f"decode: {settings.tokens} tokens after the prompt, {settings.runs} runs"
        if settings.batches:
            note += f"; batches: after {settings.contexts[0]} tokens each"
        notes = (note, *dict.fromkeys(self.notes))
        title = "decode of mlx-lm, stock against zmlx"
        return collect(
            title, self.runs, QUANTITIES, plans=self.plans, notes=(*notes, *self.failures)
        )

    def show_kernels(self, most: int) -> None:
        """Print a table for each model, workload and variant whose kernels were recorded.

        Args:
            most: rows of a table; 0 for no tables.
        """
        for name, found in self.kernels.items() if most else ():
            for label, variants in found.items():
                for variant, times in variants.items():
                    show_kernels(f"{name}, {label}, {variant}", times, most)

    def _made(self, source: Source, bandwidth: float, on_call: Callable[[str], None]) -> Bench:
        """Make a model, after the weights of the one before have gone."""
        self.bench = None
        gc.collect()
        mx.clear_cache()
        self._say(f"{source.name}: making the model")
        network, vocabulary = source.make()
        self.bench = Bench(
            source.name, network, vocabulary, self.settings, bandwidth, on_call, self._say
        )
        return self.bench

    def _measure(self, bench: Bench) -> None:
        found = bench.measure()
        self.plans[bench.name] = found.plan
        self._take(bench)
        self._write()

    def _record(self, bandwidth: float, on_call: Callable[[str], None]) -> None:
        """Record kernels, the last model's first because it is there."""
        for source in reversed(self.sources):
            bench = self.bench
            if bench is None:
                bench = self._made(source, bandwidth, on_call)
                bench.prepare()
            found = bench.kernels()
            self._take(bench)
            self._write()
            if not found:
                break  # there is no profiler here, for no model
            self.kernels[source.name] = found
            bench = self.bench = None

    def _take(self, bench: Bench) -> None:
        """Move what a model gave since the last time into the session."""
        found = bench.drain()
        self.runs += found.runs
        self.notes += found.notes
        self.failures += found.failures

    def _write(self) -> None:
        if self.file is not None:
            write(self.capsule(), self.file)

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)


def to_json(capsule: Capsule, kernels: dict[str, _Kernels]) -> dict[str, Any]:
    """Return medians, smallest and largest run, and ratios, with the capsule they come from.

    A ratio is above 1 when the patched model is better.
    """
    results = []
    for subject in capsule.subjects():
        for quantity, (unit, more) in capsule.quantities.items():
            entry: dict[str, Any] = {"subject": subject, "quantity": quantity, "unit": unit}
            medians = []
            for variant in capsule.variants():
                values = capsule.values(subject, variant, quantity)
                if values:
                    medians.append(statistics.median(values))
                    spread = {"min": min(values), "max": max(values), "runs": len(values)}
                    entry[variant] = {"median": medians[-1], **spread}
            if len(medians) == 2 and all(medians):
                entry["ratio"] = medians[1] / medians[0] if more else medians[0] / medians[1]
            if medians:
                results.append(entry)
    shown = {
        name: {
            label: {variant: asdict(times) for variant, times in variants.items()}
            for label, variants in found.items()
        }
        for name, found in kernels.items()
    }
    return {"results": results, "kernels": shown, "capsule": asdict(capsule)}


def show_kernels(title: str, times: KernelTimes, most: int) -> None:
    """Print the kernels that take longest for a token to stdout."""
    console = wide_console()
    total = f"{times.kernels:.0f} kernels, {times.microseconds:,.0f} us a token"
    console.print(f"{title}: {total}", markup=False, soft_wrap=True)
    table = Table()
    for name in ("us a token", "a token", "us each"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("kernel", no_wrap=True, overflow="ellipsis")
    for row in times.rows[:most]:
        each = row.microseconds / row.count
        cells = (f"{row.microseconds:.1f}", f"{row.count:.1f}", f"{each:.2f}", row.name)
        table.add_row(*map(Text, cells))
    console.print(table)


def _sources(models: Sequence[str], shapes: Sequence[str]) -> Iterator[Source]:
    """Return what the command's arguments name, or end the process with what is wrong."""
    if not models and not shapes:
        _refuse(f"nothing to measure: give a folder, or --shape with one of {', '.join(SHAPES)}")
    for name in shapes:
        if name not in SHAPES:
            _refuse(f"unknown shape {name!r}; known: {', '.join(SHAPES)}")
        yield Source(name, lambda name=name: _random(name))  # type: ignore[misc]
    for text in models:
        folder = Path(text).expanduser()
        if not folder.is_dir():
            _refuse(f"{text}: no such folder; give the folder of an MLX checkpoint")
        yield Source(folder.resolve().name, lambda folder=folder: _loaded(folder))  # type: ignore[misc]


def _random(shape: str) -> tuple[nn.Module, int]:
    network = unfilled_model(shape)
    _check_room(shape, parameter_bytes(network))
    return fill(network), SHAPES[shape]["vocab_size"]


def _loaded(folder: Path) -> tuple[nn.Module, int]:
    network, _ = load_checkpoint(str(folder), lazy=True)
    _check_room(str(folder), parameter_bytes(network))
    mx.eval(network.parameters())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    vocabulary = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if not isinstance(vocabulary, int):
        raise LoadError(f"{folder}: config.json has no vocab_size")
    return network, vocabulary


def _check_room(name: str, needed: int) -> None:
    """Raise Unmeasurable when the weights alone do not fit."""
    free = free_bytes()
    if free and needed > free:
        raise Unmeasurable(
            f"{name}: out of memory: its weights need {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free on {backend.current()}; take a smaller model"
        )


def free_bytes() -> int:
    """Return the memory that MLX's default device has free, or 0 when it does not tell."""
    where = backend.current()
    if where == "cpu":
        return available_bytes()
    facts = mx.device_info()
    if where == "cuda":
        # What MLX has given back may stay in CUDA's pool, which counts as used.
        mine = int(facts.get("total_memory", 0)) - mx.get_active_memory()
        return max(int(facts.get("free_memory", 0)), mine)
    room = int(facts.get("max_recommended_working_set_size", 0))
    return max(1, room - mx.get_active_memory()) if room else 0


def _refuse(text: str) -> NoReturn:
    print(f"zmlx bench model: {text}", file=sys.stderr)
    sys.exit(2)
