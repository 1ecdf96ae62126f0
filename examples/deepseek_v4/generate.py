"""Prefill and decode: the loops around `forward`, each one jitted call, with the cache donated to it."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

import jax_dsv4 as dsv4
from deepseek_v4.axes import ONE_DEVICE, Axes, scope_here
from deepseek_v4.config import Config
from deepseek_v4.model import (
    Cache,
    Implementation,
    attend_over,
    begin_step,
    extra_topk,
    forward,
    logits,
    read_streams,
    slots_of,
)
from deepseek_v4.speculate import TOKENS_PER_STEP, Draft, draft, predict

REJECTED = -3
"""In the place of a token that was drafted and is not what the model draws."""

NOT_A_TOKEN = -2
"""Drawn from logits that are not numbers: the model has computed NaN or infinity. Nothing follows it."""

TINIEST = float(jnp.finfo(jnp.float32).tiny)


class Sampling(NamedTuple):
    """How the next token is drawn. Static under jit."""

    temperature: float = 0.0  # 0: the likeliest token, always
    top_p: float = 1.0  # draw among the likeliest tokens that together have this probability


GREEDY = Sampling()


class State(NamedTuple):
    """All that decoding carries from one token to the next."""

    cache: Cache
    token: Array  # int32 [b]: drawn last, not yet in the cache
    left: Array  # int32 [b]: tokens that a request may still draw; 0 once it has drawn an end-of-sequence token, or NOT_A_TOKEN
    key: Array  # PRNG keys [b]
    draft: Draft | None = None  # with `Config.mtp`


@partial(jax.jit, static_argnames=("config", "sampling", "chunk", "implementation", "axes"), donate_argnames=("cache", "ahead"))
def prefill(
    weights: Any,
    cache: Cache,
    prompts: Array,
    lengths: Array,
    max_new_tokens: Array,
    seed: Array,
    ahead: Cache | None = None,
    *,
    config: Config,
    sampling: Sampling = GREEDY,
    chunk: int = 1,
    implementation: Implementation = None,
    axes: Axes = ONE_DEVICE,
) -> State:
    """Reads the prompts and draws each request's first token.

    Args:
        cache: empty, made for steps of `chunk` tokens. Donated.
        prompts: int32 [b, n], n a multiple of `chunk`; what is past a request's length is ignored.
        lengths: int32 [b], each at least 1. Their values do not change what is compiled.
        max_new_tokens: int32 [b], each at least 1.
        ahead: of the layer that drafts, as empty (`speculate.one_layer`); None: nothing is drafted. Donated.
    """

    def read(i: Array, carry: tuple[Cache, Cache | None, Array]) -> tuple[Cache, Cache | None, Array]:
        cache, ahead, last = carry
        tokens = lax.dynamic_slice_in_dim(prompts, i * chunk, chunk, axis=1)
        counts = jnp.clip(lengths - i * chunk, 0, chunk)
        x, cache = forward(weights, cache, tokens, counts, config=config, implementation=implementation, axes=axes)
        if ahead is not None:  # up to the last token but one, whose next one is not drawn yet
            following = lax.dynamic_slice_in_dim(jnp.roll(prompts, -1, axis=1), i * chunk, chunk, axis=1)
            known = jnp.clip(lengths - 1 - i * chunk, 0, chunk)
            _, ahead = predict(weights, ahead, x, following, known, config, implementation, axes)
        newest = jnp.take_along_axis(x, jnp.maximum(counts - 1, 0)[:, None, None, None], axis=1)  # [b, 1, n, d]
        return cache, ahead, jnp.where(counts[:, None, None, None] > 0, newest, last)

    nothing = jnp.zeros((len(prompts), 1, config.hc_mult, config.hidden_size), weights["embed"].dtype)
    longest = lax.pmax(jnp.max(lengths), axes.data)  # all devices make as many steps, as they exchange tokens in each
    cache, ahead, last = lax.fori_loop(0, -(-longest // chunk), read, (cache, ahead, nothing))
    # A request's draws depend on the seed, its place in the batch and its position, not on its neighbours.
    place = len(prompts) * lax.axis_index(axes.data) + jnp.arange(len(prompts), dtype=jnp.int32)
    key = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(place)
    state = State(cache, jnp.zeros_like(lengths), max_new_tokens, key)
    state = draw(state, logits(weights, read_streams(last, weights, config)[:, 0], axes), sampling, config)
    if ahead is None:
        return state
    return state._replace(draft=draft(weights, ahead, last, state.token[:, None], jnp.ones_like(lengths), config, implementation, axes))


@partial(jax.jit, static_argnames=("steps", "config", "sampling", "implementation", "axes"), donate_argnames="state")
def generate(
    weights: Any,
    state: State,
    *,
    steps: int,
    config: Config,
    sampling: Sampling = GREEDY,
    implementation: Implementation = None,
    axes: Axes = ONE_DEVICE,
) -> tuple[State, Array]:
    """Makes `steps` steps without the host.

    Returns int32 tokens [b, steps], −1 after a request's end. With drafts [b, 2 · steps], REJECTED for a draft that was in vain.
    """
    run = partial(forward, config=config, implementation=implementation, axes=axes)

    def step(state: State, _: None) -> tuple[State, Array]:
        running = state.left > 0
        x, cache = run(weights, state.cache, state.token[:, None], running.astype(jnp.int32))
        hidden = read_streams(x, weights, config)
        state = draw(state._replace(cache=cache), logits(weights, hidden[:, 0], axes), sampling, config)
        return state, jnp.where(running, state.token, -1)[:, None]

    def drafted_step(state: State, _: None) -> tuple[State, Array]:
        assert state.draft is not None
        running, position = state.left > 0, state.cache.position
        both = jnp.stack([state.token, state.draft.token], axis=1)
        x, cache = run(weights, state.cache, both, TOKENS_PER_STEP * running.astype(jnp.int32))
        of_both = logits(weights, read_streams(x, weights, config), axes)
        # A draw depends on its position, so that these two are what the model draws step by step.
        first = draw(state._replace(cache=cache._replace(position=position + 1)), of_both[:, 0], sampling, config)
        second = draw(first._replace(cache=cache._replace(position=position + 2)), of_both[:, 1], sampling, config)
        accepted = (first.token == state.draft.token) & (first.left > 0)
        token, left = jnp.where(accepted, second.token, first.token), jnp.where(accepted, second.left, first.left)

        counts = jnp.where(running, 1 + accepted.astype(jnp.int32), 0)
        tokens = jnp.stack([first.token, second.token], axis=1)
        ahead = draft(weights, state.draft.cache, x, tokens, counts, config, implementation, axes)
        state = State(cache._replace(position=position + counts), token, left, state.key, ahead)
        drawn = jnp.where(jnp.stack([running, accepted], axis=1), tokens, REJECTED)
        return state, jnp.where(running[:, None], drawn, -1)

    state, tokens = lax.scan(step if state.draft is None else drafted_step, state, length=steps)
    return state, jnp.moveaxis(tokens, 0, 1).reshape(len(state.token), -1)


def draw(state: State, logits: Array, sampling: Sampling, config: Config) -> State:
    """Draws each request's next token from logits [b, v]."""
    best = logits.max(axis=-1, keepdims=True)
    numbers = jnp.isfinite(best[:, 0]) & ~jnp.isnan(logits).any(axis=-1)  # XLA's maximum may pass over NaN
    if sampling.temperature < TINIEST:  # float32 would divide by 0
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        # The best at 0, so that no quotient overflows. From 1e30 on all tokens are equally likely; XLA multiplies by the reciprocal, which
        # must not underflow.
        logits = (logits - best) / min(sampling.temperature, 1e30)
        if sampling.top_p < 1:
            likeliest = jnp.sort(logits, axis=-1, descending=True)
            before = jnp.cumsum(jax.nn.softmax(likeliest), axis=-1) - jax.nn.softmax(likeliest)
            kept = before < max(sampling.top_p, TINIEST)  # the likeliest always
            least = jnp.min(likeliest, axis=-1, keepdims=True, where=kept, initial=jnp.inf)
            logits = jnp.where(logits >= least, logits, -jnp.inf)
        key = jax.vmap(jax.random.fold_in)(state.key, state.cache.position)
        token = jax.vmap(jax.random.categorical)(key, logits).astype(jnp.int32)
    token = jnp.where(numbers, token, NOT_A_TOKEN)
    ends = jnp.isin(token, jnp.array((*config.eos_token_ids, NOT_A_TOKEN), jnp.int32))
    return state._replace(token=token, left=jnp.where(ends, 0, jnp.maximum(state.left - 1, 0)))


