"""What other engines hand over: vLLM's view of a packed cache, FlashMLA's lse, slots and lengths in int64."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_same_bits

import jax_dsv4 as dsv4

HEADS, TOKENS, TOPK, BLOCK, BLOCKS = 2, 3, 6, 4, 3
SLOTS = BLOCK * BLOCKS
AVAILABLE = [name for name in ("cpu", "xla") if dsv4.implementations()[name].available]


def numbers(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape), jnp.float32)


def vllms_view() -> np.ndarray:
    """[blocks, block size, 584]: a block's bytes in vLLM's shape, though its first 584 are not its first slot's."""
    latents = np.random.default_rng(0).standard_normal((SLOTS, 512))
    return dsv4.reference.pack_fp8_ds_mla(latents, BLOCK, BLOCK * 584).reshape(BLOCKS, BLOCK, 584)


# --- vLLM's view


@pytest.mark.parametrize("wrap", [np.asarray, jnp.asarray])
def test_vllms_view_is_what_one_would_reshape_it_to(wrap: Callable[[np.ndarray], object]) -> None:
    view = wrap(vllms_view())
    cache = dsv4.KVCache(view, block_size=BLOCK)
    by_hand = dsv4.KVCache(jnp.asarray(vllms_view()).reshape(BLOCKS, BLOCK * 584), block_size=BLOCK)
    assert jax.tree.structure(cache) == jax.tree.structure(by_hand)
    assert cache.num_slots == SLOTS
    assert_same_bits("data", cache.data, by_hand.data)
    assert_same_bits("latents", dsv4.dequantize(cache), dsv4.dequantize(by_hand))


@pytest.mark.parametrize("implementation", AVAILABLE)
def test_vllms_view_in_jit(implementation: str) -> None:
    """Written and attended to; given back in the shape in which it came, in the buffer that it came in."""

    @partial(jax.jit, donate_argnums=0)
    def step(view, latents, slots, q):
        cache = dsv4.append(dsv4.KVCache(view, block_size=BLOCK), latents, slots, implementation=implementation)
        out = dsv4.sparse_mla_decode(q, dsv4.Scope(cache, jnp.broadcast_to(slots, (TOKENS, TOPK))), implementation=implementation)
        return cache.data.reshape(view.shape), out

    view, latents, slots = jnp.asarray(vllms_view()), numbers(TOPK, 512), jnp.array([1, 11, 4, -1, 7, 2], jnp.int32)
    q, address = numbers(TOKENS, HEADS, 512), view.unsafe_buffer_pointer()
    by_hand = dsv4.append(dsv4.KVCache(view.reshape(BLOCKS, -1), block_size=BLOCK), latents, slots, implementation=implementation)
    after, out = step(view, latents, slots, q)
    assert after.unsafe_buffer_pointer() == address
    assert_same_bits("view", after, np.asarray(by_hand.data).reshape(after.shape))
    want = dsv4.sparse_mla_decode(q, dsv4.Scope(by_hand, jnp.broadcast_to(slots, (TOKENS, TOPK))), implementation=implementation)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)


EITHER = f"have shape (num_blocks, block_size, 584) = (*, {BLOCK}, 584) or (num_blocks, block_stride_bytes) = (*, *)"


@pytest.mark.parametrize(
    ("shape", "layout", "rule"),
    [
        ((BLOCKS, BLOCK + 1, 584), "fp8_ds_mla", EITHER),
        ((BLOCKS, BLOCK, 576), "fp8_ds_mla", EITHER),
        ((BLOCKS, BLOCK, 1, 584), "fp8_ds_mla", EITHER),
        ((BLOCKS, BLOCK, 584), "aiter_fp8", f"have shape (1 + num_blocks, block_size, 576) = (*, {BLOCK}, 576)"),
    ],
)
def test_other_shapes_are_refused(shape: tuple[int, ...], layout: str, rule: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'KVCache: data must {rule}, got {shape}')}$"):
        dsv4.KVCache(jnp.zeros(shape, jnp.uint8), block_size=BLOCK, layout=layout)


def test_vllms_view_without_bytes() -> None:
    """As the argument of a program that is compiled ahead of time."""
    view = jax.ShapeDtypeStruct((BLOCKS, BLOCK, 584), jnp.uint8)
    assert dsv4.KVCache(view, block_size=BLOCK).data == jax.ShapeDtypeStruct((BLOCKS, BLOCK * 584), jnp.uint8)


# --- FlashMLA's lse


