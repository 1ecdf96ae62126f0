"""Kernels of our own for Hopper GPUs, in Pallas: products with weights as DeepSeek publishes them, and what XLA makes many kernels of.

    dense       a few tokens times matrices
    grouped     tokens sorted by expert times their experts' matrices, and SwiGLU
    score       the indexer's scores
    stream_logits, mix_streams      hyper-connections

Weights are bfloat16 or `Packed` (deepseek_v4/packed.py). A packed number is made bfloat16 in registers. That is exact, and so a product is
what it would be with weights dequantised before.

deepseek_v4/products.py says where a program has them. Elsewhere it and deepseek_v4/model.py compute the same in plain JAX, and the tests
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

from deepseek_v4.packed import FP4_BITS, Fp4, Fp8, Packed, byte, fp4_values, fp8_values, powers

Matrix = Array | Packed


def call(kernel: Callable[..., None], out: Any, grid: tuple[int, ...], warps: int, stages: int, interpret: bool, *operands: Any) -> Any:
    params = triton.CompilerParams(num_warps=warps, num_stages=stages)
    return pl.pallas_call(kernel, out_shape=out, grid=grid, compiler_params=params, interpret=interpret)(*jax.tree.leaves(operands))


# ---------------------------------------------------------------------------------------------------- numbers from codes

SHRINK = 30
"""A packed number is made 2^-SHRINK of what it is: its scale, times what the exponents' biases differ by, must be a bfloat16."""


def power(exponent: Array, bias: int) -> Array:
    """bfloat16 2^(exponent − 127 + bias − SHRINK) of uint8 exponents."""
    return lax.bitcast_convert_type(((exponent.astype(jnp.int32) + (bias - SHRINK)) << 7).astype(jnp.uint16), jnp.bfloat16)


def numbers(words: Array, scale: Array, sign: tuple[int, int], magnitude: tuple[int, int]) -> Array:
    """bfloat16 numbers from one code of each uint16 word, two at a time, in Hopper's own instructions.

    `sign` and `magnitude` are shifts (left, if positive) and masks: they put the sign where bfloat16 has it, exponent and mantissa where it
    has its last exponent and first mantissa bits. So a subnormal code becomes a subnormal bfloat16, and all that is missing is a power of
    two: `scale`.
    """

    def shifted(to: str, by: int) -> str:
        return f"{'shl' if by > 0 else 'shr'}.b32 {to}, $1, {abs(by)};"

    (left, mask), (by, keep) = sign, magnitude
    if left == by:
        bits = f"{shifted('a', by)} and.b32 a, a, {0x10001 * (mask | keep):#x};"
    else:
        bits = f"{shifted('a', by)} {shifted('b', left)} and.b32 a, a, {0x10001 * keep:#x}; lop3.b32 a, b, {0x10001 * mask:#x}, a, 0xEA;"
    asm = f"{{ .reg .b32 a, b; {bits} mul.rn.bf16x2 $0, a, $2; }}"
    out = [jax.ShapeDtypeStruct(words.shape, jnp.bfloat16)]
    scale = jnp.broadcast_to(scale, words.shape)
    return triton.elementwise_inline_asm(asm, args=[words, scale], constraints="=r,r,r", pack=2, result_shape_dtypes=out)[0]


def fp4_numbers(words: Array, scale: Array, place: int, interpret: bool) -> Array:
    """[r, 32] from one place of words [r, 32]; scale uint32 [r]."""
    if interpret:
        return (fp4_values(words, place) * powers(byte(scale, place) - SHRINK)[:, None]).astype(jnp.bfloat16)
    sign, lowest = FP4_BITS[place]
    return numbers(words, power(byte(scale, place), 126)[:, None], (15 - sign, 0x8000), (6 - lowest, 0x01C0))


def fp8_numbers(words: Array, scale: Array, place: int, interpret: bool) -> Array:
    """[r, 64] from one byte of words [r, 64]; scale uint8, of all of them."""
    if interpret:
        return (fp8_values(byte(words, place).astype(jnp.uint8)) * powers(scale - SHRINK)).astype(jnp.bfloat16)
    return numbers(words, power(scale, 120), (8 - 8 * place, 0x8000), (4 - 8 * place, 0x07F0))


