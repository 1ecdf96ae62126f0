"""The weights: which tensors there are, and how a Hugging Face checkpoint fills them.

`schema` is the one list of names, shapes and dtypes. The loader, the memory table and abstract lowering all read it.
Matrices keep the checkpoint's [out, in] order, so nothing is transposed on load.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array, lax

from deepseek_v4 import safetensors
from deepseek_v4.axes import AXES
from deepseek_v4.config import CheckpointError, Config, Kind, read_json
from deepseek_v4.packed import FEWEST, MOST, pack_fp4, pack_fp8, packed_form, published_shapes

Weights = dict[str, Any]
"""A pytree of arrays shaped like `schema`: dictionaries, with one list, `layers`."""


class Tensor(NamedTuple):
    """One leaf of the schema."""

    name: str  # DeepSeek's published name; `*` stands for each expert, stacked on axis 0
    shape: tuple[int, ...]
    dtype: jax.typing.DTypeLike | None = None  # None: the dtype the caller chose for weights
    stored: str = "bf16"  # how DeepSeek publishes it: bf16, fp32, fp8, fp4 or int64
    split: int | None = None  # the axis that is spread over a mesh's axes `over`; None: every device has all of it
    over: tuple[str, ...] = AXES.model
    below: int | None = None  # of a table of numbers: each is from 0 to less than this
    keep: bool = False  # as it is published, if it is quantised and its sizes let it be packed

    @property
    def packed(self) -> Any:
        """The leaf's shapes and dtypes if it is kept as it is published."""
        return packed_form(self.shape, self.stored) if self.keep else None

    def struct(self, dtype: jax.typing.DTypeLike) -> Any:
        """The leaf's shapes and dtypes."""
        return self.packed or jax.ShapeDtypeStruct(self.shape, self.dtype or dtype)


