"""RoPE, by pairs of neighbours, with YaRN."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array

from deepseek_v4.config import Config


def rope_angle(position: Array, name: str, config: Config) -> Array:
    """Angles [..., 32] of the 32 pairs at each position, float32. "compress" has its own base, and YaRN."""
    pairs = jnp.arange(0, config.qk_rope_head_dim, 2, dtype=jnp.float32)
    base = config.rope_theta if name == "main" else config.compress_rope_theta
    frequency = base ** (-pairs / config.qk_rope_head_dim)
    if name == "compress" and config.yarn:
        # Pairs that turn more than beta_fast times in the original context keep their frequency, those that turn less
        # than beta_slow times are slowed by `factor`, and those between are blended along a straight line.
        yarn, dim = config.yarn, config.qk_rope_head_dim

        def pair_turning(turns: float) -> float:
            return dim * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(base))

        first = max(math.floor(pair_turning(yarn.beta_fast)), 0)
        last = min(math.ceil(pair_turning(yarn.beta_slow)), dim - 1)
        slowed = jnp.clip((jnp.arange(dim // 2, dtype=jnp.float32) - first) / (last - first or 0.001), 0, 1)
        frequency = frequency * (1 - slowed) + frequency / yarn.factor * slowed
    return position[..., None].astype(jnp.float32) * frequency


def rotate(x: Array, angle: Array) -> Array:
    """Turns the last 64 of x [..., k], taken as pairs (2j, 2j+1), by angle [..., 32]."""
    rope = 2 * angle.shape[-1]
    even, odd = jnp.moveaxis(x[..., -rope:].astype(jnp.float32).reshape(*x.shape[:-1], -1, 2), -1, 0)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return jnp.concatenate([x[..., :-rope], turned.reshape(*x.shape[:-1], rope).astype(x.dtype)], axis=-1)


def turn(angle: Array) -> tuple[Array, Array]:
    """As deepseek_v4/fused.py takes angles."""
    return jnp.cos(angle), jnp.sin(angle)
