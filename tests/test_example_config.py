"""config.json: every setting is honoured, refused by name, or known to change nothing."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example_support import (
    PRESETS,
    ROOT,
    ROPE_CASES,
    CheckpointError,
    Config,
    abstract_weights,
    config_module,
    create_cache,
    forward,
    golden_folder,
    load_config,
    parse_config,
    rope_angle,
    strict_types,  # noqa: F401
)

PUBLISHED = json.loads((ROOT / "examples" / "deepseek_v4" / "tiny" / "config.json").read_text())
TRANSFORMERS = json.loads((golden_folder("yarn") / "config.json").read_text())


@cache
def program(config: Config) -> str:
    """What a prompt's chunk of 5 tokens computes, shapes and constants included."""
    arrays = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    empty = jax.eval_shape(partial(create_cache, config, 1, 600, chunk=5, layout="float32", dtype=jnp.float32))
    step = partial(forward, config=config, implementation="xla")
    return str(jax.make_jaxpr(step)(abstract_weights(config, jnp.float32), empty, arrays((1, 5)), arrays((1,))))


# Another value of each setting that changes what is computed.
CHANGES: dict[str, Any] = {
    "compress_rates": {"compressed_sparse_attention": 8, "heavily_compressed_attention": 128},
    "compress_rate_csa": 8,
    "compress_rate_hca": 64,
    "compress_ratios": [0, 4, 4],
    "compress_rope_theta": 9000.0,
    "hc_eps": 1e-4,
    "hc_mult": 2,
    "hc_sinkhorn_iters": 7,
    "hidden_size": 160,
    "index_head_dim": 64,
    "index_n_heads": 3,
    "index_topk": 63,
    "layer_types": ["sliding_attention", "compressed_sparse_attention", "sliding_attention"],
    "mlp_layer_types": ["hash_moe", "hash_moe", "moe"],
    "moe_intermediate_size": 96,
    "n_routed_experts": 9,
    "num_attention_heads": 6,
    "num_experts_per_tok": 3,
    "num_hash_layers": 2,
    "num_hidden_layers": 2,
    "o_groups": 1,
    "o_lora_rank": 48,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 128,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default"},
    "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 256},
    "rope_theta": 700.0,
    "routed_scaling_factor": 2.0,
    "sliding_window": 31,
    "swiglu_limit": 9.0,
    "vocab_size": 1000,
}

# Settings that the model has in one way only.
REFUSED: dict[str, Any] = {
    "attention_bias": True,
    "head_dim": 256,
    "hidden_act": "relu",
    "intermediate_size": 7,
    "mlp_bias": True,
    "model_type": "deepseek_v3",
    "n_group": 8,
    "n_shared_experts": 0,
    "norm_topk_prob": False,
    "num_key_value_heads": 4,
    "num_local_experts": 4,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]},
    "scoring_func": "softmax",
    "tie_word_embeddings": True,
    "topk_group": 4,
    "topk_method": "greedy",
}

# Settings that change nothing that decoding computes: names, training, the dtypes of a file, and what the command asks for itself.
NO_EFFECT: dict[str, Any] = {
    "architectures": ["Other"],
    "attention_dropout": 0.5,
    "bos_token_id": 5,
    "chunk_size_feed_forward": 3,
    "dtype": "bfloat16",
    "eos_token_id": 3,  # ends a request, see test_ends
    "expert_dtype": "fp4",
    "id2label": {"0": "a"},
    "initializer_range": 0.5,
    "is_encoder_decoder": False,
    "label2id": {"a": 0},
    "max_position_embeddings": 8192,  # bounds a request, see test_errors_are_one_line_and_exit_2
    "num_nextn_predict_layers": 3,
    "original_max_position_embeddings": 256,  # as YaRN has it
    "output_attentions": True,
    "output_hidden_states": True,
    "output_router_logits": True,
    "pad_token_id": 7,
    "problem_type": "regression",
    "return_dict": False,
    "router_aux_loss_coef": 0.5,
    "router_jitter_noise": 0.5,
    "torch_dtype": "bfloat16",
    "transformers_version": "6.0",
    "use_cache": False,
}


