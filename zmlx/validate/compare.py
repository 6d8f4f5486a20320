"""Measure a model stock and patched, in turn, in one process and with one copy of the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from zmlx.backend.signature import dtype_name
from zmlx.bench.environment import available_bytes
from zmlx.bench.generation import Generation, generate
from zmlx.bench.logits import LogitsError, logits_error
from zmlx.patch import PatchReport, patch, unpatch
from zmlx.validate.reference import extra_bytes, reference, reference_dtype

#: Called with the number of tokens that went through the model.
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Divergence:
    """The first place where a patched run chose another token than the first stock run.

    Attributes:
        run: number of the patched run, from 0.
        position: number of the generated token, from 0.
        stock_token: what stock chose.
        patched_token: what patched chose.
        stock_gap: stock's logit of its own choice minus its logit of the other; 0 is a tie.
        reference_gap: the same in the reference's logits; negative when the reference prefers the
            patched choice; None without a reference.
        reference_spread: largest error of stock's logits at that position; None without one.
    """

    run: int
    position: int
    stock_token: int
    patched_token: int
    stock_gap: float
    reference_gap: float | None = None
    reference_spread: float | None = None


@dataclass
class Comparison:
    """Everything that was measured.

    Attributes:
        report: what was replaced and why not the rest.
        stock, patched: the runs, in the order in which they ran.
        stock_error, patched_error: distances from the reference; None without one.
        difference: distance of patched from stock.
        no_reference: why there is no reference; empty when there is one.
        reference_dtype: "float32" or "float64"; empty when there is none.
        reference_notes: why a wider reference could not be had.
        divergences: at most one for each patched run.
        stock_varies: whether stock itself gave different tokens in different runs.
    """

    report: PatchReport
    stock: list[Generation] = field(default_factory=list)
    patched: list[Generation] = field(default_factory=list)
    stock_error: LogitsError | None = None
    patched_error: LogitsError | None = None
    difference: LogitsError | None = None
    no_reference: str = ""
    reference_dtype: str = ""
    reference_notes: list[str] = field(default_factory=list)
    divergences: list[Divergence] = field(default_factory=list)
    stock_varies: bool = False


def compare(
    model: nn.Module,
    prompt: Sequence[int],
    *,
    tokens: int = 32,
    runs: int = 3,
    profile: str | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Generate with the stock and the patched model in turn and compare every run.

    The logits are compared on the same context: the patched model and the reference are fed what
    stock generated in its first run.

    Args:
        model: a loaded model; it is unpatched when this returns or raises.
        prompt: token ids.
        tokens: tokens to generate in each run, two or more.
        runs: runs of each kind; stock and patched alternate in which goes first.
        profile: the release profile; None resolves it.
        progress: called with the number of tokens of each step.

    Returns:
        The comparison; `zmlx.validate.contract.judge` gives the verdict.

    Raises:
        ValueError: no run, or fewer than two tokens.
    """
    if runs < 1:
        raise ValueError(f"{runs} runs: at least one is needed")
    try:
        unpatch(model)
        _warm_up(model, prompt[:1])
        first = generate(model, prompt, tokens, keep_logits=True, on_token=progress)
        report: PatchReport = vars(patch(model, profile=profile))["_zmlx_patch_result"]
        result = Comparison(report)
        _warm_up(model, prompt[:1])
        forced = generate(
            model, prompt, tokens, forced=first.tokens, keep_logits=True, on_token=progress
        )
        _timed_runs(result, model, prompt, tokens, runs, profile, first, progress)
        _judge_logits(result, model, prompt, first, forced, progress)
        return result
    finally:
        unpatch(model)


def steps(prompt: Sequence[int], tokens: int, runs: int) -> int:
    """Return how many tokens `compare` reports to its progress function."""
    generation = len(prompt) + tokens - 1
    return generation * (2 * runs + 1) + generation


def _warm_up(model: nn.Module, prompt: Sequence[int]) -> None:
    """Compile what is compiled on first use, so that no timed run pays for it."""
    generate(model, prompt, 2)