def parts(empty: float) -> tuple[list[jax.Array], list[jax.Array]]:
    """Three parts; the first token has keys in the last alone, the second in none."""
    outs = [numbers(TOKENS, HEADS, 512) * k for k in (1, 2, 3)]
    lses = [numbers(TOKENS, HEADS) + k for k in (0, 1, -1)]
    lses = [lse.at[1].set(empty) for lse in lses]
    lses[:2] = [lse.at[0].set(empty) for lse in lses[:2]]
    # What an empty part has in out is not looked at.
    return [jnp.where(jnp.isinf(lse)[..., None], np.nan, out) for out, lse in zip(outs, lses)], lses


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_flashmlas_lse_merges_as_ours(jit: bool) -> None:
    theirs, ours = partial(dsv4.merge_scopes, empty_lse=np.inf), dsv4.merge_scopes
    got, want = (jax.jit(f)(*arguments) if jit else f(*arguments) for f, arguments in ((theirs, parts(np.inf)), (ours, parts(-np.inf))))
    assert_same_bits("out", got[0], want[0])
    assert_same_bits("lse", got[1], want[1])
    assert_same_bits("the first token is the last part", got[0][0], parts(np.inf)[0][2][0])
    assert np.isneginf(np.asarray(got[1][1])).all()  # in our convention
    assert not np.asarray(got[0][1]).any()


def test_flashmlas_parts_may_be_empty_in_our_convention_too() -> None:
    outs, lses = parts(np.inf)
    mixed = [parts(-np.inf)[1][0], *lses[1:]]
    for got, want in zip(dsv4.merge_scopes(outs, mixed, empty_lse=np.inf), dsv4.merge_scopes(*parts(-np.inf))):
        assert_same_bits("merged", got, want)


@pytest.mark.parametrize("empty_lse", [0.0, np.nan, -1e30])
def test_an_empty_lse_is_an_infinity(empty_lse: float) -> None:
    with pytest.raises(ValueError, match=f"^merge_scopes: empty_lse must be -inf or \\+inf, got {re.escape(str(empty_lse))}$"):
        dsv4.merge_scopes(*parts(-np.inf), empty_lse=empty_lse)


# --- int64

CACHE = dsv4.KVCache(jnp.zeros((BLOCKS, BLOCK * 584), jnp.uint8), block_size=BLOCK)


def decode(indices: np.ndarray, lengths: np.ndarray | None = None, **options: object) -> object:
    return dsv4.sparse_mla_decode(numbers(TOKENS, HEADS, 512), dsv4.Scope(CACHE, indices, lengths), **options)


def i32(*shape: int) -> np.ndarray:
    return np.ones(shape, np.int32)


def i64(*shape: int) -> np.ndarray:
    return np.ones(shape, np.int64)


OF_INT64: dict[str, Callable[[], object]] = {
    "sparse_mla_decode: swa.indices": lambda: decode(i64(TOKENS, TOPK)),
    "sparse_mla_decode: swa.lengths": lambda: decode(i32(TOKENS, TOPK), i64(TOKENS)),
    "sparse_mla_decode: extra.indices": lambda: decode(i32(TOKENS, TOPK), extra=dsv4.Scope(CACHE, i64(TOKENS, TOPK))),
    "append: slots": lambda: dsv4.append(CACHE, numbers(TOKENS, 512), i64(TOKENS)),
    "plan_decode: swa_lengths": lambda: dsv4.plan_decode(i64(TOKENS), num_heads=HEADS, swa_topk=TOPK),
    "plan_decode: extra_lengths": lambda: dsv4.plan_decode(i32(TOKENS), i64(TOKENS), num_heads=HEADS, swa_topk=TOPK, extra_topk=TOPK),
    "dequantize: slots": lambda: dsv4.dequantize(CACHE, i64(TOKENS)),
    "local_slots: slots": lambda: dsv4.local_slots(CACHE, i64(TOKENS), "x"),
    "local_scope: indices": lambda: dsv4.local_scope(dsv4.Scope(CACHE, i64(TOKENS, TOPK)), "x"),
    "local_scope: lengths": lambda: jax.vmap(
        lambda i: dsv4.local_scope(dsv4.Scope(CACHE, i, i64(TOKENS)), "x").lengths, in_axes=None, axis_name="x", axis_size=2
    )(i32(TOKENS, TOPK)),
    "split_scope: indices": lambda: dsv4.split_scope(dsv4.Scope(CACHE, i64(TOKENS, TOPK)), "x"),
    "split_scope: lengths": lambda: dsv4.split_scope(dsv4.Scope(CACHE, i32(TOKENS, TOPK), i64(TOKENS)), "x"),
}


@pytest.mark.parametrize("name", OF_INT64)
def test_int64_is_refused_with_the_cast_to_write(name: str) -> None:
    """NumPy's own, and JAX's under x64."""
    argument = name.split(": ")[1]
    message = f"{name} must have dtype int32, got int64; write {argument}.astype('int32')"
    with pytest.raises(ValueError, match=re.escape(message)):
        OF_INT64[name]()


def test_int64_of_x64_is_refused_and_its_cast_taken() -> None:
    with jax.enable_x64(True):
        slots = jnp.arange(TOKENS)
        with pytest.raises(ValueError, match=re.escape("append: slots must have dtype int32, got int64; write slots.astype('int32')")):
            dsv4.append(CACHE, numbers(TOKENS, 512), slots)
        after = dsv4.append(CACHE, numbers(TOKENS, 512), slots.astype("int32"))
    assert_same_bits("data", after.data, dsv4.append(CACHE, numbers(TOKENS, 512), jnp.arange(TOKENS, dtype=jnp.int32)).data)
