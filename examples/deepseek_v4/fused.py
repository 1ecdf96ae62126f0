"""Kernels of our own for Hopper GPUs, in Pallas: what is between a layer's products, of which XLA makes dozens of kernels.

    project         norms, rotation and compressors, after the products of an attention layer's input
    queries         norm and rotation of queries
    score, best     the indexer's scores, and the entries that score best
    write           a key of the indexer, into its cache
    route           which experts a token takes
    read_streams    hyper-connections

Products come in the parts in which deepseek_v4/kernels.py leaves them. deepseek_v4/model.py computes the same in plain JAX, and the tests
compare the two in Pallas's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from deepseek_v4 import index_keys
from deepseek_v4.index_keys import Fp8Keys, Keys
from deepseek_v4.kernels import FMA_TOKENS, MOST_TOKENS, Turn, call, turned
from deepseek_v4.terms import Terms


def power_of_two(n: int) -> int:
    """The least from n on: of Triton's arrays the sizes are powers of two."""
    return 1 << (n - 1).bit_length()


LEAST = -(2**31)


def order(x: Array) -> Array:
    """int32 in the order of float32, 0 and −0 as one, all above LEAST; NaN have their place in it too."""
    bits = jnp.where(x == 0, 0, lax.bitcast_convert_type(x, jnp.int32))
    return jnp.maximum(jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits), LEAST + 1)


def total(parts: Any, token: Array, column: Array) -> Array:
    """Columns of a token of parts [parts, s, 1, r], summed."""
    return sum((parts[i, token, 0, column] for i in range(1, parts.shape[0])), parts[0, token, 0, column])


def normed(x: Array, eps: float) -> Array:
    return x * lax.rsqrt(jnp.square(x).sum() / x.size + eps)


# ------------------------------------------------------------------------------------------------------- an attention layer


class Compressor(NamedTuple):
    """What `project` does for one compressor; it projects values and scores of each token."""

    ape: Array  # float32 [ratio, width], to be added to scores
    norm: Array  # [k]
    rows: Array  # float32 [b, ring, 2, width]: what was projected of the last tokens


