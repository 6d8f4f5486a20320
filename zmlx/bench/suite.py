"""Everything that is measured of one model, stock and patched in turn, as runs of a capsule.

The patched model is a twin: two model objects, one copy of the weights, so that neither is patched
or unpatched between runs. Each workload first runs a few tokens stock, before anything is patched,
and then patched: what is compiled on first use is compiled there. Then timed runs alternate. What a
patched model keeps between runs does not count in the peak memory of stock.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from zmlx.backend.cuda import library
from zmlx.bench.capsule import Quantities, Run
from zmlx.bench.decode import plan_of
from zmlx.bench.kernel_times import KernelTimes, NotRecorded, record
from zmlx.bench.logits import logits_error
from zmlx.bench.prompts import Prompts
from zmlx.bench.traffic import cache_bytes, weight_bytes
from zmlx.bench.twin import twin
from zmlx.bench.workloads import Decode, Outcome, Workload, generated, parts, workloads
from zmlx.graph.probing import MORE, step_in_float32
from zmlx.patch import PatchReport, patch
from zmlx.runtime import sampling

#: what is measured of a model; "of_the_limit" is the time in which the device can read weights and
#: cache, over the time of a step
QUANTITIES: Quantities = {
    "decode": ("tokens/s", True),
    "prefill": ("tokens/s", True),
    "peak_memory": ("bytes", False),
    "of_the_limit": ("%", True),
    "python": ("us a token", False),
    "encoding": ("us a token", False),
    "gpu": ("us a token", False),
    "kernels": ("a token", False),
    "weights": ("bytes", False),
    "cache": ("bytes", False),
    "patching": ("s", False),
    "modules": ("patched", True),
    "logits_error": ("%", False),
    "bandwidth": ("GB/s", True),
}
STOCK, ZMLX = "stock", "zmlx"
#: The subject of what is measured of the machine.
DEVICE = "this device"
#: Tokens of the first run of each workload.
_WARM_TOKENS = 16
#: Steps that are taken apart, and steps that a profiler watches.
_STEPS = 24
_WATCHED = 8
#: Error of the patched model's logits, in percent of their spread, that is a failure where it is
#: more than `MORE` times stock's: a router that chooses other experts for a difference in the last
#: digit makes errors of any size, in both.
_FAR_OFF = 50.0


class Unmeasurable(RuntimeError):
    """A model cannot be measured; the text says why, and what to do where that is known."""


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        contexts: tokens before those that are timed; at least one.
        runs: timed runs of each kind.
        tokens: generated in a timed run, two or more.
        batches: sequences that are decoded together, each after the first of `contexts`.
        prefill: tokens of the prompt whose reading is timed; 0 for none.
        profile: release profile of the patched model; None for the one in force.
        breakdown: whether steps are taken apart.
    """

    contexts: tuple[int, ...] = (256, 8192)
    runs: int = 5
    tokens: int = 128
    batches: tuple[int, ...] = (8, 32)
    prefill: int = 2048
    profile: str | None = None
    breakdown: bool = True

    @property
    def calls(self) -> int:
        """How often `on_call` is called for a model."""
        kinds = len(self.contexts) + len(self.batches) + bool(self.prefill)
        return 2 * kinds * (1 + self.runs) + (2 * len(self.contexts) if self.breakdown else 0)


@dataclass
class Measured:
    """What came out for one model.

    Attributes:
        runs: of a capsule with `QUANTITIES`.
        plan: the report of the patched model, as `plan_of` gives it.
        notes: what was left out, or looks wrong.
        failures: what failed on the patched model alone.
    """

    runs: list[Run] = field(default_factory=list)
    plan: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