def _timed_runs(
    result: Comparison,
    model: nn.Module,
    prompt: Sequence[int],
    tokens: int,
    runs: int,
    profile: str | None,
    first: Generation,
    progress: Progress | None,
) -> None:
    """Run both kinds in turn; the stock run that gave the logits is the first of its kind."""
    for number in range(runs):
        order = ("patched", "stock") if number % 2 == 0 else ("stock", "patched")
        for kind in order:
            if kind == "stock" and number == 0:
                result.stock.append(first)
            elif kind == "stock":
                unpatch(model)
                result.stock.append(generate(model, prompt, tokens, on_token=progress))
            else:
                patch(model, profile=profile)
                result.patched.append(generate(model, prompt, tokens, on_token=progress))


def _judge_logits(
    result: Comparison,
    model: nn.Module,
    prompt: Sequence[int],
    first: Generation,
    forced: Generation,
    progress: Progress | None,
) -> None:
    assert first.logits is not None
    assert forced.logits is not None
    truth = _reference_logits(result, unpatch(model), prompt, first.tokens, progress)
    result.difference = logits_error(forced.logits, first.logits)
    if truth is not None:
        result.stock_error = logits_error(first.logits, truth)
        result.patched_error = logits_error(forced.logits, truth)
    result.stock_varies = any(run.tokens != first.tokens for run in result.stock)
    for number, run in enumerate(result.patched):
        divergence = _divergence(number, run.tokens, first, truth)
        if divergence is not None:
            result.divergences.append(divergence)


def _reference_logits(
    result: Comparison,
    model: nn.Module,
    prompt: Sequence[int],
    tokens: Sequence[int],
    progress: Progress | None,
) -> mx.array | None:
    """Return the reference's logits (len(tokens), vocabulary), or None when memory is short."""
    wanted, available = reference_dtype(model), available_bytes()
    needed = extra_bytes(model, wanted)
    if available and needed > available:
        result.no_reference = (
            f"the reference needs {needed / 2**30:.1f} GiB for its largest layer, "
            f"and {available / 2**30:.1f} GiB are free"
        )
        return None
    context = [*prompt, *tokens[:-1]]
    for dtype in dict.fromkeys((wanted, mx.float32)):
        try:
            kept = _wide_logits(model, context, len(tokens), dtype)
        except (RuntimeError, ValueError, TypeError) as error:
            # Some operations of MLX have no float64 form; float32 is the truth then.
            result.reference_notes.append(f"no {dtype_name(dtype)} reference: {error}")
            continue
        result.reference_dtype = dtype_name(dtype)
        if progress is not None:
            progress(len(context))
        return kept
    result.no_reference = "; ".join(result.reference_notes)
    return None


def _wide_logits(model: nn.Module, context: Sequence[int], count: int, dtype: mx.Dtype) -> mx.array:
    """Return the reference's logits (count, vocabulary) at the end of the context, in float32."""
    with reference(model, dtype) as wide:
        logits: mx.array = wide(mx.array([context]), cache=make_prompt_cache(wide))
        kept = logits[0, -count:].astype(mx.float32)
        mx.eval(kept)
    return kept


def _divergence(
    number: int, tokens: Sequence[int], first: Generation, truth: mx.array | None
) -> Divergence | None:
    assert first.logits is not None
    for position, (stock, patched) in enumerate(zip(first.tokens, tokens, strict=True)):
        if stock == patched:
            continue
        row = first.logits[position]
        found = (number, position, stock, patched, _gap(row, stock, patched))
        if truth is None:
            return Divergence(*found)
        spread = mx.max(mx.abs(row - truth[position]))
        return Divergence(*found, _gap(truth[position], stock, patched), _number(spread))
    return None


def _gap(row: mx.array, one: int, other: int) -> float:
    return _number(row[one] - row[other])


def _number(value: mx.array) -> float:
    number: float = value.item()  # type: ignore[assignment]
    return number
