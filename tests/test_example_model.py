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
    NOT_A_TOKEN,
    Axes,
    Cache,
    Sampling,
    State,
    decode,
    draw,
    golden,
    golden_length,
    moe,
    run_experts,
    score_entries,
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


# Where float32 ends: its smallest normal number is 1.2e-38, its largest 3.4e38.
SMALL = (2e-2, 3e-7, 7e-20, 1.1e-37, 1.2e-38, 5e-39, 1e-43, 1e-300)
LARGE = (7e3, 8e29, 9e33, 8.4e37, 8.6e37, 2.9e38, 1e39, 1e300)


def spread_logits() -> jax.Array:
    """[40, 33], some beyond what a softmax keeps, and one token that cannot be."""
    return 30 * jax.random.normal(jax.random.key(2), (40, 33)).at[:, 11].set(-jnp.inf)


@pytest.mark.parametrize("temperature", SMALL)
def test_a_small_temperature_draws_the_likeliest(temperature):
    logits = 3 * spread_logits()
    state = draw(drawing(40), logits, Sampling(temperature), golden("hca")[0])
    if temperature < 1e-3:
        np.testing.assert_array_equal(state.token, logits.argmax(-1))
    assert (np.asarray(state.token) == np.asarray(logits.argmax(-1))).mean() > 0.9


@pytest.mark.parametrize("temperature", LARGE)
def test_a_large_temperature_draws_what_can_be(temperature):
    state = draw(drawing(40), spread_logits(), Sampling(temperature), golden("hca")[0])
    assert 11 not in np.asarray(state.token)
    assert len(set(np.asarray(state.token).tolist())) > 12


@pytest.mark.parametrize("top_p", SMALL[2:])
@pytest.mark.parametrize("temperature", [0.8, 1e-41])
def test_a_small_top_p_draws_the_likeliest(top_p, temperature):
    state = draw(drawing(40), spread_logits(), Sampling(temperature, top_p), golden("hca")[0])
    np.testing.assert_array_equal(state.token, spread_logits().argmax(-1))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7), Sampling(1.0, 0.9)])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_a_number_ends_a_request(sampling, value):
    """One such logit is enough; the other requests go on."""
    logits = spread_logits().at[3, 5].set(value).at[7].set(value).at[9].set(-np.inf)
    state = draw(drawing(40), logits, sampling, golden("hca")[0])
    ended = np.isin(np.arange(40), (3, 7, 9))
    np.testing.assert_array_equal(np.asarray(state.token) == NOT_A_TOKEN, ended)
    np.testing.assert_array_equal(np.asarray(state.left) == 0, ended)


@pytest.mark.parametrize("tokens", [1, 9], ids=["few", "many"])
def test_experts_whose_scores_all_underflow_weigh_nothing(tokens):
    """The softplus of -200 is 0 in float32: transformers divides by a sum of 1e-20, and the shared expert is what is left."""
    config, weights, _ = golden("hca")
    w = weights["layers"][1]["ffn"]
    x = jnp.abs(jax.random.normal(jax.random.key(0), (1, tokens, config.hidden_size))) + 1
    drowned = {**w, "gate": jnp.full_like(w["gate"], -200.0)}
    found = moe(x, drowned, jnp.zeros((1, tokens), jnp.int32), config, Axes())
    gate, up = (np.asarray(x) @ np.asarray(w["shared"][name]).T for name in ("w1", "w3"))
    gate, up = np.minimum(gate, config.swiglu_limit), np.clip(up, -config.swiglu_limit, config.swiglu_limit)
    wanted = (gate / (1 + np.exp(-gate)) * up) @ np.asarray(w["shared"]["w2"]).T
    np.testing.assert_allclose(found, wanted, rtol=0, atol=EXACT)