class Bench:
    """One model, stock and patched side by side.

    Args:
        name: of the model in the capsule.
        model: a loaded model that is not patched, and stays so.
        vocabulary: token ids are below.
        settings: what to measure.
        bandwidth: bytes per second that the device reads.
        on_call: called with a few words before each thing that is run.
        on_line: called with a line of text for people whenever a workload is done.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        vocabulary: int,
        settings: Settings,
        bandwidth: float,
        on_call: Callable[[str], None] = lambda _: None,
        on_line: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.name = name
        self.settings = settings
        self.bandwidth = bandwidth
        self.on_call = on_call
        self.on_line = on_line
        self.models = {STOCK: model, ZMLX: twin(model)}
        self.prompts = Prompts(model)
        self.weights = weight_bytes(model)
        self.caches: dict[str, int] = {}
        self.work = workloads(
            vocabulary,
            settings.contexts,
            settings.batches,
            settings.contexts[0],
            settings.prefill,
        )
        self.first = self.decodes[0]
        self.kept = 0  # bytes that the patched model holds when it does nothing
        self.result = Measured()

    @property
    def decodes(self) -> list[Decode]:
        """The workloads of one sequence."""
        return [work for work in self.work if isinstance(work, Decode)]

    def measure(self) -> Measured:
        """Measure all but the kernels.

        Raises:
            Unmeasurable: the stock model gives no finite logits, or does not fit into memory.
        """
        with _memory_errors(self.name):
            stock, exact = self._logits(STOCK), self._exact()
            if not mx.all(mx.isfinite(stock)).item():
                raise Unmeasurable(f"{self.name}: the stock model's logits are not finite")
            for work in self.decodes:
                self.caches[work.label] = self._cache_bytes(work)
            self.work = [work for work in self.work if self._warm_up(work, STOCK)]
            before = _active_bytes()
            self._patch()
            self._compare(stock, exact)
            self.work = [work for work in self.work if self._warm_up(work, ZMLX)]
            self.kept = max(0, _active_bytes() - before)
            for each in self.work:
                self._time(each)
            if self.settings.breakdown:
                self._take_apart()
        return self.result

    def prepare(self) -> None:
        """Patch, and run each decode once, so that `kernels` can follow without `measure`."""
        with _memory_errors(self.name):
            self.work = [work for work in self.decodes if self._warm_up(work, STOCK)]
            self._patch()
            self.work = [work for work in self.work if self._warm_up(work, ZMLX)]
        # All of that was measured before.
        self.result = Measured(plan=self.result.plan)

    def drain(self) -> Measured:
        """Return what came out since the last time this was asked."""
        found = self.result
        self.result = Measured(plan=found.plan)
        return found

    def kernels(self) -> dict[str, dict[str, KernelTimes]]:
        """Record the kernels of a token after `measure`, which they would disturb.

        Returns:
            Label of the workload -> variant -> kernels; empty where none can be recorded, and then
            a note says why.
        """
        found: dict[str, dict[str, KernelTimes]] = {}
        for work in self.decodes:
            for variant in (STOCK, ZMLX):
                self.on_call(f"{work.label}: kernels, {variant}")
                try:
                    with _memory_errors(self.name), self._in_use(variant):
                        times = self._recorded(work, variant)
                except NotRecorded as reason:
                    self.result.notes.append(f"{self.name}: no time on the GPU: {reason}")
                    return found
                found.setdefault(work.label, {})[variant] = times
                values = {"gpu": times.microseconds, "kernels": times.kernels}
                samples = {row.name: [row.count, row.microseconds] for row in times.rows}
                self._add(work.label, variant, 0, values, samples)
        return found

    def _patch(self) -> None:
        started = time.perf_counter()
        report: PatchReport = vars(patch(self.models[ZMLX], profile=self.settings.profile))[
            "_zmlx_patch_result"
        ]
        seconds = time.perf_counter() - started
        self.result.plan = plan_of(report)
        values = {"patching": seconds, "modules": float(report.patched_count)}
        self.result.runs.append(Run(self.name, ZMLX, 0, values))
        self.on_line(f"{self.name}: {report.line().removeprefix('zmlx: ')}")
        library.wait()

    def _warm_up(self, work: Workload, variant: str) -> bool:
        """Run a workload once; return whether it ran."""
        return self._tried(work, variant, min(self.settings.tokens, _WARM_TOKENS)) is not None

    def _time(self, work: Workload) -> None:
        """Time one workload, stock and patched in turn, and say what came out."""
        rates: dict[str, list[float]] = {STOCK: [], ZMLX: []}
        for number in range(self.settings.runs):
            # The order alternates, so that a drift of the machine meets both.
            for variant in (STOCK, ZMLX) if number % 2 == 0 else (ZMLX, STOCK):
                outcome = self._tried(work, variant, self.settings.tokens)
                if outcome is None:
                    return
                rates[variant].append(outcome.rate)
                peak = outcome.peak_bytes - (self.kept if variant == STOCK else 0)
                values = {outcome.quantity: outcome.rate, "peak_memory": float(peak)}
                if isinstance(work, Decode):
                    values["of_the_limit"] = self._share(work, outcome.rate)
                self._add(work.label, variant, 1 + number, values, outcome.samples)
        stock, ours = (statistics.median(rates[variant]) for variant in (STOCK, ZMLX))
        self.on_line(
            f"{self.name}, {work.label}: stock {stock:.4g}, zmlx {ours:.4g} tokens/s, "
            f"{ours / stock:.2f} x"
        )

    def _tried(self, work: Workload, variant: str, tokens: int) -> Outcome | None:
        """Run a workload; None and a note where it fails for another reason than memory."""
        self.on_call(f"{work.label}: {variant}")
        try:
            with self._in_use(variant):
                return work.run(self.models[variant], tokens, self.prompts)
        except Exception as error:
            if _out_of_memory(error):
                raise
            lines = str(error).strip().splitlines() or [""]
            text = f"{self.name}, {work.label}: {variant}: {type(error).__name__}: {lines[0]}"
            (self.result.failures if variant == ZMLX else self.result.notes).append(text)
            self.on_line(text)
            return None

    def _share(self, work: Decode, rate: float) -> float:
        """Return how much of the device's bandwidth a rate is, in percent."""
        return 100 * rate * (self.weights + self.caches[work.label]) / self.bandwidth

    def _take_apart(self) -> None:
        for work in self.decodes:
            sizes = {"weights": float(self.weights), "cache": float(self.caches[work.label])}
            for variant in (STOCK, ZMLX):
                self.on_call(f"{work.label}: steps taken apart, {variant}")
                with self._in_use(variant):
                    found = parts(self.models[variant], work.prompt, _STEPS, self.prompts)
                values = {
                    "python": 1e6 * statistics.median(found.build),
                    "encoding": 1e6 * statistics.median(found.encode),
                }
                samples = {
                    "build_seconds": found.build,
                    "encode_seconds": found.encode,
                    "wait_seconds": found.wait,
                }
                self._add(work.label, variant, 0, {**values, **sizes}, samples)

    def _compare(self, stock: mx.array, exact: mx.array | None) -> None:
        """Note how far the logits of both are from what float32 gives, or ours from stock's."""
        ours = self._logits(ZMLX)
        where = f"{self.name}, {self.first.label}"
        if not mx.all(mx.isfinite(ours)).item():
            self.result.failures.append(f"{where}: zmlx: logits are not finite")
            return
        truth, theirs = (stock if exact is None else exact), 0.0
        error = 100 * logits_error(ours, truth).rms
        self._add(self.first.label, ZMLX, 0, {"logits_error": error}, {})
        if exact is not None:
            theirs = 100 * logits_error(stock, exact).rms
            self._add(self.first.label, STOCK, 0, {"logits_error": theirs}, {})
        if error > max(_FAR_OFF, MORE * theirs):
            than = "stock's" if exact is None else f"those in float32, stock's {theirs:.0f} %"
            self.result.failures.append(f"{where}: zmlx: logits are {error:.0f} % from {than}")

    def _logits(self, variant: str) -> mx.array:
        """Return the float32 logits of a step after the first context."""
        tokens, model = self._step(), self.models[variant]
        logits: mx.array = model(tokens, cache=self.prompts.after(self.first.prompt))
        return _last(logits)

    def _exact(self) -> mx.array | None:
        """Return the same of the stock model, computed in float32; None and a note if it cannot."""

        def forward(tokens: mx.array, caches: list[Any]) -> mx.array:
            logits: mx.array = self.models[STOCK](tokens, cache=caches)
            return logits

        caches = self.prompts.after(self.first.prompt)
        try:
            return _last(step_in_float32(forward, self._step(), caches))
        except RuntimeError as reason:  # a model that cannot be traced, a kernel that cannot run
            if _out_of_memory(reason):
                raise
            text = f"{self.name}: not computed in float32: {str(reason).strip().splitlines()[0]}"
            self.result.notes.append(text)
            return None

    def _step(self) -> mx.array:
        return mx.array([self.first.prompt[-1:]])

    def _cache_bytes(self, work: Decode) -> int:
        """Return the bytes that the stock model's cache holds after a prompt; nothing is run."""
        model = self.models[STOCK]
        cache = make_prompt_cache(model)
        # A sliding window gives up what is outside with the first single token.
        for tokens in (work.prompt, work.prompt[-1:]):
            model(mx.array([tokens]), cache=cache)
        return cache_bytes(cache)

    def _recorded(self, work: Decode, variant: str) -> KernelTimes:
        # Two tokens before, and `record` takes the rest twice.
        caches = self.prompts.after(work.prompt)
        tokens = generated(self.models[variant], work.prompt[-1:], 3 + 2 * _WATCHED, caches)
        next(tokens)
        next(tokens)

        def some() -> None:
            for _ in range(_WATCHED):
                next(tokens)

        try:
            return record(some, _WATCHED)
        finally:
            for _ in tokens:
                pass

    @contextmanager
    def _in_use(self, variant: str) -> Iterator[None]:
        """Have the process as it is when only this variant's model is loaded.

        A patched model may change what mlx-lm's loops do (`zmlx.runtime.sampling`), for every
        model; stock runs are without it.
        """
        patched = self.models[ZMLX]
        fused = "decode_step" in self.result.plan.get("pattern_counts", {})
        if variant == STOCK and fused:
            sampling.release(patched)
        try:
            yield
        finally:
            if variant == STOCK and fused:
                sampling.use(patched, self.result.plan["backend"])

    def _add(
        self,
        label: str,
        variant: str,
        repeat: int,
        values: Mapping[str, float],
        samples: Mapping[str, Sequence[float]],
    ) -> None:
        lists = {name: list(numbers) for name, numbers in samples.items()}
        run = Run(f"{self.name}, {label}", variant, repeat, dict(values), lists)
        self.result.runs.append(run)


def _last(logits: mx.array) -> mx.array:
    """Return the last token's logits in float32, computed."""
    logits = logits[0, -1].astype(mx.float32)
    mx.eval(logits)
    return logits


def _active_bytes() -> int:
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    return mx.get_active_memory()


@contextmanager
def _memory_errors(name: str) -> Iterator[None]:
    """Say in words what MLX's errors say when memory is short."""
    try:
        yield
    except Exception as error:
        if not _out_of_memory(error):
            raise
        held = mx.get_active_memory() / 1e9
        raise Unmeasurable(
            f"{name}: out of memory, with {held:.1f} GB held ({str(error).strip()}); "
            "take a smaller model, a shorter --context or fewer sequences (--batch)"
        ) from error


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("allocate" in text or "out of memory" in text)
