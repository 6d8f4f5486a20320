"""`zmlx bench dispatches MODEL`: how many kernels a token launches, without launching any.

A step of the model is traced: one token at the end of a context, as `mlx_lm.generate` decodes it
greedily, from the token to the next token and its log-probabilities. Stock is what mlx-lm launches:
every operation on its own, but for the functions that mlx-lm compiles. What has to be known of the
weights are shapes and dtypes, so a model of any size takes little memory.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from zmlx.console import wide_console

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

    from zmlx.graph.nodes import Graph

#: Length of the context of the step, in tokens.
CONTEXT = 300
#: variant ("stock", "patched") -> operation -> launches
Counts = Mapping[str, Mapping[str, int]]


def hollow(model: nn.Module) -> nn.Module:
    """Put zeros that take no memory in place of a model's parameters, and return it.

    What else its modules hold, such as the frequencies of a rotary embedding, is evaluated.
    """
    import mlx.core as mx  # noqa: PLC0415
    from mlx.utils import tree_map  # noqa: PLC0415

    model.update(tree_map(_zeros, model.parameters()))
    held = [value for _, module in model.named_modules() for value in module.values()]
    mx.eval([value for value in held if isinstance(value, mx.array)])
    return model


def _zeros(like: mx.array) -> mx.array:
    import mlx.core as mx  # noqa: PLC0415

    zeros = mx.broadcast_to(mx.zeros((), like.dtype), like.shape)
    mx.eval(zeros)
    return zeros


def stock_graph(model: nn.Module, context: int = CONTEXT) -> Graph:
    """Return the graph of one decoded token, with what mlx-lm compiles joined.

    Args:
        model: a model of mlx-lm; it is not evaluated.
        context: tokens before this one. At a multiple of 256 the caches grow.

    Raises:
        TraceError: the step cannot be traced.
    """
    import mlx.core as mx  # noqa: PLC0415

    from zmlx.graph.compiled import fused, trace_compiled  # noqa: PLC0415
    from zmlx.graph.step import Step  # noqa: PLC0415

    step = Step(model, _filled_cache(model, context))

    def decoded(token: mx.array, *arrays: mx.array) -> list[mx.array]:
        logits, *after = step(token[None], *arrays)
        logits = logits[:, -1, :]
        logprobs = logits - mx.logsumexp(logits, keepdims=True)
        return [mx.argmax(logprobs, axis=-1), logprobs.squeeze(0), *after]

    graph, regions = trace_compiled(decoded, mx.array([0], mx.int32), *step.arrays)
    return fused(graph, regions)


def _filled_cache(model: nn.Module, context: int) -> list[Any]:
    """Return the model's caches after some tokens, with zeros in them."""
    import mlx.core as mx  # noqa: PLC0415
    from mlx_lm.models.cache import make_prompt_cache  # noqa: PLC0415

    from zmlx.graph.step import cache_arrays, fill_cache  # noqa: PLC0415

    cache: list[Any] = make_prompt_cache(model)
    model(mx.zeros((1, context), mx.int32), cache=cache)
    # What the cache holds has its shape now; nothing may compute it.
    fill_cache(cache, [_zeros(array) for array in cache_arrays(cache)])
    return cache


@dataclass(frozen=True)
class Recorded:
    """The part of a step that the pattern decode_step replays on GPUs.

    Attributes:
        stock: the graph of the part as mlx-lm has it.
        program: what is replayed in its place.
    """

    stock: Graph
    program: Graph


def recorded(model: nn.Module, context: int = CONTEXT) -> Recorded | None:
    """Return what is replayed of a decoded token; None where the model's forward runs.

    Args:
        model: a model of mlx-lm; it is not evaluated.
        context: tokens before this one.
    """
    import mlx.core as mx  # noqa: PLC0415

    from zmlx.graph.caches import Layout, ProgramRefused  # noqa: PLC0415
    from zmlx.graph.compiled import fused, trace_compiled  # noqa: PLC0415
    from zmlx.graph.program import traced_step  # noqa: PLC0415
    from zmlx.graph.step import Step  # noqa: PLC0415
    from zmlx.graph.trace import TraceError  # noqa: PLC0415
    from zmlx.patch.pattern import PatchConfig, Proposal, patterns  # noqa: PLC0415

    cache = _filled_cache(model, context)
    for _, module in model.named_modules():
        verdict = patterns()["decode_step"].examine(module, "", None, PatchConfig("cuda"))
        if not isinstance(verdict, Proposal) or module is model:
            continue
        part = Step(module, cache)
        graph, regions = trace_compiled(part, mx.zeros((1, 1), mx.uint32), *part.arrays)
        try:
            layout = Layout.of(cache)
            step = traced_step(lambda x, c, m=module: m(x, cache=c), layout, mx.uint32, tried=False)  # type: ignore[misc]
        except (ProgramRefused, TraceError):
            return None
        # What is replayed is joined by mx.compile.
        return Recorded(fused(graph, regions), fused(step.graph))
    return None


