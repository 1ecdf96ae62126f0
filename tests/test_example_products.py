"""Weights as they are published, and the kernels that multiply with them: against NumPy in float64, in Pallas's interpreter."""

from __future__ import annotations

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from example_support import (
    PRESETS,
    CheckpointError,
    create_cache,
    decode_loop,
    forward,
    kernels,
    load_weights,
    map_schema,
    mesh,
    packed,
    quantised_checkpoint,
    rotate,
    run_experts,
    safetensors,
    strict_types,  # noqa: F401
    swiglu,
    turn,
)

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
F32 = jnp.float32
SUMS = 1e-5  # of a float32 sum in another order, relative to the largest
ROUNDED = 2.0**-7  # of a bfloat16 result that was rounded once or twice

# All sizes are multiples of 128, as V4-Flash's and V4-Pro's are.
WIDE = dataclasses.replace(
    PRESETS["tiny"],
    hidden_size=256,
    q_lora_rank=128,
    o_lora_rank=128,
    vocab_size=32,
    layers=("swa", "csa"),
    n_routed_experts=4,
    moe_intermediate_size=128,
    yarn=None,
)


def random_fp8(rng: np.random.Generator, *shape: int) -> tuple[packed.Fp8, np.ndarray]:
    """Matrices and their numbers in float64."""
    codes = rng.integers(0, 256, shape, np.uint8)
    codes[codes & 0x7F == 0x7F] = 1  # NaN
    grid = (*shape[:-2], -(-shape[-2] // 128), shape[-1] // 128)
    scale = rng.integers(110, 130, grid, np.uint8)
    numbers = np.repeat(np.repeat(2.0 ** (scale - 127.0), 128, -2), 128, -1)[..., : shape[-2], :]
    return packed.pack_fp8(codes, scale), codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * numbers


def random_fp4(rng: np.random.Generator, *shape: int) -> tuple[packed.Fp4, np.ndarray]:
    codes = rng.integers(0, 256, (*shape[:-1], shape[-1] // 2), np.uint8)
    scale = rng.integers(110, 130, (*shape[:-1], shape[-1] // 32), np.uint8)
    numbers = np.stack([E2M1[codes & 15], E2M1[codes >> 4]], axis=-1).reshape(shape)
    return packed.pack_fp4(codes, scale), numbers * np.repeat(2.0 ** (scale - 127.0), 32, -1)


def random_bf16(rng: np.random.Generator, *shape: int) -> tuple[jax.Array, np.ndarray]:
    array = jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    return array, np.asarray(array, np.float64)


KINDS = {"fp4": random_fp4, "fp8": random_fp8, "bf16": random_bf16}


def assert_close(found: jax.Array, wanted: np.ndarray, share: float) -> None:
    found = np.asarray(found, np.float64)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= share * np.abs(wanted).max()


# ------------------------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", ["fp4", "fp8"])
def test_packed_numbers_are_exact(kind, dtype):
    """All codes are among them: of bfloat16 too, nothing is rounded."""
    w, numbers = KINDS[kind](np.random.default_rng(0), 3, 192, 256)
    assert w.shape == numbers.shape
    np.testing.assert_array_equal(np.asarray(packed.unpack(w, dtype), np.float64), numbers)


def test_packed_bytes_are_those_that_are_published():
    for kind, share in (("fp4", 17 / 32), ("fp8", 1 + 1 / 128**2)):
        w, numbers = KINDS[kind](np.random.default_rng(0), 2, 128, 256)
        assert sum(leaf.nbytes for leaf in w) == share * numbers.size
        form = packed.packed_form(numbers.shape, kind)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), form) == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), w)
    assert packed.packed_form((128, 160), "fp8") is None
    assert packed.packed_form((128, 256), "bf16") is None


def write_checkpoint(folder, config, edit=lambda tensors: None) -> dict[str, np.ndarray]:
    tensors = quantised_checkpoint(config)
    edit(tensors)
    safetensors.write(folder / "model.safetensors", tensors)
    return tensors


def test_a_published_checkpoint_is_kept_bit_for_bit(tmp_path):
    """Every matrix that is published in fp4 or fp8 is kept, and is what is dequantised without `packed`."""
    write_checkpoint(tmp_path, WIDE)
    kept_config = dataclasses.replace(WIDE, packed=True)
    kept, plain = load_weights(tmp_path, kept_config, F32), load_weights(tmp_path, WIDE, F32)
    forms = jax.tree.leaves(map_schema(lambda tensor: isinstance(tensor.packed, packed.Packed), kept_config))
    stored = jax.tree.leaves(map_schema(lambda tensor: tensor.stored in ("fp4", "fp8"), kept_config))
    assert forms == stored
    assert jax.tree.structure(map_schema(lambda tensor: tensor.struct(F32), kept_config)) == jax.tree.structure(kept)
    is_packed = lambda leaf: isinstance(leaf, packed.Packed)  # noqa: E731
    unpacked = jax.tree.map(lambda leaf: packed.unpack(leaf, F32), kept, is_leaf=is_packed)
    jax.tree.map(np.testing.assert_array_equal, unpacked, plain)


def spoil(name: str, change):
    """An edit of one tensor of a checkpoint."""
    return lambda tensors: tensors.__setitem__(name, change(tensors[name].copy()))


def with_nan(codes):
    codes.view(np.uint8)[3, 5] = 0xFF
    return codes


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (spoil("layers.1.attn.wq_a.weight", with_nan), r"layers.1.attn.wq_a.weight has NaN in it"),
        (spoil("layers.1.attn.wkv.scale", lambda s: s.astype(np.float32) * 1.5), r"wkv.scale must be powers of two to be packed"),
        (spoil("layers.0.attn.wo_b.scale", lambda s: np.zeros(s.shape, np.uint8)), r"wo_b.scale must be from 2\^-87 to 2\^31"),
        (
            spoil("layers.0.ffn.experts.3.w2.weight", lambda c: c.astype(ml_dtypes.bfloat16)),
            r"experts.3.w2.weight must .*shape|must be fp4",
        ),
        (spoil("layers.0.ffn.experts.3.w2.scale", lambda s: s[:, 1:]), r"w2.scale must have shape \(256, 4\), got \(256, 3\)"),
        (lambda tensors: tensors.pop("layers.0.attn.wkv.scale"), r"layers.0.attn.wkv.scale is missing"),
    ],
)
def test_what_cannot_be_packed_is_refused_by_name(edit, message, tmp_path):
    write_checkpoint(tmp_path, WIDE, edit)
    with pytest.raises(CheckpointError, match=message):
        load_weights(tmp_path, dataclasses.replace(WIDE, packed=True))


