"""What every op goes through between its checks and its kernels: compiled once, differentiated, batched, split over devices, and given
to the implementation of the platform.

An op says what it is in the terms of `Op`; the transforms are the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp

from jax_dsv4 import _checks
from jax_dsv4._implementations import Chosen
from jax_dsv4._implementations.interface import Implementation
from jax_dsv4._sharding import Dims, is_explicit, partitioned, vary, varying_axes
from jax_dsv4.cache import LAYOUTS, KVCache

Arrays = tuple[jax.Array, ...]
Operands = TypeVar("Operands")
Result = TypeVar("Result")


class Op(Protocol[Operands]):
    """An op with its static arguments; hashable. `Operands` is a pytree of arrays. Its results are a tuple of arrays."""

    @property
    def name(self) -> str: ...

    @property
    def chosen(self) -> Chosen: ...

    def on_device(self, operands: Operands) -> Arrays:
        """What one device does: the whole call, or its part."""

    def dims(self, operands: Operands) -> tuple[Sequence[Dims], Sequence[Dims]]:
        """How the leaves of the operands, and the results, may be split over devices."""

    def batch(self, size: int, operands: Operands, batched: Operands) -> tuple[Operands, Callable[[Arrays], Arrays]]:
        """The one call that does what `size` calls do, and what makes their results of its results, batch axis first. `batched` says
        which leaves have a leading axis of that size."""


def apply(op: Op[Operands], operands: Operands) -> Arrays:
    """The results of an op, under whatever transformations the caller is."""
    results: Arrays = _compiled(op, operands)
    return results


# One jit for all calls: outside of any other, a call of known shapes is neither traced nor compiled again.
@partial(jax.jit, static_argnums=0)
def _compiled(op: Op[Operands], operands: Operands) -> Arrays:
    call = jax.custom_batching.custom_vmap(partial(_over_devices, op))

    @call.def_vmap
    def rule(size: int, batched: tuple[Operands], operands: Operands) -> tuple[Arrays, tuple[bool, ...]]:
        merged, results_of_each = op.batch(size, operands, batched[0])
        results = results_of_each(call(merged))
        return results, (True,) * len(results)

    differentiated = jax.custom_jvp(call)

    @differentiated.defjvp
    def derivative(primals: tuple[Operands], tangents: tuple[Operands]) -> tuple[Arrays, Arrays]:
        if not op.chosen.plain_jax:
            raise NotImplementedError(f"{op.name}: native implementations have no derivative; pass implementation='xla' to differentiate")
        # Custom partitioning has no derivative, plain JAX needs none to be partitioned; explicit mode's shard_map has one.
        plain = partial(_over_devices, op) if is_explicit(primals) else op.on_device
        results: tuple[Arrays, Arrays] = jax.jvp(plain, primals, tangents)
        return results

    results: Arrays = differentiated(operands)
    return results


def _over_devices(op: Op[Operands], operands: Operands) -> Arrays:
    leaves, structure = jax.tree.flatten(operands)

    def on_device(*leaves: jax.Array) -> Arrays:
        return op.on_device(jax.tree.unflatten(structure, leaves))

    return partitioned(op.name, on_device, *op.dims(operands))(*leaves)


def dispatch(chosen: Chosen, call: Callable[[Implementation, Operands], Result], operands: Operands) -> Result:
    """call(implementation, operands) with the implementation chosen for the platform that is lowered for."""
    # Inside a shard_map, a result differs between devices where an operand does. JAX sees that in plain code, and not in an ffi_call;
    # branches must agree.
    axes = varying_axes(operands)

    def branch(implementation: Implementation, operands: Operands) -> Result:
        return vary(call(implementation, operands), axes)

    branches = {platform: partial(branch, implementation) for platform, implementation in chosen.by_platform}
    default = branches.pop("", None)
    if not branches and default:
        return default(operands)
    result: Result = jax.lax.platform_dependent(operands, default=default, **branches)
    return result


def spread(size: int, arrays: Operands, batched: Operands) -> Operands:
    """The arrays, each with a leading axis of so many entries, under vmap. `batched` says which have it already."""
    every: Operands = jax.tree.map(lambda x, has: x if has else jnp.broadcast_to(x, (size, *x.shape)), arrays, batched)
    return every


def side_by_side(op: str, size: int, cache: KVCache, slots: jax.Array) -> tuple[KVCache, jax.Array]:
    """Caches [size, ...] under vmap as one cache, and each one's slots [size, ...] in it; -1 for what is outside of its own."""
    per_cache = cache.data.shape[1] * cache.block_size
    # A layout's own blocks at the front are between the caches now: no slot may name them.
    valid = per_cache - LAYOUTS[cache.layout].zero_blocks * cache.block_size
    _checks.require_fits_int32(size * per_cache, op, "slots of all caches under vmap")
    first = per_cache * jnp.arange(size, dtype=jnp.int32).reshape(-1, *[1] * (slots.ndim - 1))
    merged = cache.replace(cache.data.reshape(-1, *cache.data.shape[2:]))
    return merged, jnp.where((slots >= 0) & (slots < valid), slots + first, -1)
