"""The converter gives the real model: its answer, its logits as experts, its tokenizer."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from zmlx.demo import moe, smollm
from zmlx.demo.prepare import prepare
from zmlx.validate.command import encode
from zmlx.validate.compare import compare
from zmlx.validate.contract import judge

PROMPT = "The capital of France is"


def test_the_answer_names_paris_stock_and_patched(dense):
    model, tokenizer = dense
    ids = encode(tokenizer, "What is the capital of France?")
    comparison = compare(model, ids, tokens=9, runs=1)
    assert (
        tokenizer.decode(list(comparison.stock[0].tokens[:7])) == "The capital of France is Paris."
    )
    assert comparison.stock[0].tokens[7] == tokenizer.eos_token_id
    assert comparison.report.patched_count > 200
    assert comparison.divergences == []
    assert judge(comparison) == []


@pytest.mark.parametrize("shape", ["moe", "moe-identical"])
def test_the_experts_compute_the_dense_function(checkpoints, dense, shape):
    model, tokenizer = dense
    experts, _ = mlx_lm.load(str(checkpoints(shape)))
    tokens = mx.array([tokenizer.encode(PROMPT)])
    truth, logits = model(tokens), experts(tokens)
    assert mx.abs(truth - logits).max().item() < 1e-3
    assert mx.abs(truth).max().item() > 10


def test_each_distinct_expert_matters(checkpoints, dense):
    model, tokenizer = dense
    experts, _ = mlx_lm.load(str(checkpoints("moe")))
    tokens = mx.array([tokenizer.encode(PROMPT)])
    block = experts.model.layers[3].block_sparse_moe.switch_mlp.down_proj
    block.scales[2] = block.scales[1]
    assert mx.abs(model(tokens) - experts(tokens)).max().item() > 0.05


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bit_scales_change_the_dtype_and_little_else(checkpoints, dtype):
    weights = mx.load(str(checkpoints(dtype=dtype) / "model.safetensors"))
    wide = mx.load(str(checkpoints() / "model.safetensors"))
    assert {str(a.dtype) for a in weights.values()} == {f"mlx.core.{dtype}", "mlx.core.uint32"}
    name = "model.layers.7.mlp.up_proj.scales"
    assert mx.allclose(weights[name].astype(mx.float32), wide[name], rtol=4e-3)


def test_rope_rows_are_put_back():
    # What GGUF does to a projection: the two halves of each head are interleaved.
    heads, size, inputs = 3, 8, 5
    rows = np.arange(heads * size * inputs).reshape(heads * size, inputs)
    interleaved = rows.reshape(heads, 2, size // 2, inputs).swapaxes(1, 2).reshape(-1, inputs)
    assert not np.array_equal(interleaved, rows)
    restored = smollm.unpermute_rope(mx.array(interleaved), heads)
    assert np.array_equal(np.array(restored), rows)


def test_the_tokenizer_splits_and_joins_as_the_model_expects(dense):
    _, tokenizer = dense
    text = "Zoë paid 1234 € —\n\tfor  naïve 漢字 🙂."
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("1234")) == 4  # digits one by one
    assert tokenizer.encode("<|im_start|>") == [1]
    ids = encode(tokenizer, "Hi")
    assert ids[0] == 1
    assert tokenizer.decode(ids).endswith("user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.eos_token == "<|im_end|>"


def test_the_folder_is_written_once_and_again_when_its_recipe_changes(checkpoints, monkeypatch):
    folder = checkpoints()
    written = (folder / "config.json").stat().st_mtime_ns
    assert prepare(folder.parent) == folder
    assert (folder / "config.json").stat().st_mtime_ns == written
    monkeypatch.setattr(smollm, "_RECIPE", smollm._RECIPE + 1)
    prepare(folder.parent)
    assert (folder / "config.json").stat().st_mtime_ns > written


def test_an_interrupted_conversion_leaves_no_checkpoint(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm, "_tokenizer", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path)
    assert not (tmp_path / "smollm2-dense-float32").exists()
    monkeypatch.undo()
    assert (prepare(tmp_path) / "tokenizer.json").exists()


def test_the_index_names_every_array(checkpoints):
    folder = checkpoints("moe")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    arrays = mx.load(str(folder / "model.safetensors"))
    assert set(index["weight_map"]) == set(arrays)
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in arrays.values())


def test_unknown_shapes_dtypes_and_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected shapes dense, moe"):
        prepare(tmp_path, "sparse")
    with pytest.raises(ValueError, match="float32, float16, bfloat16"):
        prepare(tmp_path, "dense", "int8")
    with pytest.raises(ValueError, match="expected one of"):
        smollm.read("float64")
    with pytest.raises(ValueError, match="not a multiple"):
        moe.distinct_experts(smollm.read(), experts=5)
    other = tmp_path / "other.gguf"
    mx.save_gguf(str(other), {"a": mx.zeros((4,))}, {"general.architecture": "mamba"})
    with pytest.raises(ValueError, match="expected 'llama'"):
        smollm.read(gguf=other)
