"""What a DeepSeek-V4 checkpoint's config.json says, as one frozen (hence jit-static) dataclass."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

Kind = Literal["swa", "csa", "hca"]
"""How a layer attends: `swa` the sliding window alone; `csa` also the indexer's pick of the entries that
compress 4 tokens each; `hca` also every entry that compresses 128 tokens."""

KIND_OF_RATIO: dict[int, Kind] = {0: "swa", 4: "csa", 128: "hca"}
KIND_OF_LAYER_TYPE: dict[str, Kind] = {
    "sliding_attention": "swa",
    "compressed_sparse_attention": "csa",
    "heavily_compressed_attention": "hca",
}


class CheckpointError(Exception):
    """The checkpoint folder is not what the model needs. The message is one line, fit to print."""


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN: rotations slower than `beta_slow` turns per original context are slowed down by `factor`."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a DeepSeek-V4. Names are config.json's, defaults are those that V4-Flash and V4-Pro share."""

    hidden_size: int
    num_attention_heads: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    layers: tuple[Kind, ...]
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    routed_scaling_factor: float
    index_n_heads: int
    index_topk: int
    num_hash_layers: int = 3
    index_head_dim: int = 128
    vocab_size: int = 129280
    max_position_embeddings: int = 1048576
    head_dim: int = 512
    qk_rope_head_dim: int = 64
    sliding_window: int = 128
    csa_ratio: int = 4
    hca_ratio: int = 128
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    yarn: Yarn | None = None
    swiglu_limit: float = 10.0
    rms_norm_eps: float = 1e-6
    hc_mult: int = 4
    hc_eps: float = 1e-6
    hc_sinkhorn_iters: int = 20
    eos_token_ids: tuple[int, ...] = ()

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    def ratio(self, kind: Kind) -> int:
        """Tokens per compressed entry; 0 where a layer compresses nothing."""
        return {"swa": 0, "csa": self.csa_ratio, "hca": self.hca_ratio}[kind]


def load_config(folder: str | Path) -> Config:
    """Reads `folder`/config.json, in DeepSeek's published dialect or in transformers'."""
    path = Path(folder) / "config.json"
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no config.json there; expected a Hugging Face checkpoint folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    try:
        return parse_config(raw)
    except KeyError as error:
        raise CheckpointError(f"{path}: {error.args[0]!r} is missing") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def parse_config(raw: dict[str, Any]) -> Config:
    """Translates a parsed config.json. Raises KeyError for a missing size, ValueError for one that cannot be."""
    if raw.get("model_type") != "deepseek_v4":
        raise ValueError(f"model_type must be 'deepseek_v4', got {raw.get('model_type')!r}")
    if raw.get("scoring_func", "sqrtsoftplus") != "sqrtsoftplus":
        raise ValueError(f"scoring_func must be 'sqrtsoftplus', got {raw['scoring_func']!r}")

    num_layers = raw["num_hidden_layers"]
    if raw.get("layer_types"):
        layers = [KIND_OF_LAYER_TYPE.get(name) for name in raw["layer_types"]]
    else:  # Published configs append the ratio of the next-token-prediction layer, which decoding does not run.
        layers = [KIND_OF_RATIO.get(ratio) for ratio in raw["compress_ratios"]]
    known = tuple(kind for kind in layers[:num_layers] if kind is not None)
    if len(known) != num_layers:
        raise ValueError(f"layer_types / compress_ratios must name one known kind for each of {num_layers} layers")
    if raw.get("mlp_layer_types"):
        num_hash_layers = raw["mlp_layer_types"].count("hash_moe")
        if "hash_moe" in raw["mlp_layer_types"][num_hash_layers:]:
            raise ValueError("mlp_layer_types must put every 'hash_moe' layer before the first 'moe' layer")
    else:
        num_hash_layers = raw["num_hash_layers"]

    rates = raw.get("compress_rates") or {}
    rope = raw.get("rope_parameters") or {}
    rope = rope.get("compress") or rope or raw.get("rope_scaling") or {}
    eos = raw.get("eos_token_id")
    shared = {field.name for field in dataclasses.fields(Config)} - {"layers", "num_hash_layers", "yarn"}
    required = {f.name for f in dataclasses.fields(Config) if f.default is dataclasses.MISSING} - {"layers"}
    config = Config(
        **{name: raw[name] for name in shared if name in raw or name in required},
        layers=known,
        num_hash_layers=num_hash_layers,
        csa_ratio=rates.get("compressed_sparse_attention", 4),
        hca_ratio=rates.get("heavily_compressed_attention", 128),
        yarn=_parse_yarn(rope),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
    )
    if config.num_attention_heads % config.o_groups:
        raise ValueError(f"o_groups must divide num_attention_heads = {config.num_attention_heads}, got {config.o_groups}")
    return config


def _parse_yarn(rope: dict[str, Any]) -> Yarn | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ValueError(f"rope scaling must be 'yarn' or none, got {kind!r}")
    return Yarn(**{f.name: rope[f.name] for f in dataclasses.fields(Yarn) if f.name in rope})


V4_FLASH = Config(
    hidden_size=4096,
    num_attention_heads=64,
    q_lora_rank=1024,
    o_groups=8,
    o_lora_rank=1024,
    layers=("swa", "swa", *("csa" if i % 2 == 0 else "hca" for i in range(41))),
    n_routed_experts=256,
    num_experts_per_tok=6,
    moe_intermediate_size=2048,
    routed_scaling_factor=1.5,
    index_n_heads=64,
    index_topk=512,
    yarn=Yarn(factor=16, original_max_position_embeddings=65536),
    eos_token_ids=(1,),
)

V4_PRO = dataclasses.replace(
    V4_FLASH,
    hidden_size=7168,
    num_attention_heads=128,
    q_lora_rank=1536,
    o_groups=16,
    layers=("hca", "hca", *("csa" if i % 2 == 0 else "hca" for i in range(59))),
    n_routed_experts=384,
    moe_intermediate_size=3072,
    routed_scaling_factor=2.5,
    index_topk=1024,
)

TINY = Config(
    vocab_size=1024,
    hidden_size=128,
    num_attention_heads=4,
    q_lora_rank=64,
    o_groups=2,
    o_lora_rank=64,
    layers=("swa", "csa", "hca"),
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=128,
    routed_scaling_factor=1.5,
    num_hash_layers=1,
    index_n_heads=4,
    index_topk=64,
    max_position_embeddings=4096,
    sliding_window=32,
    yarn=Yarn(factor=16, original_max_position_embeddings=256),
)

PRESETS = {"tiny": TINY, "v4-flash": V4_FLASH, "v4-pro": V4_PRO}