def with_setting(name: str, value: object) -> dict[str, Any]:
    raw = {**PUBLISHED, name: value}
    if name == "partial_rotary_factor":
        del raw["qk_rope_head_dim"]
    if name == "layer_types":
        del raw["compress_ratios"]
    if name == "rope_parameters":
        del raw["rope_scaling"]
    return raw


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_changes_the_program(name: str) -> None:
    assert program(parse_config(with_setting(name, CHANGES[name]))) != program(PRESETS["tiny"])


def test_a_program_does_not_change_by_itself() -> None:
    again = dataclasses.replace(PRESETS["tiny"], eos_token_ids=(1,))
    assert again != PRESETS["tiny"]
    assert program(again) == program(PRESETS["tiny"])


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_is_not_there_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        parse_config(with_setting(name, REFUSED[name]))


@pytest.mark.parametrize("name", NO_EFFECT)
def test_a_setting_has_no_effect(name: str) -> None:
    config = parse_config(with_setting(name, NO_EFFECT[name]))
    same = {field: getattr(PRESETS["tiny"], field) for field in ("eos_token_ids", "max_position_embeddings")}
    assert dataclasses.replace(config, **same) == PRESETS["tiny"]


def test_every_setting_is_in_one_of_the_lists() -> None:
    known = {*CHANGES, *REFUSED, *NO_EFFECT}
    assert len(known) == len(CHANGES) + len(REFUSED) + len(NO_EFFECT)
    derived = {"layers", "csa_ratio", "hca_ratio", "yarn", "eos_token_ids", "mtp", "packed"}
    ours = {field.name for field in dataclasses.fields(Config)} - derived
    assert {*PUBLISHED, *TRANSFORMERS, *ours, *config_module.FIXED} <= known


def test_every_setting_of_transformers_is_in_one_of_the_lists() -> None:
    v4 = pytest.importorskip("transformers.models.deepseek_v4", reason="needs the oracle extra: pip install -e '.[oracle]'")
    fields = {name for name in v4.DeepseekV4Config().to_dict() if not name.startswith("_")}
    assert fields <= {*CHANGES, *REFUSED, *NO_EFFECT}


NUMBERS = [f for f in dataclasses.fields(Config) if f.type in ("int", "float") and f.name not in ("csa_ratio", "hca_ratio")]
ZERO_IS_FINE = ("num_hash_layers", "hc_sinkhorn_iters")
CANNOT_BE: list[Any] = [None, "3", True, [1], {}, math.nan, math.inf, -1, 2**200]


