"""append: quantises latents and writes them to their slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_dsv4 import _checks
from jax_dsv4._implementations import Chosen, choose
from jax_dsv4._implementations.interface import Implementation
from jax_dsv4._sharding import Dims, require_whole
from jax_dsv4._transforms import apply, dispatch, side_by_side, spread
from jax_dsv4.cache import LATENT_DIM, KVCache

_OP = "append"


def append(cache: KVCache, latents: jax.Array, slots: jax.Array, *, implementation: str | Sequence[str] | None = None) -> KVCache:
    """Quantises latents and writes them to their slots.

    Under jit the result is the argument's own buffer when that is donated or a loop carry: nothing is copied. Reading the old cache
    after the append brings a copy back, so attend on what append returns. Over a mesh, every device writes all rows to its own copy; where
    blocks are spread over devices, `local_slots` says which rows are whose.

    `"fp8_ds_mla"` quantises every 64 nope numbers to e4m3fn with the scale 2^ceil(log2(max(amax, 1e-4) / 448)), stored as ue8m0; rope
    stays bfloat16. `"aiter_fp8"` divides by the cache's scale and keeps e4m3fn throughout, `"aiter_fp8_fnuz"` e4m3fnuz. Rounding is to
    nearest even. In these formats infinities and what is too large saturate. NaN stays NaN.

    `"mxfp8_528"` does with every 32 of all 512 numbers what `"fp8_ds_mla"` does with 64. There a number that is not finite makes its 32
    numbers NaN. `"nvfp4_288"` quantises every 16 numbers to e2m1 with the scale clip(amax / 6, 2^-9, 448), rounded to e4m3fn. Quotients are
    exact before they are rounded. What is too large saturates, infinities to 2688; a NaN makes its 16 numbers NaN.

    Under `jax.export` the number of rows may be symbolic, and a cache's number of blocks with an upper bound.

    Args:
      cache: where to write.
      latents: [*batch, 512] bfloat16 or float32.
      slots: [*batch] int32. A slot outside [0, cache.num_slots) skips its row; of equal slots the last row wins.
      implementation: as in `sparse_mla_decode`.

    Returns:
      The cache with those rows replaced.

    Raises:
      ValueError: a wrong shape or dtype.
    """
    _checks.require(isinstance(cache, KVCache), _OP, "cache", "be a KVCache", type(cache).__name__)
    _checks.require_dtype(latents, _OP, "latents", jnp.bfloat16, jnp.float32)
    _checks.require_dtype(slots, _OP, "slots", jnp.int32)
    batch = latents.shape[:-1]
    _checks.require_shape(latents, _OP, "latents", "(*batch, 512)", (*batch, LATENT_DIM))
    _checks.require_shape(slots, _OP, "slots", "(*batch,)", batch)
    require_whole(_OP, "cache", cache.data)
    _checks.require_same_devices(_OP, cache=cache, latents=latents, slots=slots)
    chosen = choose(_OP, implementation, lambda i: i.unsupported(1, (cache,)))
    if slots.size == 0:
        return cache
    (data,) = apply(_Append(chosen), _Operands(cache, latents, slots))
    return cache.replace(data)


class _Operands(NamedTuple):
    cache: KVCache
    latents: jax.Array
    slots: jax.Array


@dataclass(frozen=True)
class _Append:
    """The op with its static arguments."""

    chosen: Chosen
    name: str = _OP

    def on_device(self, operands: _Operands) -> tuple[jax.Array, ...]:
        cache, latents, slots = operands
        return (dispatch(self.chosen, self._write, _Operands(cache, latents.reshape(-1, LATENT_DIM), slots.reshape(-1))),)

    def _write(self, implementation: Implementation, operands: _Operands) -> jax.Array:
        return implementation.append(*operands)

    def dims(self, operands: _Operands) -> tuple[Sequence[Dims], Sequence[Dims]]:
        """Every device writes every row to its own copy of the cache, so all need all rows."""
        cache, latents, slots = operands
        dims = [Dims.unsplit(cache.data, "cache"), Dims.unsplit(latents), Dims.unsplit(slots)]
        return dims, [Dims.unsplit(cache.data)]

    def batch(self, size: int, operands: _Operands, batched: _Operands) -> tuple[_Operands, Callable[..., tuple[jax.Array, ...]]]:
        """The caches side by side are one cache."""
        cache, latents, slots = operands
        if not batched.cache.data:
            raise NotImplementedError(f"{_OP}: under vmap the cache must be batched too: every entry writes to its own")
        merged, slots = side_by_side(_OP, size, cache, spread(size, slots, batched.slots))
        return _Operands(merged, spread(size, latents, batched.latents), slots), lambda results: (results[0].reshape(cache.data.shape),)