def project(
    parts: Array,
    q_norm: Array,
    kv_norm: Array,
    compressors: Sequence[Compressor],
    heads: int,
    head_scale: float,
    position: Array,
    valid: Array,
    complete: Array,
    turn: Turn,
    entry_turn: Turn,
    eps: float,
    dtype: Any,
    interpret: bool = False,
) -> tuple[Array, Array, Array, list[Array], list[Array]]:
    """What an attention layer makes of what it projects of one token of each request.

    Args:
        parts: of one product, side by side: [r] low-rank queries, [k] latent, each compressor's [width] values and [width] scores, and a
            weight of each of the indexer's heads, to be scaled.
        position, valid, complete: [b]: the token's; whether there is one; whether an entry is complete with it.
        turn, entry_turn: cosine and sine of the angles [b, 32] at the token, and at the entry's first one.
    Returns:
        The low-rank queries and the latent, of `dtype`; the weights, float32 [b, heads]; an entry [b, k] of each compressor, of no use
        unless complete, the first of `dtype`, the indexer's float32; and the compressors' rows with the token's in them.
    """
    b, low, dim = len(position), q_norm.size, kv_norm.size
    rows = [c.rows for c in compressors]
    constants = (position, valid.astype(jnp.int32), complete.astype(jnp.int32), *turn, *entry_turn, q_norm, kv_norm)
    operands = (parts, *constants, [(c.ape, c.norm) for c in compressors], rows)
    leaves, structure = jax.tree.flatten(operands)
    count, n = len(leaves), len(compressors)

    def project_kernel(*refs: Any) -> None:
        inputs, outs = jax.tree.unflatten(structure, refs[:count]), refs[count:]
        parts, position, valid, complete, cos, sin, entry_cos, entry_sin, q_norm, kv_norm, settings, old = inputs
        q_out, latent_out, weight_out, *rest = outs
        request, role = pl.program_id(0), pl.program_id(1)

        @pl.when(role == 0)
        def _() -> None:
            lane = jnp.arange(low, dtype=jnp.int32)
            q_out[request, pl.ds(0, low)] = (normed(total(parts, request, lane), eps) * q_norm[lane]).astype(dtype)
            if heads:
                first = parts.shape[-1] - heads
                weight_out[request, pl.ds(0, heads)] = head_scale * total(parts, request, first + jnp.arange(heads, dtype=jnp.int32))

        @pl.when(role == 1)
        def _() -> None:
            latent = lambda lane: (normed(total(parts, request, low + lane), eps) * kv_norm[lane]).astype(dtype).astype(jnp.float32)  # noqa: E731
            latent_out[request, pl.ds(0, dim)] = turned(latent, jnp.arange(dim, dtype=jnp.int32), dim, (cos, sin), (request,)).astype(dtype)

        first = low + dim
        for i, ((ape, norm), before) in enumerate(zip(settings, old, strict=True)):
            width = ape.shape[1]

            @pl.when(role == 2 + i)
            def _(i: int = i, ape: Any = ape, norm: Any = norm, before: Any = before, first: int = first, width: int = width) -> None:
                at, (ratio, size) = position[request], (ape.shape[0], norm.shape[0])
                value = lambda lane: total(parts, request, first + lane)  # noqa: E731
                score = lambda lane: total(parts, request, first + width + lane) + ape[at % ratio, lane]  # noqa: E731

                @pl.when(valid[request] != 0)
                def _() -> None:
                    lane = jnp.arange(width, dtype=jnp.int32)
                    for j, made in enumerate((value(lane), score(lane))):
                        rest[n + i][request, at % before.shape[1], j, pl.ds(0, width)] = made

                @pl.when(complete[request] != 0)
                def _() -> None:
                    new = lambda lane: (value(width - size + lane), score(width - size + lane))  # noqa: E731
                    average = partial(window_average, before, request, at, ratio, size, new)
                    entry = lambda lane: normed(average(lane), eps) * norm[lane]  # noqa: E731
                    made = turned(entry, jnp.arange(size, dtype=jnp.int32), size, (entry_cos, entry_sin), (request,))
                    rest[i][request, pl.ds(0, size)] = made.astype(rest[i].dtype)

            first += 2 * width

    f32 = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    out = [jax.ShapeDtypeStruct((b, low), dtype), jax.ShapeDtypeStruct((b, dim), dtype), f32((b, heads or 1))]
    out += [jax.ShapeDtypeStruct((b, c.norm.size), jnp.float32 if i else dtype) for i, c in enumerate(compressors)]
    out += [f32(r.shape) for r in rows]
    aliases = {count - n + i: 3 + n + i for i in range(n)}
    q, latent, weight, *rest = call(project_kernel, out, (b, 2 + n), 4, 1, interpret, *operands, aliases=aliases)
    return q, latent, weight, rest[:n], rest[n:]


