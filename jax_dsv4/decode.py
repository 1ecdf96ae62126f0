"""sparse_mla_decode: check, choose an implementation, and attend: one fused call, or a call per scope merged in JAX."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_dsv4 import _checks
from jax_dsv4.cache import LATENT_DIM, LAYOUTS, KVCache, Scope
from jax_dsv4.implementations import any_native, cannot_fuse, choose, dispatch, fuses, no_derivative, spelling
from jax_dsv4.merge import apply_attn_sink, merge_scopes
from jax_dsv4.plan import DecodePlan, PlanKey, WorkPlan

_OP = "sparse_mla_decode"
MAX_HEADS = 128


def sparse_mla_decode(
    q: jax.Array,
    swa: Scope,
    extra: Scope | None = None,
    *,
    attn_sink: jax.Array | None = None,
    scale: float = LATENT_DIM**-0.5,
    plan: DecodePlan | None = None,
    implementation: str | Sequence[str] | None = None,
    fused: bool | None = None,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """DeepSeek-V4's sparse attention for decoding: one softmax over the keys of a sliding window and of compressed entries.

        s[h, k] = scale * q[h] . latent[k]           over the valid keys k of both scopes
        lse[h]  = log sum_k exp(s[h, k])
        out[h]  = sum_k exp(s[h, k]) latent[k] / (exp(lse[h]) + exp(attn_sink[h]))

    A key is valid if its entry lies before the scope's length and names a slot of the cache. Lengths and indices are data: any value is
    legal. What a token does not attend to has no effect on it, NaN included. A token without a valid key has out = 0, lse = -inf.

    Args:
      q: [*batch, heads, 512] bfloat16 or float32, 1 to 128 heads. Each batch entry is a token.
      swa: the sliding window's Scope.
      extra: the compressed entries' Scope, if any.
      attn_sink: float32 [heads], natural log and not scaled; -inf is no sink, +inf gives zeros.
      scale: a positive Python float.
      plan: what `plan_decode` made from these very lengths, with the same `implementation` and `fused`. A token whose length is
        another is answered with NaN. Default: the call plans for itself.
      implementation: `"cpu"`, `"xla"`, ... (see `implementations()`), a sequence of such in order of preference, or None: the best for
        the platform that the program is lowered for.
      fused: whether one kernel call takes both scopes and the sink. False: a call per scope, merged by `merge_scopes` and
        `apply_attn_sink`. Default: as the implementation does best.
      return_lse: whether to return lse as well.

    Returns:
      out [*batch, heads, 512] in q's dtype; with `return_lse` also lse, float32 [*batch, heads], natural log, sink excluded.

    Raises:
      ValueError: a wrong rank, shape, dtype or static value.
      NotImplementedError: no implementation asked for can take this call; a derivative of a native one (use "xla").

    Source: DeepSeek-V4's inference code (sparse_attn), FlashMLA's sparse decode (MODEL1).
    """
    _checks.require_dtype(q, _OP, "q", jnp.bfloat16, jnp.float32)
    _checks.require(q.ndim >= 2, _OP, "q", "have shape (*batch, heads, 512)", tuple(q.shape))
    *batch, heads, _ = q.shape
    _checks.require_shape(q, _OP, "q", "(*batch, heads, 512)", (*batch, heads, LATENT_DIM))
    _checks.require(1 <= heads <= MAX_HEADS, _OP, "q", f"have 1 to {MAX_HEADS} heads", heads)
    tokens = math.prod(batch)
    scopes = [_flat_scope("swa", swa, tuple(batch), tokens)]
    if extra is not None:
        scopes.append(_flat_scope("extra", extra, tuple(batch), tokens))
    if attn_sink is not None:
        _checks.require_dtype(attn_sink, _OP, "attn_sink", jnp.float32)
        _checks.require_shape(attn_sink, _OP, "attn_sink", "(heads,)", (heads,))
    is_number = isinstance(scale, (int, float, np.floating)) and not isinstance(scale, bool)
    _checks.require(is_number, _OP, "scale", "be a Python float", f"{type(scale).__name__} {scale!r}")
    _checks.require(math.isfinite(scale) and scale > 0, _OP, "scale", "be positive and finite", scale)
    topks = tuple(s.indices.shape[1] for s in scopes)
    _checks.require_fits_int32(tokens * sum(topks), _OP, "tokens * topk")
    if plan is not None:
        _check_plan(plan, PlanKey(tokens, heads, topks[0], sum(topks[1:]), spelling(implementation), fused))

    caches = [s.cache for s in scopes]
    chosen = choose(_OP, implementation, lambda i: cannot_fuse(i, fused) or i.unsupported(heads, caches, q.dtype))
    if tokens == 0:
        out, lse = jnp.zeros((0, heads, LATENT_DIM), q.dtype), jnp.zeros((0, heads), jnp.float32)
    else:
        attend = partial(_attend_on, chosen, float(scale), fused)
        if any_native(chosen):
            attend = _with_transforms(attend)
        out, lse = attend(q.reshape(tokens, heads, LATENT_DIM), tuple(scopes), attn_sink, plan.work if plan else None)
    out = out.reshape(q.shape)
    return (out, lse.reshape(q.shape[:-1])) if return_lse else out


def _flat_scope(name: str, scope: Scope, batch: tuple[int, ...], tokens: int) -> Scope:
    """Checks a scope against q's batch axes and flattens them."""
    _checks.require(isinstance(scope, tuple) and len(scope) == 3, _OP, name, "be a Scope", type(scope).__name__)
    cache, indices, lengths = scope
    _checks.require(isinstance(cache, KVCache), _OP, f"{name}.cache", "be a KVCache", type(cache).__name__)
    _checks.require_dtype(indices, _OP, f"{name}.indices", jnp.int32)
    topk = indices.shape[-1] if indices.ndim else 0
    _checks.require_shape(indices, _OP, f"{name}.indices", "(*batch, topk)", (*batch, topk))
    if lengths is None:
        lengths = jnp.full(batch, topk, jnp.int32)
    _checks.require_dtype(lengths, _OP, f"{name}.lengths", jnp.int32)
    _checks.require_shape(lengths, _OP, f"{name}.lengths", "(*batch,)", batch)
    return Scope(cache, indices.reshape(tokens, topk), lengths.reshape(tokens))


