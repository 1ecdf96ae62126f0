"""What an implementation is, and what it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax

from jax_dsv4._work import WorkPlan
from jax_dsv4.cache import KVCache, Scope


class Availability(NamedTuple):
    """Whether an implementation can run in this process, and what it is or why it cannot."""

    available: bool
    detail: str


@dataclass(frozen=True)
class KernelCall:
    """The decode of one kernel call.

    q          [tokens, heads, 512]
    scopes     indices [tokens, topk] and lengths [tokens]; the latter are never left out here
    attn_sink  float32 [heads], or None where the sink is applied later
    work       what `plan` made from these lengths; None where it makes nothing
    scale      of the scores
    out_dtype  q's, or float32 for what will be merged
    batch_invariant  whether a token's bits must not depend on the other tokens
    """

    q: jax.Array
    scopes: tuple[Scope, ...]
    attn_sink: jax.Array | None
    work: WorkPlan | None
    scale: float
    out_dtype: jax.typing.DTypeLike
    batch_invariant: bool

    @property
    def planned(self) -> WorkPlan:
        """The work of an implementation that plans."""
        assert self.work is not None
        return self.work

    @property
    def lengths(self) -> list[jax.Array]:
        return [scope.lengths for scope in self.scopes if scope.lengths is not None]

    @property
    def topks(self) -> list[int]:
        return [scope.indices.shape[1] for scope in self.scopes]


class Implementation(Protocol):
    name: str
    platforms: tuple[str, ...]  # JAX's names; () for any
    fuses: bool  # whether one call may take both scopes and the sink
    batch_invariant: bool  # whether it can give a token the same bits in any batch

    def availability(self) -> Availability: ...

    def exportable(self) -> bool:
        """Whether programs may be lowered to it on a machine without its platform."""

    def unsupported(self, num_heads: int, caches: Sequence[KVCache], q_dtype: jax.typing.DTypeLike | None = None) -> str | None:
        """Why it cannot take such a call; None if it can."""

    def plan(self, lengths: Sequence[jax.Array], topks: Sequence[int], num_heads: int, segments: int) -> WorkPlan | None:
        """Plans one kernel call over scopes of such lengths [tokens]; None if it needs no plan. Batch-invariant unless `segments` is 0; its
        arrays have room for so many items of each token then."""

    def decode(self, call: KernelCall) -> tuple[jax.Array, jax.Array]:
        """out [tokens, heads, 512] of `call.out_dtype` and lse float32 [tokens, heads]."""

    def append(self, cache: KVCache, latents: jax.Array, slots: jax.Array) -> jax.Array:
        """`cache.data` with latents [count, 512] written at slots [count]."""
