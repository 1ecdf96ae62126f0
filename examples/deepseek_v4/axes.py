"""The axes of a mesh, and what devices exchange along them. On one device nothing moves."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

import jax_dsv4 as dsv4

PLACEMENT = "interleaved"  # blocks of a compressed cache are dealt to the devices in turn: its newest ones are not all on one


class Axes(NamedTuple):
    """The mesh axes that a program is spread over; () is none: one device."""

    data: tuple[str, ...] = ()  # requests
    model: tuple[str, ...] = ()  # heads, groups of the output projection, vocabulary
    context: tuple[str, ...] = ()  # blocks of the compressed caches

    @property
    def peers(self) -> tuple[str, ...]:
        """Along which devices have the same requests: the shared expert's inner size, the indexer's keys."""
        return (*self.model, *self.context)

    @property
    def every(self) -> tuple[str, ...]:
        """Experts."""
        return (*self.data, *self.peers)


ONE_DEVICE = Axes()
AXES = Axes(("data",), ("model",), ("context",))


def scope_here(scope: dsv4.Scope, axes: Axes) -> dsv4.Scope:
    """The part of a compressed scope that is on this device of the context."""
    return scope if lax.axis_size(axes.context) == 1 else dsv4.local_scope(scope, axes.context, placement=PLACEMENT)


def slots_here(cache: dsv4.KVCache, slots: Array, axes: Axes) -> Array:
    """Which of a compressed cache's slots are on this device of the context, where; -1 for the others."""
    return slots if lax.axis_size(axes.context) == 1 else dsv4.local_slots(cache, slots, axes.context, placement=PLACEMENT)


def shares_groups(groups: int, context: int) -> bool:
    """Whether the devices of a context share out the groups of the output projection that are on each: if they divide them."""
    return context > 1 and groups % context == 0


def share(x: Array, axis: int, axes: Axes) -> Array:
    """This device's n-th of an axis, among the n of the context."""
    size = x.shape[axis] // lax.axis_size(axes.context)
    return lax.dynamic_slice_in_dim(x, size * lax.axis_index(axes.context), size, axis)


def best_of_peers(best: Array, chosen: Array, topk: int, axes: Axes) -> Array:
    """The `topk` of the entries int32 [b, t, k] that each of the peers has chosen, by their scores `best`, float32; best first.

    Of equal scores it takes the earlier entry, as one device does.
    """
    if lax.axis_size(axes.peers) == 1:
        return chosen
    both = jnp.stack([lax.bitcast_convert_type(best, jnp.int32), chosen])  # in one collective
    best, chosen = lax.all_gather(both, axes.peers, axis=3, tiled=True)
    return lax.sort((-lax.bitcast_convert_type(best, jnp.float32), chosen), num_keys=2)[1][..., :topk]


def to_experts(x: Array, axes: Axes) -> Array:
    """x [b, ...] of this device's requests → of all devices' along `data`.

    Experts are on all devices, so a token goes to all of them, and each adds up what its own experts say to it (`from_experts`). With few
    tokens latency is what counts, and this is one collective there and one back; docs/example.md compares it with an all-to-all.
    """
    return lax.all_gather(x, axes.data, tiled=True)


def from_experts(routed: Array, shared: Array, axes: Axes) -> Array:
    """What the experts of all devices say to this device's requests, added up: routed [devices of data · b, ...], shared [b, ...]."""
    return lax.psum(shared + lax.psum_scatter(routed, axes.data, tiled=True), axes.peers)
