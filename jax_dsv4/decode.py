"""sparse_mla_decode: check, choose an implementation, and attend: one fused call, or a call per scope merged in JAX."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np

from jax_dsv4 import _checks
from jax_dsv4._sharding import Dims, partitioned, require_whole
from jax_dsv4.cache import LATENT_DIM, LAYOUTS, KVCache, Scope
from jax_dsv4.implementations import any_native, cannot_fuse, choose, dispatch, fuses, spelling, with_derivative
from jax_dsv4.merge import apply_attn_sink, merge_scopes
from jax_dsv4.plan import DecodePlan, PlanKey, WorkPlan

_OP = "sparse_mla_decode"
MAX_HEADS = 128


@overload
def sparse_mla_decode(
    q: jax.Array,
    swa: Scope,
    extra: Scope | None = ...,
    *,
    attn_sink: jax.Array | None = ...,
    scale: float = ...,
    plan: DecodePlan | None = ...,
    implementation: str | Sequence[str] | None = ...,
    fused: bool | None = ...,
    out_dtype: jax.typing.DTypeLike | None = ...,
    return_lse: Literal[False] = False,
) -> jax.Array: ...


@overload
def sparse_mla_decode(
    q: jax.Array,
    swa: Scope,
    extra: Scope | None = ...,
    *,
    attn_sink: jax.Array | None = ...,
    scale: float = ...,
    plan: DecodePlan | None = ...,
    implementation: str | Sequence[str] | None = ...,
    fused: bool | None = ...,
    out_dtype: jax.typing.DTypeLike | None = ...,
    return_lse: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...


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
    out_dtype: jax.typing.DTypeLike | None = None,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """DeepSeek-V4's sparse attention for decoding: one softmax over the keys of a sliding window and of compressed entries.

        s[h, k] = scale * q[h] . latent[k]           over the valid keys k of both scopes
        lse[h]  = log sum_k exp(s[h, k])
        out[h]  = sum_k exp(s[h, k]) latent[k] / (exp(lse[h]) + exp(attn_sink[h]))

    A key is valid if its entry lies before the scope's length and names a slot of the cache. Lengths and indices are data: any value is
    legal. What a token does not attend to has no effect on it, NaN included. A token without a valid key has out = 0, lse = -inf.

    Over a mesh, batch axes and heads may be split, and nothing moves; caches stay whole on every device (docs/scaling.md).

    Args:
      q: [*batch, heads, 512] bfloat16 or float32, 1 to 128 heads. Each batch entry is a token.
      swa: the sliding window's Scope.
      extra: the compressed entries' Scope, if any.
      attn_sink: float32 [heads], natural log and not scaled; -inf is no sink, +inf gives zeros.
      scale: a positive Python float.
      plan: what `plan_decode` made from these very lengths, with the same `implementation` and `fused`. A token whose length is
        another is answered with NaN. Default: the call plans for itself, and so does each device that has a part of it.
      implementation: `"cpu"`, `"xla"`, ... (see `implementations()`), a sequence of such in order of preference, or None: the best for
        the platform that the program is lowered for.
      fused: whether one kernel call takes both scopes and the sink. False: a call per scope, merged by `merge_scopes` and
        `apply_attn_sink`. Default: as the implementation does best.
      out_dtype: q's dtype, the default, or float32: unrounded, for what will be merged with the attention to other keys.
      return_lse: whether to return lse as well.

    Returns:
      out [*batch, heads, 512] in `out_dtype`; with `return_lse` also lse, float32 [*batch, heads], natural log, sink excluded.

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
    scopes = [_checked_scope("swa", swa, tuple(batch))]
    if extra is not None:
        scopes.append(_checked_scope("extra", extra, tuple(batch)))
    if attn_sink is not None:
        _checks.require_dtype(attn_sink, _OP, "attn_sink", jnp.float32)
        _checks.require_shape(attn_sink, _OP, "attn_sink", "(heads,)", (heads,))
    is_number = isinstance(scale, (int, float, np.floating)) and not isinstance(scale, bool)
    _checks.require(is_number, _OP, "scale", "be a Python float", f"{type(scale).__name__} {scale!r}")
    _checks.require(math.isfinite(scale) and scale > 0, _OP, "scale", "be positive and finite", scale)
    dtype = jnp.dtype(q.dtype if out_dtype is None else out_dtype)
    names = " or ".join(sorted({jnp.dtype(q.dtype).name, "float32"}))
    _checks.require(dtype in (q.dtype, jnp.float32), _OP, "out_dtype", f"be {names}", dtype.name)
    topks = tuple(s.indices.shape[-1] for s in scopes)
    _checks.require_fits_int32(tokens * sum(topks), _OP, "tokens * topk")
    if plan is not None:
        _check_plan(plan, PlanKey(tokens, heads, topks[0], sum(topks[1:]), spelling(implementation), fused))

    caches = [s.cache for s in scopes]
    chosen = choose(_OP, implementation, lambda i: cannot_fuse(i, fused) or i.unsupported(heads, caches, q.dtype))
    if tokens == 0:
        out, lse = jnp.zeros(q.shape, dtype), jnp.zeros(q.shape[:-1], jnp.float32)
    else:
        local = partial(_attend_local, partial(_attend_tokens, chosen, float(scale), fused, dtype), plan.made_for if plan else None)
        attend = _with_transforms(local, differentiable=not any_native(chosen))
        out, lse = attend(q, tuple(scopes), attn_sink, plan.work if plan else None)
    return (out, lse) if return_lse else out


