"""The pure JAX implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from cases import make
from conformance import Conformance, named

import jax_dsv4 as dsv4


class TestXLA(Conformance):
    implementation = "xla"


def test_derivatives_against_differences() -> None:
    p = make(named("float32-q_float32"))
    finite_sink = jnp.where(jnp.isfinite(p.attn_sink), p.attn_sink, 0)
    weights = jnp.asarray(np.random.default_rng(0).standard_normal(p.q.shape), jnp.float32)

    def loss(q, sink):
        out = dsv4.sparse_mla_decode(q, p.swa, p.extra, attn_sink=sink, implementation="xla")
        return jnp.sum(out * weights)

    gradient = jax.grad(loss, (0, 1))(p.q, finite_sink)
    assert all(bool(jnp.isfinite(g).all()) for g in gradient)
    direction = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), jnp.float32), (p.q, finite_sink))
    step = 1e-2
    ahead = loss(*jax.tree.map(lambda x, d: x + step * d, (p.q, finite_sink), direction))
    behind = loss(*jax.tree.map(lambda x, d: x - step * d, (p.q, finite_sink), direction))
    expected = sum(jnp.sum(g * d) for g, d in zip(gradient, direction))
    np.testing.assert_allclose((ahead - behind) / (2 * step), expected, rtol=2e-3, atol=2e-2)


def test_gradient_reaches_an_unpacked_cache() -> None:
    cache = dsv4.KVCache.create(2, 4, "float32")
    indices = jnp.array([[1, 5, -1]], jnp.int32)

    def loss(data, q):
        return jnp.sum(dsv4.sparse_mla_decode(q, dsv4.Scope(cache.replace(data), indices), implementation="xla"))

    gradient = jax.grad(loss)(cache.data, jnp.ones((1, 2, 512), jnp.float32))
    touched = np.flatnonzero(np.abs(np.asarray(gradient)).sum(-1).reshape(-1))
    assert touched.tolist() == [1, 5]