def count(model: nn.Module, backends: Iterable[str], context: int = CONTEXT) -> dict[str, Counts]:
    """Return the kernels per token: backend -> variant -> operation -> launches.

    Raises:
        TraceError: the step cannot be traced.
        ValueError: kernels of a backend cannot be counted.
    """
    from zmlx.graph.dispatches import dispatches  # noqa: PLC0415
    from zmlx.runtime.sampling import second_launches  # noqa: PLC0415

    stock, replayed = stock_graph(model, context), recorded(model, context)
    found: dict[str, Counts] = {}
    for backend in backends:
        counts = {"stock": dispatches(stock, backend)}
        if replayed is not None:
            around = Counter(counts["stock"])
            around.subtract(dispatches(replayed.stock, backend))
            around.update(dispatches(replayed.program, backend))
            around.update(second_launches(stock.outputs[1].shape[-1]))
            counts["patched"] = {op: n for op, n in around.most_common() if n > 0}
        found[backend] = counts
    return found


def _table(title: str, counted: Mapping[str, Counts]) -> Table:
    result = Table(title=title, title_justify="left", show_footer=True)
    columns = [(backend, variant) for backend, counts in counted.items() for variant in counts]
    result.add_column("operation", footer="kernels per token", no_wrap=True)
    for backend, variant in columns:
        total = sum(counted[backend][variant].values())
        result.add_column(f"{backend}, {variant}", justify="right", footer=f"{total:,}")
    most: dict[str, int] = {}
    for backend, variant in columns:
        for op, launches in counted[backend][variant].items():
            most[op] = max(most.get(op, 0), launches)
    for op in sorted(most, key=lambda name: (-most[name], name)):
        cells = [counted[backend][variant].get(op, 0) for backend, variant in columns]
        result.add_row(op, *(f"{cell:,}" if cell else "" for cell in cells))
    return result


def _model(folder: str | None, shape: str | None) -> nn.Module:
    if (folder is None) == (shape is None):
        raise click.UsageError("give a model's folder or --shape, one of them")
    if shape is not None:
        from zmlx.bench.shapes import unfilled_model  # noqa: PLC0415

        try:
            return hollow(unfilled_model(shape))
        except ValueError as error:
            raise click.ClickException(str(error)) from error
    from zmlx.bench.loading import LoadError, load_checkpoint  # noqa: PLC0415

    try:
        return hollow(load_checkpoint(str(folder), lazy=True)[0])
    except LoadError as error:
        raise click.ClickException(str(error)) from error


@click.command(name="dispatches")
@click.argument("model", required=False)
@click.option("--shape", help="A published shape instead of a model.")
@click.option(
    "--backend",
    type=click.Choice(["metal", "cuda", "both"]),
    default="both",
    show_default=True,
    help="Whose kernels are counted.",
)
@click.option(
    "--context",
    type=click.IntRange(min=1),
    default=CONTEXT,
    show_default=True,
    help="Tokens before the one that is decoded.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: str | None, shape: str | None, backend: str, context: int, as_json: bool
) -> None:
    """Count the kernels that a token of MODEL launches, stock and patched.

    MODEL is a checkpoint's folder. Nothing of it is computed, so no GPU is needed and a model of
    any size fits. The step is traced on this machine: where mlx-lm has a Metal kernel of its own
    (gated delta rules, state spaces), the operations in its place are counted elsewhere.
    """
    from zmlx.graph.trace import TraceError  # noqa: PLC0415

    loaded = _model(model, shape)
    backends = ("metal", "cuda") if backend == "both" else (backend,)
    name = shape or str(model)
    try:
        counted = count(loaded, backends, context)
    except TraceError as error:
        raise click.ClickException(f"{name}: {error}") from error
    if as_json:
        print(json.dumps(_report(name, context, counted), indent=2))
        return
    title = f"{name}: kernels of one token after {context}"
    wide_console().print(_table(title, counted))


def _report(name: str, context: int, counted: Mapping[str, Counts]) -> dict[str, Any]:
    return {
        "model": name,
        "context": context,
        "kernels": {
            backend: {
                variant: {"total": sum(by_op.values()), "by_operation": dict(by_op)}
                for variant, by_op in counts.items()
            }
            for backend, counts in counted.items()
        },
    }
