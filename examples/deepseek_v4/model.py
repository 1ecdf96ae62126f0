"""DeepSeek-V4's forward pass over a paged cache, as pure functions on pytrees.

`forward` runs t more tokens of each of b requests: t = 1 is a decode step, t > 1 a chunk of a prompt. Einsum letters:

    b request   t token       n residual stream   d hidden    h head        k head_dim (512, or the indexer's 128)
    r low rank  g head group  e expert, s its row  i expert's inner size    c compressed entry    w window row

Attention itself is `jax_dsv4.sparse_mla_decode`; everything else is here. The numbers are those of the published model
without its activation quantisation (no fp8 activations, no fp4 indexer). Transformers computes the same, and the tests compare the two.

On a mesh (deepseek_v4/mesh.py) each device runs these functions on its part, inside `jax.shard_map`. It has some requests, heads, head
groups and experts, a part of the vocabulary, and some blocks of the compressed caches. The shapes of its weights say which. What has
`Axes` to its arguments may exchange something along them (deepseek_v4/axes.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

import jax_dsv4 as dsv4
from deepseek_v4.axes import ONE_DEVICE, Axes, best_of_peers, from_experts, scope_here, share, shares_groups, slots_here, to_experts
from deepseek_v4.config import Config, Kind
from deepseek_v4.index_keys import Keys, create_keys, score_entries, write
from deepseek_v4.products import dense, dense_heads, dense_parts, expert_parts, fused, gate_and_up, run_experts, takes
from deepseek_v4.rope import rope_angle, rotate, turn
from deepseek_v4.terms import Routed, Terms, total

Implementation = str | tuple[str, ...] | None  # as `jax_dsv4.sparse_mla_decode` takes it

BLOCK_SIZE: dict[Kind, int] = {"swa": 64, "csa": 64, "hca": 2}
"""Slots per page of each kind of cache, as serving engines page them."""


# ---------------------------------------------------------------------------------------------------------- the cache


class IndexCache(NamedTuple):
    """What the indexer of a CSA layer remembers."""

    keys: Keys  # [b, entries, 128]: its compressed keys; of n peers, every n-th
    rows: Array  # [b, ring, 2, 256] float32: as `CompressedCache.rows`, for its own compressor


class CompressedCache(NamedTuple):
    """What the compressor of a CSA or HCA layer remembers."""

    extra: dsv4.KVCache  # compressed latents, one per 4 (CSA) or 128 (HCA) tokens
    rows: Array  # [b, ring, 2, width] float32: what it projected of the last tokens
    indexer: IndexCache | None = None  # CSA alone


class LayerCache(NamedTuple):
    """What one layer remembers."""

    swa: dsv4.KVCache  # latents of the last tokens, a ring per request
    compressed: CompressedCache | None = None  # None for an SWA layer


class Cache(NamedTuple):
    """What all requests remember. Layers of one kind share a page table, as each token needs a slot in every layer."""

    layers: tuple[LayerCache, ...]
    tables: dict[Kind, Array]  # int32 [b, pages]: the block that holds page p of request b
    position: Array  # int32 [b]: tokens so far
    # int32 [b], where requests share pages (serving.py): tokens at the front that others have written, read and never written here. The
    # indexer's keys are then paged as the CSA entries are, [blocks, 64, 128].
    shared: Array | None = None


def create_cache(
    config: Config,
    batch: int,
    max_tokens: int,
    *,
    layout: str = "fp8_ds_mla",
    scale: float | None = None,
    chunk: int = 1,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    fp8_keys: bool = False,
    context: int = 1,
    peers: int = 1,
) -> Cache:
    """An empty cache.

    Args:
        batch: requests.
        max_tokens: of each request, prompt included.
        layout, scale: of the latents (`jax_dsv4.KVCache`).
        chunk: the most tokens per request of one `forward`. Rings are this much longer than what a token looks back
            on, so that a chunk's last token does not overwrite what its first one needs.
        dtype: of the indexer's keys, unless fp8_keys: then e4m3, with a scale each.
        context, peers: devices that the compressed caches and the indexer's keys are spread over; the result is one device's share.
    """
    pages: dict[Kind, int] = {"swa": -(-(config.sliding_window + chunk - 1) // BLOCK_SIZE["swa"])}
    for kind in set(config.layers) - {"swa"}:
        pages[kind] = -(-max(max_tokens // config.ratio(kind), 1) // (BLOCK_SIZE[kind] * context)) * context

    def latents(kind: Kind) -> dsv4.KVCache:
        blocks = batch * pages[kind] // (1 if kind == "swa" else context)
        return dsv4.KVCache.create(blocks, BLOCK_SIZE[kind], layout=layout, scale=scale)

    def rows(kind: Kind, dim: int) -> Array:
        overlap = 2 if kind == "csa" else 1
        return jnp.zeros((batch, overlap * config.ratio(kind) + chunk - 1, 2, overlap * dim), jnp.float32)

    def layer(kind: Kind) -> LayerCache:
        if kind == "swa":
            return LayerCache(latents("swa"))
        indexer = None
        if kind == "csa":
            entries = -(-pages["csa"] * BLOCK_SIZE["csa"] // peers)
            keys = create_keys((batch, entries, config.index_head_dim), jnp.float8_e4m3fn if fp8_keys else dtype)
            indexer = IndexCache(keys, rows("csa", config.index_head_dim))
        return LayerCache(latents("swa"), CompressedCache(latents(kind), rows(kind, config.head_dim), indexer))

    def table(pages: int) -> Array:
        # Pages are dealt in turn, each round from the next request on: so a request's pages are on all devices of a context.
        page, request = jnp.arange(pages, dtype=jnp.int32)[None], jnp.arange(batch, dtype=jnp.int32)[:, None]
        return page * batch + (request + page) % batch

    tables = {kind: table(n) for kind, n in pages.items()}
    return Cache(tuple(map(layer, config.layers)), tables, jnp.zeros(batch, jnp.int32))


def slots_of(table: Array, entry: Array, kind: Kind, valid: Array | bool = True) -> Array:
    """Slots of entries [b, ...] in the cache that `table` [b, pages] pages; −1 where not `valid`."""
    page, offset = jnp.divmod(entry, BLOCK_SIZE[kind])
    block = jnp.take_along_axis(table, page.reshape(len(table), -1), axis=1, mode="clip").reshape(entry.shape)
    return jnp.where(valid, block * BLOCK_SIZE[kind] + offset, -1)


# ------------------------------------------------------------------------- what all layers of one step have in common


class Entries(NamedTuple):
    """The compressed entries of one kind that a step may complete, and those that its tokens see."""

    number: Array  # int32 [b, c]
    complete: Array  # bool [b, c]: the entry's last token is in this step, and it is not shared
    slots: Array  # int32 [b, c]; −1 unless complete
    visible: Array  # int32 [b, t]: a token sees the entries before this one
    max_entries: int  # that the cache has room for


class Step(NamedTuple):
    """Made once per step and shared by its layers."""

    all_tokens: Array  # int32 [devices of data · b, t]: the tokens that experts are to run over; −1 is none
    position: Array  # int32 [b, t]
    valid: Array  # bool [b, t]: false where a request has fewer than t tokens in this step
    tables: dict[Kind, Array]  # as in Cache
    key_table: Array | None  # of the indexer's keys; None: they are in a row
    angle: dict[str, Array]  # float32 [b, t, 32]: "main" for SWA layers, "compress" for the others
    swa_slots: Array  # int32 [b, t]: where each token's latent is written
    swa_indices: Array  # int32 [b, t, window]
    swa_lengths: Array  # int32 [b, t]
    entries: dict[Kind, Entries]
    extra_lengths: dict[Kind, Array]  # int32 [b, t]
    all_entries: dict[Kind, dsv4.Scope]  # "hca": every entry that is on this device; its cache is that of the first HCA layer
    plan: dict[Kind, dsv4.DecodePlan | None]  # None: each layer plans for itself


def begin_step(
    cache: Cache, tokens: Array, counts: Array, config: Config, implementation: Implementation = None, axes: Axes = ONE_DEVICE
) -> Step:
    """Lays out positions, slots, lengths and plans for `counts[b]` of `tokens` [b, t]."""
    t = tokens.shape[1]
    position = cache.position[:, None] + jnp.arange(t, dtype=jnp.int32)  # [b, t]
    valid = jnp.arange(t, dtype=jnp.int32) < counts[:, None]

    ring = cache.tables["swa"].shape[1] * BLOCK_SIZE["swa"]
    if config.sliding_window + t - 1 > ring:
        raise ValueError(f"forward: a step must have at most {ring - config.sliding_window + 1} tokens, got {t}")
    window = position[..., None] - jnp.arange(config.sliding_window, dtype=jnp.int32)  # [b, t, window], newest first
    swa_lengths = jnp.where(valid, jnp.minimum(position + 1, config.sliding_window), 0)

    entries: dict[Kind, Entries] = {}
    extra_lengths: dict[Kind, Array] = {}
    shared = jnp.zeros_like(counts) if cache.shared is None else cache.shared
    for kind in sorted(set(config.layers) - {"swa"}):
        ratio = config.ratio(kind)
        number = cache.position[:, None] // ratio + jnp.arange((t + ratio - 2) // ratio + 1, dtype=jnp.int32)
        complete = ((number + 1) * ratio <= (cache.position + counts)[:, None]) & (number * ratio >= shared[:, None])
        slots = slots_of(cache.tables[kind], number, kind, complete)
        visible = jnp.where(valid, (position + 1) // ratio, 0)
        entries[kind] = Entries(number, complete, slots, visible, cache.tables[kind].shape[1] * BLOCK_SIZE[kind])
        extra_lengths[kind] = jnp.minimum(visible, extra_topk(entries[kind], kind, config))

    all_entries: dict[Kind, dsv4.Scope] = {}
    if "hca" in entries:
        every = jnp.arange(entries["hca"].max_entries, dtype=jnp.int32)
        every = slots_of(cache.tables["hca"], jnp.broadcast_to(every, (len(tokens), every.size)), "hca")
        every = jnp.broadcast_to(every[:, None], (*tokens.shape, every.shape[-1]))
        compressed = cache.layers[config.layers.index("hca")].compressed
        assert compressed is not None
        all_entries["hca"] = scope_here(dsv4.Scope(compressed.extra, every, extra_lengths["hca"]), axes)

    swa_indices = slots_of(cache.tables["swa"], window % ring, "swa", window >= 0)

    def plan(kind: Kind) -> dsv4.DecodePlan | None:
        swa, extra = dsv4.Scope(cache.layers[0].swa, swa_indices, swa_lengths), extra_lengths.get(kind)
        if lax.axis_size(axes.context) > 1 and kind != "swa":
            if kind == "csa":
                return None  # how many of its entries are here depends on which ones each layer's indexer chooses
            swa, extra = dsv4.split_scope(swa, axes.context), all_entries["hca"].lengths
        assert swa.lengths is not None
        return dsv4.plan_decode(
            swa.lengths,
            extra,
            num_heads=config.num_attention_heads // lax.axis_size(axes.model),
            swa_topk=swa.indices.shape[-1],
            extra_topk=extra_topk(entries[kind], kind, config) if kind in entries else 0,
            implementation=implementation,
        )

    return Step(
        all_tokens=to_experts(jnp.where(valid, tokens, -1), axes),
        position=position,
        valid=valid,
        tables=cache.tables,
        key_table=None if cache.shared is None else cache.tables.get("csa"),
        angle={name: rope_angle(position, name, config) for name in ("main", "compress")},
        swa_slots=slots_of(cache.tables["swa"], position % ring, "swa", valid & (position >= shared[:, None])),
        swa_indices=swa_indices,
        swa_lengths=swa_lengths,
        entries=entries,
        extra_lengths=extra_lengths,
        all_entries=all_entries,
        plan={kind: plan(kind) for kind in sorted(set(config.layers))},
    )


def extra_topk(entries: Entries, kind: Kind, config: Config) -> int:
    """The most entries a token attends to: what the indexer picks (CSA), or all that there is room for (HCA)."""
    return min(config.index_topk, entries.max_entries) if kind == "csa" else entries.max_entries


# ------------------------------------------------------------------------------------------------------------ the model


def forward(
    weights: Any,
    cache: Cache,
    tokens: Array,
    counts: Array,
    *,
    config: Config,
    implementation: Implementation = None,
    axes: Axes = ONE_DEVICE,
) -> tuple[Array, Cache]:
    """Runs more tokens of each request through all layers.

    Args:
        tokens: int32 [b, t].
        counts: int32 [b] in 0…t: how many of a request's tokens are real. The others change nothing.
    Returns:
        The residual streams [b, t, n, d], for `read_streams`, and the cache with the tokens in it.
    """
    x = weights["embed"][tokens]  # [b, t, d]
    x = jnp.broadcast_to(x[:, :, None], (*x.shape[:2], config.hc_mult, x.shape[-1]))  # [b, t, n, d]
    return run_layers(x, weights["layers"], cache, tokens, counts, config, implementation, axes)


def run_layers(
    x: Array, weights: Any, cache: Cache, tokens: Array, counts: Array, config: Config, implementation: Implementation, axes: Axes
) -> tuple[Array, Cache]:
    """The residual streams x [b, t, n, d] through the layers that `weights` lists."""
    step = begin_step(cache, tokens, counts, config, implementation, axes)
    layers: list[LayerCache] = []
    back: Any = None  # a sublayer's output goes into the streams when the next one reads them: that is one kernel
    for kind, w, layer in zip(config.layers, weights, cache.layers, strict=True):
        x, y, *way = read_in(x, back, w["attn_hc"], w["attn_norm"], config)
        attended, layer = attention(y, w["attn"], layer, step, kind, config, implementation, axes)

        x, y, *next_way = read_in(x, (attended, *way), w["ffn_hc"], w["ffn_norm"], config)
        back = (moe(y, w["ffn"], step.all_tokens, config, axes), *next_way)
        layers.append(layer)
    x = x if back is None else write_back(x, *back)
    return x, cache._replace(layers=tuple(layers), position=cache.position + counts)


def read_streams(x: Array, w: Any, config: Config) -> Array:
    """The streams x [b, t, n, d] after the last layer → hidden [b, t, d], ready for `logits`."""
    pre = jax.nn.sigmoid(stream_mixes(x, w["hc_head"], config) * w["hc_head"]["scale"] + w["hc_head"]["base"])
    x = jnp.einsum("btn,btnd->btd", (pre + config.hc_eps).astype(x.dtype), x)
    return rms_norm(x, w["norm"], config)


def logits(weights: Any, hidden: Array, axes: Axes = ONE_DEVICE) -> Array:
    """hidden [..., d] → float32 logits [..., vocabulary]."""
    here = jnp.einsum("...d,vd->...v", hidden, weights["head"], preferred_element_type=jnp.float32)
    return lax.all_gather(here, axes.model, axis=here.ndim - 1, tiled=True)


def rms_norm(x: Array, weight: Array | None, config: Config) -> Array:
    x32 = x.astype(jnp.float32)
    x32 *= lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + config.rms_norm_eps)
    return (x32 if weight is None else weight * x32).astype(x.dtype)


# ------------------------------------------------------------------------------------------------------ hyper-connections


def stream_mixes(x: Array, w: Any, config: Config) -> Array:
    """x [b, t, n, d] → the mixing logits [b, t, m] of w["fn"] [m, n·d], float32."""
    flat = rms_norm(x.reshape(*x.shape[:2], -1).astype(jnp.float32), None, config)
    return jnp.einsum("btx,mx->btm", flat, w["fn"])


@partial(jax.jit, static_argnames="config")  # here and below: traced and lowered once for all layers
def read_in(x: Array, back: Any, w: Any, norm: Array, config: Config) -> tuple[Array, Array, Array, Array]:
    """The streams x [b, t, n, d] with a sublayer's output in them, if any: `back` is (y, post, mix), as `write_back` takes them. And the
    next one's input [b, t, d], RMS-normed, and how its output goes back (`hyper_connection`): post and mix."""
    own, lead = fused(), x.shape[:2]
    reads = own is not None and own.reads(x)
    if back is not None and not (reads and fused(lead[0] * lead[1])):
        x, back = write_back(x, *back), None
    if reads:
        back = back and (Terms.of(back[0]), *(leaf.reshape(-1, *leaf.shape[2:]) for leaf in back[1:]))
        flat, eps = x.reshape(-1, *x.shape[2:]), (config.rms_norm_eps, config.hc_eps)
        found = own.read_streams(flat, back, w, norm, eps, config.hc_sinkhorn_iters)
        x, y, post, mix = (leaf.reshape(*lead, *leaf.shape[1:]) for leaf in found)
        return x, y, post, mix
    pre, post, mix = hyper_connection(x, w, config)
    return x, rms_norm(jnp.einsum("btn,btnd->btd", pre, x), norm, config), post, mix