def test_packed_weights_give_the_same_logits(tmp_path):
    """In float32 the products are those of the dequantised numbers, in the same order."""
    write_checkpoint(tmp_path, WIDE)
    found = []
    for config in (WIDE, dataclasses.replace(WIDE, packed=True)):
        cache = create_cache(config, 2, 64, layout="float32", chunk=7, dtype=F32)
        tokens, counts = np.arange(14, dtype=np.int32).reshape(2, 7), np.array([7, 5], np.int32)
        x, _ = jax.jit(partial(forward, config=config))(load_weights(tmp_path, config, F32), cache, tokens, counts)
        found.append(np.asarray(x))
    assert np.isfinite(found[0][0]).all()
    assert_close(found[1][0], found[0][0], SUMS)


def test_a_checkpoint_that_is_not_quantised_cannot_be_packed(capsys):
    assert decode_loop.main(["--weights", "packed", "--prompt-ids", "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"tensor \S+ must be fp[48] to be packed, got \w+; --weights bf16 may take it", line)


def test_v4_pro_fits_eight_gpus():
    """On paper, packed, at 8k context: each device's weights and cache against its memory, of which a tenth is left for the rest."""
    config = dataclasses.replace(PRESETS["v4-pro"], packed=True)
    options = dict(layout="fp8_ds_mla", scale=None, dtype="bfloat16", chunk=512)
    for room in (141e9, 288e9):
        sizes = mesh.fitting_mesh(int(0.9 * room), config, 64, 8192, options)
        assert np.prod(list(sizes.values())) <= 8
    plain = mesh.fitting_mesh(int(0.9 * 141e9), PRESETS["v4-pro"], 64, 8192, options)
    assert np.prod(list(plain.values())) > 8


def test_a_mesh_leaves_blocks_whole():
    config = dataclasses.replace(WIDE, packed=True, num_attention_heads=4)
    reason = mesh.cannot_split({"data": 1, "model": 2, "context": 1}, config, 1)
    assert re.search(r"2 devices must leave whole blocks of 128 of .*shared_experts.w1.weight, of \(128, 256\)", reason)
    for inner in (128, 192):  # which nothing splits here
        config = dataclasses.replace(config, moe_intermediate_size=inner)
        assert mesh.cannot_split({"data": 2, "model": 1, "context": 1}, config, 2) is None


# ----------------------------------------------------------------------------------------------------------------- products


@pytest.mark.parametrize(
    ("tokens", "groups", "columns", "fp4"),
    [(1, 1, 128, True), (1, 1, 384, False), (2, 2, 2048, False), (5, 1, 1024, True), (40, 2, 512, True), (70, 1, 256, True)],
)
def test_dense_kernel(tokens, groups, columns, fp4):
    """Matrices of all kinds in one call; rows of 64 and more, columns in one part and in several. Without fp4 a token or two are multiplied
    one by one."""
    rng = np.random.default_rng(0)
    x, wide = random_bf16(rng, tokens, groups, columns)
    kinds = [("fp8", 128), ("bf16", 64), *([("fp4", 192)] if fp4 else []), ("fp8", 64)]
    ws, numbers = zip(*(KINDS[kind](rng, groups, rows, columns) for kind, rows in kinds))
    found = kernels.dense(x, *ws, dtype=F32, interpret=True)
    for y, w in zip(found, numbers, strict=True):
        assert_close(y, np.einsum("sgc,grc->sgr", wide, w), SUMS)


@pytest.mark.parametrize("kind", ["fp8", "bf16"])
def test_heads_are_turned_on_their_way(kind):
    """As `rotate` turns them, whatever the angle; each group's heads times the group's matrix."""
    rng = np.random.default_rng(4)
    x, wide = random_bf16(rng, 2, 2, 1024)  # two tokens, two groups of two heads
    w, numbers = KINDS[kind](rng, 2, 64, 1024)
    angle = jnp.asarray(100 * rng.standard_normal((2, 32)), F32)
    (found,) = kernels.dense(x, w, dtype=F32, turn=turn(angle), head=512, interpret=True)
    turned = rotate(jnp.asarray(wide, F32).reshape(2, 4, 512), angle[:, None]).reshape(2, 2, 1024)
    assert_close(found, np.einsum("sgc,grc->sgr", np.asarray(turned, np.float64), numbers), SUMS)


# Experts, tokens, choices of each, inner size and hidden size: few tokens of each, split columns, many tokens of each.
EXPERTS = [(8, 20, 2, 128, 256), (4, 1, 3, 128, 1024), (2, 70, 2, 128, 128), (2, 120, 1, 128, 128)]
FEW_EXPERTS = [(4, 1, 3, 128, 1024), (6, 5, 3, 256, 128), (3, 16, 2, 128, 128)]


@pytest.mark.parametrize(("few", "sizes"), [*((False, s) for s in EXPERTS), *((True, s) for s in FEW_EXPERTS)], ids=str)
@pytest.mark.parametrize("kind", ["fp4", "bf16"])
def test_experts_kernel(kind, few, sizes):
    """Some choices are of experts that are elsewhere; some experts nobody chose."""
    experts, tokens, per, inner, hidden = sizes
    rng = np.random.default_rng(1)
    x, wide = random_bf16(rng, tokens, hidden)
    w, numbers = {}, {}
    for name, shape in (("w1", (experts, inner, hidden)), ("w3", (experts, inner, hidden)), ("w2", (experts, hidden, inner))):
        w[name], numbers[name] = KINDS[kind](rng, *shape)
    chosen = rng.integers(0, experts + 1, tokens * per).astype(np.int32)
    chosen[chosen == 1] = 0
    activate = partial(swiglu, config=PRESETS["tiny"])
    if few:
        chosen = np.stack([rng.permutation(experts + 1)[:per] for _ in range(tokens)]).astype(np.int32).reshape(-1)
        chosen[-1] = chosen[-2]  # a token that has an expert twice
        found = kernels.few_experts(x, jnp.asarray(chosen.reshape(tokens, per)), w, activate, interpret=True)
    else:
        found = kernels.experts(x, chosen, w, activate, total=2 if tokens > 100 else experts, interpret=True)
    here = chosen < experts
    at = np.minimum(chosen, experts - 1)
    rows = np.repeat(wide, per, axis=0)
    gate, up = (np.einsum("sd,sid->si", rows, numbers[name][at]) for name in ("w1", "w3"))
    y = np.minimum(gate, 10) / (1 + np.exp(-np.minimum(gate, 10))) * np.clip(up, -10, 10)
    y = np.einsum("si,sdi->sd", y, numbers["w2"][at])
    assert_close(found.sum(axis=0)[:-1][here], y[here], ROUNDED)


def test_experts_without_kernels():
    """The plain form takes packed experts too, and choices that are elsewhere."""
    rng = np.random.default_rng(2)
    config = dataclasses.replace(PRESETS["tiny"], n_routed_experts=4, hidden_size=128, moe_intermediate_size=128)
    w = {name: random_fp4(rng, 4, 128, 128)[0] for name in ("w1", "w3", "w2")}
    x = rng.standard_normal((2, 9, 128)).astype(np.float32)
    chosen, weight = rng.integers(-1, 5, (2, 9, 2)).astype(np.int32), rng.random((2, 9, 2), np.float32)
    found = run_experts(x, chosen, weight, w, config)
    plain = {name: packed.unpack(matrix, F32) for name, matrix in w.items()}
    assert_close(found, np.asarray(run_experts(x, chosen, weight, plain, config), np.float64), SUMS)


@pytest.mark.parametrize("pairs", [1, 6, 300, 1500])
def test_blocks_hold_each_pair_once(pairs):
    """Of 10 experts and those that are elsewhere (10); 1,500 pairs are sorted, fewer are counted."""
    rng = np.random.default_rng(pairs)
    expert, size = rng.integers(0, 11, pairs).astype(np.int32), 16
    order, blocks = np.asarray(kernels.order_by_expert(jnp.asarray(expert))), kernels.blocks_of(jnp.asarray(expert), 10, size)
    assert sorted(order) == list(range(pairs))
    count, seen = int(blocks.used[0]), []
    assert count <= len(blocks.expert)
    for e, first, end in zip(blocks.expert[:count], blocks.first[:count], blocks.end[:count]):
        assert 0 < end - first <= size
        assert (expert[order[first:end]] == e).all()
        seen += list(order[first:end])
    assert sorted(seen) == list(np.flatnonzero(expert < 10))


@pytest.fixture
def hopper():
    (device,) = jnp.zeros(1).devices()  # where there is a GPU, it is these tests' default, but not the suite's
    if getattr(device, "compute_capability", None) != "9.0":
        pytest.skip("needs a Hopper GPU")


@pytest.mark.cuda
@pytest.mark.parametrize("tokens", [1, 8, 16, 128])
@pytest.mark.parametrize("kind", ["fp4", "fp8", "bf16"])
def test_on_a_gpu_codes_become_the_same_numbers(hopper, kind, tokens):
    """One column of x at a time is 1: the products are the numbers themselves, and all codes are among them."""
    w, numbers = KINDS[kind](np.random.default_rng(5), 1, 128, 128)
    w, columns = jax.tree.map(jnp.asarray, w), jnp.eye(128, dtype=jnp.bfloat16)[:, None]
    found = [kernels.dense(columns[i : i + tokens], w, dtype=F32)[0] for i in range(0, 128, tokens)]
    np.testing.assert_array_equal(np.asarray(jnp.concatenate(found)[:, 0].T, np.float64), numbers[0])