@partial(jax.jit, static_argnames=("config", "dtype", "implementation", "axes"))
def attend(
    cache: Cache, *, config: Config, dtype: jax.typing.DTypeLike, implementation: Implementation = None, axes: Axes = ONE_DEVICE
) -> Array:
    """The attention of one decode step and nothing else, to be timed: plans, and one sparse_mla_decode per layer.

    Queries are made up, and CSA layers read their first entries instead of choosing; lengths are the real ones.
    """
    b = len(cache.position)
    step = begin_step(cache, jnp.zeros((b, 1), jnp.int32), jnp.ones(b, jnp.int32), config, implementation, axes)
    total = jnp.zeros((), jnp.float32)
    for kind, layer in zip(config.layers, cache.layers, strict=True):
        q = jnp.ones((b, 1, config.num_attention_heads // lax.axis_size(axes.model), config.head_dim), dtype)
        swa, extra = dsv4.Scope(layer.swa, step.swa_indices, step.swa_lengths), None
        if layer.compressed is not None:
            first = jnp.arange(extra_topk(step.entries[kind], kind, config), dtype=jnp.int32)
            first = jnp.broadcast_to(first, (b, 1, first.size))
            slots = slots_of(cache.tables[kind], first, kind)
            extra = scope_here(dsv4.Scope(layer.compressed.extra, slots, step.extra_lengths[kind]), axes)
        out = attend_over(q, swa, extra, None, step.plan[kind], implementation, axes)
        total += out.astype(jnp.float32).sum()
    return total
