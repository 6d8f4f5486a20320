"""A process that decodes for some seconds whenever it reads their number from stdin.

python worker.py CHECKPOINT
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterator

import mlx.core as mx
from mlx_lm.generate import generate_step

from zmlx.backend.cpu import native
from zmlx.bench.decode import plan_of
from zmlx.bench.loading import load_checkpoint
from zmlx.patch import patch

PROMPT = "The capital of France is"
#: Tokens after which the text starts anew, so that all contexts are equally long.
LAP = 65


def laps(model: object, prompt: mx.array) -> Iterator[list[float]]:
    """Yield for each text the times at which its tokens came, as long as more are asked for."""
    for _ in itertools.count():
        times: list[float] = []
        for _ in generate_step(prompt, model, max_tokens=LAP):
            times.append(time.perf_counter())
            yield times


def decode(model: object, prompt: mx.array, seconds: float) -> dict[str, object]:
    """Decode for some seconds; return the time of each step after a text's first token."""
    ends, used = time.perf_counter() + seconds, time.process_time()
    began = time.perf_counter()
    steps: list[float] = []
    for times in laps(model, prompt):
        if times[-1] > ends:
            break
        if len(times) > 1:
            steps.append(times[-1] - times[-2])
    wall = time.perf_counter() - began
    return {"steps": steps, "cores": (time.process_time() - used) / wall}


def main() -> None:
    model, tokenizer = load_checkpoint(sys.argv[1])
    patch(model)
    prompt = mx.array(tokenizer.encode(PROMPT))
    decode(model, prompt, 1.0)
    plan = plan_of(vars(model)["_zmlx_patch_result"])
    print(json.dumps({"threads": native.load().num_threads(), "plan": plan}), flush=True)
    for line in sys.stdin:
        print(json.dumps(decode(model, prompt, float(line))), flush=True)


if __name__ == "__main__":
    main()
