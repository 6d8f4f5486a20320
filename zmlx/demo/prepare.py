"""Write the demo's checkpoints into a folder, once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from zmlx.demo.moe import distinct_experts, identical_experts
from zmlx.demo.smollm import DTYPES, Checkpoint, gguf_path, is_current, read, write


def _dense(checkpoint: Checkpoint) -> Checkpoint:
    return checkpoint


#: name of a shape of the model -> how it is made from the dense one
SHAPES: dict[str, Callable[[Checkpoint], Checkpoint]] = {
    "dense": _dense,
    "moe": distinct_experts,
    "moe-identical": identical_experts,
}


def prepare(folder: Path, shape: str = "dense", dtype: str = "float32") -> Path:
    """Write one checkpoint of SmolLM2-135M-Instruct, unless it is there already.

    Args:
        folder: where the checkpoints lie; the new one is `folder/smollm2-SHAPE-DTYPE`.
        shape: "dense" (llama), "moe" (mixtral, four distinct experts) or "moe-identical".
        dtype: "float32", "float16" or "bfloat16": of scales, biases, norms and activations.

    Returns:
        The checkpoint's folder, which `mlx_lm.load` takes.

    Raises:
        zmlx.demo.smollm.DemoUnavailable: the package with the model is not installed.
        ValueError: an unknown shape or dtype.
    """
    if shape not in SHAPES or dtype not in DTYPES:
        allowed = f"shapes {', '.join(SHAPES)}; dtypes {', '.join(DTYPES)}"
        raise ValueError(f"no checkpoint {shape!r} with {dtype!r}; expected {allowed}")
    target = folder / f"smollm2-{shape}-{dtype}"
    file = gguf_path()
    manifest = {"source": file.name, "bytes": file.stat().st_size, "shape": shape, "dtype": dtype}
    if is_current(target, manifest):
        return target
    return write(SHAPES[shape](read(dtype, file)), target, manifest)