def _checked_scope(name: str, scope: Scope, batch: tuple[int, ...]) -> Scope:
    """Checks a scope against q's batch axes, and fills in its lengths."""
    _checks.require(isinstance(scope, tuple) and len(scope) == 3, _OP, name, "be a Scope", type(scope).__name__)
    cache, indices, lengths = scope
    _checks.require(isinstance(cache, KVCache), _OP, f"{name}.cache", "be a KVCache", type(cache).__name__)
    require_whole(_OP, f"{name}.cache", cache.data)
    _checks.require_dtype(indices, _OP, f"{name}.indices", jnp.int32)
    topk = indices.shape[-1] if indices.ndim else 0
    _checks.require_shape(indices, _OP, f"{name}.indices", "(*batch, topk)", (*batch, topk))
    if lengths is None:
        lengths = jnp.full(batch, topk, jnp.int32)
    _checks.require_dtype(lengths, _OP, f"{name}.lengths", jnp.int32)
    _checks.require_shape(lengths, _OP, f"{name}.lengths", "(*batch,)", batch)
    return Scope(cache, indices, lengths)


def _check_plan(plan: DecodePlan, call: PlanKey) -> None:
    _checks.require(isinstance(plan, DecodePlan), _OP, "plan", "be a DecodePlan", type(plan).__name__)
    for field, made_for, called_with in zip(PlanKey._fields, plan.made_for, call):
        rule = f"be made for this call's {field} = {called_with!r}"
        _checks.require(made_for == called_with, _OP, "plan", rule, repr(made_for))


def _attend_local(
    attend: Any, made_for: PlanKey | None, q: jax.Array, scopes: Sequence[Scope], attn_sink: jax.Array | None, work: Any
) -> tuple[jax.Array, jax.Array]:
    """What one device does: all tokens and heads, or its part of them."""
    tokens, heads = math.prod(q.shape[:-2]), q.shape[-2]
    if made_for is not None and (tokens, heads) != (made_for.tokens, made_for.num_heads):
        work = None  # it was made for the tokens and heads of all devices together
    flat = tuple(Scope(s.cache, s.indices.reshape(tokens, -1), s.lengths.reshape(tokens)) for s in scopes)  # type: ignore[union-attr]
    out, lse = attend(q.reshape(tokens, heads, LATENT_DIM), flat, attn_sink, work)
    return out.reshape(q.shape), lse.reshape(q.shape[:-1])


