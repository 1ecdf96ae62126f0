"""The implementations of the ops, and how a call chooses among them.

An implementation is chosen when a program is lowered, for the platform it is lowered for, so that one traced program can be exported
for several. Each is an object with the methods of `Implementation`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jax_dsv4 import _checks
from jax_dsv4._sharding import Dims, partitioned, require_whole, vary, varying_axes
from jax_dsv4.cache import LAYOUTS, KVCache
from jax_dsv4.implementations import aiter, native, xla
from jax_dsv4.implementations._interface import Availability, Implementation
from jax_dsv4.plan import PlanKey, WorkPlan

# In order of preference.
_REGISTRY: dict[str, Implementation] = {i.name: i for i in (native.CPU, native.CUDA, aiter.AITER, xla.XLA)}

Spelling = str | tuple[str, ...] | None


def implementations() -> dict[str, Availability]:
    """Which implementations can run in this process, in order of preference; for each absent one, why."""
    return {name: implementation.availability() for name, implementation in _REGISTRY.items()}


def platforms_of(name: str) -> tuple[str, ...]:
    """The platforms, by JAX's names, that an implementation runs on; () for any."""
    return _REGISTRY[name].platforms


def spelling(implementation: str | Sequence[str] | None) -> Spelling:
    """The `implementation=` argument in a hashable form."""
    return implementation if implementation is None or isinstance(implementation, str) else tuple(implementation)


def choose(
    op: str, implementation: str | Sequence[str] | None, unsupported: Callable[[Implementation], str | None]
) -> dict[str, Implementation]:
    """The implementation for each platform that has one ("" stands for any other platform).

    Raises:
      ValueError: an unknown name.
      NotImplementedError: none of those asked for can take the call; the message has each one's reason.
    """
    named = spelling(implementation)
    names = tuple(_REGISTRY) if named is None else (named,) if isinstance(named, str) else named
    chosen: dict[str, Implementation] = {}
    reasons = []
    for name in names:
        rule = "be None or name " + ", ".join(repr(n) for n in _REGISTRY)
        _checks.require(name in _REGISTRY, op, "implementation", rule, repr(name))
        candidate = _REGISTRY[name]
        available, detail = candidate.availability()
        reason = None if available or (named is None and candidate.exportable()) else detail
        reason = reason or unsupported(candidate)
        if reason is not None:
            reasons.append(f"{name}: {reason}")
            continue
        for platform in candidate.platforms or ("",):
            chosen.setdefault(platform, candidate)
    if not chosen:
        raise NotImplementedError(f"{op}: implementation={implementation!r} cannot run this call. " + "; ".join(reasons))
    return chosen


def dispatch(chosen: dict[str, Implementation], call: Callable[..., Any], *operands: Any) -> Any:
    """call(implementation, *operands) with the implementation chosen for the platform that is lowered for."""
    # Inside a shard_map, a result differs between devices where an operand does. JAX sees that in plain code, and not in an ffi_call;
    # branches must agree.
    axes = varying_axes(operands)

    def typed(implementation: Implementation, *operands: Any) -> Any:
        return vary(call(implementation, *operands), axes)

    if set(chosen) == {""}:
        return typed(chosen[""], *operands)
    branches = {platform: partial(typed, candidate) for platform, candidate in chosen.items() if platform}
    default = partial(typed, chosen[""]) if "" in chosen else None
    return jax.lax.platform_dependent(*operands, default=default, **branches)


def fuses(implementation: Implementation, fused: bool | None) -> bool:
    """Whether a call of both scopes is one kernel call, given the `fused=` argument."""
    return implementation.fuses if fused is None else fused


def cannot_fuse(implementation: Implementation, fused: bool | None) -> str | None:
    return "it calls its kernel per scope, and fused=True was asked for" if fused and not implementation.fuses else None


