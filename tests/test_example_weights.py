"""Reading checkpoints: dialects of names, quantised tensors, and the one line that each kind of bad folder gets."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from example_support import (
    PRESETS,
    RENAMES,
    CheckpointError,
    Pieces,
    Tensor,
    dequantize,
    golden,
    golden_folder,
    load_config,
    load_weights,
    open_checkpoint,
    parse_config,
    published_name,
    safetensors,
    schema,
    strict_types,  # noqa: F401
)

QUANTISED = dataclasses.replace(
    PRESETS["tiny"],
    hidden_size=160,  # not a multiple of 128: the last block of a row is a part
    q_lora_rank=64,
    vocab_size=32,
    layers=("swa", "csa"),
    n_routed_experts=2,
    moe_intermediate_size=96,
    yarn=None,
)


def leaves(config) -> list[Tensor]:
    return jax.tree.leaves(schema(config), is_leaf=lambda leaf: isinstance(leaf, Tensor))


def quantised_checkpoint(config) -> dict[str, np.ndarray]:
    """Random bytes under the published names, stored as DeepSeek stores each tensor."""
    random, tensors = np.random.default_rng(0), {}
    for tensor in leaves(config):
        experts = range(tensor.shape[0]) if "*" in tensor.name else [0]
        shape = tensor.shape[1:] if "*" in tensor.name else tensor.shape
        for expert in experts:
            name = tensor.name.replace("*", str(expert))
            scale_name = name.removesuffix(".weight") + ".scale"
            if tensor.stored == "fp8":
                tensors[name] = random.standard_normal(shape).astype(ml_dtypes.float8_e4m3fn)
                grid = -(-shape[0] // 128), -(-shape[1] // 128)
            elif tensor.stored == "fp4":
                tensors[name] = random.integers(-128, 128, (shape[0], shape[1] // 2)).astype(np.int8)
                grid = shape[0], shape[1] // 32
            elif tensor.stored == "int64":
                tensors[name] = random.integers(0, config.n_routed_experts, shape)
                continue
            else:
                dtype = ml_dtypes.bfloat16 if tensor.stored == "bf16" else np.float32
                tensors[name] = random.standard_normal(shape).astype(dtype)
                continue
            tensors[scale_name] = (2.0 ** random.integers(-3, 4, grid)).astype(ml_dtypes.float8_e8m0fnu)
    return tensors


def test_quantised_checkpoint_is_dequantised_on_load(tmp_path):
    tensors = quantised_checkpoint(QUANTISED)
    safetensors.write(tmp_path / "model.safetensors", tensors)
    weights = load_weights(tmp_path, QUANTISED, jnp.float32)

    fp8, scale = (tensors[f"layers.1.attn.wq_a.{kind}"].astype(np.float32) for kind in ("weight", "scale"))
    expected = np.array([[fp8[i, j] * scale[i // 128, j // 128] for j in range(160)] for i in range(64)])
    np.testing.assert_array_equal(weights["layers"][1]["attn"]["wq_a"], expected)

    fp4, scale = (tensors[f"layers.1.ffn.experts.1.w3.{kind}"] for kind in ("weight", "scale"))
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]

    def e2m1(i: int, j: int) -> float:
        nibble = (int(fp4[i, j // 2]) & 255) >> 4 * (j % 2) & 15
        return values[nibble & 7] * (-1 if nibble & 8 else 1) * float(scale[i, j // 32])

    expected = np.array([[e2m1(i, j) for j in range(160)] for i in range(96)], np.float32)
    np.testing.assert_array_equal(weights["layers"][1]["ffn"]["experts"]["w3"][1], expected)


def test_scales_may_be_floats_or_bytes():
    values = np.arange(4, dtype=np.float32).reshape(2, 2).astype(ml_dtypes.float8_e4m3fn)
    for scale in (np.float32(0.25), np.uint8(125), np.array(0.25, ml_dtypes.float8_e8m0fnu)):
        np.testing.assert_array_equal(dequantize(values, np.full((1, 1), scale)), values.astype(np.float32) / 4)


def test_dtype_is_of_the_matrices_alone():
    config, _, _ = golden("hca")
    weights = load_weights(golden_folder("hca"), config)
    layer = weights["layers"][0]
    assert layer["attn"]["wq_a"].dtype == weights["embed"].dtype == jnp.bfloat16
    assert layer["attn"]["sink"].dtype == layer["attn_hc"]["fn"].dtype == layer["attn_norm"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("transformers_name", "published"),
    [
        ("model.embed_tokens.weight", "embed.weight"),
        ("lm_head.weight", "head.weight"),
        ("model.hc_head.hc_fn", "hc_head_fn"),
        ("model.layers.7.self_attn.q_a_norm.weight", "layers.7.attn.q_norm.weight"),
        ("model.layers.7.self_attn.o_b_proj.weight_scale_inv", "layers.7.attn.wo_b.scale"),
        ("model.layers.7.attn.norm.weight", "layers.7.attn.kv_norm.weight"),
        ("model.layers.7.self_attn.compressor.gate_proj.weight", "layers.7.attn.compressor.wgate.weight"),
        ("model.layers.7.self_attn.compressor.indexer.kv_norm.weight", "layers.7.attn.indexer.compressor.norm.weight"),
        ("model.layers.7.self_attn.compressor.indexer.q_b_proj.weight", "layers.7.attn.indexer.wq_b.weight"),
        (
            "model.layers.7.self_attn.compressor.indexer.scorer.weights_proj.weight",
            "layers.7.attn.indexer.weights_proj.weight",
        ),
        ("model.layers.7.ffn_hc.scale", "layers.7.hc_ffn_scale"),
        ("model.layers.7.mlp.gate.e_score_correction_bias", "layers.7.ffn.gate.bias"),
        ("model.layers.7.mlp.experts.3.down_proj.weight", "layers.7.ffn.experts.3.w2.weight"),
        ("model.layers.7.mlp.shared_experts.gate_proj.weight", "layers.7.ffn.shared_experts.w1.weight"),
    ],
)
def test_transformers_names(transformers_name, published):
    assert published_name(transformers_name) == published
    assert published_name(published) == published


def test_published_names_are_left_alone():
    for preset in ("tiny", "v4-flash"):
        for tensor in leaves(PRESETS[preset]):
            assert published_name(tensor.name) == tensor.name
    assert len(RENAMES) == len(dict(RENAMES))


def test_published_config_dialect():
    raw = json.loads((golden_folder("yarn").parents[2] / "examples/deepseek_v4/tiny/config.json").read_text())
    assert parse_config(raw) == PRESETS["tiny"]
    # As published: one more ratio, of the layer that predicts the token after next.
    assert parse_config({**raw, "compress_ratios": [*raw["compress_ratios"], 0]}) == PRESETS["tiny"]


def write(folder, tensors, config_from):
    safetensors.write(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text((config_from / "config.json").read_text())


@pytest.fixture
def broken(tmp_path):
    """A function from an edit of the hca checkpoint's tensors to the message that loading it gives."""

    def message(edit) -> str:
        tensors = {name: np.asarray(array) for name, array in open_checkpoint(golden_folder("hca")).items()}
        edit(tensors)
        write(tmp_path, tensors, golden_folder("hca"))
        with pytest.raises(CheckpointError) as caught:
            load_weights(tmp_path, load_config(tmp_path))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return message


