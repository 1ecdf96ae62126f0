"""sparse_mla_decode: check, choose an implementation, and attend: one fused call, or a call per scope merged in JAX."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np

from jax_dsv4 import _checks
from jax_dsv4._implementations import Chosen, cannot_fuse, cannot_size, choose, fuses, names, varies
from jax_dsv4._implementations.interface import Implementation, KernelCall
from jax_dsv4._sharding import Dims, require_whole
from jax_dsv4._transforms import apply, dispatch, side_by_side, spread
from jax_dsv4._work import MAX_HEADS, DecodePlan, PlanKey, WorkPlan, most_segments
from jax_dsv4.cache import LATENT_DIM, LAYOUTS, Scope, require_scope
from jax_dsv4.merge import apply_attn_sink, merge_scopes

_OP = "sparse_mla_decode"


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
    batch_invariant: bool = ...,
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
    batch_invariant: bool = ...,
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
    batch_invariant: bool = False,
    out_dtype: jax.typing.DTypeLike | None = None,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """DeepSeek-V4's sparse attention for decoding: one softmax over the keys of a sliding window and of compressed entries.

        s[h, k] = scale * q[h] . latent[k]           over the valid keys k of both scopes
        lse[h]  = log sum_k exp(s[h, k])
        out[h]  = sum_k exp(s[h, k]) latent[k] / (exp(lse[h]) + exp(attn_sink[h]))

    A key is valid if its entry lies before the scope's length and names a slot of the cache. Lengths and indices are data: any value is
    legal. What a token does not attend to has no effect on it, NaN included. A token without a valid key has out = 0, lse = -inf.

    Over a mesh, batch axes and heads may be split, and nothing moves; caches stay whole on every device.

    Under `jax.export`, batch axes may be symbolic for `"xla"`, and a cache's number of blocks for any implementation; both need an upper
    bound. Heads and topk are constants.

    Args:
      q: [*batch, heads, 512] bfloat16 or float32, 1 to 128 heads. Each batch entry is a token.
      swa: the sliding window's Scope.
      extra: the compressed entries' Scope, if any. The two caches' layouts, block sizes and strides have nothing to do with each other.
      attn_sink: float32 [heads], natural log and not scaled; -inf is no sink, +inf gives zeros.
      scale: a positive Python float.
      plan: what `plan_decode` made from these very lengths, with the same `implementation`, `fused` and `batch_invariant`. A token whose
        length is another is answered with NaN; `"xla"` and `"aiter_gluon"` need no plan and look at none. Default: the call plans for
        itself, and so does each device that has a part of it.
      implementation: `"cpu"`, `"xla"`, ... (see `implementations()`), a sequence of such in order of preference, or None: the best for
        the platform that the program is lowered for.
      fused: whether one kernel call takes both scopes and the sink. False: a call per scope, merged by `merge_scopes` and
        `apply_attn_sink`. Default: as the implementation does best.
      batch_invariant: whether a token must get the same bits in any batch: alone or among others, at any place, with any plan, on any
        number of processors. Heads, scopes and lengths being the same, nothing else counts; where a mesh splits heads, those of a device
        do. `"cpu"` is so always. `"cuda"` is so if asked, and cuts long contexts at fixed places for it, which costs time and, beyond
        1280 keys, memory. `"xla"` and `"aiter"` cannot promise it.
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
    _checks.require_constant(_OP, "q", "number of heads", heads)
    _checks.require(1 <= heads <= MAX_HEADS, _OP, "q", f"have 1 to {MAX_HEADS} heads", heads)
    tokens = math.prod(batch)
    scopes = [_checked_scope("swa", swa, tuple(batch))]
    if extra is not None:
        scopes.append(_checked_scope("extra", extra, tuple(batch)))
    if attn_sink is not None:
        _checks.require_dtype(attn_sink, _OP, "attn_sink", jnp.float32)
        _checks.require_shape(attn_sink, _OP, "attn_sink", "(heads,)", (heads,))
    scale = _checks.require_float(scale, _OP, "scale")
    _checks.require(math.isfinite(scale) and scale > 0, _OP, "scale", "be positive and finite", scale)
    fused = None if fused is None else _checks.require_bool(fused, _OP, "fused")
    batch_invariant = _checks.require_bool(batch_invariant, _OP, "batch_invariant")
    return_lse = _checks.require_bool(return_lse, _OP, "return_lse")
    dtype = jnp.dtype(q.dtype if out_dtype is None else out_dtype)
    dtypes = " or ".join(sorted({jnp.dtype(q.dtype).name, "float32"}))
    _checks.require(dtype in (q.dtype, jnp.float32), _OP, "out_dtype", f"be {dtypes}", dtype.name)
    topks = tuple(s.indices.shape[-1] for s in scopes)
    _checks.require_fits_int32(tokens * sum(topks), _OP, "tokens * topk")
    if plan is not None:
        _check_plan(plan, PlanKey(tokens, heads, topks[0], sum(topks[1:]), names(_OP, implementation), fused, batch_invariant))
    _checks.require_same_devices(_OP, q=q, swa=swa, extra=extra, attn_sink=attn_sink, plan=plan)

    caches = [s.cache for s in scopes]

    def unsupported(candidate: Implementation) -> str | None:
        reason = cannot_fuse(candidate, fused) or varies(candidate, batch_invariant) or cannot_size(candidate, tokens)
        return reason or candidate.unsupported(heads, caches, q.dtype)

    chosen = choose(_OP, implementation, unsupported)
    op = _Decode(chosen, scale, fused, batch_invariant, dtype, plan.made_for if plan else None)
    out, lse = apply(op, _Operands(q, tuple(scopes), attn_sink, plan.work if plan else ()))
    return (out, lse) if return_lse else out