def _check_plan(plan: DecodePlan, call: PlanKey) -> None:
    _checks.require(isinstance(plan, DecodePlan), _OP, "plan", "be a DecodePlan", type(plan).__name__)
    for field, made_for, called_with in zip(PlanKey._fields, plan.made_for, call):
        rule = f"be made for this call's {field} = {called_with!r}"
        _checks.require(made_for == called_with, _OP, "plan", rule, repr(made_for))


def _attend_on(
    chosen: dict[str, Any],
    scale: float,
    fused: bool | None,
    q: jax.Array,
    scopes: tuple[Scope, ...],
    attn_sink: jax.Array | None,
    work: tuple[WorkPlan, ...] | None,
) -> tuple[jax.Array, jax.Array]:
    def attend(implementation, q, scopes, attn_sink, work):  # type: ignore[no-untyped-def]
        calls = [scopes] if fuses(implementation, fused) else [(scope,) for scope in scopes]
        outs, lses = [], []
        for i, call in enumerate(calls):
            lengths, topks = [s.lengths for s in call], [s.indices.shape[1] for s in call]
            planned = implementation.plan(lengths, topks, q.shape[1]) if work is None else work[i]
            alone = len(calls) == 1
            out_dtype = q.dtype if alone else jnp.float32
            out, lse = implementation.decode(q, call, attn_sink if alone else None, scale, planned, out_dtype)
            outs.append(out)
            lses.append(lse)
        if len(calls) == 1:
            return outs[0], lses[0]
        out, lse = merge_scopes(outs, lses)
        out = out if attn_sink is None else apply_attn_sink(out, lse, attn_sink)
        return out.astype(q.dtype), lse

    return dispatch(chosen, attend, q, scopes, attn_sink, work)


def _with_transforms(attend: Any) -> Any:
    """`attend` with a rule for vmap (more tokens of one call) and a clear error for derivatives."""
    call = jax.custom_batching.custom_vmap(no_derivative(_OP, attend))

    @call.def_vmap
    def rule(axis_size, in_batched, q, scopes, attn_sink, work):  # type: ignore[no-untyped-def]
        q_batched, scopes_batched, sink_batched, _ = in_batched
        if work is not None:
            raise NotImplementedError(
                f"{_OP}: plan must be left out under vmap, or made for all tokens at once: give q one more batch axis instead"
            )
        spread = partial(_spread, axis_size)
        merged = tuple(_merge_scope(spread, axis_size, s, b) for s, b in zip(scopes, scopes_batched))
        flat_q = spread(q, q_batched).reshape(-1, *q.shape[-2:])
        # A sink of its own for every entry cannot be the call's, which has one per head.
        out, lse = call(flat_q, merged, None if sink_batched else attn_sink, None)
        out, lse = out.reshape(axis_size, -1, *out.shape[1:]), lse.reshape(axis_size, -1, *lse.shape[1:])
        if attn_sink is not None and sink_batched:
            out = jax.vmap(apply_attn_sink)(out, lse, attn_sink)
        return (out, lse), (True, True)

    return call


def _spread(axis_size: int, x: jax.Array, batched: bool) -> jax.Array:
    return x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))


def _merge_scope(spread: Any, axis_size: int, scope: Scope, batched: Scope) -> Scope:
    """One scope from `axis_size` of them: caches of their own become one cache, their slots moved accordingly."""
    indices, lengths = spread(scope.indices, batched.indices), spread(scope.lengths, batched.lengths)
    cache = scope.cache
    if batched.cache.data:
        slots = cache.data.shape[1] * cache.block_size
        # A layout's own blocks at the front are between the caches now: no slot may name them.
        valid = slots - LAYOUTS[cache.layout].zero_blocks * cache.block_size
        _checks.require_fits_int32(axis_size * slots, _OP, "slots of all caches under vmap")
        cache = cache.replace(cache.data.reshape(-1, *cache.data.shape[2:]))
        first = slots * jnp.arange(axis_size, dtype=jnp.int32)[:, None, None]
        indices = jnp.where((indices >= 0) & (indices < valid), indices + first, -1)
    return Scope(cache, indices.reshape(-1, indices.shape[-1]), lengths.reshape(-1))
