"""jax_dsv4 with implementation="aiter", under jit, through the handlers that we ship and AITER's own kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_dsv4 as dsv4

LATENT = 512
COSINE = 0.999
LSE_TOLERANCE = 1e-3


def make_cache(rng, slots, block_size=16, scale=0.02):
    """Appended through the handler under test; slots past `slots` hold NaN."""
    cache = dsv4.KVCache.create(-(-slots // block_size) + 1, block_size, "aiter_fp8", scale=scale)
    latents = rng.normal(size=(cache.num_slots, LATENT)).astype(np.float32)
    latents[slots:] = np.nan
    where = jnp.asarray(rng.permutation(cache.num_slots), jnp.int32)
    return jax.jit(lambda c, l, s: dsv4.append(c, l, s, implementation="aiter"))(cache, jnp.asarray(latents)[where], where)


def make_scope(rng, cache, slots, lengths, topk, holes=0.0):
    indices = rng.integers(0, slots, (len(lengths), topk)).astype(np.int32)
    indices[rng.random(indices.shape) < holes] = rng.choice([-1, 2**30, -(2**31)])
    for t, n in enumerate(lengths):
        indices[t, max(n, 0) :] = slots  # NaN rows, past the length
    return dsv4.Scope(cache, jnp.asarray(indices), jnp.asarray(lengths, jnp.int32))


def reference(q, scopes, sink=None):
    """float64, on q rounded as the handler rounds it and the cache as it is stored."""
    q = np.asarray(q, np.float64)
    step = np.float32(np.abs(q).max() / 448)
    codes = (np.asarray(q, np.float32) * (np.float32(1) / step)).astype(jnp.float8_e4m3fn)
    q = codes.astype(np.float64) * np.float64(step)
    tokens, heads, _ = q.shape
    out, lse = np.zeros(q.shape), np.full((tokens, heads), -np.inf)
    for t in range(tokens):
        keys = []
        for cache, indices, lengths in scopes:
            row = np.asarray(indices)[t, : max(int(lengths[t]), 0)]
            row = row[(row >= 0) & (row < cache.num_slots)]
            keys.append(np.asarray(dsv4.dequantize(cache, jnp.asarray(row)), np.float64))
        keys = np.concatenate(keys)
        if len(keys):
            scores = q[t] @ keys.T * LATENT**-0.5
            top = scores.max(-1)
            weights = np.exp(scores - top[:, None])
            lse[t] = top + np.log(weights.sum(-1))
            total = weights.sum(-1) + (0 if sink is None else np.exp(np.asarray(sink, np.float64) - top))
            out[t] = weights @ keys / total[:, None]
    return out, lse


def check(got, want):
    (out, lse), (want_out, want_lse) = [np.asarray(x, np.float64) for x in got], want
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(want_lse))
    for t in range(len(out)):
        if np.isneginf(want_lse[t]).all():
            assert (out[t] == 0).all()
            continue
        assert np.isfinite(out[t]).all(), f"token {t}"
        cosine = (out[t] * want_out[t]).sum() / np.linalg.norm(out[t]) / np.linalg.norm(want_out[t])
        assert cosine >= COSINE, f"token {t}: cosine {cosine}"
    finite = np.isfinite(want_lse)
    np.testing.assert_allclose(lse[finite], want_lse[finite], atol=LSE_TOLERANCE, rtol=0)


@jax.jit
def attend(q, scopes, sink):
    return dsv4.sparse_mla_decode(q, *scopes, attn_sink=sink, implementation="aiter", return_lse=True)


@pytest.mark.parametrize("heads", [1, 8, 16, 32, 40, 64, 128])
def test_heads(rocm, heads):
    rng = np.random.default_rng(heads)
    cache = make_cache(rng, 100)
    scope = make_scope(rng, cache, 100, [0, 70, 33], 70)
    q = jnp.asarray(rng.normal(size=(3, heads, LATENT)), jnp.bfloat16)
    check(attend(q, (scope,), None), reference(q, [scope]))
