"""Kernels of our own for Hopper GPUs, in Pallas: products with weights as DeepSeek publishes them.

    dense           a few tokens times matrices
    few_experts     a few tokens times their experts' matrices
    experts         more of them, sorted by expert

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


def call(
    kernel: Callable[..., None],
    out: Any,
    grid: tuple[int, ...],
    warps: int,
    stages: int,
    interpret: bool,
    *operands: Any,
    aliases: dict[int, int] | None = None,
) -> Any:
    """Runs a kernel over the leaves of its operands; `aliases` says which of these are written in place, as which result."""
    params = triton.CompilerParams(num_warps=warps, num_stages=stages)
    run = pl.pallas_call(kernel, out_shape=out, grid=grid, compiler_params=params, interpret=interpret, input_output_aliases=aliases or {})
    return run(*jax.tree.leaves(operands))


# ---------------------------------------------------------------------------------------------------- numbers from codes

SHRINK = 30
"""A packed number is made 2^-SHRINK of what it is: its scale, times what the exponents' biases differ by, must be a bfloat16."""


def numbers(words: Array, scale: Array, place: int, bias: int, sign: tuple[int, int], magnitude: tuple[int, int]) -> Array:
    """bfloat16 numbers from one code of each uint16 word, two at a time, in Hopper's own instructions.

    `sign` and `magnitude` are shifts (left, if positive) and masks: they put the sign where bfloat16 has it, exponent and mantissa where it
    has its last exponent and first mantissa bits. So a subnormal code becomes a subnormal bfloat16, and all that is missing is a power of
    two: 2^(exponent − 127 + bias − SHRINK), whose exponent is byte `place` of `scale`, uint32.

    To make the powers before, of a row's scale, would be fewer instructions. But Triton would then bring each to its row's numbers through
    shared memory, with two barriers.
    """

    def shifted(to: str, by: int) -> str:
        return f"{'shl' if by > 0 else 'shr'}.b32 {to}, $1, {abs(by)};"

    (left, mask), (by, keep) = sign, magnitude
    if left == by:
        bits = f"{shifted('a', by)} and.b32 a, a, {0x10001 * (mask | keep):#x};"
    else:
        bits = f"{shifted('a', by)} {shifted('b', left)} and.b32 a, a, {0x10001 * keep:#x}; lop3.b32 a, b, {0x10001 * mask:#x}, a, 0xEA;"
    power = f"bfe.u32 c, $2, {8 * place}, 8; mad.lo.u32 c, c, {0x10001 << 7:#x}, {0x10001 * (bias - SHRINK << 7):#x};"
    asm = f"{{ .reg .b32 a, b, c; {bits} {power} mul.rn.bf16x2 $0, a, c; }}"
    out = [jax.ShapeDtypeStruct(words.shape, jnp.bfloat16)]
    scale = jnp.broadcast_to(scale, words.shape)
    return triton.elementwise_inline_asm(asm, args=[words, scale], constraints="=r,r,r,r", pack=2, result_shape_dtypes=out)[0]


def fp4_numbers(words: Array, scale: Array, place: int, interpret: bool) -> Array:
    """[r, 32] from one place of words [r, 32]; scale uint32 [r]."""
    if interpret:
        return (fp4_values(words, place) * powers(byte(scale, place) - SHRINK)[:, None]).astype(jnp.bfloat16)
    sign, lowest = FP4_BITS[place]
    return numbers(words, scale[:, None], place, 126, (15 - sign, 0x8000), (6 - lowest, 0x01C0))


def fp8_numbers(words: Array, scale: Array, place: int, interpret: bool) -> Array:
    """[r, 64] from one byte of words [r, 64]; scale uint8, of all of them."""
    if interpret:
        return (fp8_values(byte(words, place).astype(jnp.uint8)) * powers(scale - SHRINK)).astype(jnp.bfloat16)
    return numbers(words, scale.astype(jnp.uint32), 0, 120, (8 - 8 * place, 0x8000), (4 - 8 * place, 0x07F0))


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
        return [settled(total, interpret) for total in totals], following

    totals, _ = lax.fori_loop(0, steps, add, ([jnp.zeros((rows, size), jnp.float32) for _ in ws], scales(first)))
    return [total * 2.0**SHRINK if isinstance(w, Packed) else total for total, w in zip(totals, ws, strict=True)]


def settled(x: Array, interpret: bool) -> Array:
    """x, once it is there.

    Triton lets the last product of a step run on while the next step's numbers are loaded into the memory that it reads (seen in XLA's
    Triton of jaxlib 0.11.2, where four products are a step; results differed when other kernels ran at the same time). To use a product at
    the step's end makes it wait.
    """
    if interpret:
        return x
    out = [jax.ShapeDtypeStruct(x.shape, x.dtype)]
    return triton.elementwise_inline_asm("mov.b32 $0, $1;", args=[x], constraints="=f,f", pack=1, result_shape_dtypes=out)[0]


