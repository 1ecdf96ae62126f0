"""The layer that predicts the token after next: it drafts, the model checks, and what comes out is what the model alone would draw.

The published layer (`mtp.0` of a checkpoint) is one more SWA layer. It reads the residual streams that the last layer wrote at a position
and the token that was drawn there, and predicts the one after. A step of the model then takes both tokens: if the draft is what it draws
itself, it has drawn two. If not, the second one is forgotten by putting `Cache.position` back: what is past it is never read, and
overwritten.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from deepseek_v4.axes import Axes
from deepseek_v4.config import Config
from deepseek_v4.model import Cache, Implementation, logits, read_streams, rms_norm, run_layers
from deepseek_v4.products import dense

TOKENS_PER_STEP = 2
"""That a step of the model takes: the caches' `chunk` must be at least this."""


class Draft(NamedTuple):
    """What drafting carries from one step to the next."""

    cache: Cache  # of its one layer; its position is the model's
    token: Array  # int32 [b]: the guess at what follows the token that was drawn last


def one_layer(config: Config) -> Config:
    """The config of the layer that drafts, for `create_cache`: its experts are chosen by score, as in the model's last layers."""
    return dataclasses.replace(config, layers=("swa",), num_hash_layers=0, mtp=False)


def predict(
    weights: Any, cache: Cache, x: Array, tokens: Array, counts: Array, config: Config, implementation: Implementation, axes: Axes
) -> tuple[Array, Cache]:
    """Hidden states [b, t, d] of the tokens after next.

    Args:
        x: [b, t, n, d], what the model's last layer wrote at the next t positions of `cache`.
        tokens: int32 [b, t], the token after each of them.
        counts: int32 [b] in 0…t: how many of them are real.
    """
    w = weights["mtp"]
    (token,) = dense(rms_norm(weights["embed"][tokens], w["enorm"], config), w["e_proj"])
    (x,) = dense(rms_norm(x, w["hnorm"], config), w["h_proj"])  # [b, t, n, d]
    x += token[:, :, None]
    x, cache = run_layers(x, [w["layer"]], cache, tokens, counts, one_layer(config), implementation, axes)
    return read_streams(x, w, config), cache


def draft(
    weights: Any, cache: Cache, x: Array, tokens: Array, counts: Array, config: Config, implementation: Implementation, axes: Axes
) -> Draft:
    """As `predict`; the likeliest token after the last real one."""
    hidden, cache = predict(weights, cache, x, tokens, counts, config, implementation, axes)
    last = jnp.take_along_axis(hidden, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
    return Draft(cache, jnp.argmax(logits(weights, last, axes), axis=-1).astype(jnp.int32))