def write_back(x: Array, y: Array | Terms, post: Array, mix: Array) -> Array:
    """The streams x [b, t, n, d] mixed, with a sublayer's output y [b, t, d] in them."""
    wide, y = x.astype(post.dtype), total(y, (*x.shape[:2], x.shape[-1]), x.dtype).astype(post.dtype)
    out = post[..., None] * y[:, :, None]
    for m in range(x.shape[2]):
        out += mix[:, :, m, :, None] * wide[:, :, m, None]
    return out.astype(x.dtype)


@partial(jax.jit, static_argnames="config")
def hyper_connection(x: Array, w: Any, config: Config) -> tuple[Array, Array, Array]:
    """mHC: how a sublayer reads the n residual streams (pre), writes them (post), and how they mix (m → n).

    pre, post [b, t, n]; mix [b, t, m, n], made doubly stochastic by Sinkhorn's alternating normalisation, which is what
    keeps the residual from growing with depth.
    """
    n, eps = config.hc_mult, config.hc_eps
    pre, post, mix = jnp.split(stream_mixes(x, w, config), [n, 2 * n], axis=-1)
    pre_base, post_base, mix_base = jnp.split(w["base"], [n, 2 * n])
    pre_scale, post_scale, mix_scale = w["scale"]

    pre = jax.nn.sigmoid(pre * pre_scale + pre_base) + eps
    post = 2 * jax.nn.sigmoid(post * post_scale + post_base)
    mix = jax.nn.softmax((mix * mix_scale + mix_base).reshape(*x.shape[:2], n, n), axis=-1) + eps

    def over(mix: Array, axis: int) -> Array:
        return mix / (mix.sum(axis, keepdims=True) + eps)

    mix = over(mix, -2)
    mix = lax.fori_loop(1, config.hc_sinkhorn_iters, lambda _, mix: over(over(mix, -1), -2), mix)
    return pre.astype(x.dtype), post.astype(x.dtype), mix.astype(x.dtype)


