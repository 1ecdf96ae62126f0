"""The example model against transformers, run here and now (the `oracle` extra)."""

from __future__ import annotations

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example_support import (
    EXACT,
    ROPE_CASES,
    decode,
    golden_folder,
    load_config,
    load_weights,
    parse_config,
    rope_angle,
    score_text,
    strict_types,  # noqa: F401
)

pytest.importorskip("transformers", minversion="5.24", reason="needs the oracle extra: pip install -e '.[oracle]'")
pytest.importorskip("torch", reason="needs the oracle extra: pip install -e '.[oracle]'")
import hf_oracle
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding

# What transformers announces of its next releases is shown, and no failure of ours.
pytestmark = [pytest.mark.filterwarnings(f"default::{kind}") for kind in ("FutureWarning", "DeprecationWarning")]


@pytest.fixture(scope="module", params=sorted(hf_oracle.CONFIGS))
def case(request, tmp_path_factory):
    """(config, weights, transformers' model, its answers)."""
    model = hf_oracle.make_model(request.param, seed=1)
    folder = tmp_path_factory.mktemp(request.param)
    hf_oracle.save(model, folder)
    config = load_config(folder)
    weights = load_weights(folder, config, jnp.float32)
    return config, weights, model, hf_oracle.answers(model, hf_oracle.prompt_ids(request.param, seed=1))


@pytest.mark.parametrize("name", ROPE_CASES)
def test_rotations(name):
    """test_example_config.py says what each case is."""
    raw = ROPE_CASES[name][0](json.loads((golden_folder("yarn") / "config.json").read_text()))
    config, position = parse_config(copy.deepcopy(raw)), np.arange(0, 5000, 37)
    rotary = DeepseekV4RotaryEmbedding(hf_oracle.DeepseekV4Config(**raw))
    for layers in ("main", "compress"):
        assert getattr(rotary, f"{layers}_attention_scaling") == 1
        wanted = position[:, None] * getattr(rotary, f"{layers}_inv_freq").numpy().astype(np.float64)
        np.testing.assert_allclose(rope_angle(jnp.array(position), layers, config), wanted, rtol=2e-6, atol=1e-6)


def test_logits_and_greedy_tokens(case):
    config, weights, _, answers = case
    text = np.concatenate([answers["prompt"], answers["tokens"]])
    n = len(answers["prompt"])
    found = score_text(config, weights, text, single_from=n)
    np.testing.assert_allclose(found[:n], answers["prefill_logits"], rtol=0, atol=EXACT)
    np.testing.assert_allclose(found[n:], answers["decode_logits"], rtol=0, atol=EXACT)
    tokens = decode(config, weights, [answers["prompt"]], hf_oracle.DECODED, max_tokens=len(text))
    assert tokens == [answers["tokens"].tolist()]


def test_module_names_load_as_published_names_do(case, tmp_path):
    config, weights, model, _ = case
    hf_oracle.save(model, tmp_path, save_original_format=False)
    again = load_weights(tmp_path, config, jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, weights, again)


def test_fp8_cache(case):
    """Equal to rounding for the first tokens. From where float32 noise decides between two fp8 values, it depends on model and
    machine how far the two part (the models are random, and a pick of another expert is a jump): always far less than what
    fp8 itself is worth, as test_example_model.py has it in numbers for two models."""
    config, weights, model, answers = case
    wanted = hf_oracle.packed_answers(model, answers["prompt"])
    text = np.concatenate([wanted["prompt"], wanted["tokens"]])
    wanted = np.concatenate([wanted["prefill_logits"], wanted["decode_logits"]])

    def errors(**cache):
        return np.abs(score_text(config, weights, text, **cache) - wanted).max(axis=-1)

    found, exact = errors(layout="fp8_ds_mla"), errors()
    assert found[:2].max() < EXACT
    assert np.median(found) < np.median(exact) / 5
