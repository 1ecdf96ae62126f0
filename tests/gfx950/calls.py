"""Calls of implementation="aiter" on caches that its own append filled, and what they must answer."""

import jax
import jax.numpy as jnp
import numpy as np
from aiter_kernel import BF16, FNUZ, FP8, LATENT, answer
from compare import Answer, assert_answer

import jax_dsv4 as dsv4
from jax_dsv4 import reference

GFX950_LAYOUTS = ("aiter_bf16", "aiter_fp8")  # gfx942 has the first, and aiter_fp8_fnuz


def precision_of(layout):
    """Of the kernels that read it. Plain JAX, which reads the others as well, is no worse than bf16."""
    return {"aiter_fp8": FP8, "aiter_fp8_fnuz": FNUZ}.get(layout, BF16)


def create_cache(num_blocks, block_size, layout, scale=0.02):
    return dsv4.KVCache.create(num_blocks, block_size, layout, scale=scale if precision_of(layout) is not BF16 else None)


def make_cache(rng, slots, layout, block_size=16):
    """Appended through the handler under test; slots past `slots` hold NaN."""
    cache = create_cache(-(-slots // block_size) + 1, block_size, layout)
    latents = rng.normal(size=(cache.num_slots, LATENT)).astype(np.float32)
    latents[slots:] = np.nan
    where = jnp.asarray(rng.permutation(cache.num_slots), jnp.int32)
    return jax.jit(lambda c, x, s: dsv4.append(c, x, s, implementation="aiter"))(cache, jnp.asarray(latents)[where], where)


def make_scope(rng, cache, slots, lengths, topk, holes=0.0):
    indices = rng.integers(0, slots, (len(lengths), topk)).astype(np.int32)
    indices[rng.random(indices.shape) < holes] = rng.choice([-1, 2**30, -(2**31)])
    for t, n in enumerate(lengths):
        indices[t, max(n, 0) :] = slots  # NaN rows, past the length
    return dsv4.Scope(cache, jnp.asarray(indices), jnp.asarray(lengths, jnp.int32))


@jax.jit
def attend(q, scopes, sink=None, plan=None):
    return dsv4.sparse_mla_decode(q, *scopes, attn_sink=sink, plan=plan, implementation="aiter", return_lse=True)


def plan_for(scopes, heads):
    lengths, topks = [s.lengths for s in scopes], [s.indices.shape[1] for s in scopes]
    extra = {"extra_topk": topks[1]} if len(scopes) > 1 else {}
    return dsv4.plan_decode(*lengths, num_heads=heads, swa_topk=topks[0], **extra, implementation="aiter")


def make_q(rng, tokens, heads, dtype=jnp.bfloat16):
    return jnp.asarray(rng.normal(size=(tokens, heads, LATENT)), dtype)


def round_to_fp8(q, dtype):
    """As the handler does: e4m3 in units of one step for all of q."""
    q = np.asarray(q).astype(np.float32)
    step = np.abs(q).max(initial=1e-30) / np.float32(jnp.finfo(dtype).max)
    return (q * (np.float32(1) / step)).astype(dtype).astype(np.float64) * np.float64(step)


def expected(q, scopes, sink=None, scale: float = LATENT**-0.5, round_q=True) -> Answer:
    """float64, on q rounded as the handler rounds it (or as it is) and the caches, of one layout, as they are stored."""
    precision = precision_of(scopes[0].cache.layout)
    rounded = q.astype(jnp.bfloat16) if precision is BF16 else round_to_fp8(q, precision.dtype)
    q = np.asarray(rounded if round_q else q, np.float64)
    pools = [np.asarray(dsv4.dequantize(scope.cache), np.float64) for scope in scopes]
    keys = [reference.ReferenceScope(pool, np.asarray(s.indices), np.asarray(s.lengths)) for pool, s in zip(pools, scopes)]
    return answer(precision, q, keys, sink, scale)


def check(got, want: Answer, layout) -> None:
    precision = precision_of(layout)
    assert_answer(got, want, precision.out, precision.lse)