# -------------------------------------------------------------------------------------------------------------- attention


def attention(
    x: Array, w: Any, layer: LayerCache, step: Step, kind: Kind, config: Config, implementation: Implementation, axes: Axes
) -> tuple[Array | Terms, LayerCache]:
    """One attention sublayer: x [b, t, d] → [b, t, d]."""
    b, t, _ = x.shape
    append = partial(dsv4.append, implementation=implementation)
    angle = step.angle["main" if kind == "swa" else "compress"]
    found = project(x, w, layer.compressed, step, kind, config)
    q, index_q = queries(found.q_low, w, angle, kind, config)
    layer = layer._replace(swa=append(layer.swa, found.latent, step.swa_slots))
    swa, extra = dsv4.Scope(layer.swa, step.swa_indices, step.swa_lengths), None

    if layer.compressed is not None:
        old, _, indexer = layer.compressed
        new = append(old, found.entries[0].astype(x.dtype), slots_here(old, step.entries[kind].slots, axes))
        if indexer is not None:
            assert index_q is not None
            assert found.weight is not None
            indexer = indexer._replace(rows=found.rows[1])
            indices, indexer = choose_entries(index_q, found.weight, found.entries[1], indexer, step, config, axes)
            extra = scope_here(dsv4.Scope(new, indices, step.extra_lengths[kind]), axes)
        else:
            extra = step.all_entries[kind]._replace(cache=new)
        layer = layer._replace(compressed=CompressedCache(new, found.rows[0], indexer))

    groups = config.o_groups // lax.axis_size(axes.model)
    shared = kind != "swa" and shares_groups(groups, lax.axis_size(axes.context))
    out = attend_over(q, swa, extra, w["sink"], step.plan[kind], implementation, axes, shared)
    wo_a, wo_b = w["wo_a"], w["wo_b"]
    if shared:
        groups //= lax.axis_size(axes.context)
        wo_a, wo_b = (jax.tree.map(lambda leaf, axis=axis: share(leaf, axis, axes), wo) for axis, wo in enumerate((wo_a, wo_b)))
    wo_a = jax.tree.map(lambda leaf: leaf.reshape(groups, -1, leaf.shape[-1]), wo_a)
    # Values carry their keys' rotation; turning back by the query's position leaves the relative one.
    out = dense_heads(out, -angle, wo_a).reshape(b, t, -1)
    if fused(b * t) and lax.axis_size(axes.peers) == 1 and takes(out, wo_b):
        return Terms(dense_parts(out, wo_b)), layer
    return lax.psum(dense(out, wo_b)[0], axes.peers if shared else axes.model), layer