def test_a_missing_tensor_is_named(broken):
    assert "tensor layers.2.attn.wkv.weight is missing" in broken(lambda t: t.pop("layers.2.attn.wkv.weight"))


def test_a_missing_expert_is_named(broken):
    assert "tensor layers.1.ffn.experts.3.w2.weight is missing" in broken(lambda t: t.pop("layers.1.ffn.experts.3.w2.weight"))


def test_a_shape_that_does_not_fit_is_named(broken):
    message = broken(lambda t: t.update({"head.weight": t["head.weight"][:-1]}))
    assert message.endswith("tensor head.weight must have shape (96, 32), got (95, 32)")


def test_a_missing_scale_is_named(broken):
    name = "layers.0.attn.wkv.weight"
    message = broken(lambda t: t.update({name: t[name].astype(ml_dtypes.float8_e4m3fn)}))
    assert "tensor layers.0.attn.wkv.scale is missing" in message


def test_a_truncated_file_is_refused(tmp_path):
    path = golden_folder("hca") / "model-00001-of-00004.safetensors"
    (tmp_path / "model.safetensors").write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        open_checkpoint(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"head.weight": "model-00001.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"model-00001\.safetensors: named in model\.safetensors\.index\.json but not there"):
        open_checkpoint(tmp_path)


def test_pieces_take_the_longest_that_fits():
    pieces = Pieces(["a", "b", "ab", "abb", " "])
    assert pieces.encode("abbab aé") == [3, 2, 4, 0]
    assert pieces.decode([3, 2, 4, 0]) == "abbab a"
