"""Other engines' forms: page tables, ragged queries, softmax residuals, caches of other layouts, tokamax's `sparse_mla`.

    from jax_dsv4 import adapters

Nothing here is needed where an engine has slots and a packed cache already.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_dsv4 import _checks
from jax_dsv4 import cache as kv
from jax_dsv4._ops.decode import sparse_mla_decode
from jax_dsv4._sharding import is_explicit
from jax_dsv4.merge import apply_attn_sink, merge_scopes

# A maximum as low as this is that of a row without keys: kernels start from the lowest float or a fraction of it, not only from -inf.
NO_KEYS = -1e30
# tokamax packs a position in 128 words of four bytes, and its rotary numbers in 32 words of two.
TOKAMAX_WORDS = 128
TOKAMAX_ROPE_WORDS = kv.ROPE_DIM // 2


def slots_from_pages(page_table: jax.Array, logical_indices: jax.Array, page_size: int, *, requests: jax.Array | None = None) -> jax.Array:
    """Slots of positions that are numbered within a request, by its page table (vLLM's and FlashMLA's block table).

        slot = page_table[request, index // page_size] * page_size + index % page_size

    Args:
      page_table: int32 [*batch, pages], a token's own; with `requests`, int32 [num_requests, pages]. The cache's blocks, in the order of
        the request's positions; negative where there is none.
      logical_indices: int32 [*batch, topk], positions within the token's request.
      page_size: positions in a page, which is the cache's block_size.
      requests: int32 [*batch], the request of each token, such as `ragged_rows` gives.

    Returns:
      int32 [*batch, topk]; -1 for an index that is negative or beyond the table, for a page or a request that is not there.

    Raises:
      ValueError: a wrong dtype; shapes that do not fit.
    """
    return _slots_from_pages("slots_from_pages", page_table, "logical_indices", logical_indices, page_size, requests)


def _slots_from_pages(
    op: str, page_table: jax.Array, argument: str, logical_indices: jax.Array, page_size: int, requests: jax.Array | None
) -> jax.Array:
    _checks.require_dtype(page_table, op, "page_table", jnp.int32)
    _checks.require_dtype(logical_indices, op, argument, jnp.int32)
    _checks.require(logical_indices.ndim >= 1, op, argument, "have shape (*batch, topk)", tuple(logical_indices.shape))
    page_size = _checks.require_int(page_size, op, "page_size", 1)
    *batch, _ = logical_indices.shape
    if requests is None:
        _checks.require_shape(page_table, op, "page_table", "(*batch, pages) without requests", (*batch, None))
    else:
        _checks.require_dtype(requests, op, "requests", jnp.int32)
        _checks.require_shape(requests, op, "requests", "(*batch,)", batch)
        _checks.require_shape(page_table, op, "page_table", "(num_requests, pages)", (None, None))
    if page_table.size == 0:
        return jnp.full_like(logical_indices, -1)
    page, offset = jnp.divmod(logical_indices, page_size)
    inside = (page >= 0) & (page < page_table.shape[-1])
    if requests is None:
        block = jnp.take_along_axis(page_table, jnp.where(inside, page, 0), axis=-1)
    else:
        inside &= ((requests >= 0) & (requests < page_table.shape[0]))[..., None]
        at = jnp.where(inside, requests[..., None], 0), jnp.where(inside, page, 0)
        # Over an explicit mesh JAX asks how rows that tokens choose are split: as the tokens are.
        sharding = jax.typeof(at[0]).sharding if is_explicit(at) else None
        block = jnp.asarray(page_table).at[at].get(out_sharding=sharding)
    valid = inside & (block >= 0) & (block <= (_checks.INT32_MAX - page_size + 1) // page_size)
    return jnp.where(valid, block * page_size + offset, -1)


def window_from_pages(
    page_table: jax.Array, positions: jax.Array, window: int, page_size: int, *, requests: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The sliding window of tokens at these positions of their requests: the last `window` positions, their own the last of them.

    Args:
      page_table, page_size, requests: as in `slots_from_pages`.
      positions: int32 [*batch]; negative for a token that is padding.
      window: how many positions a token attends to at most.

    Returns:
      slots int32 [*batch, window] and lengths int32 [*batch], for a Scope.

    Raises:
      ValueError: as `slots_from_pages`.
    """
    op = "window_from_pages"
    _checks.require_dtype(positions, op, "positions", jnp.int32)
    window = _checks.require_int(window, op, "window", 1)
    first = jnp.maximum(positions - window + 1, 0)
    logical = first[..., None] + jax.lax.broadcasted_iota(jnp.int32, (*positions.shape, window), positions.ndim)
    slots = _slots_from_pages(op, page_table, "positions", logical, page_size, requests)
    return slots, jnp.clip(positions + 1, 0, window)


class RaggedRows(NamedTuple):
    """What each row of ragged queries is.

    Attributes:
      requests: int32 [rows], its request; -1 for a row that is padding.
      positions: int32 [rows], its position in the request; -1 for a row that is padding.
    """

    requests: jax.Array
    positions: jax.Array


def ragged_rows(
    cu_q_lens: jax.Array, num_rows: int, *, kv_lens: jax.Array | None = None, num_requests: jax.Array | int | None = None
) -> RaggedRows:
    """The request and the position of each row, where the queries of all requests are one array without gaps.

    Args:
      cu_q_lens: int32 [max_requests + 1]: request r has the rows from cu_q_lens[r] to cu_q_lens[r + 1]. Not decreasing.
      num_rows: rows of the array, a static int. Those from cu_q_lens[num_requests] on are padding.
      kv_lens: int32 [max_requests], positions of each request with its new ones. Default: its new ones alone.
      num_requests: how many requests there are; what `cu_q_lens` has beyond them may be anything. Default: max_requests.

    Raises:
      ValueError: a wrong dtype or shape.
    """
    op = "ragged_rows"
    _checks.require_dtype(cu_q_lens, op, "cu_q_lens", jnp.int32)
    _checks.require(cu_q_lens.ndim == 1 and cu_q_lens.shape[0] >= 2, op, "cu_q_lens", "have shape (max_requests + 1,)", cu_q_lens.shape)
    num_rows = _checks.require_int(num_rows, op, "num_rows", 0)
    most = cu_q_lens.shape[0] - 1
    if num_requests is None:
        num_requests = most
    if isinstance(num_requests, (jax.Array, np.ndarray)):
        _checks.require_dtype(num_requests, op, "num_requests", jnp.int32)
        _checks.require_shape(num_requests, op, "num_requests", "of one number", ())
    else:
        num_requests = _checks.require_int(num_requests, op, "num_requests", 0)
    count = jnp.clip(jnp.asarray(num_requests, jnp.int32), 0, most)
    ends = jnp.where(jnp.arange(most, dtype=jnp.int32) < count, cu_q_lens[1:], cu_q_lens[count])
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    request = jnp.searchsorted(ends, rows, side="right").astype(jnp.int32)
    there = request < count
    safe = jnp.where(there, request, 0)
    if kv_lens is None:
        position = rows - cu_q_lens[safe]
    else:
        _checks.require_dtype(kv_lens, op, "kv_lens", jnp.int32)
        _checks.require_shape(kv_lens, op, "kv_lens", "(max_requests,)", (most,))
        position = kv_lens[safe] - ends[safe] + rows
    return RaggedRows(jnp.where(there, request, -1), jnp.where(there, position, -1))


def from_residuals(acc: jax.Array, l: jax.Array, m: jax.Array) -> tuple[jax.Array, jax.Array]:  # noqa: E741 - the field's own name
    """Attention that was left unnormalised, as a part for `merge_scopes`.

        out = acc / l        lse = m + log(l)

    Args:
      acc: [*batch, heads, dim], the sum of exp(score - m) * value.
      l: float32 [*batch, heads], the sum of exp(score - m).
      m: float32 [*batch, heads], the greatest score, natural log. A row without keys has l = 0 or m <= -1e30.

    Returns:
      out in acc's dtype and lse float32; zeros and -inf for a row without keys.

    Raises:
      ValueError: shapes that do not fit.
    """
    op = "from_residuals"
    _checks.require_dtype(acc, op, "acc", *_checks.PARTS)
    for name, value in (("l", l), ("m", m)):
        _checks.require_dtype(value, op, name, jnp.float32)
        _checks.require_shape(value, op, name, "(*batch, heads)", acc.shape[:-1])
    empty = (l == 0) | (m <= NO_KEYS)
    safe = jnp.where(empty, 1, l)
    out = jnp.where(empty[..., None], 0, acc.astype(jnp.float32) / safe[..., None])
    return out.astype(acc.dtype), jnp.where(empty, -jnp.inf, m + jnp.log(safe))


def to_residuals(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The inverse: (acc, l, m) of a part, for an engine that merges by residuals.

    Args:
      out: [*batch, heads, dim], without sink.
      lse: float32 [*batch, heads], natural log.

    Returns:
      acc = out, l = 1 and m = lse; for a row without keys acc = 0, l = 0 and m = the lowest float32, so that m - m is not NaN.

    Raises:
      ValueError: shapes that do not fit.
    """
    op = "to_residuals"
    _checks.require_dtype(out, op, "out", *_checks.PARTS)
    _checks.require_shape(lse, op, "lse", "(*batch, heads)", out.shape[:-1])
    _checks.require_dtype(lse, op, "lse", jnp.float32)
    empty = jnp.isneginf(lse)
    acc = jnp.where(empty[..., None], jnp.zeros((), out.dtype), out)
    return acc, jnp.where(empty, jnp.float32(0), jnp.float32(1)), jnp.where(empty, jnp.finfo(jnp.float32).min, lse)


def cache_from_latents(
    latents: jax.Array, layout: str = "fp8_ds_mla", *, scale: float | None = None, arrangement: str | None = None
) -> kv.KVCache:
    """A cache of latents that are paged already, such as an engine's bfloat16 cache: block b, row r becomes slot b * block_size + r.

    Args:
      latents: bfloat16 or float32 [num_blocks, block_size, 512].
      layout, scale, arrangement: the cache's, as in `KVCache`. Quantised as `append` does; `"bf16"` of bfloat16 latents is the same bytes.

    Raises:
      ValueError: a wrong dtype or shape.
    """
    op = "cache_from_latents"
    _checks.require_dtype(latents, op, "latents", jnp.bfloat16, jnp.float32)
    _checks.require_shape(latents, op, "latents", "(num_blocks, block_size, 512)", (None, None, kv.LATENT_DIM))
    blocks, block_size, _ = latents.shape
    if layout in ("bf16", "float32"):
        data = latents.astype(kv.LAYOUTS[layout].dtype)
        return kv.KVCache(data, block_size=block_size, layout=layout, scale=scale, arrangement=arrangement)
    cache = kv.KVCache.create(blocks, block_size, layout, scale=scale, arrangement=arrangement)
    rows = latents.reshape(-1, kv.LATENT_DIM)
    return cache.replace(kv.write_rows(cache, rows, jnp.arange(len(rows), dtype=jnp.int32)))


def cache_from_tokamax(
    cache_kv_nope: jax.Array,
    cache_kv_rope: jax.Array,
    layout: str = "fp8_ds_mla",
    *,
    scale: float | None = None,
    arrangement: str | None = None,
) -> kv.KVCache:
    """A cache of the pages of tokamax's `sparse_mla`: a page becomes a block.

    tokamax has a scale for every 64th number, `"fp8_ds_mla"` one for every 64 neighbours. So the numbers are rounded to e4m3 once more,
    but with `"bf16"`, which has them as they are.

    Args:
      cache_kv_nope: int32 [pages, page_size, 128]. Byte b of word w is byte 128 * b + w of a position: 448 e4m3fn, and 64 ue8m0 scales,
        of which number i has scale i % 64.
      cache_kv_rope: int32 [pages, page_size / 4, 128]: four positions a row. Word k of a position has rotary numbers k and k + 32.
      layout, scale, arrangement: the cache's, as in `KVCache`.

    Raises:
      ValueError: a wrong dtype or shape.

    Source: tokamax 0.0.17, csa_cache_layout.
    """
    op = "cache_from_tokamax"
    pages, page_size = _check_tokamax(op, cache_kv_nope, cache_kv_rope)
    words = cache_kv_rope.reshape(pages, page_size, TOKAMAX_ROPE_WORDS)
    return cache_from_latents(_tokamax_latents(cache_kv_nope, words), layout, scale=scale, arrangement=arrangement)


def tokamax_sparse_mla(
    q: jax.Array,
    cache_kv_nope: jax.Array,
    cache_kv_rope: jax.Array,
    topk_indices: jax.Array,
    page_indices: jax.Array,
    cu_q_lens: jax.Array,
    distribution: jax.Array,
    attention_sinks: jax.Array,
    swa_accumution: jax.Array,
    swa_l: jax.Array,
    swa_m: jax.Array,
    *,
    sm_scale: float = 1.0,
) -> jax.Array:
    """For tokamax's `sparse_mla(..., implementation=adapters.tokamax_sparse_mla)`: its arguments, the kernels of this package.

    The selected positions are unpacked in every call: to bfloat16, which is exact, or for Hopper to `"fp8_ds_mla"`, which rounds. Where
    that time matters, keep the cache in a layout of this package (`cache_from_tokamax`) and call `sparse_mla_decode`.

    Args:
      q: [tokens, heads, 512] bfloat16 or float32.
      cache_kv_nope, cache_kv_rope: as in `cache_from_tokamax`.
      topk_indices: int32 [tokens, topk], positions within the token's request; negative or beyond its pages: none.
      page_indices: int32 [max_requests * pages], the requests' page tables one after another.
      cu_q_lens: int32 [max_requests + 1], as in `ragged_rows`.
      distribution: int32 [3], of which the last is the number of requests.
      attention_sinks: float32 [heads].
      swa_accumution, swa_l, swa_m: the sliding window's residuals, as in `from_residuals`.
      sm_scale: of the scores.

    Returns:
      [tokens, heads, 512] in q's dtype. A row that is padding attends to its window alone.

    Raises:
      ValueError: a wrong dtype or shape.

    Source: tokamax 0.0.17, ops/sparse_mla.
    """
    op = "tokamax_sparse_mla"
    pages, page_size = _check_tokamax(op, cache_kv_nope, cache_kv_rope)
    _checks.require_shape(topk_indices, op, "topk_indices", "(tokens, topk)", (q.shape[0], None))
    requests, _ = ragged_rows(cu_q_lens, q.shape[0], num_requests=distribution[2])
    most = cu_q_lens.shape[0] - 1
    _checks.require(
        page_indices.size % most == 0, op, "page_indices", f"be divided by the {most} requests of cu_q_lens", page_indices.shape
    )
    slots = slots_from_pages(page_indices.reshape(most, -1), topk_indices, page_size, requests=requests)
    valid = (slots >= 0) & (slots < pages * page_size)
    picked = jnp.where(valid, slots, 0)
    nope = cache_kv_nope.reshape(-1, TOKAMAX_WORDS)[picked]
    latents = _tokamax_latents(nope, cache_kv_rope.reshape(-1, TOKAMAX_ROPE_WORDS)[picked])
    rows = jnp.where(valid, jnp.arange(valid.size, dtype=jnp.int32).reshape(valid.shape), -1)

    def attend(q: jax.Array, latents: jax.Array, rows: jax.Array, *, layout: str) -> tuple[jax.Array, jax.Array]:
        scope = kv.Scope(cache_from_latents(latents, layout), rows)
        return sparse_mla_decode(q, scope, scale=sm_scale, out_dtype=jnp.float32, return_lse=True)

    forms = {"cuda": jax.tree_util.Partial(attend, layout="fp8_ds_mla"), "default": jax.tree_util.Partial(attend, layout="bf16")}
    selected = jax.lax.platform_dependent(q, latents, rows, **forms)
    window = from_residuals(swa_accumution.astype(jnp.float32), swa_l, swa_m)
    out, lse = merge_scopes(*zip(selected, window))
    return apply_attn_sink(out, lse, attention_sinks).astype(q.dtype)


def _check_tokamax(op: str, cache_kv_nope: jax.Array, cache_kv_rope: jax.Array) -> tuple[int, int]:
    """Pages and positions in a page."""
    _checks.require_dtype(cache_kv_nope, op, "cache_kv_nope", jnp.int32)
    _checks.require_dtype(cache_kv_rope, op, "cache_kv_rope", jnp.int32)
    _checks.require_shape(cache_kv_nope, op, "cache_kv_nope", "(pages, page_size, 128)", (None, None, TOKAMAX_WORDS))
    pages, page_size, _ = cache_kv_nope.shape
    _checks.require(page_size % 4 == 0, op, "cache_kv_nope", "have a page_size of a multiple of 4", page_size)
    expected = pages, page_size // 4, TOKAMAX_WORDS
    _checks.require_shape(cache_kv_rope, op, "cache_kv_rope", "(pages, page_size / 4, 128)", expected)
    return pages, page_size


def _tokamax_latents(nope: jax.Array, rope: jax.Array) -> jax.Array:
    """bfloat16 [..., 512] of words [..., 128] and [..., 32]; exact but for what is subnormal."""
    words = jax.lax.bitcast_convert_type(nope, jnp.uint32)
    data = jnp.concatenate([(words >> jnp.uint32(8 * byte)).astype(jnp.uint8) for byte in range(4)], axis=-1)
    codes, scales = data[..., : kv.NOPE_DIM], data[..., kv.NOPE_DIM :]
    numbers = jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32)
    powers = jax.lax.bitcast_convert_type(scales, jnp.float8_e8m0fnu).astype(jnp.float32)
    numbers = numbers * jnp.tile(powers, kv.NOPE_DIM // kv.SCALE_TILE)
    words = jax.lax.bitcast_convert_type(rope, jnp.uint32)
    halves = jnp.concatenate([words.astype(jnp.uint16), (words >> jnp.uint32(16)).astype(jnp.uint16)], axis=-1)
    return jnp.concatenate([numbers.astype(jnp.bfloat16), jax.lax.bitcast_convert_type(halves, jnp.bfloat16)], axis=-1)