class Projected(NamedTuple):
    """What an attention layer makes of its input alone."""

    q_low: Array  # [b, t, r], normed
    latent: Array  # [b, t, k], normed and turned
    weight: Array | None  # float32 [b, t, h], of the indexer's heads
    entries: Sequence[Array]  # [b, c, k] of each compressor: those that this step may complete
    rows: Sequence[Array]  # of each compressor, with this step's in them


def project(x: Array, w: Any, old: CompressedCache | None, step: Step, kind: Kind, config: Config) -> Projected:
    """All that is projected of x [b, t, d], in one product."""
    compressors, rows = [] if old is None else [w["compressor"]], [] if old is None else [old.rows]
    matrices, heads = [w["wq_a"], w["wkv"]], 0
    if old is not None and old.indexer is not None:
        compressors, rows = [*compressors, w["indexer"]["compressor"]], [*rows, old.indexer.rows]
        heads = config.index_n_heads
    matrices += [c[name] for c in compressors for name in ("wkv", "wgate")] + ([w["indexer"]["weights_proj"]] if heads else [])
    angle, head_scale = step.angle["main" if kind == "swa" else "compress"], (config.index_head_dim * config.index_n_heads) ** -0.5

    own, sizes = fused(len(x)), [matrix.shape[0] for matrix in matrices]
    if own and x.shape[1] == 1 and own.projects(sizes, kind, config) and takes(x, *matrices):
        entry = step.entries.get(kind)
        first, complete = (step.position, step.valid) if entry is None else (entry.number * config.ratio(kind), entry.complete)
        found = own.project(
            dense_parts(x, *matrices),
            w["q_norm"],
            w["kv_norm"],
            [own.Compressor(c["ape"], c["norm"], old) for c, old in zip(compressors, rows, strict=True)],
            *(heads, head_scale),
            *(leaf[:, 0] for leaf in (step.position, step.valid, complete)),
            *(turn(leaf[:, 0]) for leaf in (angle, rope_angle(first, "compress", config))),
            *(config.rms_norm_eps, x.dtype),
        )
        q_low, latent, weight, entries = jax.tree.map(lambda leaf: leaf[:, None], found[:4])
        return Projected(q_low, latent, weight, entries, found[4])

    q_low, latent, *projected = dense(x, *matrices, dtype=jnp.float32)
    latent = rotate(rms_norm(latent, w["kv_norm"], config).astype(x.dtype), angle)
    weight = head_scale * projected.pop() if heads else None
    made = [compress(projected[2 * i : 2 * i + 2], c, rows[i], step, kind, config) for i, c in enumerate(compressors)]
    return Projected(rms_norm(q_low, w["q_norm"], config).astype(x.dtype), latent, weight, *([m[i] for m in made] for i in (0, 1)))