def plan_work(lengths: Sequence[jax.Array], topks: Sequence[int], key: PlanKey) -> tuple[WorkPlan, ...]:
    """The WorkPlans of a DecodePlan: for each kernel call of each implementation that may be chosen."""
    op = "plan_decode"
    chosen = choose(op, key.implementation, lambda i: cannot_fuse(i, key.fused) or i.unsupported(key.num_heads, ()))
    # All platforms' plans have one structure: as many WorkPlans as the one that calls most often needs, blank ones for the others.
    count = 1 if all(fuses(i, key.fused) for i in chosen.values()) else len(lengths)
    shapes = (native.plan_shapes(key.tokens),) * count

    def blank() -> WorkPlan:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[0])

    if key.tokens == 0:
        return (blank(),) * count

    def plan_on(implementation: Implementation, *lengths: jax.Array) -> tuple[WorkPlan, ...]:
        calls = [(lengths, topks)] if fuses(implementation, key.fused) else [((n,), (k,)) for n, k in zip(lengths, topks)]
        made = [implementation.plan(*call, key.num_heads) or blank() for call in calls]
        return (*made, *(blank() for _ in range(count - len(made))))

    def local(*lengths: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jax.tree.leaves(dispatch(chosen, plan_on, *(n.reshape(-1) for n in lengths))))

    # A plan is of a whole call, so of all its lengths; a device that has a part of the call plans that for itself (decode.py).
    dims = [Dims((None,) * n.ndim) for n in lengths]
    results = [Dims((None,) * len(x.shape)) for x in jax.tree.leaves(shapes)]
    call = jax.custom_batching.custom_vmap(partitioned(op, local, dims, results))

    @call.def_vmap
    def rule(*_):  # type: ignore[no-untyped-def]
        raise NotImplementedError(f"{op}: lengths must not be batched by vmap: a plan is of one call, made for all its tokens at once")

    return jax.tree.unflatten(jax.tree.structure(shapes), call(*lengths))


def append_rows(cache: KVCache, latents: jax.Array, slots: jax.Array, implementation: str | Sequence[str] | None) -> jax.Array:
    """`cache.data` with latents [*batch, 512] written at slots [*batch]."""
    op = "append"
    require_whole(op, "cache", cache.data)
    chosen = choose(op, implementation, lambda i: i.unsupported(1, (cache,)))
    if slots.size == 0:
        return cache.data

    def local(data: jax.Array, latents: jax.Array, slots: jax.Array) -> tuple[jax.Array]:
        rows = latents.reshape(-1, latents.shape[-1]), slots.reshape(-1)
        return (dispatch(chosen, lambda i, data, *rows: i.append(cache.replace(data), *rows), data, *rows),)

    def write(*arrays: jax.Array) -> jax.Array:
        # Every device writes every row to its own copy of the cache, so all need all rows.
        dims = [Dims((None,) * array.ndim) for array in arrays]
        return partitioned(op, local, [dims[0]._replace(stays="cache"), *dims[1:]], dims[:1])(*arrays)[0]

    call = jax.custom_batching.custom_vmap(write)

    @call.def_vmap
    def rule(axis_size, in_batched, data, latents, slots):  # type: ignore[no-untyped-def]
        if not in_batched[0]:
            raise NotImplementedError(f"{op}: under vmap the cache must be batched too: every entry writes to its own")
        # The caches side by side are one cache; a slot outside its own must not reach a neighbour's.
        latents, slots = (x if b else jnp.broadcast_to(x, (axis_size, *x.shape)) for x, b in zip((latents, slots), in_batched[1:]))
        per_cache = data.shape[1] * cache.block_size
        _checks.require_fits_int32(axis_size * per_cache, op, "slots of all caches under vmap")
        first = per_cache * jnp.arange(axis_size, dtype=jnp.int32).reshape(-1, *[1] * (slots.ndim - 1))
        valid = per_cache - LAYOUTS[cache.layout].zero_blocks * cache.block_size
        slots = jnp.where((slots >= 0) & (slots < valid), slots + first, -1)
        return call(data.reshape(-1, *data.shape[2:]), latents, slots).reshape(data.shape), True

    plain = None if any_native(chosen) else lambda *arrays: local(*arrays)[0]
    return with_derivative(op, call, plain)(cache.data, latents, slots)


def any_native(chosen: dict[str, Implementation]) -> bool:
    return any(platform for platform in chosen)


def with_derivative(op: str, function: Callable[..., Any], plain: Callable[..., Any] | None) -> Callable[..., Any]:
    """`function` with the derivative of `plain`, which computes the same in plain JAX; with a clear error where there is none."""
    wrapped = jax.custom_jvp(function)

    @wrapped.defjvp
    def derivative(primals: Any, tangents: Any) -> Any:
        if plain is None:
            raise NotImplementedError(f"{op}: native implementations have no derivative; pass implementation='xla' to differentiate")
        return jax.jvp(plain, primals, tangents)

    return wrapped