@pytest.mark.parametrize("field", NUMBERS, ids=lambda field: field.name)
def test_a_number_that_cannot_be_is_refused_by_name(field: dataclasses.Field) -> None:
    extra = ([] if field.name in ZERO_IS_FINE else [0]) + ([2.5] if field.type == "int" else [])
    for value in CANNOT_BE + extra:
        with pytest.raises(ValueError, match=field.name) as caught:
            parse_config(with_setting(field.name, value))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (dict(o_groups=8), "o_groups must divide num_attention_heads = 4, got 8"),
        (dict(num_experts_per_tok=11), "num_experts_per_tok must be at most n_routed_experts = 8, got 11"),
        (dict(num_attention_heads=130, o_groups=2), "num_attention_heads must be an integer from 1 to 128, got 130"),
        (dict(index_head_dim=48), "index_head_dim must be at least qk_rope_head_dim = 64, got 48"),
        (dict(qk_rope_head_dim=96), "qk_rope_head_dim must be a multiple of 64, got 96"),
        (dict(qk_rope_head_dim=640, index_head_dim=640), "qk_rope_head_dim must be at most head_dim = 512, got 640"),
        (dict(partial_rotary_factor=0.5), "must agree, got [64, 256]"),
        (dict(partial_rotary_factor="0.125"), "partial_rotary_factor must be a number"),
        (dict(compress_rates={"heavily_compressed_attention": 0}), "hca_ratio must be an integer from 1"),
        (dict(compress_rates=[4, 128]), "compress_rates must be a JSON object, got [4, 128]"),
        (dict(compress_rate_csa="4"), "csa_ratio must be an integer"),
        (dict(compress_ratios=[0, 4]), "compress_ratios must name one of 0, 4, 128 for each of 3 layers"),
        (dict(compress_ratios=[0, 4, 64]), "compress_ratios must name one of 0, 4, 128"),
        (dict(compress_ratios={"0": 4}), "compress_ratios must name one of 0, 4, 128"),
        (dict(layer_types=["sliding_attention"] * 2), "layer_types must name one of sliding_attention"),
        (dict(layer_types=[["sliding_attention"]] * 3), "layer_types must name one of sliding_attention"),
        (dict(mlp_layer_types=["moe", "dense", "moe"]), "mlp_layer_types must name one of hash_moe, moe"),
        (dict(mlp_layer_types=["moe", "moe", "hash_moe"]), "mlp_layer_types must put every 'hash_moe' layer before"),
        (dict(quantization_config="fp8"), "quantization_config must be a JSON object, got 'fp8'"),
        (dict(quantization_config={"quant_method": "awq"}), "quantization_config.quant_method must be 'fp8', got 'awq'"),
        (dict(quantization_config={"fmt": "e5m2"}), "quantization_config.fmt must be 'e4m3', got 'e5m2'"),
        (dict(n_shared_experts=2), "n_shared_experts must be 1, got 2"),
        (dict(hidden_size=-128), "hidden_size must be an integer from 1 to 2147483647, got -128"),
        (dict(eos_token_id=[1, "2"]), "eos_token_id must be token ids from 0 to 2147483647, got [1, '2']"),
        (dict(eos_token_id=2**31), "eos_token_id must be token ids"),
        (dict(eos_token_id=-1), "eos_token_id must be token ids"),
        (dict(eos_token_id=True), "eos_token_id must be token ids"),
        (dict(eos_token_id={"a": 1}), "eos_token_id must be token ids"),
        (dict(original_max_position_embeddings=512), "original_max_position_embeddings, got"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_do_not_go_together(edit: dict[str, Any], message: str) -> None:
    message = message.replace("original_max_position_embeddings, got", "original_max_position_embeddings: must agree, got [512, 256]")
    with pytest.raises(ValueError) as caught:
        parse_config({**PUBLISHED, **edit})
    assert message in str(caught.value)


# --- Rotations


@pytest.mark.parametrize("name", ROPE_CASES)
def test_rotations(name: str) -> None:
    """Held to transformers' own in test_example_oracle.py; here to numbers worked out from its rules."""
    edit, (theta, compress_theta, size, factor) = ROPE_CASES[name]
    config = parse_config(edit(copy.deepcopy(TRANSFORMERS)))
    assert (config.rope_theta, config.compress_rope_theta, config.qk_rope_head_dim) == (theta, compress_theta, size)
    assert (config.yarn and config.yarn.factor) == factor
    pairs = np.arange(0, size, 2)
    main, compress = (np.asarray(rope_angle(jnp.ones((), jnp.int32), layers, config)) for layers in ("main", "compress"))
    np.testing.assert_allclose(main, float(theta) ** (-pairs / size), rtol=1e-5)
    plain = float(compress_theta) ** (-pairs / size)
    if factor is None:
        np.testing.assert_allclose(compress, plain, rtol=1e-5)
    else:
        assert np.all((compress <= plain * (1 + 1e-5)) & (compress >= plain / factor * (1 - 1e-5)))


ROPE_ERRORS = [
    (dict(main=dict(rope_type="yarn")), "rope_parameters.main must have rope_type 'default', got 'yarn'"),
    (dict(main=None), "'rope_theta' is missing"),
    (dict(compress=dict(rope_type="ntk")), "rope_parameters.compress must have rope_type 'yarn' or 'default', got 'ntk'"),
    (dict(compress=dict(attention_factor=0.9)), "rope_parameters.compress.attention_factor must be 1, got 0.9"),
    (dict(compress=dict(truncate=False)), "rope_parameters.compress.truncate must be True, got False"),
    (dict(compress=dict(mscale=0.7, mscale_all_dim=1.0)), "rope_parameters.compress.mscale must be 1.0, got 0.7"),
    (dict(compress=dict(factor=0.5)), "factor must be a number from 1"),
    (dict(compress=dict(factor=None)), "factor must be a number from 1"),
    (dict(compress=dict(factor="16")), "factor must be a number from 1"),
    (dict(compress=dict(beta_fast=-2)), "beta_fast must be a number"),
    (dict(compress=dict(beta_fast=1, beta_slow=9)), "beta_fast must be at least beta_slow = 9, got 1"),
    (dict(compress=dict(original_max_position_embeddings=64.5)), "original_max_position_embeddings must be an integer"),
    (dict(compress=dict(partial_rotary_factor=0.5)), "must agree, got [64, 64, 64, 256]"),
    (dict(compress=dict(rope_theta="10000")), "compress_rope_theta must be a number"),
    (dict(compress=[1]), "rope_parameters.compress must be a JSON object, got [1]"),
]


@pytest.mark.parametrize(("edit", "message"), ROPE_ERRORS, ids=[message[:40] for _, message in ROPE_ERRORS])
def test_rotations_that_the_model_does_not_make(edit: dict[str, Any], message: str, tmp_path) -> None:
    raw = copy.deepcopy(TRANSFORMERS)
    for part, changes in edit.items():
        raw["rope_parameters"][part] = {**raw["rope_parameters"][part], **changes} if isinstance(changes, dict) else changes
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError) as caught:
        load_config(tmp_path)
    assert message in str(caught.value)