def test_no_token_no_expert():
    """Where there is no token, no expert is read: these are NaN, and what is left is the shared one."""
    config, weights, _ = golden("hca")
    for w in (weights["layers"][0]["ffn"], weights["layers"][-1]["ffn"]):  # experts by the token's number, and by its score
        x = jax.random.normal(jax.random.key(0), (2, 3, config.hidden_size))
        broken = {**w, "experts": jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), w["experts"])}
        nothing = moe(x, broken, jnp.full((2, 3), -1, jnp.int32), config, Axes())
        whole = moe(x, {**w, "experts": jax.tree.map(jnp.zeros_like, w["experts"])}, jnp.zeros((2, 3), jnp.int32), config, Axes())
        np.testing.assert_allclose(nothing, whole, rtol=0, atol=EXACT)


@pytest.mark.parametrize("tokens", [1, 3, 40, 300])
def test_experts_are_run_for_their_tokens_alone(tokens):
    """Against float64, one token and one expert at a time; of 8 experts one is nobody's, and others are on another device."""
    rng, (count, inner, hidden, each) = np.random.default_rng(tokens), (8, 24, 16, 3)
    config = dataclasses.replace(golden("hca")[0], swiglu_limit=2.0)
    w = {name: rng.standard_normal((count, inner, hidden)) for name in ("w1", "w3")} | {"w2": rng.standard_normal((count, hidden, inner))}
    x, weight = rng.standard_normal((tokens, hidden)), rng.random((tokens, each))
    chosen = np.stack([rng.choice([-5, -1, 0, 1, 2, 4, 5, 6, 7, 8, 11], each, replace=False) for _ in range(tokens)])
    wanted = np.zeros((tokens, hidden))
    for token, choice in np.ndindex(chosen.shape):
        if 0 <= (e := chosen[token, choice]) < count:
            gate, up = np.minimum(w["w1"][e] @ x[token], 2), np.clip(w["w3"][e] @ x[token], -2, 2)
            wanted[token] += weight[token, choice] * (w["w2"][e] @ (gate / (1 + np.exp(-gate)) * up))
    w = {name: np.where(np.arange(count)[:, None, None] == 3, np.nan, values).astype(np.float32) for name, values in w.items()}
    single = (array.astype(np.float32) for array in (x, weight))
    x, weight = map(jnp.asarray, single)
    (found,) = run_experts(x[None], jnp.asarray(chosen.astype(np.int32))[None], weight[None], jax.tree.map(jnp.asarray, w), config)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=EXACT)


@pytest.mark.parametrize("tokens", [1, 64])
def test_experts_are_not_gathered(tokens):
    """What the program needs beside its arguments is less than two of its 16 experts of 3 MB: XLA's CPU copies one to multiply it."""
    struct = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    w = {name: struct(16, 512, 512) for name in ("w1", "w3", "w2")}
    run = jax.jit(lambda *arguments: run_experts(*arguments, golden("hca")[0]))
    program = run.lower(struct(1, tokens, 512), struct(1, tokens, 6, dtype=jnp.int32), struct(1, tokens, 6), w).compile()
    assert program.memory_analysis().temp_size_in_bytes < 2 * 3 * 512 * 512 * 4


@pytest.mark.parametrize("visible", [0, 1, 256, 257, 700])
def test_entries_are_scored_in_pieces(visible):
    """700 entries, by pieces of 256 for a step of 8 tokens; those past the last piece are not looked at."""
    rng = np.random.default_rng(visible)
    q, weight, keys = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 8, 3, 16), (2, 8, 3), (2, 700, 16)))
    wanted = np.einsum("bthc,bth->btc", np.maximum(np.einsum("bthk,bck->bthc", q, keys), 0), weight)[..., :visible]
    keys[:, -(-visible // 256) * 256 :] = np.nan
    found = jax.jit(score_entries)(q, weight, keys, np.int32(visible))
    np.testing.assert_allclose(found[..., :visible], wanted, rtol=0, atol=EXACT)
    if visible <= 256:
        assert np.isfinite(found).all()


def test_no_array_has_all_heads_of_all_entries():
    """For a chunk of 512 tokens, 64 heads and 4096 entries it would have 537 MB."""
    q, keys, weight = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 512, 64, 128), (1, 4096, 128), (1, 512, 64)))
    program = jax.jit(score_entries).lower(q, weight, keys, jax.ShapeDtypeStruct((), jnp.int32)).compile()
    assert program.memory_analysis().temp_size_in_bytes < 512 * 64 * 4096 * 4 / 4
