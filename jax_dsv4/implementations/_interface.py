"""What an implementation is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax

from jax_dsv4.cache import KVCache, Scope
from jax_dsv4.plan import WorkPlan


class Availability(NamedTuple):
    """Whether an implementation can run in this process, and what it is or why it cannot."""

    available: bool
    detail: str


class Implementation(Protocol):
    name: str
    platforms: tuple[str, ...]  # JAX's names; () for any
    fuses: bool  # whether one call may take both scopes and the sink

    def availability(self) -> Availability: ...

    def exportable(self) -> bool:
        """Whether programs may be lowered to it on a machine without its platform."""

    def unsupported(self, num_heads: int, caches: Sequence[KVCache], q_dtype: jax.typing.DTypeLike | None = None) -> str | None:
        """Why it cannot take such a call; None if it can."""

    def plan(self, lengths: Sequence[jax.Array], topks: Sequence[int], num_heads: int) -> WorkPlan | None:
        """Plans one kernel call over the given scopes; None if it needs no plan."""

    def decode(
        self,
        q: jax.Array,
        scopes: Sequence[Scope],
        attn_sink: jax.Array | None,
        scale: float,
        work: WorkPlan | None,
        out_dtype: jax.typing.DTypeLike,
    ) -> tuple[jax.Array, jax.Array]:
        """out [tokens, heads, 512] of `out_dtype` (q's, or float32 when it will be merged) and lse [tokens,
        heads] of one kernel call; `work` is None where `plan` gives none."""

    def append(self, cache: KVCache, latents: jax.Array, slots: jax.Array) -> jax.Array:
        """`cache.data` with latents [count, 512] written at slots [count]."""