# ------------------------------------------------------------------------------------------------------------- products

STEP = 128
"""Columns of a matrix that one step of a product takes."""


def load_scale(w: Any, lead: Array, row: Array, rows: int, step: Array) -> Array:
    """The scales of a step, of the last one if it is past it."""
    if isinstance(w, Fp4):
        return w.scale[lead, jnp.minimum(step, w.scale.shape[1] - 1), pl.ds(row, rows)]
    if isinstance(w, Fp8):
        return w.scale[lead, row // 128, jnp.minimum(step, w.scale.shape[2] - 1)]
    return step  # of no use


def load_tiles(w: Any, scale: Array, lead: Array, row: Array, rows: int, step: Array, interpret: bool) -> list[Array]:
    """A step's columns of w[lead, row : row + rows], side by side, bfloat16."""
    here = pl.ds(row, rows)
    if isinstance(w, Fp4):
        words = w.codes[lead, step, here]
        return [fp4_numbers(words, scale, place, interpret) for place in range(4)]
    if isinstance(w, Fp8):
        words = w.codes[lead, here, pl.ds(64 * step, 64)]
        return [fp8_numbers(words, scale, place, interpret) for place in (0, 1)]
    return [w[lead, here, pl.ds(STEP * step + 64 * half, 64)] for half in (0, 1)]


def multiply(
    ws: Sequence[Any],
    lead: Array,
    row: Array,
    rows: int,
    first: Array,
    steps: int,
    take: Callable[[Array, int], Array],
    size: int,
    interpret: bool,
) -> list[Array]:
    """w[lead, row : row + rows, columns of the steps] · x of matrices of one type → float32 [rows, size].

    Args:
        take: x's columns from a first one on: [size, columns].
    """

    def scales(step: Array) -> list[Array]:
        return [load_scale(w, lead, row, rows, step) for w in ws]

    def add(i: Array, carry: tuple[list[Array], list[Array]]) -> tuple[list[Array], list[Array]]:
        totals, scale = carry
        following = scales(first + i + 1)  # a step ahead: nothing else would hide how long they take
        tiles = [load_tiles(w, s, lead, row, rows, first + i, interpret) for w, s in zip(ws, scale, strict=True)]
        for part in range(len(tiles[0])):
            columns = STEP // len(tiles[0])
            x = take(STEP * (first + i) + columns * part, columns)
            products = [lax.dot_general(tile[part], x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32) for tile in tiles]
            totals = [total + product for total, product in zip(totals, products, strict=True)]
        return totals, following

    totals, _ = lax.fori_loop(0, steps, add, ([jnp.zeros((rows, size), jnp.float32) for _ in ws], scales(first)))
    return [total * 2.0**SHRINK if isinstance(w, Packed) else total for total, w in zip(totals, ws, strict=True)]


def takes(w: Matrix) -> bool:
    """Whether the products here take a matrix: by its dtype and its sizes."""
    return (isinstance(w, Packed) or w.dtype == jnp.bfloat16) and w.shape[-2] % ROWS == 0 and w.shape[-1] % STEP == 0


MOST_TOKENS = 128
"""Of `dense`: with more of them, it pays to dequantise the matrix first."""

ROWS = 64
"""Of a matrix, to a program."""


def dense(x: Array, *ws: Matrix, dtype: jax.typing.DTypeLike, interpret: bool = False) -> list[Array]:
    """x [s, g, c] times each of ws [g, r, c] → [s, g, r] of `dtype`, all in one kernel."""
    (s, groups, columns), size = x.shape, 16 if len(x) <= 16 else 32 if len(x) <= 32 else 64
    padded, tiles = -(-s // size) * size, [w.shape[1] // ROWS for w in ws]
    # Programs enough for the whole GPU, each with steps enough to have loads in flight.
    splits = 1
    while splits < 8 and sum(tiles) * groups * splits < 400 and columns % (2 * splits * STEP) == 0 and columns // (2 * splits) >= 256:
        splits *= 2
    out = jax.ShapeDtypeStruct((splits, padded, groups, sum(w.shape[1] for w in ws)), jnp.float32 if splits > 1 else dtype)
    structure = jax.tree.structure(ws)

    def dense_kernel(x_ref: Any, *refs: Any) -> None:
        *matrices, out_ref = refs
        tile, block, place = (pl.program_id(axis) for axis in range(3))
        group, split = place // splits, place % splits
        tokens = pl.ds(block * size, size)
        token = jnp.minimum(block * size + jnp.arange(size, dtype=jnp.int32), s - 1)
        first, steps = 0, columns // splits // STEP
        for w, count in zip(jax.tree.unflatten(structure, matrices), tiles, strict=True):

            @pl.when((tile >= first) & (tile < first + count))
            def _(w: Any = w, first: int = first) -> None:
                take = lambda at, width: x_ref[token, group, pl.ds(at, width)]  # noqa: E731
                (y,) = multiply([w], group, (tile - first) * ROWS, ROWS, split * steps, steps, take, size, interpret)
                out_ref[split, tokens, group, pl.ds(tile * ROWS, ROWS)] = y.T.astype(out_ref.dtype)

            first += count

    grid = (sum(tiles), padded // size, groups * splits)
    found = call(dense_kernel, [out], grid, 4, 4, interpret, x, ws)[0]
    found = (found[0] if splits == 1 else found.sum(axis=0).astype(dtype))[:s]
    ends = [sum(w.shape[1] for w in ws[: i + 1]) for i in range(len(ws))]
    return jnp.split(found, ends[:-1], axis=-1)


class Blocks(NamedTuple):
    """Rows of one expert each. Those from `used` on are none."""

    expert: Array  # int32 [blocks]
    first: Array  # int32 [blocks], of the pairs as they are ordered
    end: Array  # int32 [blocks]: of its rows, at most `size` after the first
    used: Array  # int32 [1]


def order_by_expert(expert: Array) -> Array:
    """Where each pair goes for its expert's pairs to be together: int32 [pairs], the pairs in that order. expert int32 [pairs]."""
    place = jnp.arange(len(expert), dtype=jnp.int32)
    if len(expert) > 1024:
        return jnp.argsort(expert)
    # In two kernels, where a sort has many.
    before = (expert < expert[:, None]) | ((expert == expert[:, None]) & (place < place[:, None]))
    rank = before.sum(axis=1, dtype=jnp.int32)
    return jnp.where(rank == place[:, None], place, 0).sum(axis=1, dtype=jnp.int32)


def blocks_of(expert: Array, count: int, size: int) -> Blocks:
    """Blocks of at most `size` of the ordered pairs, each of one of `count` experts; a pair's expert may be one past the last: none."""
    number = jnp.arange(count, dtype=jnp.int32)
    first, end = (compare(expert, number[:, None]).sum(axis=1, dtype=jnp.int32) for compare in (jnp.less, jnp.less_equal))
    blocks = -((first - end) // size)  # of each expert
    blocks_end = jnp.where(number <= number[:, None], blocks, 0).sum(axis=1, dtype=jnp.int32)
    i = jnp.arange(min(count, len(expert)) + len(expert) // size, dtype=jnp.int32)
    e = jnp.minimum((blocks_end <= i[:, None]).sum(axis=1, dtype=jnp.int32), count - 1)
    at = first[e] + (i - blocks_end[e] + blocks[e]) * size
    return Blocks(e, at, jnp.minimum(at + size, end[e]), blocks_end[-1:])


class Form(NamedTuple):
    """How a grouped product is cut; measured on an H200."""

    size: int  # tokens of a block
    rows: int  # of a matrix, to a program
    warps: int
    stages: int


def grouped(
    x: Array, order: Array, blocks: Blocks, ws: Sequence[Matrix], form: Form, per: int, dtype: Any, interpret: bool = False
) -> list[Array]:
    """Each pair's row times its expert's matrices: float32 or `dtype` [splits, pairs + 1, r], to be summed, the last row garbage.

    Args:
        x: [s, c]; pair p has row p // per.
        order: int32 [pairs]: pairs by expert.
        ws: of each expert one matrix [e, r, c] or more, all of one type.
    """
    pairs, (_, height, columns), (size, rows, warps, stages) = len(order), ws[0].shape, form
    rows = rows if height % rows == 0 else ROWS
    programs, steps, splits = height // rows * len(blocks.expert), columns // STEP, 1
    while 2 * splits * programs <= 4096 and steps % (2 * splits) == 0 and steps // (2 * splits) >= 4:
        splits *= 2
    structure = jax.tree.structure(ws)

    def experts_kernel(expert: Any, first: Any, end: Any, used: Any, order: Any, x_ref: Any, *refs: Any) -> None:
        outs, refs = refs[-len(ws) :], refs[: -len(ws)]
        row, block, split = pl.program_id(0) * rows, pl.program_id(1), pl.program_id(2)

        @pl.when(block < used[0])
        def _() -> None:
            at = first[block] + jnp.arange(size, dtype=jnp.int32)
            pair = jnp.where(at < end[block], order[jnp.minimum(at, pairs - 1)], pairs)  # what is past an expert's end goes to waste
            token = jnp.minimum(pair // per, x_ref.shape[0] - 1)
            take = lambda at, width: x_ref[token, pl.ds(at, width)]  # noqa: E731
            matrices, part = jax.tree.unflatten(structure, refs), steps // splits
            found = multiply(matrices, expert[block], row, rows, split * part, part, take, size, interpret)
            for y, out in zip(found, outs, strict=True):
                out[split, pair, pl.ds(row, rows)] = y.T.astype(out.dtype)

    out = jax.ShapeDtypeStruct((splits, pairs + 1, height), jnp.float32 if splits > 1 else dtype)
    grid = (height // rows, len(blocks.expert), splits)
    return call(experts_kernel, [out] * len(ws), grid, warps, stages, interpret, *blocks, order, x, ws)


def experts(
    x: Array, expert: Array, w: dict[str, Matrix], activate: Callable[[Array, Array], Array], total: int, interpret: bool = False
) -> Array:
    """Each pair's expert of its token → float32 [pairs, d]; a pair without an expert comes out as garbage.

    Args:
        x: [s, d].
        expert: int32 [pairs], one past the last where it is not here; s divides pairs.
        w: "w1", "w3" [e, i, d] and "w2" [e, d, i].
        activate: of the first two's products.
        total: of experts, here and elsewhere.
    """
    count, pairs = w["w1"].shape[0], len(expert)
    w1, w3, w2 = w["w1"], w["w3"], w["w2"]
    order = order_by_expert(expert)
    product = partial(grouped, order=order, interpret=interpret)
    if pairs <= 16 * total:
        form = down = Form(16, 128, 4, 3)
        blocks = down_blocks = blocks_of(expert, count, form.size)
        together = [[w1], [w3]]  # one by one they are faster
    else:
        form, down = Form(64 if pairs <= 48 * total else 128, 64, 4, 2), Form(64, 128, 8, 3 if isinstance(w2, Packed) else 2)
        blocks, down_blocks = (blocks_of(expert, count, size) for size in (form.size, down.size))
        together = [[w1, w3]]
    first = [y for ws in together for y in product(x, blocks=blocks, ws=ws, form=form, per=pairs // len(x), dtype=x.dtype)]
    inner = activate(*(y.sum(axis=0, dtype=jnp.float32) for y in first)).astype(x.dtype)
    (out,) = product(inner, blocks=down_blocks, ws=[w2], form=down, per=1, dtype=jnp.float32)
    return out[:, :-1].sum(axis=0)


# -------------------------------------------------------------------------------------------------------------- the indexer

ENTRIES, TOKENS = 64, 8
"""To a program of `score`."""


def scores(q: Array, keys: Array) -> bool:
    """Whether `score` takes these."""
    (heads, dim), bf16 = q.shape[2:], q.dtype == keys.dtype == jnp.bfloat16
    return bf16 and heads in (16, 32, 64) and dim == 128 and keys.shape[1] % ENTRIES == 0


def score(q: Array, weight: Array, keys: Array, limit: Array, interpret: bool = False) -> Array:
    """Σ_h weight_h · relu(q_h · key): q [b, t, h, k], weight [b, t, h], keys [b, c, k] → float32 [b, t, c], −inf from `limit` [b, t] on."""
    b, t, _, _ = q.shape
    many = TOKENS if t % TOKENS == 0 else 1

    def score_kernel(q_ref: Any, weight_ref: Any, keys_ref: Any, limit_ref: Any, out_ref: Any) -> None:
        request, first, at = pl.program_id(0), pl.program_id(1) * many, pl.program_id(2) * ENTRIES
        here = pl.ds(at, ENTRIES)
        number = at + jnp.arange(ENTRIES, dtype=jnp.int32)

        @pl.when(at >= limit_ref[request, first + many - 1])  # the last of them sees most
        def _() -> None:
            for i in range(many):
                out_ref[request, first + i, here] = jnp.full(ENTRIES, -jnp.inf, jnp.float32)

        @pl.when(at < limit_ref[request, first + many - 1])
        def _() -> None:
            key = keys_ref[request, here]
            for i in range(many):
                product = lax.dot_general(q_ref[request, first + i], key, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
                total = (jnp.maximum(product, 0) * weight_ref[request, first + i][:, None]).sum(axis=0)
                out_ref[request, first + i, here] = jnp.where(number < limit_ref[request, first + i], total, -jnp.inf)

    out = [jax.ShapeDtypeStruct((b, t, keys.shape[1]), jnp.float32)]
    grid = (b, t // many, keys.shape[1] // ENTRIES)
    return call(score_kernel, out, grid, 4, 1, interpret, q, weight, keys, jnp.broadcast_to(limit, (b, t)))[0]


# ------------------------------------------------------------------------------------------------------- hyper-connections

LOGITS, SQUARES = 32, 31
"""Rows of a part of the streams' mixing logits, and the one that has the sum of the streams' squares."""


def reads(x: Array) -> bool:
    """Whether `read_streams` takes streams [s, n, d]."""
    return x.dtype == jnp.bfloat16 and x.shape[1] == 4 and x.shape[2] % 1024 == 0


def read_streams(
    x: Array, w: Any, norm: Array, eps: tuple[float, float], rounds: int, interpret: bool = False
) -> tuple[Array, Array, Array]:
    """What mHC makes of the residual streams x [s, n, d]: the sublayer's input [s, d], RMS-normed, post [s, n] and mix [s, m, n].

    Args:
        w: "fn" [24, n · d], "base" [24], "scale" [3].
        norm: [d], of the RMS norm.
        eps: of norms, and of mHC.
        rounds: of Sinkhorn's normalisation.
    """
    s, n, d = x.shape
    norm_eps, eps_hc = eps
    flat = x.reshape(s, n * d)
    if s <= MOST_TOKENS:
        parts = stream_logits(flat, w["fn"], interpret)
    else:
        wide = flat.astype(jnp.float32)
        logits = jnp.einsum("sx,mx->sm", wide, w["fn"])
        squares = jnp.square(wide).sum(axis=-1, keepdims=True)
        parts = jnp.concatenate([logits, jnp.zeros((s, SQUARES - logits.shape[1]), jnp.float32), squares], axis=1)[None]
    count = len(parts)

    def streams_kernel(parts_ref: Any, base: Any, scale: Any, x_ref: Any, norm_ref: Any, y_ref: Any, post_ref: Any, mix_ref: Any) -> None:
        token, every, places = pl.program_id(0), pl.ds(0, count), [pl.ds(1024 * i, 1024) for i in range(d // 1024)]
        # All loads first: they take longer than all else.
        parts = [parts_ref[every, token, pl.ds(first, size)] for first, size in ((0, n), (n, n), (2 * n, n * n))]
        squares = parts_ref[every, token, SQUARES]
        bases = [base[pl.ds(first, size)] for first, size in ((0, n), (n, n), (2 * n, n * n))]
        streams = [x_ref[token, pl.ds(0, n), place] for place in places]
        norms = [norm_ref[place] for place in places]

        shrink = lax.rsqrt(squares.sum(axis=0) / (n * d) + norm_eps)
        pre, post, mix = (part.sum(axis=0) * shrink * scale[i] + at for i, (part, at) in enumerate(zip(parts, bases, strict=True)))
        pre = jax.nn.sigmoid(pre) + eps_hc
        pieces = [(pre[:, None] * piece.astype(jnp.float32)).sum(axis=0) for piece in streams]
        total = jnp.zeros(1024, jnp.float32)
        for piece in pieces:
            total += jnp.square(piece)
        grow = lax.rsqrt(total.sum(axis=0) / d + norm_eps)
        for place, piece, norm in zip(places, pieces, norms, strict=True):
            y_ref[token, place] = (piece * grow * norm).astype(y_ref.dtype)

        post_ref[token, pl.ds(0, n)] = 2 * jax.nn.sigmoid(post)
        mix = mix.reshape(n, n)
        mix = jnp.exp(mix - mix.max(axis=1, keepdims=True))
        mix = mix / mix.sum(axis=1, keepdims=True) + eps_hc
        mix = mix / (mix.sum(axis=0, keepdims=True) + eps_hc)

        def turn(_: Array, mix: Array) -> Array:
            mix = mix / (mix.sum(axis=1, keepdims=True) + eps_hc)
            return mix / (mix.sum(axis=0, keepdims=True) + eps_hc)

        mix_ref[token, pl.ds(0, n * n)] = lax.fori_loop(1, rounds, turn, mix).reshape(n * n)

    outs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (((s, d), x.dtype), ((s, n), jnp.float32), ((s, n * n), jnp.float32))]
    y, post, mix = call(streams_kernel, outs, (s,), 4, 1, interpret, parts, w["base"], w["scale"], x, norm)
    return y, post, mix.reshape(s, n, n)


def stream_logits(x: Array, fn: Array, interpret: bool) -> Array:
    """Parts, to be summed over axis 0, of the logits x [s, c] · fn [m, c] and of the squares' sum: float32 [parts, s, LOGITS]."""
    (s, columns), size, width = x.shape, 16, 256
    m, count = len(fn), columns // width
    parts = 1 << (count - 1).bit_length()  # of Triton's arrays the sizes are powers of two

    def streams_logits_kernel(x_ref: Any, fn_ref: Any, out_ref: Any) -> None:
        token = jnp.minimum(pl.program_id(1) * size + jnp.arange(size, dtype=jnp.int32), s - 1)
        row, here = jnp.arange(LOGITS, dtype=jnp.int32), pl.ds(jnp.minimum(pl.program_id(0), count - 1) * width, width)
        rest, streams = fn_ref[jnp.minimum(row, m - 1), here], x_ref[token, here]
        squares = jnp.square(streams.astype(jnp.float32)).sum(axis=1)
        total = jnp.zeros((LOGITS, size), jnp.float32)
        for _ in range(3):  # float32 is the sum of three bfloat16, and the streams are bfloat16
            part = rest.astype(jnp.bfloat16)
            rest -= part.astype(jnp.float32)
            total += lax.dot_general(part, streams, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        total = jnp.where(row[:, None] == SQUARES, squares[None], total)
        out_ref[pl.program_id(0), token, pl.ds(0, LOGITS)] = jnp.where(pl.program_id(0) < count, total, 0).T

    out = [jax.ShapeDtypeStruct((parts, s, LOGITS), jnp.float32)]
    return call(streams_logits_kernel, out, (parts, -(-s // size)), 4, 1, interpret, x, fn)[0]