def takes(w: Matrix) -> bool:
    """Whether the products here take a matrix: by its dtype and its sizes."""
    return (isinstance(w, Packed) or w.dtype == jnp.bfloat16) and w.shape[-2] % ROWS == 0 and w.shape[-1] % STEP == 0


MOST_TOKENS = 128
"""Of `dense`: with more of them, it pays to dequantise the matrix first."""

FMA_TOKENS = 2
"""Up to so many tokens multiply faster one by one than by tensor cores."""

ROWS = 64
"""Of a matrix, to a program; a quarter of them where tokens are multiplied one by one, and of a matrix as low as a gate a sixteenth."""


Turn = tuple[Array, Array]
"""Cosine and sine [s, 32] of the angles that pairs are turned by."""


def turned(numbers: Callable[[Array], Array], column: Array, size: int, turn: Any, where: tuple[Any, ...]) -> Array:
    """`numbers` of columns, of which each `size` are a head; its last ones turned by pairs as `rope.rotate` does. It is asked for each
    number's partner too. `where` is the token's place in `turn`."""
    cos, sin = turn
    lane, first = column % size, size - 2 * cos.shape[-1]
    angle = (*where, jnp.maximum(lane - first, 0) // 2)
    here, partner = numbers(column), numbers(column ^ 1)
    return jnp.where(lane < first, here, here * cos[angle] + partner * jnp.where(column % 2 == 0, -sin[angle], sin[angle]))


def dense(
    x: Array, *ws: Matrix, dtype: jax.typing.DTypeLike, turn: Turn | None = None, head: int = 0, interpret: bool = False
) -> list[Array]:
    """x [s, g, c] times each of ws [g, r, c] → [s, g, r] of `dtype`, all in one kernel. With `turn`, of at most FMA_TOKENS tokens whose
    heads of `head` columns are turned first."""
    found = dense_parts(x, *ws, dtype=dtype, turn=turn, head=head, interpret=interpret)
    found = (found[0] if len(found) == 1 else found.sum(axis=0))[: len(x)].astype(dtype)
    ends = [sum(w.shape[1] for w in ws[: i + 1]) for i in range(len(ws))]
    return jnp.split(found, ends[:-1], axis=-1)


def dense_parts(
    x: Array, *ws: Matrix, dtype: jax.typing.DTypeLike = jnp.float32, turn: Turn | None = None, head: int = 0, interpret: bool = False
) -> Array:
    """The products of `dense` side by side, in parts to be summed over axis 0: [parts, s or more, g, Σ r], float32 or, if one, `dtype`."""
    (s, groups, columns), heights = x.shape, [w.shape[1] for w in ws]
    if one_by_one := s <= FMA_TOKENS and not any(isinstance(w, Fp4) for w in ws):
        rows, size, padded = ROWS // (4 if sum(heights) > 256 else 16), s, s
        splits = columns // (1024 if columns % 1024 == 0 else STEP)
    else:
        rows, size = ROWS, next((size for size in (8, 16, 32) if s <= size), 64)
        padded, splits = -(-s // size) * size, 1
        # Programs enough for the whole GPU, each with steps enough to have loads in flight.
        programs = sum(heights) // rows * groups
        while splits < 8 and programs * splits < 400 and columns % (2 * splits * STEP) == 0 and columns // (2 * splits) >= 256:
            splits *= 2
    structure, width = jax.tree.structure((ws, turn)), columns // splits
    assert turn is None or one_by_one

    def dense_kernel(x_ref: Any, *refs: Any) -> None:
        matrices, turn = jax.tree.unflatten(structure, refs[:-1])
        out_ref = refs[-1]

        def number(token: int, group: Array, column: Array) -> Array:
            read = lambda column: x_ref[token, group, column].astype(jnp.float32)  # noqa: E731
            return read(column) if turn is None else turned(read, column, head, turn, (token,))

        tile, block, place = (pl.program_id(axis) for axis in range(3))
        group, split = place // splits, place % splits
        first = 0
        for w, height in zip(matrices, heights, strict=True):

            @pl.when((tile >= first) & (tile < first + height // rows))
            def _(w: Any = w, first: int = first) -> None:
                row, here = (tile - first) * rows, pl.ds(tile * rows, rows)
                if one_by_one:
                    found = multiply_one_by_one(w, group, row, rows, split, width, s, number, interpret)
                    for token, y in enumerate(found):
                        out_ref[split, token, group, here] = y.astype(out_ref.dtype)
                else:
                    tokens = block * size + jnp.arange(size, dtype=jnp.int32)
                    take = partial(take_rows, x_ref, (jnp.minimum(tokens, s - 1), group), tokens < s, interpret)
                    (y,) = multiply([w], group, row, rows, split * (width // STEP), width // STEP, take, size, interpret)
                    out_ref[split, pl.ds(block * size, size), group, here] = y.T.astype(out_ref.dtype)

            first += height // rows

    out = jax.ShapeDtypeStruct((splits, padded, groups, sum(heights)), jnp.float32 if splits > 1 else dtype)
    return call(dense_kernel, [out], (sum(heights) // rows, padded // size, groups * splits), 4, 3, interpret, x, ws, turn)[0]


def take_rows(x: Any, rows: tuple[Any, ...], real: Array, interpret: bool, at: Array, width: int) -> Array:
    """Columns of rows of x, 0 for those that are not real: nothing is read for them."""
    here = (*rows, pl.ds(at, width))
    if interpret:
        return jnp.where(real[:, None], x[here], 0)
    return triton.load(x.at[here], mask=jnp.broadcast_to(real[:, None], (len(real), width)), other=0)


def multiply_one_by_one(
    w: Any, lead: Array, row: Array, rows: int, part: Array, width: int, tokens: int, number: Callable[..., Array], interpret: bool
) -> list[Array]:
    """w[lead, row : row + rows, part · width : (part + 1) · width] · each token's numbers → float32 [rows], on the ordinary units.

    `number` gives a token's float32 at (token, lead, columns).

    Everything is loaded before anything is multiplied. XLA's Triton leaves product and sum two instructions: the assembly makes them one.
    """
    per = 2 if isinstance(w, Fp8) else 1  # numbers of a word
    words = 1 << min((width // per & -(width // per)).bit_length() - 1, 8)
    tiles = width // per // words
    lane = jnp.arange(words, dtype=jnp.int32)
    first = part * (width // per)  # not a quotient: of its factors the compiler sees that loads are aligned
    starts = [first + i * words for i in range(tiles)]
    here = pl.ds(row, rows)
    scales: list[Array | None] = [None] * tiles
    if isinstance(w, Fp8):
        codes = [w.codes[lead, here, pl.ds(at, words)] for at in starts]
        blocks = [(at + lane) // 64 for at in starts]
        scales = [powers(w.scale[lead, row // 128, block]) for block in blocks]
        columns = [[block * 128 + (at + lane) % 64 + 64 * half for half in (0, 1)] for at, block in zip(starts, blocks, strict=True)]
    else:
        codes = [w[lead, here, pl.ds(at, words)].astype(jnp.float32) for at in starts]
        columns = [[at + lane] for at in starts]
    xs = [[[number(token, lead, column) for column in tile] for tile in columns] for token in range(tokens)]
    found = []
    for tile_xs in xs:
        total = jnp.zeros((rows, words), jnp.float32)
        for code, scale, numbers in zip(codes, scales, tile_xs, strict=True):
            scaled = [(x if scale is None else x * scale)[None] for x in numbers]
            total = add_products(code, scaled, total, interpret)
        found.append(total.sum(axis=1))
    return found


def add_products(codes: Array, xs: list[Array], total: Array, interpret: bool) -> Array:
    """total + the numbers of codes · xs: of each uint16 its two e4m3, or float32 as they are."""
    if interpret:
        values = [codes] if len(xs) == 1 else [fp8_values(byte(codes, place).astype(jnp.uint8)) for place in (0, 1)]
        return total + sum(value * x for value, x in zip(values, xs, strict=True))
    if len(xs) == 1:
        asm, pack, form = "fma.rn.f32 $0, $1, $2, $3;", 1, "=f,f,f,f"
    else:
        pack, form = 2, "=f,=f,r,f,f,f,f,f,f"
        asm = """{ .reg .b16 p, q, a, b, c, d; .reg .b32 h, g; .reg .f32 e, f, i, j, s, t;
            mov.b32 {p, q}, $2; cvt.rn.f16x2.e4m3x2 h, p; cvt.rn.f16x2.e4m3x2 g, q; mov.b32 {a, b}, h; mov.b32 {c, d}, g;
            cvt.f32.f16 e, a; cvt.f32.f16 f, b; cvt.f32.f16 i, c; cvt.f32.f16 j, d;
            fma.rn.f32 s, e, $3, $7; fma.rn.f32 t, i, $4, $8; fma.rn.f32 s, f, $5, s; fma.rn.f32 t, j, $6, t;
            mov.f32 $0, s; mov.f32 $1, t; }"""
    args = [codes, *(jnp.broadcast_to(x, codes.shape) for x in xs), total]
    out = [jax.ShapeDtypeStruct(codes.shape, jnp.float32)]
    return triton.elementwise_inline_asm(asm, args=args, constraints=form, pack=pack, result_shape_dtypes=out)[0]


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
    """Each pair's expert of its token → float32 [parts, pairs + 1, d], to be summed; a pair without an expert, and the last, are garbage.

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
    return product(inner, blocks=down_blocks, ws=[w2], form=down, per=1, dtype=jnp.float32)[0]


FEW_TOKENS = 16
"""Of `few_experts`."""


def few_experts(x: Array, chosen: Array, w: dict[str, Matrix], activate: Callable[[Array, Array], Array], interpret: bool = False) -> Array:
    """As `experts`, for at most FEW_TOKENS tokens x [s, d], which need not be sorted.

    `chosen` int32 [s, k] are each token's experts; those that are not here are any other numbers.
    """
    form = Form(8 if len(x) <= 8 else FEW_TOKENS, 64, 2, 3)
    # One token's experts run beside the shared expert's product, which takes up some processors: more and smaller programs even that out.
    gate, up = few(x, chosen, [w["w1"], w["w3"]], form, 4 if len(x) == 1 else 2, interpret).sum(axis=1)
    return few(activate(gate, up).astype(x.dtype), chosen, [w["w2"]], form, 2, interpret)[0]


def few(x: Array, chosen: Array, ws: Sequence[Matrix], form: Form, splits: int, interpret: bool) -> Array:
    """Each pair's row times its expert's matrices → float32 [matrices, parts, pairs + 1, r], the last row garbage.

    Pair p has row p // k of x, or row p if there are so many.

    A program is of a pair: of the first that has an expert. It multiplies for all tokens that chose it; the others' programs end at once.
    """
    (s, k), (count, height, columns), (size, rows, warps, stages) = chosen.shape, ws[0].shape, form
    pairs, rows = s * k, rows if height % rows == 0 else ROWS
    per = k if len(x) == s else 1
    splits = splits if columns % (splits * STEP) == 0 else 1
    tiles, steps, many = height // rows, columns // STEP // splits, 1 << (pairs - 1).bit_length()
    structure = jax.tree.structure(ws)

    def experts_kernel(chosen_ref: Any, x_ref: Any, *refs: Any) -> None:
        *matrices, out_ref = refs
        tile, pair, split = (pl.program_id(axis) for axis in range(3))

        def expert_of(pair: Array) -> Array:
            return chosen_ref[pair // k, pair % k]

        expert, number = expert_of(pair), jnp.arange(many, dtype=jnp.int32)
        mine = (expert >= 0) & (expert < count)
        if s > 1:
            earlier = (expert_of(jnp.minimum(number, pairs - 1)) == expert) & (number < pair)
            again = (earlier & (number // k == pair // k)).astype(jnp.int32).sum() > 0  # a token's second pair with an expert is on its own
            mine &= again | (earlier.astype(jnp.int32).sum() == 0)

        def run(which: int, w: Any) -> None:
            row = (tile - which * tiles) * rows
            if s == 1:
                theirs = jnp.where(jnp.arange(size, dtype=jnp.int32) == 0, pair, pairs)
            else:
                token, choice = jnp.arange(size, dtype=jnp.int32)[:, None], jnp.arange(1 << (k - 1).bit_length(), dtype=jnp.int32)[None]
                same = chosen_ref[jnp.minimum(token, s - 1), jnp.minimum(choice, k - 1)] == expert
                same &= (token < s) & (choice < k) & ((token * k + choice == pair) | ~again)
                theirs = jnp.where(same, token * k + choice, pairs).min(axis=1)  # of each token its pair; what is of none goes to waste
            take = partial(take_rows, x_ref, (jnp.minimum(theirs, pairs - 1) // per,), theirs < pairs, interpret)
            (y,) = multiply([w], expert, row, rows, split * steps, steps, take, size, interpret)
            out_ref[which, split, theirs, pl.ds(row, rows)] = y.T

        for which, w in enumerate(jax.tree.unflatten(structure, matrices)):
            pl.when(mine & (tile >= which * tiles) & (tile < (which + 1) * tiles))(partial(run, which, w))

    out = [jax.ShapeDtypeStruct((len(ws), splits, pairs + 1, height), jnp.float32)]
    return call(experts_kernel, out, (tiles * len(ws), pairs, splits), warps, stages, interpret, chosen, x, ws)[0]
