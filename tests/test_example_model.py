"""The example model against what transformers answered (tests/data), and against itself."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example_support import (
    EXACT,
    GOLDEN,
    Cache,
    Sampling,
    State,
    decode,
    draw,
    golden,
    golden_length,
    score_text,
    strict_types,  # noqa: F401
)


@pytest.mark.parametrize(("name", "implementation"), [("yarn", None), ("yarn", "xla"), ("hca", None)])
def test_logits_equal_transformers(name, implementation):
    config, weights, answers = golden(name)
    text = np.concatenate([answers["prompt"], answers["tokens"]])
    n = len(answers["prompt"])
    found = score_text(config, weights, text, single_from=n, implementation=implementation)
    np.testing.assert_allclose(found[:n], answers["prefill_logits"], rtol=0, atol=EXACT)
    np.testing.assert_allclose(found[n:], answers["decode_logits"], rtol=0, atol=EXACT)


def test_greedy_tokens_equal_transformers():
    """Through `prefill` and `generate`. The command's test does the same for the other model."""
    config, weights, answers = golden("yarn")
    found = decode(config, weights, [answers["prompt"]], len(answers["tokens"]), max_tokens=golden_length("yarn"))
    assert found == [answers["tokens"].tolist()]


def test_chunks_equal_single_steps():
    """140 tokens: past one HCA window, and 27 at a time, which neither 4 nor 128 divides."""
    config, weights, answers = golden("hca")
    text, max_tokens = answers["prompt"][:140], golden_length("hca")
    one_by_one = score_text(config, weights, text, single_from=0, max_tokens=max_tokens)
    in_chunks = score_text(config, weights, text, count=27, max_tokens=max_tokens)
    np.testing.assert_allclose(in_chunks, one_by_one, rtol=0, atol=EXACT)


@pytest.mark.parametrize("name", GOLDEN)
def test_fp8_cache_equals_transformers_over_a_simulated_one(name):
    """Equal to rounding until a latent lies so near the middle of two fp8 values that float32 noise decides between them
    (the first tokens); from there the two differ by what one such step in one of 448 numbers is worth."""
    config, weights, answers = golden(name)
    text = np.concatenate([answers["fp8_prompt"], answers["fp8_tokens"]])
    wanted = np.concatenate([answers["fp8_prefill_logits"], answers["fp8_decode_logits"]])
    found = score_text(config, weights, text, layout="fp8_ds_mla")
    error = np.abs(found - wanted).max(axis=-1)
    assert error[:3].max() < EXACT  # which token is the first to differ depends on the versions' rounding
    assert np.quantile(error, 0.5) < 0.01
    assert np.quantile(error, 0.98) < 0.05
    assert (found.argmax(-1) == wanted.argmax(-1)).mean() > 0.98


@pytest.mark.parametrize("name", GOLDEN)
def test_fp8_cache_is_close_to_an_exact_one(name):
    """Measured: median worst logit off by 0.12 (hca) and 0.18 (yarn), where logits spread by 1.5. The tails are wide, as
    a pick of another expert or entry is a jump, and random models have many near ties."""
    config, weights, answers = golden(name)
    found = score_text(config, weights, answers["prompt"], layout="fp8_ds_mla", max_tokens=golden_length(name))
    error = np.abs(found - answers["prefill_logits"]).max(axis=-1)
    assert np.quantile(error, 0.5) < 0.25
    assert (found.argmax(-1) == answers["prefill_logits"].argmax(-1)).mean() > 0.85


def test_batch_equals_single_requests_and_stops_early():
    """Five requests of different lengths and limits, one of which meets an end-of-sequence token."""
    config, weights, answers = golden("hca")
    stop = int(answers["tokens"][5])
    config = dataclasses.replace(config, eos_token_ids=(stop,))
    prompts = [answers["prompt"][:n] for n in (1, 33, 128, 257, 350)]
    limits = [40, 3, 40, 40, 40]
    together = decode(config, weights, prompts, limits, max_tokens=400)
    for prompt, limit, found in zip(prompts, limits, together, strict=True):
        (alone,) = decode(config, weights, [prompt], 40, max_tokens=400)
        assert found == alone[:limit]
    until_stop = answers["tokens"].tolist()[: answers["tokens"].tolist().index(stop) + 1]
    assert together[4] == until_stop
    assert len(until_stop) < 40


def drawing(batch: int) -> State:
    cache = Cache((), {}, jnp.arange(batch, dtype=jnp.int32))
    key = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(batch))
    return State(cache, jnp.zeros(batch, jnp.int32), jnp.full(batch, 9, jnp.int32), key)


def test_temperature_draws_from_the_softmax():
    config, _, _ = golden("hca")
    probability = np.array([0.5, 0.3, 0.15, 0.05])
    logits = jnp.broadcast_to(jnp.log(probability) * 0.7, (4000, 4))
    state = draw(drawing(4000), logits, Sampling(temperature=0.7), config)
    frequency = np.bincount(np.asarray(state.token), minlength=4) / 4000
    np.testing.assert_allclose(frequency, probability, atol=0.03)  # three standard deviations
    again = draw(drawing(4000), logits, Sampling(temperature=0.7), config)
    np.testing.assert_array_equal(state.token, again.token)


def test_top_p_keeps_the_fewest_likeliest_tokens():
    config, _, _ = golden("hca")
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.05, 0.5, 0.15, 0.3])), (1000, 4))
    for top_p, kept in ((0.4, {1}), (0.7, {1, 3}), (0.9, {1, 2, 3}), (1.0, {0, 1, 2, 3})):
        state = draw(drawing(1000), logits, Sampling(temperature=1.0, top_p=top_p), config)
        assert set(np.asarray(state.token).tolist()) == kept


def test_end_of_sequence_leaves_nothing_to_draw():
    config = dataclasses.replace(golden("hca")[0], eos_token_ids=(2, 3))
    logits = jnp.eye(4)[jnp.array([0, 2, 3])]
    state = draw(drawing(3), logits, Sampling(), config)
    assert state.token.tolist() == [0, 2, 3]
    assert state.left.tolist() == [8, 0, 0]
