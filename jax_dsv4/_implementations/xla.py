"""The ops in plain JAX: any platform, any layout, differentiable in q, attn_sink and unpacked caches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from jax_dsv4 import cache as kv
from jax_dsv4._implementations.interface import Availability, KernelCall


class _XLA:
    name = "xla"
    platforms: tuple[str, ...] = ()
    fuses = True
    batch_invariant = False  # XLA chooses how to multiply by all shapes

    def availability(self) -> Availability:
        return Availability(True, "plain JAX, any platform")

    def exportable(self) -> bool:
        return True

    def unsupported(self, num_heads: int, caches: Sequence[kv.KVCache], q_dtype: jax.typing.DTypeLike | None = None) -> str | None:
        return None

    def plan(self, lengths: Sequence[jax.Array], topks: Sequence[int], num_heads: int, segments: int) -> None:
        return None

    def append(self, cache: kv.KVCache, latents: jax.Array, slots: jax.Array) -> jax.Array:
        # The barrier keeps XLA's GPU compilers from fusing what makes the latents into each byte that is written, which takes them long.
        return kv.write_rows(cache, jax.lax.optimization_barrier(latents), slots)

    def decode(self, call: KernelCall) -> tuple[jax.Array, jax.Array]:
        operands = call.q, call.scopes, call.attn_sink
        by_token, batched = (partial(form, scale=call.scale) for form in (attend_by_token, attend_batched))
        if call.q.shape[0] == 1:
            out, lse = batched(*operands)
        else:
            # On CPU a batched gather materialises [tokens, topk, 512] floats and the batched product is slow: one token at a time is up
            # to four times faster (benchmarks/cpu.py times both). A GPU wants the batch.
            out, lse = jax.lax.platform_dependent(*operands, cpu=by_token, default=batched)
        return out.astype(call.out_dtype), lse


def attend_by_token(
    q: jax.Array, scopes: Sequence[kv.Scope], attn_sink: jax.Array | None, scale: float, products: jax.typing.DTypeLike = jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """`attend_batched`, one token at a time."""

    def one(operands: tuple[jax.Array, list[kv.Scope]]) -> tuple[jax.Array, jax.Array]:
        # The barrier keeps XLA from hoisting the dequantisation of all tokens out of the loop.
        q, rows = jax.lax.optimization_barrier(jax.tree.map(lambda x: x[None], operands))
        token_scopes = [s._replace(indices=i, lengths=n) for s, (i, n) in zip(scopes, rows)]
        out, lse = attend_batched(q, token_scopes, attn_sink, scale, products)
        return out[0], lse[0]

    return jax.lax.map(one, (q, [(s.indices, s.lengths) for s in scopes]))


def attend_batched(
    q: jax.Array, scopes: Sequence[kv.Scope], attn_sink: jax.Array | None, scale: float, products: jax.typing.DTypeLike = jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """q: t h d. rows: t k d, both scopes' keys side by side. One softmax over the union, in float32, as sums of products are."""
    rows, masks = [], []
    for scope in scopes:
        assert scope.lengths is not None  # decode.py fills it in
        inside = jnp.arange(scope.indices.shape[1], dtype=jnp.int32)[None] < scope.lengths[:, None]
        mask = inside & kv.valid_slots(scope.cache, scope.indices)
        # Unattended rows may hold NaN, and 0 * NaN is NaN: they must not reach a product.
        row = kv.read_rows(scope.cache, jnp.where(mask, scope.indices, 0))
        rows.append(jnp.where(mask[..., None], row, 0).astype(products))
        masks.append(mask)
    keys, mask = jnp.concatenate(rows, axis=1), jnp.concatenate(masks, axis=1)[:, None]
    product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    scores = product("thd,tkd->thk", q.astype(products), keys) * scale
    scores = jnp.where(mask, scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf)
    top = jax.lax.stop_gradient(jnp.where(jnp.isneginf(top), 0, top))
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1)
    empty = ~jnp.any(mask, axis=-1)
    lse = jnp.where(empty, -jnp.inf, top[..., 0] + jnp.log(jnp.where(empty, 1, total)))
    denominator = total if attn_sink is None else total + jnp.exp(attn_sink[None] - top[..., 0])
    out = product("thk,tkd->thd", weights.astype(products), keys)
    out = jnp.where(empty[..., None], 0, out / jnp.where(empty, 1, denominator)[..., None])
    return out, lse


XLA = _XLA()