def schema(config: Config) -> Weights:
    """The pytree of `Tensor`s that make a DeepSeek-V4 of this config."""
    c = config
    f32 = jnp.float32

    def norm(name: str, size: int) -> Tensor:
        return Tensor(f"{name}.weight", (size,), f32)

    def linear(name: str, rows: int, columns: int, stored: str = "bf16", split: int | None = None) -> Tensor:
        return Tensor(f"{name}.weight", (rows, columns), stored=stored, split=split, keep=c.packed)

    def hyper_connection(name: str) -> Weights:
        mixes = (2 + c.hc_mult) * c.hc_mult  # pre, post: [n]; comb: [n, n]
        return {
            "fn": Tensor(f"{name}_fn", (mixes, c.hc_mult * c.hidden_size), f32, "fp32"),
            "base": Tensor(f"{name}_base", (mixes,), f32, "fp32"),
            "scale": Tensor(f"{name}_scale", (3,), f32, "fp32"),
        }

    def compressor(name: str, kind: Kind, dim: int) -> Weights:
        width = dim * (2 if kind == "csa" else 1)  # CSA's windows overlap: a half for this one and for the next
        return {
            "wkv": linear(f"{name}.wkv", width, c.hidden_size),
            "wgate": linear(f"{name}.wgate", width, c.hidden_size),
            "ape": Tensor(f"{name}.ape", (c.ratio(kind), width), f32, "fp32"),
            "norm": norm(f"{name}.norm", dim),
        }

    def attention(name: str, kind: Kind) -> Weights:
        heads_dim = c.num_attention_heads * c.head_dim
        wo_a = linear(f"{name}.wo_a", c.o_groups * c.o_lora_rank, heads_dim // c.o_groups, "fp8", split=0)
        weights: Weights = {
            "wq_a": linear(f"{name}.wq_a", c.q_lora_rank, c.hidden_size, "fp8"),
            "q_norm": norm(f"{name}.q_norm", c.q_lora_rank),
            "wq_b": linear(f"{name}.wq_b", heads_dim, c.q_lora_rank, "fp8", split=0),
            "wkv": linear(f"{name}.wkv", c.head_dim, c.hidden_size, "fp8"),
            "kv_norm": norm(f"{name}.kv_norm", c.head_dim),
            "sink": Tensor(f"{name}.attn_sink", (c.num_attention_heads,), f32, "fp32", split=0),
            "wo_a": wo_a._replace(keep=c.packed and c.o_lora_rank % 128 == 0),  # its groups are of whole blocks
            "wo_b": linear(f"{name}.wo_b", c.hidden_size, c.o_groups * c.o_lora_rank, "fp8", split=1),
        }
        if kind != "swa":
            weights["compressor"] = compressor(f"{name}.compressor", kind, c.head_dim)
        if kind == "csa":
            weights["indexer"] = {
                "wq_b": linear(f"{name}.indexer.wq_b", c.index_n_heads * c.index_head_dim, c.q_lora_rank, "fp8"),
                "weights_proj": linear(f"{name}.indexer.weights_proj", c.index_n_heads, c.hidden_size),
                "compressor": compressor(f"{name}.indexer.compressor", kind, c.index_head_dim),
            }
        return weights

    def swiglu(name: str, stored: str) -> Weights:
        inner, outer = c.moe_intermediate_size, c.hidden_size
        return {
            "w1": linear(f"{name}.w1", inner, outer, stored, split=0),  # gate
            "w3": linear(f"{name}.w3", inner, outer, stored, split=0),  # up
            "w2": linear(f"{name}.w2", outer, inner, stored, split=1),  # down
        }

    def moe(name: str, hashed: bool) -> Weights:
        experts = swiglu(f"{name}.experts.*", "fp4")
        weights: Weights = {
            "gate": linear(f"{name}.gate", c.n_routed_experts, c.hidden_size),
            "experts": {k: t._replace(shape=(c.n_routed_experts, *t.shape), split=0, over=AXES.every) for k, t in experts.items()},
            "shared": {k: t._replace(over=AXES.peers) for k, t in swiglu(f"{name}.shared_experts", "fp8").items()},
        }
        if hashed:
            shape = (c.vocab_size, c.num_experts_per_tok)
            weights["tid2eid"] = Tensor(f"{name}.gate.tid2eid", shape, jnp.int32, "int64", below=c.n_routed_experts)
        else:
            weights["bias"] = Tensor(f"{name}.gate.bias", (c.n_routed_experts,), f32, "fp32")
        return weights

    def layer(name: str, kind: Kind, hashed: bool) -> Weights:
        return {
            "attn_hc": hyper_connection(f"{name}.hc_attn"),
            "attn_norm": norm(f"{name}.attn_norm", c.hidden_size),
            "attn": attention(f"{name}.attn", kind),
            "ffn_hc": hyper_connection(f"{name}.hc_ffn"),
            "ffn_norm": norm(f"{name}.ffn_norm", c.hidden_size),
            "ffn": moe(f"{name}.ffn", hashed),
        }

    def end(prefix: str) -> Weights:
        """From the residual streams to what the head reads."""
        return {
            "hc_head": {
                "fn": Tensor(f"{prefix}hc_head_fn", (c.hc_mult, c.hc_mult * c.hidden_size), f32, "fp32"),
                "base": Tensor(f"{prefix}hc_head_base", (c.hc_mult,), f32, "fp32"),
                "scale": Tensor(f"{prefix}hc_head_scale", (1,), f32, "fp32"),
            },
            "norm": norm(f"{prefix}norm", c.hidden_size),
        }

    mtp = {
        "enorm": norm("mtp.0.enorm", c.hidden_size),
        "hnorm": norm("mtp.0.hnorm", c.hidden_size),
        "e_proj": linear("mtp.0.e_proj", c.hidden_size, c.hidden_size, "fp8"),
        "h_proj": linear("mtp.0.h_proj", c.hidden_size, c.hidden_size, "fp8"),
        "layer": layer("mtp.0", "swa", hashed=False),
        **end("mtp.0."),
    }
    return {
        "embed": linear("embed", c.vocab_size, c.hidden_size),
        "layers": [layer(f"layers.{i}", kind, i < c.num_hash_layers) for i, kind in enumerate(c.layers)],
        **end(""),
        "head": linear("head", c.vocab_size, c.hidden_size, split=0),
        **({"mtp": mtp} if c.mtp else {}),
    }


def map_schema(function: Callable[[Tensor], Any], config: Config) -> Weights:
    """The weights' pytree with `function(tensor)` at each leaf."""
    return jax.tree.map(function, schema(config), is_leaf=lambda leaf: isinstance(leaf, Tensor))


def abstract_weights(config: Config, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> Weights:
    """Shapes and dtypes only: enough to trace, lower and count bytes of a model that fits nowhere here."""
    return map_schema(lambda tensor: tensor.struct(dtype), config)


WORKERS = min(4, os.cpu_count() or 1)
"""Threads that read tensors. XLA dequantises each matrix on all processors; more threads would only hold more of the host's memory."""


def load_weights(
    folder: str | Path,
    config: Config,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    track: Callable[[list[Tensor]], Iterable[Tensor]] = iter,
    sharding: Callable[[Tensor], jax.sharding.Sharding] | None = None,
) -> Weights:
    """Reads a `DeepseekV4ForCausalLM` checkpoint: one or many safetensors files, fp8 and fp4 dequantised or, if `config.packed`, kept.

    File by file, several tensors at a time, and from each tensor only what this process's devices are to hold.

    Args:
        folder: holds model.safetensors, or shards with model.safetensors.index.json.
        dtype: of the matrices. Norms, sinks, hyper-connections and biases stay float32.
        track: wraps the list of tensors as it is read, for a progress bar.
        sharding: where each tensor goes; default: all to the default device.
    Raises:
        CheckpointError: a file or tensor is missing or does not have the shape that the config asks for, or cannot be packed.
    """
    tensors = open_checkpoint(folder)
    wanted = jax.tree.leaves(schema(config), is_leaf=lambda leaf: isinstance(leaf, Tensor))
    place = {name: i for i, name in enumerate(tensors)}
    wanted.sort(key=lambda t: place.get(t.name.replace("*", "0"), place.get(t.name, 0)))

    def put(tensor: Tensor, shape: tuple[int, ...], read: Callable[[tuple[slice, ...]], np.ndarray]) -> jax.Array:
        if sharding is None:
            return jax.device_put(read((slice(None),) * len(shape)))
        once = cache(lambda index: read(tuple(slice(*ends) for ends in index)))
        part_of = lambda index: once(tuple(i.indices(n)[:2] for i, n in zip(index, shape)))  # noqa: E731
        return jax.make_array_from_callback(shape, sharding(tensor), part_of)

    def load(tensor: Tensor) -> Any:
        if tensor.packed:
            bytes_of = [put(tensor, *part) for part in _published_bytes(tensors, tensor, folder)]
            pack = pack_fp8 if tensor.stored == "fp8" else pack_fp4
            return jax.jit(pack, out_shardings=sharding and sharding(tensor))(*bytes_of)
        return put(tensor, tensor.shape, lambda index: _read(tensors, tensor, folder, index, np.dtype(tensor.dtype or dtype)))

    pool = ThreadPoolExecutor(WORKERS)
    try:
        loaded = pool.map(load, wanted)
        arrays = {tensor.name: next(loaded) for tensor in track(wanted)}
    finally:
        pool.shutdown(cancel_futures=True)
    return map_schema(lambda tensor: arrays[tensor.name], config)


def open_checkpoint(folder: str | Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint folder, memory-mapped, under DeepSeek's published name; stacked experts under `experts.*`."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    files = _files_of(index) if index.exists() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no *.safetensors file there")

    tensors: dict[str, np.ndarray] = {}
    origin: dict[str, Path] = {}
    for file in files:
        try:
            read = safetensors.read(file)
        except FileNotFoundError:
            raise CheckpointError(f"{file}: named in {index.name} but not there") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file}: {error}") from None
        for original, tensor in read.items():
            for name, part in _published(original, tensor):
                if name in tensors:
                    raise CheckpointError(f"{folder}: tensor {name} is there twice, in {origin[name].name} and {file.name}")
                tensors[name], origin[name] = part, file
    return tensors


def _files_of(index: Path) -> list[Path]:
    found = read_json(index)
    names = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index}: not a JSON object with a weight_map from tensors to files")
    return [index.parent / name for name in sorted(set(names.values()))]


def _published(name: str, tensor: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """A tensor under DeepSeek's published name, or names: transformers stacks experts, and their gate on their up projection."""
    name = re.sub(r"\.experts\.(gate_up_proj|w[123]\.|down_proj$|down_proj_scale_inv$)", r".experts.*.\1", published_name(name))
    name = name.replace("_proj_scale_inv", "_proj.scale") if ".*." in name else name
    name = re.sub(r"\.(down|gate_up)_proj$", r".\1_proj.weight", name)
    half = tensor.shape[1] // 2 if ".*.gate_up_proj." in name and tensor.ndim == 3 else 0  # [expert, gate | up, hidden], and so the scales
    if half and not (tensor.dtype == FP8 and half % 128):  # else a block of scales is of both
        return [(name.replace("gate_up_proj", w), part) for w, part in (("w1", tensor[:, :half]), ("w3", tensor[:, half:]))]
    return [(name.replace(".*.down_proj.", ".*.w2."), tensor)]


def fingerprint(folder: str | Path) -> str:
    """Tells checkpoints apart without reading their tensors: from their settings, and each file's name, size and header."""
    digest = hashlib.sha256()
    for file in sorted(Path(folder).glob("*")):
        if file.suffix in (".json", ".safetensors") and file.is_file():
            with open(file, "rb") as opened:
                header = opened.read(8) if file.suffix == ".safetensors" else b""
                start = header + opened.read(min(int.from_bytes(header, "little"), 2**28) if header else -1)
            digest.update(f"{file.name} {file.stat().st_size} ".encode() + start)
    return digest.hexdigest()


# transformers' module names, and what its save_pretrained writes, as DeepSeek published them. Applied in order.
RENAMES = [
    (r"^model\.", ""),
    (r"^embed_tokens\.", "embed."),
    (r"^lm_head\.", "head."),
    (r"^hc_head\.hc_", "hc_head_"),
    (r"\.self_attn\.", ".attn."),
    (r"\.mlp\.", ".ffn."),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.(attn|ffn)_hc\.", r".hc_\1_"),
    (r"\.compressor\.indexer\.(scorer\.weights_proj|q_b_proj)\.", r".indexer.\1."),
    (r"\.compressor\.indexer\.", ".indexer.compressor."),
    (r"\.scorer\.weights_proj\.", ".weights_proj."),
    (r"\.compressor\.kv_norm\.", ".compressor.norm."),
    (r"\.compressor\.gate_proj\.", ".compressor.wgate."),
    (r"\.position_bias$", ".ape"),
    (r"\.sinks$", ".attn_sink"),
    (r"\.attn\.norm\.", ".attn.kv_norm."),  # written so by transformers 5.23
    (r"\.q_a_norm\.", ".q_norm."),
    (r"\.(q_a|q_b|kv|o_a|o_b)_proj\.", r".w\1."),
    (r"(experts(?:\.\d+)?)\.gate_proj\.", r"\1.w1."),
    (r"(experts(?:\.\d+)?)\.up_proj\.", r"\1.w3."),
    (r"(experts(?:\.\d+)?)\.down_proj\.", r"\1.w2."),
    (r"\.e_score_correction_bias$", ".bias"),
    (r"\.weight_scale_inv$", ".scale"),
]


def published_name(name: str) -> str:
    """DeepSeek's name of a tensor that transformers may call otherwise."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
QUANTISED = (FP8, np.int8, np.uint8)
FLOATS = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)
INTEGERS = (np.int64, np.int32, np.int16, np.uint64, np.uint32, np.uint16)

ALIGNMENT = 64
"""Bytes: from such an address on, JAX's CPU takes an array over as it is."""


def _read(tensors: dict[str, np.ndarray], tensor: Tensor, folder: str | Path, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
    """A part of one leaf, dequantised; experts stacked."""
    shape = tuple(len(range(size)[part]) for size, part in zip(tensor.shape, index))
    # All of it at once: NumPy asks for huge pages, and small ones take longer to come by than to fill.
    memory = np.empty(math.prod(shape) * dtype.itemsize + ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % ALIGNMENT
    out = memory[begin : begin + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
    _fill(out, tensors, tensor, folder, index)
    return out


def _published_bytes(
    tensors: dict[str, np.ndarray], tensor: Tensor, folder: str | Path
) -> list[tuple[tuple[int, ...], Callable[[tuple[slice, ...]], np.ndarray]]]:
    """Shape and reader of a quantised tensor's codes, and of its scales, both uint8."""
    fp8 = tensor.stored == "fp8"
    name = tensor.name.removesuffix(".weight")

    def read(kind: str, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
        key = f"{name}.{kind}"
        if "*" in name and key not in tensors:
            experts = range(shape[0])[index[0]]
            return np.stack([part(key.replace("*", str(e)), kind, shape[1:], index[1:]) for e in experts])
        return part(key, kind, shape, index)

    def part(key: str, kind: str, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
        def require(ok: bool, message: str) -> None:
            if not ok:
                raise CheckpointError(f"{folder}: tensor {key}{message}; --weights bf16 may take it")

        require(key in tensors, " is missing")
        found = tensors[key]
        require(found.shape == shape, f" must have shape {shape}, got {found.shape}")
        if kind == "weight":
            kinds = (FP8,) if fp8 else (np.int8, np.uint8)
            require(found.dtype in kinds, f" must be {tensor.stored} to be packed, got {safetensors.dtype_name(found)}")
            codes = found[index].view(np.uint8)
            require(not fp8 or not np.any(codes & 0x7F == 0x7F), " has NaN in it")
            return codes
        scale = found[index]
        if scale.dtype in FLOATS:
            mantissa, exponent = np.frexp(scale.astype(np.float64))
            require(bool(np.all(mantissa == 0.5)), " must be powers of two to be packed")
            scale = exponent + 126
        else:
            scale = scale.view(np.uint8)
        inside = bool(np.all((scale >= FEWEST) & (scale <= MOST)))
        require(inside, f" must be from 2^{FEWEST - 127} to 2^{MOST - 127} to be packed")
        return scale.astype(np.uint8)

    return [(shape, partial(read, kind, shape)) for kind, shape in zip(("weight", "scale"), published_shapes(tensor.shape, tensor.stored))]


def _fill(out: np.ndarray, tensors: dict[str, np.ndarray], tensor: Tensor, folder: str | Path, index: tuple[slice, ...]) -> None:
    def require(ok: bool, message: str) -> None:
        if not ok:
            raise CheckpointError(f"{folder}: tensor {tensor.name}{message}")

    if "*" in tensor.name:
        if tensor.name not in tensors:
            for row, expert in zip(out, range(tensor.shape[0])[index[0]]):
                each = tensor._replace(name=tensor.name.replace("*", str(expert)), shape=tensor.shape[1:])
                _fill(row, tensors, each, folder, index[1:])
            return
        first = tensor.name.replace("*", "0")
        require(first not in tensors, f" is there twice, of all experts and as {first}")
    require(tensor.name in tensors, " is missing")
    found = tensors[tensor.name]
    scale, shape = None, found.shape
    if tensor.below is None and found.dtype in QUANTISED:
        scale_name = tensor.name.removesuffix(".weight") + ".scale"
        require(scale_name in tensors, f" is {found.dtype}, and tensor {scale_name} is missing")
        scale = tensors[scale_name]
        shape = (*found.shape[:-1], found.shape[-1] * (1 if found.dtype == FP8 else 2)) if found.ndim else ()
    else:
        rule = "be floats or quantised" if tensor.below is None else "be numbers"
        kinds = FLOATS if tensor.below is None else (*FLOATS, *INTEGERS)
        require(found.dtype in kinds, f" must {rule}, got {safetensors.dtype_name(found)}")
    require(shape == tensor.shape, f" must have shape {tensor.shape}, got {shape}")
    if tensor.below is not None:
        part = found[index]
        require(bool(np.all((part >= 0) & (part < tensor.below) & (part == np.trunc(part)))), f" must be integers in [0, {tensor.below})")
    if scale is None:
        out[...] = found[index]
        return
    try:
        # Matrix by matrix: what XLA needs beside `out` stays small.
        for place in np.ndindex(out.shape[:-2]):
            lead = tuple(slice(at := range(n)[part][i], at + 1) for n, part, i in zip(shape, index, place))
            out[place] = dequantize(found, scale, (*lead, *index[-2:]), out.dtype).reshape(out.shape[-2:])
    except ValueError as error:
        raise CheckpointError(f"{folder}: tensor {tensor.name}: {error}") from None


def dequantize(
    packed: np.ndarray, scale: np.ndarray, index: tuple[slice, ...] = (), dtype: jax.typing.DTypeLike = jnp.float32
) -> np.ndarray:
    """Quantised matrix [..., rows, columns] times its scales, rounded once, to `dtype`; `index`: the part of it that is wanted.

    float8_e4m3fn carries one scale per 128 x 128 block. A byte dtype is fp4: two e2m1 numbers per byte, the low
    nibble first, one scale per 32 numbers of a row. Scales are e8m0 (also as raw bytes: 2^(byte - 127)) or floats.
    """
    is_fp8 = packed.dtype == FP8
    block, numbers = ((128, 128), 1) if is_fp8 else ((1, 32), 2)  # numbers: in an item of `packed`
    shape = (*packed.shape[:-1], packed.shape[-1] * numbers)
    grid = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    if scale.dtype not in (*FLOATS, ml_dtypes.float8_e8m0fnu, np.uint8):
        raise ValueError(f"scale must be floats or uint8, got {safetensors.dtype_name(scale)}")
    if scale.shape != grid:
        raise ValueError(f"scale must have shape {grid} for blocks of {block}, got {scale.shape}")
    *lead, rows, columns = index or (slice(None),) * len(shape)
    # The whole blocks that the wanted rows and columns are of.
    ends = [part.indices(n)[:2] for part, n in zip((rows, columns), shape[-2:])]
    blocks = tuple(slice(begin // size, -(-end // size)) for (begin, end), size in zip(ends, block))
    first = [part.start * size for part, size in zip(blocks, block)]
    (row, column), (row_end, column_end) = first, (part.stop * size for part, size in zip(blocks, block))
    codes = packed[(*lead, slice(row, row_end), slice(column // numbers, column_end // numbers))]
    scale = scale[(*lead, *blocks)]
    scale = scale.view(ml_dtypes.float8_e8m0fnu) if scale.dtype == np.uint8 else scale
    codes = codes if is_fp8 else codes.view(np.uint8)
    with jax.default_device(_host()):
        products = np.asarray(_products(codes, scale.astype(np.float32), np.dtype(dtype)))
    values = products.view(dtype)[..., : shape[-1] - column]
    (begin, end), (left, right) = ends
    return values[..., begin - row : end - row, left - column : right - column]


@cache
def _host() -> jax.Device | None:
    """Where matrices are dequantised: the host's processors, or the default device if JAX_PLATFORMS leaves those out."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


@partial(jax.jit, static_argnames="dtype")
def _products(codes: Array, scale: Array, dtype: np.dtype) -> Array:
    """Codes [..., rows, items] times scales [..., blocks, blocks]; fp4's two products of an item may be halves of a word."""
    if codes.dtype == FP8:
        scale = jnp.repeat(jnp.repeat(scale, 128, axis=-2), 128, axis=-1)
        return (codes.astype(jnp.float32) * scale[..., : codes.shape[-2], : codes.shape[-1]]).astype(dtype)

    scale = jnp.repeat(scale, 16, axis=-1)[..., : codes.shape[-1]]

    def product(code: Array) -> Array:
        # Twice 0, 0.5, 1, 1.5, 2, 3, 4, 6 are the hexadecimal digits of a constant.
        twice = (jnp.uint32(0xC8643210) >> (4 * (code & 7))) & 15
        value = 0.5 * twice.astype(jnp.int32).astype(jnp.float32)
        return (jnp.where(code > 7, -value, value) * scale).astype(dtype)

    low, high = product(codes.astype(jnp.uint32) & 15), product(codes.astype(jnp.uint32) >> 4)
    if dtype.itemsize == 4:
        return jnp.stack([low, high], axis=-1).reshape(*codes.shape[:-1], -1)
    low, high = (lax.bitcast_convert_type(half, jnp.uint16).astype(jnp.uint32) for half in (low, high))
    return low | high << 16  # XLA's CPU interleaves arrays four times slower