@partial(jax.jit, static_argnames=("kind", "config"))
def queries(q_low: Array, w: Any, angle: Array, kind: Kind, config: Config) -> tuple[Array, Array | None]:
    """Queries [b, t, h, k], normed and turned, and the indexer's [b, t, h, k], turned."""
    lead, matrices = q_low.shape[:2], [w["wq_b"], *([w["indexer"]["wq_b"]] if kind == "csa" else [])]
    own = fused(lead[0] * lead[1])
    if own and takes(q_low, *matrices):
        heads, turns = w["wq_b"].shape[0] // config.head_dim, turn(angle.reshape(-1, angle.shape[-1]))
        sizes = heads, config.head_dim, config.index_head_dim
        found = own.queries(dense_parts(q_low, *matrices), *sizes, turns, config.rms_norm_eps, q_low.dtype)
        q, index_q = jax.tree.map(lambda leaf: leaf.reshape(*lead, *leaf.shape[1:]), found)
        return q, index_q
    q, *index_q = (leaf.reshape(*lead, -1, dim) for leaf, dim in zip(dense(q_low, *matrices), (config.head_dim, config.index_head_dim)))
    q = rotate(rms_norm(q, None, config), angle[:, :, None])
    return q, rotate(index_q[0], angle[:, :, None]) if index_q else None