def _over_devices(local: Any, *operands: Any) -> tuple[jax.Array, jax.Array]:
    """local(q, scopes, attn_sink, work) on each device of a mesh: batch axes and heads may be split, caches stay whole."""
    arrays = jax.tree.leaves(operands)
    structure: Any = jax.tree.structure(operands)
    q, scopes, attn_sink, work = operands
    batch = tuple(f"b{i}" for i in range(q.ndim - 2))
    dims = [Dims((*batch, "h", None))]
    for name, scope in zip(("swa", "extra"), scopes):
        dims += [Dims((None,) * scope.cache.data.ndim, stays=f"{name}.cache"), Dims((*batch, None)), Dims(batch)]
    dims += [Dims(("h",))] if attn_sink is not None else []
    dims += [Dims((None,) * array.ndim) for array in jax.tree.leaves(work)]
    call = partitioned(_OP, lambda *arrays: local(*structure.unflatten(arrays)), dims, (dims[0], Dims((*batch, "h"))))
    out, lse = call(*arrays)
    return out, lse


def _attend_tokens(
    chosen: dict[str, Any],
    scale: float,
    fused: bool | None,
    dtype: jax.typing.DTypeLike,
    q: jax.Array,
    scopes: tuple[Scope, ...],
    attn_sink: jax.Array | None,
    work: tuple[WorkPlan, ...] | None,
) -> tuple[jax.Array, jax.Array]:
    """The call of q [tokens, heads, 512], by the implementation chosen."""

    def attend(implementation, q, scopes, attn_sink, work):  # type: ignore[no-untyped-def]
        calls = [scopes] if fuses(implementation, fused) else [(scope,) for scope in scopes]
        outs, lses = [], []
        for i, call in enumerate(calls):
            lengths, topks = [s.lengths for s in call], [s.indices.shape[1] for s in call]
            planned = implementation.plan(lengths, topks, q.shape[1]) if work is None else work[i]
            alone = len(calls) == 1
            out, lse = implementation.decode(q, call, attn_sink if alone else None, scale, planned, dtype if alone else jnp.float32)
            outs.append(out)
            lses.append(lse)
        if len(calls) == 1:
            return outs[0], lses[0]
        out, lse = merge_scopes(outs, lses)
        out = out if attn_sink is None else apply_attn_sink(out, lse, attn_sink)
        return out.astype(dtype), lse

    return dispatch(chosen, attend, q, scopes, attn_sink, work)


def _with_transforms(local: Any, differentiable: bool) -> Any:
    """`local` over the devices of a mesh, with a rule for vmap (more tokens of one call) and one for derivatives."""
    call = jax.custom_batching.custom_vmap(partial(_over_devices, local))

    @call.def_vmap
    def rule(axis_size, in_batched, q, scopes, attn_sink, work):  # type: ignore[no-untyped-def]
        q_batched, scopes_batched, sink_batched, _ = in_batched
        if work is not None:
            raise NotImplementedError(
                f"{_OP}: plan must be left out under vmap, or made for all tokens at once: give q one more batch axis instead"
            )
        spread = partial(_spread, axis_size)
        merged = tuple(_merge_scope(spread, axis_size, s, b) for s, b in zip(scopes, scopes_batched))
        # A sink of its own for every entry cannot be the call's, which has one per head.
        out, lse = call(spread(q, q_batched), merged, None if sink_batched else attn_sink, None)
        if attn_sink is not None and sink_batched:
            out = jax.vmap(apply_attn_sink)(out, lse, attn_sink)
        return (out, lse), (True, True)

    return with_derivative(_OP, call, local if differentiable else None)


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
        first = slots * jnp.arange(axis_size, dtype=jnp.int32).reshape(-1, *[1] * (indices.ndim - 1))
        indices = jnp.where((indices >= 0) & (indices < valid), indices + first, -1)
    return Scope(cache, indices, lengths)