def test_a_theta_that_names_neither_is_refused() -> None:
    raw = {**PUBLISHED, "rope_scaling": {**PUBLISHED["rope_scaling"], "rope_theta": 123.0}}
    with pytest.raises(ValueError, match=r"rope_scaling\.rope_theta must be rope_theta or compress_rope_theta, got 123\.0"):
        parse_config(raw)
    del raw["rope_scaling"]["rope_theta"]
    assert parse_config(raw) == PRESETS["tiny"]


def test_half_of_a_nested_dictionary_is_refused(tmp_path) -> None:
    raw = copy.deepcopy(TRANSFORMERS)
    del raw["rope_parameters"]["main"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="'main' is missing"):
        load_config(tmp_path)


# --- Files


@pytest.mark.parametrize(
    "text",
    [
        "[[[[",
        "[" * 100_000,
        '"text"',
        "3.5",
        "[1, 2]",
        "{}",
        "true",
        '{"model_type": "deepseek_v4"}',
        "1" * 5000,
        '{"a": Infinity}',
        "\xff",
    ],
    ids=range(11),
)
def test_a_file_that_is_no_config_is_one_line(text: str, tmp_path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError) as caught:
        load_config(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/config.json: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("raw", [PUBLISHED, TRANSFORMERS], ids=["published", "transformers"])
def test_a_file_that_is_cut_off_is_one_line(raw: dict[str, Any], tmp_path) -> None:
    text = json.dumps(raw, indent=1)
    for end in np.linspace(0, len(text) - 1, 20).astype(int):
        (tmp_path / "config.json").write_text(text[:end])
        with pytest.raises(CheckpointError, match="not readable as JSON"):
            load_config(tmp_path)


@pytest.mark.parametrize("raw", [PUBLISHED, TRANSFORMERS], ids=["published", "transformers"])
def test_a_setting_that_is_missing_or_null(raw: dict[str, Any]) -> None:
    """Its default, or an error with its name."""
    for name in raw:
        for other in ({key: value for key, value in raw.items() if key != name}, {**raw, name: None}):
            try:
                parse_config(other)
            except (KeyError, ValueError) as error:
                assert name in str(error) or (name, str(error)) in {  # noqa: PT017
                    ("layer_types", "'compress_ratios'"),
                    ("mlp_layer_types", "'num_hash_layers'"),
                }


@pytest.mark.parametrize(
    ("of_config", "of_generation", "ends"),
    [(None, 7, (7,)), (3, [5, 9], (5, 9)), (3, None, (3,)), ([2, 4], [], (2, 4)), (0, 0, (0,))],
)
def test_ends(of_config: object, of_generation: object, ends: tuple[int, ...], tmp_path) -> None:
    """generation_config.json has the last word, as in transformers' generate."""
    (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED, "eos_token_id": of_config}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": of_generation, "temperature": 0.6}))
    assert load_config(tmp_path).eos_token_ids == ends


@pytest.mark.parametrize("text", ["[]", "{", '{"eos_token_id": "7"}', "5"])
def test_a_broken_generation_config_is_named(text: str, tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"generation_config\.json: "):
        load_config(tmp_path)