def attend_over(
    q: Array,
    swa: dsv4.Scope,
    extra: dsv4.Scope | None,
    sink: Array | None,
    plan: dsv4.DecodePlan | None,
    implementation: Implementation,
    axes: Axes,
    shared: bool = False,
) -> Array:
    """Attention to both scopes, of which `extra` is the part on this device of the context. If `shared`, of this device's share of the
    heads alone, else the same on all devices of the context."""
    attend = partial(dsv4.sparse_mla_decode, q, plan=plan, implementation=implementation)
    if extra is None or lax.axis_size(axes.context) == 1:
        return attend(swa, extra, attn_sink=sink)
    # All of them have the window. Parts are in float32: rounded to bf16 they would show it where they cancel.
    out, lse = attend(dsv4.split_scope(swa, axes.context), extra, out_dtype=jnp.float32, return_lse=True)
    if shared:
        out, lse = dsv4.merge_over_axis(out, lse, axes.context, scatter_dimension=-2)
        sink = sink if sink is None else share(sink, 0, axes)
    else:
        out, lse = dsv4.merge_over_axis(out, lse, axes.context, out_dtype=q.dtype)
    return (out if sink is None else dsv4.apply_attn_sink(out, lse, sink)).astype(q.dtype)


def compress(projected: Sequence[Array], w: Any, rows: Array, step: Step, kind: Kind, config: Config) -> tuple[Array, Array]:
    """The entries that this step may complete, float32 [b, c, dim], and the rolling rows with this step's in them.

    Of what its two matrices make of the tokens, float32 [b, t, width] each: values and their scores.

    An entry is a per-channel softmax average of what its window's tokens project, in float32. HCA's windows are its 128
    tokens. CSA's overlap: 4 tokens of the window before, which give the first half of their channels, and its own 4,
    which give the second. The average is made at every step and kept only when a window ends: a shape that depends on
    the position would not be static.
    """
    ratio, entries = config.ratio(kind), step.entries[kind]
    value, score = projected
    score += w["ape"][step.position % ratio]

    ring = rows.shape[1]
    here = jnp.where(step.valid, step.position % ring, ring)  # past the end, where writes are dropped
    request = jnp.arange(len(rows))[:, None, None]
    # Value and score are two rows to the scatter: of a single row XLA makes a slice update, which it fuses into the
    # gather below, and then that needs a copy of the old rows.
    rows = rows.at[request, here[..., None], jnp.arange(2)].set(jnp.stack([value, score], axis=2), mode="drop")

    first, dim = entries.number * ratio, w["norm"].size
    window = first[..., None] + jnp.arange(-ratio if kind == "csa" else 0, ratio, dtype=jnp.int32)  # [b, c, w]
    windows = rows[request, window % ring]  # [b, c, w, 2, width]
    # Nothing was projected before the text began: score −inf, weight 0.
    windows = jnp.where(window[..., None, None] >= 0, windows, jnp.array([[0.0], [-jnp.inf]], jnp.float32))
    if kind == "csa":
        before, own = jnp.split(windows, 2, axis=2)
        windows = jnp.concatenate([before[..., :dim], own[..., dim:]], axis=2)
    value, score = windows[..., 0, :], windows[..., 1, :]  # [b, c, w, dim]
    # Barriers: XLA's GPU compilers would fuse the average, the norm and the rotation into what writes the entries, compute the average
    # again for every number that the norm sums, and take minutes to compile that.
    entry = lax.optimization_barrier(jnp.einsum("bcwk,bcwk->bck", value, jax.nn.softmax(score, axis=2)))
    entry = lax.optimization_barrier(rms_norm(entry, w["norm"], config))
    return rotate(entry, rope_angle(first, "compress", config)), rows