def window_average(
    rows: Any, request: Array, position: Array, ratio: int, size: int, new: Callable[[Array], tuple[Array, Array]], lane: Array
) -> Array:
    """The softmax average of an entry's channels `lane` over its window, whose last token is at `position`, as `model.compress` makes it.

    `new` gives that token's values and scores, which may not be in the rows yet.
    """
    ring, overlap = rows.shape[1], rows.shape[3] // size
    value, score = new(lane)

    def add(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        most, weights, values = carry
        back = overlap * ratio - 1 - (8 * i + jnp.arange(8, dtype=jnp.int32))
        here, token = (back > 0)[:, None], position - back
        channel = lane[None] + jnp.where(back < ratio, (overlap - 1) * size, 0)[:, None]
        place = (jnp.maximum(token, 0) % ring)[:, None]
        s = jnp.where(here, rows[request, place, 1, channel], score[None])
        v = jnp.where(here, rows[request, place, 0, channel], value[None])
        real = (token >= 0)[:, None]  # nothing was projected before the text began
        s, v = jnp.where(real, s, -jnp.inf), jnp.where(real, v, 0)
        larger = jnp.maximum(most, s.max(axis=0))
        shrink, p = jnp.exp(most - larger), jnp.exp(s - larger[None])
        return larger, weights * shrink + p.sum(axis=0), values * shrink + (p * v).sum(axis=0)

    zero = jnp.zeros(size, jnp.float32)
    _, weights, values = lax.fori_loop(0, overlap * ratio // 8, add, (jnp.full(size, -1e30, jnp.float32), zero, zero))
    return values / weights


def projects(sizes: Sequence[int], kind: str, config: Any) -> bool:
    """Whether `project` takes a layer: by what is projected, and its compressors' ratio."""
    return all(size & (size - 1) == 0 for size in sizes) and (kind == "swa" or config.ratio(kind) % 4 == 0)


def queries(
    parts: Array, heads: int, dim: int, index_dim: int, turn: Turn, eps: float, dtype: Any, interpret: bool = False
) -> tuple[Array, Array | None]:
    """Queries [s, heads, dim], each RMS-normed, and the indexer's [s, h, index_dim] after them, all turned at [s, 32]'s angles."""
    s = len(turn[0])
    more = (parts.shape[-1] - heads * dim) // index_dim

    def queries_kernel(parts: Any, cos: Any, sin: Any, *outs: Any) -> None:
        token, head = pl.program_id(0), pl.program_id(1)

        @pl.when(head < heads)
        def _() -> None:
            def query(lane: Array) -> Array:
                rounded = total(parts, token, head * dim + lane).astype(dtype).astype(jnp.float32)
                return normed(rounded, eps).astype(dtype).astype(jnp.float32)

            lane = jnp.arange(dim, dtype=jnp.int32)
            outs[0][token, head, pl.ds(0, dim)] = turned(query, lane, dim, (cos, sin), (token,)).astype(dtype)

        if more:

            @pl.when(head >= heads)
            def _() -> None:
                mine, lane = head - heads, jnp.arange(index_dim, dtype=jnp.int32)
                first = heads * dim + mine * index_dim
                query = lambda lane: total(parts, token, first + lane).astype(dtype).astype(jnp.float32)  # noqa: E731
                outs[1][token, mine, pl.ds(0, index_dim)] = turned(query, lane, index_dim, (cos, sin), (token,)).astype(dtype)

    out = [jax.ShapeDtypeStruct((s, heads, dim), dtype)]
    out += [jax.ShapeDtypeStruct((s, more, index_dim), dtype)] if more else []
    found = call(queries_kernel, out, (s, heads + more), 2, 1, interpret, parts, *turn)
    return found[0], found[1] if more else None


# -------------------------------------------------------------------------------------------------------------- the experts


def route(
    parts: Array, k: int, bias: Array | None, given: Array | None, tokens: Array, factor: float, interpret: bool = False
) -> tuple[Array, Array]:
    """Of the products with a MoE layer's gate: each token's experts, int32 [s, k], and their weights, float32 [s, k].

    `given`, int32 [s, k], names the experts, or `bias`, of each expert a number, helps to pick them. A token that is negative has none: −1.
    """
    s, wide, count = len(tokens), power_of_two(k), parts.shape[-1]
    every = power_of_two(count)
    chooser = bias if given is None else given
    assert chooser is not None

    def route_kernel(parts: Any, chooser: Any, tokens: Any, chosen_out: Any, weight_out: Any) -> None:
        token, place = pl.program_id(0), jnp.arange(wide, dtype=jnp.int32)

        def score_of(expert: Array) -> Array:
            x = total(parts, token, expert)
            return jnp.sqrt(jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x))))

        if given is not None:
            chosen = jnp.where(place < k, chooser[token, jnp.minimum(place, k - 1)], -1)
            weight = jnp.where(place < k, score_of(jnp.clip(chosen, 0, count - 1)), 0)
        else:
            expert = jnp.arange(every, dtype=jnp.int32)
            there = expert if count == every else jnp.minimum(expert, count - 1)  # such a minimum hides that loads are side by side
            score = score_of(there)
            left = score + chooser[there]
            left = jnp.where((expert < count) & (left == left), order(left), LEAST)  # of NaN none is best
            bits = lax.bitcast_convert_type(score, jnp.int32)  # of integers a warp has maximum and sum in one instruction
            chosen, weight = jnp.full(wide, -1, jnp.int32), jnp.zeros(wide, jnp.float32)
            for i in range(k):
                most = left.max()
                best = jnp.where(left == most, expert, every).min()
                here, mine = (place == i) & (most > LEAST), expert == best
                chosen = jnp.where(here, best, chosen)
                weight = jnp.where(here, lax.bitcast_convert_type(jnp.where(mine, bits, 0).sum(), jnp.float32), weight)
                left = jnp.where(mine, LEAST, left)
        chosen = jnp.where((tokens[token] < 0) | (chosen >= count), -1, chosen)
        triton.store(chosen_out.at[token, place], chosen, mask=place < k)
        triton.store(weight_out.at[token, place], factor * weight / (weight.sum() + 1e-20), mask=place < k)

    out = [jax.ShapeDtypeStruct((s, k), kind) for kind in (jnp.int32, jnp.float32)]
    chosen, weight = call(route_kernel, out, (s,), 1, 1, interpret, parts, chooser, tokens)
    return chosen, weight