def _checked_scope(name: str, scope: Scope, batch: tuple[int, ...]) -> Scope:
    """Checks a scope against q's batch axes, and fills in its lengths."""
    require_scope(scope, _OP, name)
    cache, indices, lengths = scope
    if name == "swa":
        rule = f"have a layout of the sliding window ({cache.layout!r} is for extra only)"
        _checks.require(not LAYOUTS[cache.layout].extra_only, _OP, "swa.cache", rule, repr(cache.layout))
    require_whole(_OP, f"{name}.cache", cache.data)
    _checks.require_dtype(indices, _OP, f"{name}.indices", jnp.int32)
    topk = indices.shape[-1] if indices.ndim else 0
    _checks.require_shape(indices, _OP, f"{name}.indices", "(*batch, topk)", (*batch, topk))
    _checks.require_constant(_OP, f"{name}.indices", "topk", topk)
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


class _Operands(NamedTuple):
    q: jax.Array
    scopes: tuple[Scope, ...]
    attn_sink: jax.Array | None
    work: tuple[WorkPlan, ...]  # () where the call plans for itself


@dataclass(frozen=True)
class _Decode:
    """The op with its static arguments."""

    chosen: Chosen
    scale: float
    fused: bool | None
    batch_invariant: bool
    out_dtype: np.dtype[np.generic]
    made_for: PlanKey | None
    name: str = _OP

    def on_device(self, operands: _Operands) -> tuple[jax.Array, ...]:
        q, scopes, attn_sink, work = operands
        *batch, heads, _ = q.shape
        tokens = math.prod(batch)
        if tokens == 0:
            return jnp.zeros(q.shape, self.out_dtype), jnp.zeros(q.shape[:-1], jnp.float32)
        if self.made_for is not None and (tokens, heads) != (self.made_for.tokens, self.made_for.num_heads):
            work = ()  # it was made for the tokens and heads of all devices together
        flat = tuple(Scope(s.cache, s.indices.reshape(tokens, -1), s.lengths.reshape(tokens)) for s in scopes)  # type: ignore[union-attr]
        operands = _Operands(q.reshape(tokens, heads, LATENT_DIM), flat, attn_sink, work)
        out, lse = dispatch(self.chosen, self._attend, operands)
        return out.reshape(q.shape), lse.reshape(q.shape[:-1])

    def _attend(self, implementation: Implementation, operands: _Operands) -> tuple[jax.Array, jax.Array]:
        """One kernel call for all scopes, or one for each, merged."""
        q, scopes, attn_sink, work = operands
        fused = fuses(implementation, self.fused) or len(scopes) == 1
        call = KernelCall(q, scopes, attn_sink, None, self.scale, self.out_dtype, self.batch_invariant)
        calls = [call]
        if not fused:
            calls = [replace(call, scopes=(scope,), attn_sink=None, out_dtype=jnp.dtype(jnp.float32)) for scope in scopes]
        segments = most_segments(sum(call.topks), self.batch_invariant)
        planned = work or [implementation.plan(each.lengths, each.topks, q.shape[1], segments) for each in calls]
        results = [implementation.decode(replace(call, work=each)) for call, each in zip(calls, planned)]
        if fused:
            return results[0]
        out, lse = merge_scopes(*zip(*results))
        out = out if attn_sink is None else apply_attn_sink(out, lse, attn_sink)
        return out.astype(self.out_dtype), lse

    def dims(self, operands: _Operands) -> tuple[Sequence[Dims], Sequence[Dims]]:
        """Batch axes and heads may be split. Caches stay whole."""
        q, scopes, attn_sink, work = operands
        batch = tuple(f"b{i}" for i in range(q.ndim - 2))
        dims = [Dims((*batch, "h", None))]
        for name, scope in zip(("swa", "extra"), scopes):
            dims += [Dims.unsplit(scope.cache.data, f"{name}.cache"), Dims((*batch, None)), Dims(batch)]
        dims += [Dims(("h",))] if attn_sink is not None else []
        dims += [Dims.unsplit(array) for array in jax.tree.leaves(work)]
        return dims, (dims[0], Dims((*batch, "h")))

    def batch(self, size: int, operands: _Operands, batched: _Operands) -> tuple[_Operands, Callable[..., tuple[jax.Array, ...]]]:
        """More tokens of one call. Caches of their own become one cache."""
        q, scopes, attn_sink, work = operands
        if work:
            raise NotImplementedError(
                f"{_OP}: plan must be left out under vmap, or made for all tokens at once: give q one more batch axis instead"
            )
        merged = []
        for scope, has in zip(scopes, batched.scopes):
            cache, indices = scope.cache, spread(size, scope.indices, has.indices)
            if has.cache.data:
                cache, indices = side_by_side(_OP, size, cache, indices)
            merged.append(Scope(cache, indices, spread(size, scope.lengths, has.lengths)))
        # A sink of its own for every entry cannot be the call's, which has one per head.
        own_sinks = attn_sink if batched.attn_sink else None

        def results_of_each(results: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            out, lse = results
            return (out if own_sinks is None else jax.vmap(apply_attn_sink)(out, lse, own_sinks)), lse

        call = _Operands(spread(size, q, batched.q), tuple(merged), attn_sink if own_sinks is None else None, ())
        return call, results_of_each