def choose_entries(
    q: Array, weight: Array, key: Array, cache: IndexCache, step: Step, config: Config, axes: Axes
) -> tuple[Array, IndexCache]:
    """The lightning indexer: slots [b, t, topk] of the entries that score best, best first.

    Of its queries [b, t, h, k], a weight of each head [b, t, h], and the keys float32 [b, c, k] that the step may complete.
    score = Σ_h weight_h · relu(q_h · key). An entry that is not visible scores −inf, so the visible ones come first and
    `extra_lengths` cuts the rest off. Entry number e has its key on device e mod n of n peers, at e div n.
    """
    entries, devices, device = step.entries["csa"], lax.axis_size(axes.peers), lax.axis_index(axes.peers)
    held = jax.tree.leaves(cache.keys)[0].shape[:2]
    count = held[1] if step.key_table is None else entries.max_entries
    mine = entries.complete & (entries.number % devices == device)
    here = jnp.where(mine, entries.number // devices, count)  # past the end, where writes are dropped
    row = jnp.arange(len(q))[:, None]
    if step.key_table is not None:
        row, here = jnp.divmod(jnp.where(mine, entries.slots, held[0] * held[1]), held[1])
    own = fused()
    own = own if own and own.scores(q, cache.keys) else None
    keys = (own.write if own else write)(cache.keys, row, here, key)
    cache = cache._replace(keys=keys)

    topk, visible = extra_topk(entries, "csa", config), (entries.visible - device + devices - 1) // devices  # of those that are here
    if own:
        score = own.score(q, weight, keys, visible, step.key_table)
        if devices == 1 and count <= own.MOST_ENTRIES:
            return own.best(score, visible, step.tables["csa"], topk), cache
    else:
        score = score_entries(q, weight, keys, jnp.max(visible), step.key_table)
        score = jnp.where(jnp.arange(count, dtype=jnp.int32) < visible[..., None], score, -jnp.inf)

    best, chosen = lax.top_k(score, min(topk, count))
    chosen = best_of_peers(best, devices * chosen + device, topk, axes)
    return slots_of(step.tables["csa"], chosen, "csa"), cache


# -------------------------------------------------------------------------------------------------------------------- MoE


@partial(jax.jit, static_argnames=("config", "axes"))
def moe(x: Array, w: Any, tokens: Array, config: Config, axes: Axes) -> Array | Terms:
    """Each token's top experts, weighted, and the shared expert: x [b, t, d] → [b, t, d].

    A device has some of the experts, of all devices, and among its peers a part of the shared one's inner size. It is given all devices'
    tokens, and each token's sum goes back to where its request is. `tokens` are `Step.all_tokens`.
    """
    shared, k, factor = w["shared"], config.num_experts_per_tok, config.routed_scaling_factor
    given = w["tid2eid"][tokens] if "tid2eid" in w else None  # hash layers: the token's id names its experts
    own = fused(x.shape[0] * x.shape[1])
    if own and lax.axis_size(axes.every) == 1 and takes(x, w["gate"], *shared.values(), *w["experts"].values()):
        flat = None if given is None else given.reshape(-1, k)
        chosen, weight = own.route(dense_parts(x, w["gate"]), k, w.get("bias"), flat, tokens.reshape(-1), factor)
        routed = Routed(expert_parts(x.reshape(-1, x.shape[-1]), chosen, w["experts"], config), chosen, weight)
        return Terms(dense_parts(gate_and_up(x, shared, config), shared["w2"]), routed)

    (out,) = dense(gate_and_up(x, shared, config), shared["w2"])
    x = to_experts(x, axes)
    (score,) = dense(x, w["gate"], dtype=jnp.float32)
    score = jnp.sqrt(jax.nn.softplus(score))
    # The bias balances the load; it picks experts and does not weigh them.
    chosen = lax.top_k(score + w["bias"], k)[1] if given is None else given
    weight = jnp.take_along_axis(score, chosen, axis=-1)  # [b, t, experts per token]
    weight = factor * weight / (weight.sum(-1, keepdims=True) + 1e-20)  # all may have underflowed

    chosen -= w["experts"]["w1"].shape[0] * lax.axis_index(axes.every)  # of the experts here; others are not
    chosen = jnp.where(tokens[..., None] < 0, -1, chosen)
    mixed = run_experts(x, chosen, weight, w["experts"], config).astype(out.dtype)
    return from_experts(mixed, out, axes)
