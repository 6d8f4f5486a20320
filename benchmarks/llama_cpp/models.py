"""GGUF files of the published shapes, with random 4-bit weights (Q4_0, 4.5 bits a weight)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from zmlx.bench.shapes import SHAPES

#: of the file's type, general.file_type: mostly Q4_0
MOSTLY_Q4_0 = 2
SIGMOID = 2


def gguf_of(shape: str, folder: Path, sources: Path) -> Path:
    """Return a GGUF file of a shape, written unless it is there.

    Args:
        shape: a name in `zmlx.bench.shapes.SHAPES`.
        folder: where the files lie.
        sources: llama.cpp, whose Python package writes them.
    """
    file = folder / f"{shape}.gguf"
    if not file.exists():
        sys.path.insert(0, str(sources / "gguf-py"))
        gguf = import_module("gguf")
        part = file.with_suffix(".part")
        config = SHAPES[shape]
        describe, tensors = _KINDS[config["model_type"]]
        writer = gguf.GGUFWriter(str(part), describe.__name__)
        describe(writer, config)
        writer.add_tokenizer_model("no_vocab")
        writer.add_vocab_size(config["vocab_size"])
        writer.add_file_type(MOSTLY_Q4_0)
        random = np.random.default_rng(0)
        for name, size in tensors(config):
            if len(size) == 1 or name.endswith(("gate_inp.weight", "conv.weight")):
                writer.add_tensor(name, np.ones(size, np.float32))
            else:
                writer.add_tensor(
                    name, _q4_0(random, size), raw_dtype=gguf.GGMLQuantizationType.Q4_0
                )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        part.rename(file)
    return file


def _q4_0(random: np.random.Generator, size: tuple[int, ...]) -> np.ndarray:
    """Return blocks of 32 weights: a float16 scale and 16 bytes."""
    *rows, columns = size
    blocks = np.empty((*rows, columns // 32, 18), np.uint8)
    blocks[..., :2] = np.frombuffer(np.float16(0.005).tobytes(), np.uint8)
    blocks[..., 2:] = random.integers(0, 256, (*rows, columns // 32, 16), np.uint8)
    return blocks.reshape(*rows, columns // 32 * 18)


def _common(writer: Any, c: dict[str, Any], eps: float) -> None:
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_context_length(4096)
    writer.add_embedding_length(c["hidden_size"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_layer_norm_rms_eps(eps)
    writer.add_rope_freq_base(c["rope_theta"])


def llama(writer: Any, c: dict[str, Any]) -> None:
    """Write the metadata of a llama."""
    _common(writer, c, c["rms_norm_eps"])
    writer.add_head_count_kv(c["num_key_value_heads"])
    writer.add_rope_dimension_count(c["head_dim"])


def lfm2moe(writer: Any, c: dict[str, Any]) -> None:
    """Write the metadata of an LFM2 with experts."""
    _common(writer, c, c["norm_eps"])
    heads = c["num_key_value_heads"]
    layers = range(c["num_hidden_layers"])
    writer.add_head_count_kv([heads if i in c["full_attn_idxs"] else 0 for i in layers])
    writer.add_shortconv_l_cache(c["conv_L_cache"])
    writer.add_leading_dense_block_count(c["num_dense_layers"])
    writer.add_expert_feed_forward_length(c["moe_intermediate_size"])
    writer.add_expert_count(c["num_experts"])
    writer.add_expert_used_count(c["num_experts_per_tok"])
    writer.add_uint32("lfm2moe.expert_gating_func", SIGMOID)


Tensors = Iterator[tuple[str, tuple[int, ...]]]


def _attention(at: str, c: dict[str, Any]) -> Tensors:
    width = c["hidden_size"]
    narrow = width // c["num_attention_heads"] * c["num_key_value_heads"]
    yield f"{at}attn_q.weight", (width, width)
    yield f"{at}attn_k.weight", (narrow, width)
    yield f"{at}attn_v.weight", (narrow, width)
    yield f"{at}attn_output.weight", (width, width)


def _gated(at: str, suffix: str, width: int, inner: int, *experts: int) -> Tensors:
    yield f"{at}ffn_gate{suffix}.weight", (*experts, inner, width)
    yield f"{at}ffn_up{suffix}.weight", (*experts, inner, width)
    yield f"{at}ffn_down{suffix}.weight", (*experts, width, inner)


def _llama_tensors(c: dict[str, Any]) -> Tensors:
    width = c["hidden_size"]
    yield "token_embd.weight", (c["vocab_size"], width)
    yield "output_norm.weight", (width,)
    for i in range(c["num_hidden_layers"]):
        at = f"blk.{i}."
        yield f"{at}attn_norm.weight", (width,)
        yield f"{at}ffn_norm.weight", (width,)
        yield from _attention(at, c)
        yield from _gated(at, "", width, c["intermediate_size"])


def _lfm2_tensors(c: dict[str, Any]) -> Tensors:
    width, head = c["hidden_size"], c["hidden_size"] // c["num_attention_heads"]
    yield "token_embd.weight", (c["vocab_size"], width)
    yield "token_embd_norm.weight", (width,)
    for i in range(c["num_hidden_layers"]):
        at = f"blk.{i}."
        yield f"{at}attn_norm.weight", (width,)
        yield f"{at}ffn_norm.weight", (width,)
        if i in c["full_attn_idxs"]:
            yield f"{at}attn_q_norm.weight", (head,)
            yield f"{at}attn_k_norm.weight", (head,)
            yield from _attention(at, c)
        else:
            yield f"{at}shortconv.conv.weight", (width, c["conv_L_cache"])
            yield f"{at}shortconv.in_proj.weight", (3 * width, width)
            yield f"{at}shortconv.out_proj.weight", (width, width)
        if i < c["num_dense_layers"]:
            yield from _gated(at, "", width, c["intermediate_size"])
        else:
            yield f"{at}ffn_gate_inp.weight", (c["num_experts"], width)
            yield f"{at}exp_probs_b.bias", (c["num_experts"],)
            yield from _gated(at, "_exps", width, c["moe_intermediate_size"], c["num_experts"])


_KINDS: dict[str, tuple[Callable[..., None], Callable[..., Tensors]]] = {
    "llama": (llama, _llama_tensors),
    "lfm2_moe": (lfm2moe, _lfm2_tensors),
}