# -------------------------------------------------------------------------------------------------------------- the indexer

ENTRIES, TOKENS = 64, 8
"""To a program of `score`."""


def scores(q: Array, keys: Keys) -> bool:
    """Whether `score` takes these."""
    (heads, dim), (codes, *_) = q.shape[2:], jax.tree.leaves(keys)
    known = q.dtype == jnp.bfloat16 and codes.dtype in (jnp.bfloat16, jnp.float8_e4m3fn)
    return known and heads in (16, 32, 64) and dim == 128 and codes.shape[1] % ENTRIES == 0


def score(q: Array, weight: Array, keys: Keys, limit: Array, table: Array | None = None, interpret: bool = False) -> Array:
    """Σ_h weight_h · relu(q_h · key): q [b, t, h, k], weight [b, t, h], keys [b, c, k] → float32 [b, t, c], −inf from `limit` [b, t] on.

    With a `table` [b, pages], of keys [blocks, 64, k]: c is all pages' entries.
    """
    (b, t, _, _), (codes, *_) = q.shape, jax.tree.leaves(keys)
    many = TOKENS if t % TOKENS == 0 else 1
    if table is not None and codes.shape[1] != ENTRIES:
        raise ValueError(f"score: a page must have {ENTRIES} entries, got {codes.shape[1]}")
    count = codes.shape[1] if table is None else ENTRIES * table.shape[1]

    def score_kernel(q_ref: Any, weight_ref: Any, limit_ref: Any, keys_ref: Any, *rest: Any) -> None:
        *scale_ref, table_ref, out_ref = rest if table is not None else (*rest[:-1], None, rest[-1])
        request, first, at = pl.program_id(0), pl.program_id(1) * many, pl.program_id(2) * ENTRIES
        here = pl.ds(at, ENTRIES)
        held = (request, here) if table is None else (table_ref[request, pl.program_id(2)], pl.ds(0, ENTRIES))
        number = at + jnp.arange(ENTRIES, dtype=jnp.int32)

        @pl.when(at >= limit_ref[request, first + many - 1])  # the last of them sees most
        def _() -> None:
            for i in range(many):
                out_ref[request, first + i, here] = jnp.full(ENTRIES, -jnp.inf, jnp.float32)

        @pl.when(at < limit_ref[request, first + many - 1])
        def _() -> None:
            key = keys_ref[held].astype(jnp.bfloat16)
            for i in range(many):
                product = lax.dot_general(key, q_ref[request, first + i], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
                total = (jnp.maximum(product, 0) * weight_ref[request, first + i][None]).sum(axis=1)
                if scale_ref:
                    total *= scale_ref[0][held]
                out_ref[request, first + i, here] = jnp.where(number < limit_ref[request, first + i], total, -jnp.inf)

    out = [jax.ShapeDtypeStruct((b, t, count), jnp.float32)]
    grid = (b, t // many, count // ENTRIES)
    operands = (q, weight, jnp.broadcast_to(limit, (b, t)), keys, table)
    return call(score_kernel, out, grid, 4, 1, interpret, *operands)[0]


def write(keys: Keys, row: Array, entry: Array, key: Array, interpret: bool = False) -> Keys:
    """As `index_keys.write`, which XLA makes four kernels of; of one key of each request in one, in place."""
    if key.shape[1] > 1:
        return index_keys.write(keys, row, entry, key)
    leaves, structure = jax.tree.flatten(keys)
    (rows, entries, dim), count = leaves[0].shape, len(leaves)

    def write_kernel(row: Any, entry: Any, key: Any, *refs: Any) -> None:
        request, outs = pl.program_id(0), jax.tree.unflatten(structure, refs[count:])
        at = row[request], entry[request]

        @pl.when((at[0] < rows) & (at[1] < entries))
        def _() -> None:
            here, new = (*at, pl.ds(0, dim)), key[request, pl.ds(0, dim)]
            if isinstance(keys, Fp8Keys):
                outs.codes[here], outs.scale[at] = index_keys.quantize(new)
            else:
                outs[here] = new.astype(keys.dtype)

    out = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    row, entry = (jnp.broadcast_to(leaf, key.shape[:2])[:, 0] for leaf in (row, entry))
    aliases = {3 + i: i for i in range(count)}
    found = call(write_kernel, out, (len(key),), 1, 1, interpret, row, entry, key[:, 0], keys, aliases=aliases)
    return jax.tree.unflatten(structure, found)


MOST_ENTRIES = 8192
"""Of `best`, which compares each with each."""


def best(score: Array, limit: Array, table: Array, topk: int, interpret: bool = False) -> Array:
    """Slots int32 [b, t, topk] of the entries that score best, best first and of equal ones the earlier, of score float32 [b, t, c].

    Those from `limit` [b, t] on score −inf. Entry e is in block table[b, e // size] of blocks of c / pages = size. An entry's place is how
    many are before it: each program counts that for some of them. A sort takes 15 µs for 2,048.
    """
    b, t, count = score.shape
    size, many = count // table.shape[1], min(count & -count, 512)
    mine = 8 if b * t <= 16 else 16  # few tokens are more and smaller programs

    def best_kernel(score_ref: Any, limit_ref: Any, table_ref: Any, out_ref: Any) -> None:
        request, token, first = pl.program_id(0), pl.program_id(1), pl.program_id(2) * mine
        entry, limit = first + jnp.arange(mine, dtype=jnp.int32), limit_ref[request, token]
        value = order(score_ref[request, token, pl.ds(first, mine)])
        slot = table_ref[request, entry // size] * size + entry % size

        def count_better(i: Array, better: Array) -> Array:
            other = i * many + jnp.arange(many, dtype=jnp.int32)
            theirs = order(score_ref[request, token, pl.ds(i * many, many)])
            # Of equal ones the earlier: it is better than one less.
            return better + (theirs[None] > value[:, None] - (other[None] < entry[:, None]).astype(jnp.int32)).astype(jnp.int32)

        # Past the limit an entry's place is its number; and if all that are seen are chosen, their order is of no account.
        steps = jnp.where((first < limit) & (limit > topk), (limit + many - 1) // many, 0)
        place = lax.fori_loop(0, steps, count_better, jnp.zeros((mine, many), jnp.int32)).sum(axis=1)
        place = jnp.where((entry < limit) & (limit > topk), place, entry)
        triton.store(out_ref.at[request, token, place], slot, mask=place < topk)

    out = [jax.ShapeDtypeStruct((b, t, topk), jnp.int32)]
    grid = (b, t, -(-count // mine))
    return call(best_kernel, out, grid, 4, 1, interpret, score, jnp.broadcast_to(limit, (b, t)), table)[0]


# ------------------------------------------------------------------------------------------------------- hyper-connections

LOGITS, SQUARES = 32, 31
"""Rows of a part of the streams' mixing logits, and the one that has the sum of the streams' squares."""


def reads(x: Array) -> bool:
    """Whether `read_streams` takes streams [..., n, d]."""
    return x.dtype == jnp.bfloat16 and x.shape[-2] == 4 and x.shape[-1] % 1024 == 0


Back = tuple[Terms, Array, Array]
"""A sublayer's output [s, d] and how it goes into the streams: float32 [s, n] and [s, n, n]."""


def summed(terms: Terms, token: Array, columns: Any) -> Array:
    """Columns of some tokens, of what `terms.total` sums."""
    dense, routed = terms
    found = sum((dense[i, token, 0, columns].astype(jnp.float32) for i in range(dense.shape[0])), jnp.float32(0))
    if routed is None:
        return found
    experts, chosen, weight = routed
    k = chosen.shape[1]
    for choice in range(k):
        each = sum((experts[i, token * k + choice, columns] for i in range(experts.shape[0])), jnp.float32(0))
        found += jnp.where((chosen[token, choice] >= 0)[:, None], weight[token, choice][:, None] * each, 0)
    return found


def summed_of_one(terms: Terms, token: Array, columns: Any) -> Array:
    """The same of one token. All terms are rows of one array: so a number is loaded once, in one layout."""
    dense, routed = terms
    count = dense.shape[0]
    row = jnp.arange(power_of_two(count), dtype=jnp.int32)
    found = jnp.where((row < count)[:, None], dense[jnp.minimum(row, count - 1), token, 0, columns].astype(jnp.float32), 0).sum(axis=0)
    if routed is None:
        return found
    experts, chosen, weight = routed
    parts, k = experts.shape[0], chosen.shape[1]
    row = jnp.arange(power_of_two(parts * k), dtype=jnp.int32)
    choice = jnp.minimum(row // parts, k - 1)
    each = experts[row % parts, token * k + choice, columns]
    real = (row < parts * k) & (chosen[token, choice] >= 0)
    return found + jnp.where(real[:, None], weight[token, choice][:, None] * each, 0).sum(axis=0)


def read_streams(
    x: Array, back: Back | None, w: Any, norm: Array, eps: tuple[float, float], rounds: int, interpret: bool = False
) -> tuple[Array, Array, Array, Array]:
    """The residual streams x [s, n, d] with the output of the sublayer before in them, if any; and what mHC makes of them: the next one's
    input [s, d], RMS-normed, post [s, n] and mix [s, n, n].

    Args:
        w: "fn" [24, n · d], "base" [24], "scale" [3].
        norm: [d], of the RMS norm.
        eps: of norms, and of mHC.
        rounds: of Sinkhorn's normalisation.
    """
    s, n, d = x.shape
    norm_eps, eps_hc = eps
    x, parts = stream_logits(x, back, w["fn"], interpret)
    every, width = pl.ds(0, len(parts)), min(d & -d, 2048)

    def logits(refs: Any, first: int, size: int, i: int) -> Callable[[], Array]:
        """Loads them, and gives a function that computes with them: loads take longer than all else."""
        parts, base, scale = refs
        token = pl.program_id(0)
        part, squares, at = parts[every, token, pl.ds(first, size)], parts[every, token, SQUARES], base[pl.ds(first, size)]
        factor = scale[i]
        return lambda: part.sum(axis=0) * lax.rsqrt(squares.sum(axis=0) / (n * d) + norm_eps) * factor + at

    def streams_kernel(*refs: Any) -> None:
        x_ref, norm_ref, y_ref = refs[3:]
        token, places = pl.program_id(0), [pl.ds(i, width) for i in range(0, d, width)]
        pre = logits(refs[:3], 0, n, 0)
        streams = [x_ref[token, pl.ds(0, n), place] for place in places]
        norms = [norm_ref[place] for place in places]
        weight = jax.nn.sigmoid(pre()) + eps_hc
        pieces = [(weight[:, None] * piece.astype(jnp.float32)).sum(axis=0) for piece in streams]
        total = jnp.zeros(width, jnp.float32)
        for piece in pieces:
            total += jnp.square(piece)
        grow = lax.rsqrt(total.sum(axis=0) / d + norm_eps)
        for place, piece, norm in zip(places, pieces, norms, strict=True):
            y_ref[token, place] = (piece * grow * norm).astype(y_ref.dtype)

    def over(m: Array, axis: int, eps: float = eps_hc) -> Array:
        shrink = lax.rsqrt(m.sum(axis=axis, keepdims=True) + eps)  # one instruction, where a quotient has ten
        return m * (shrink * shrink)

    def streams_mix_kernel(*refs: Any) -> None:
        post_ref, mix_ref = refs[3:]
        token, post, mix = pl.program_id(0), logits(refs[:3], n, n, 1), logits(refs[:3], 2 * n, n * n, 2)
        post_ref[token, pl.ds(0, n)] = 2 * jax.nn.sigmoid(post())
        m = mix().reshape(n, n)
        m = over(jnp.exp(m - m.max(axis=1, keepdims=True)), 1, 0.0) + eps_hc
        m = over(m, 0)
        mix_ref[token, pl.ds(0, n * n)] = lax.fori_loop(1, rounds, lambda _, m: over(over(m, 1), 0), m).reshape(n * n)

    of_logits = parts, w["base"], w["scale"]
    (y,) = call(streams_kernel, [jax.ShapeDtypeStruct((s, d), x.dtype)], (s,), 8, 1, interpret, *of_logits, x, norm)
    # A kernel of its own, which takes longer than the one before: what is next needs y alone.
    outs = [jax.ShapeDtypeStruct((s, size), jnp.float32) for size in (n, n * n)]
    post, mix = call(streams_mix_kernel, outs, (s,), 1, 1, interpret, *of_logits)
    return x, y, post, mix.reshape(s, n, n)


def stream_logits(x: Array, back: Back | None, fn: Array, interpret: bool) -> tuple[Array, Array]:
    """The streams x [s, n, d] with `back` in them, and parts, to be summed over axis 0, of their logits · fn [m, n · d] and of the sum of
    their squares: float32 [parts, s, LOGITS]."""
    (s, n, d), m = x.shape, len(fn)
    if s > MOST_TOKENS:
        assert back is None
        flat = x.reshape(s, n * d).astype(jnp.float32)
        logits, squares = jnp.einsum("sx,mx->sm", flat, fn), jnp.square(flat).sum(axis=-1, keepdims=True)
        return x, jnp.concatenate([logits, jnp.zeros((s, SQUARES - m), jnp.float32), squares], axis=1)[None]
    one_by_one = s <= FMA_TOKENS
    size, width = 1 if one_by_one else 16, 32
    parts = d // width
    parts_padded = power_of_two(parts)
    structure = jax.tree.structure(back)

    def logits_of_one(x_ref: Any, fn_ref: Any, back: Back | None, x_out: Any, token: Array, row: Array, here: Any) -> Array:
        fns = fn_ref[jnp.minimum(row, m - 1), pl.ds(0, n), here]
        if back is None:
            streams = x_ref[token, pl.ds(0, n), here].astype(jnp.float32)
        else:
            terms, post, mix = back
            new = post[token, pl.ds(0, n)][:, None] * summed_of_one(terms, token, here)[None]
            for j in range(n):
                new += mix[token, j, pl.ds(0, n)][:, None] * x_ref[token, j, here].astype(jnp.float32)[None]
            x_out[token, pl.ds(0, n), here] = new.astype(x.dtype)
            streams = new.astype(x.dtype).astype(jnp.float32)
        factors = jnp.where((row == SQUARES)[:, None, None], streams[None], fns)
        return (factors * streams[None]).sum(axis=1).sum(axis=1)

    def logits_of_some(x_ref: Any, fn_ref: Any, back: Back | None, x_out: Any, token: Array, row: Array, here: Any) -> Array:
        fns = [fn_ref[jnp.minimum(row, m - 1), i, here] for i in range(n)]
        streams = [x_ref[token, i, here] for i in range(n)]
        if back is not None:
            terms, post, mix = back
            old, new = [stream.astype(jnp.float32) for stream in streams], summed(terms, token, here)
            posts = [post[token, i] for i in range(n)]
            mixes = [[mix[token, j, i] for j in range(n)] for i in range(n)]
            for i in range(n):
                stream = posts[i][:, None] * new
                for j in range(n):
                    stream += mixes[i][j][:, None] * old[j]
                streams[i] = stream.astype(x.dtype)
                x_out[token, i, here] = streams[i]
        total, squares = jnp.zeros((LOGITS, size), jnp.float32), jnp.zeros(size, jnp.float32)
        for stream, rest in zip(streams, fns, strict=True):
            squares += jnp.square(stream.astype(jnp.float32)).sum(axis=-1)
            for _ in range(3):  # float32 is the sum of three bfloat16, and the streams are bfloat16
                piece = rest.astype(jnp.bfloat16)
                rest -= piece.astype(jnp.float32)
                total += lax.dot_general(piece, stream, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        return jnp.where(row[:, None] == SQUARES, squares[None], total).T

    def streams_logits_kernel(x_ref: Any, fn_ref: Any, *refs: Any) -> None:
        *back_refs, x_out, out_ref = refs
        part, block = pl.program_id(0), pl.program_id(1)
        row, column = jnp.arange(LOGITS, dtype=jnp.int32), jnp.minimum(part, parts - 1) * width
        here, back = pl.ds(column, width), jax.tree.unflatten(structure, back_refs)
        if one_by_one:
            token, found = block, logits_of_one(x_ref, fn_ref, back, x_out, block, row, here)
        else:
            token = jnp.minimum(block * size + jnp.arange(size, dtype=jnp.int32), s - 1)
            found = logits_of_some(x_ref, fn_ref, back, x_out, token, row, here)
        out_ref[part, token, pl.ds(0, LOGITS)] = jnp.where(part < parts, found, 0)

    out = [jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((parts_padded, s, LOGITS), jnp.float32)]
    grid = (parts_padded, -(-s // size))
    new, found = call(streams_logits_kernel, out, grid, 4, 1, interpret, x, fn.reshape(m, n, d), back)
    return (x if back is None else new), found
