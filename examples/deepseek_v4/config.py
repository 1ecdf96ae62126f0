"""What a DeepSeek-V4 checkpoint's config.json says, as one frozen (hence jit-static) dataclass.

A setting that changes the mathematics is honoured as transformers does, or refused by name. What does not is passed over: names,
dtypes and versions, training (dropout, initialisation, router losses), and how many layers predict the token after next.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

Kind = Literal["swa", "csa", "hca"]
"""How a layer attends: `swa` the sliding window alone; `csa` also the indexer's pick of the entries that
compress 4 tokens each; `hca` also every entry that compresses 128 tokens."""

KIND_OF_RATIO: dict[int, Kind] = {0: "swa", 4: "csa", 128: "hca"}
KIND_OF_LAYER_TYPE: dict[str, Kind] = {
    "sliding_attention": "swa",
    "compressed_sparse_attention": "csa",
    "heavily_compressed_attention": "hca",
}

INT32_MAX = 2**31 - 1


class CheckpointError(Exception):
    """The checkpoint folder is not what the model needs. The message is one line, fit to print."""


# ------------------------------------------------------------------------------------------------------------ the settings


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN: rotations slower than `beta_slow` turns per original context are slowed down by `factor`."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        _check_fields(self, YARN_RULES)


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a DeepSeek-V4. Names are config.json's, defaults are those that V4-Flash and V4-Pro share.

    Raises ValueError for a size that cannot be.
    """

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
    # What a run decides; config.json has no say.
    mtp: bool = False  # whether the layer that predicts the token after next is loaded
    packed: bool = False  # whether quantised matrices are kept as they are published

    def __post_init__(self) -> None:
        _check_fields(self, RULES)

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    def ratio(self, kind: Kind) -> int:
        """Tokens per compressed entry; 0 where a layer compresses nothing."""
        return {"swa": 0, "csa": self.csa_ratio, "hca": self.hca_ratio}[kind]


# --------------------------------------------------------------------------------------------------------------- the rules

# The values that a field may have, where they are not from 1 to INT32_MAX (int) or from above 0 to 1e30 (float).
LIMITS: dict[str, tuple[float, float]] = {
    "num_attention_heads": (1, 128),  # of jax_dsv4's kernels
    "head_dim": (512, 512),  # a latent of jax_dsv4
    "num_hash_layers": (0, INT32_MAX),
    "hc_sinkhorn_iters": (0, INT32_MAX),
    "rope_theta": (1.001, 1e30),
    "compress_rope_theta": (1.001, 1e30),
    "factor": (1, 1e30),
}

Rule = tuple[str, str, Callable[[Any], bool]]
"""A field, what it must do, and whether it does. `{c.name}` in the text is the config's field of that name."""

RULES: tuple[Rule, ...] = (
    ("o_groups", "divide num_attention_heads = {c.num_attention_heads}", lambda c: c.num_attention_heads % c.o_groups == 0),
    ("num_experts_per_tok", "be at most n_routed_experts = {c.n_routed_experts}", lambda c: c.num_experts_per_tok <= c.n_routed_experts),
    # The packed caches keep 64 numbers to a tile.
    ("qk_rope_head_dim", "be a multiple of 64", lambda c: c.qk_rope_head_dim % 64 == 0),
    ("qk_rope_head_dim", "be at most head_dim = {c.head_dim}", lambda c: c.qk_rope_head_dim <= c.head_dim),
    ("index_head_dim", "be at least qk_rope_head_dim = {c.qk_rope_head_dim}", lambda c: c.index_head_dim >= c.qk_rope_head_dim),
)
YARN_RULES: tuple[Rule, ...] = (("beta_fast", "be at least beta_slow = {c.beta_slow}", lambda c: c.beta_fast >= c.beta_slow),)

# Settings that the model has in one way only; one that is absent or null is taken to be that.
FIXED: dict[str, object] = {
    "scoring_func": "sqrtsoftplus",
    "hidden_act": "silu",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}

# The same of `quantization_config`; the dtypes of the tensors say the rest.
QUANTISATION: dict[str, object] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


def _check_fields(config: Config | Yarn, rules: tuple[Rule, ...]) -> None:
    """Each number by its type and limits, then the fields by each other."""
    for field in dataclasses.fields(config):
        if field.type in ("int", "float"):
            _check_number(field.name, getattr(config, field.name), field.type)
    for name, rule, holds in rules:
        if not holds(config):
            raise ValueError(f"{name} must {rule.format(c=config)}, got {getattr(config, name)}")


def _check_number(name: str, value: object, kind: str = "int") -> int | float:
    """`value`, once it is sure to be an "int" or a "float" within its limits."""
    least, most = LIMITS.get(name, (1, INT32_MAX) if kind == "int" else (1e-30, 1e30))
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not least <= number <= most or (kind == "int" and not isinstance(number, int)):
        what = "an integer" if kind == "int" else "a number"
        limits = f"{what} from {least} to {most}" if least < most else str(least)
        raise ValueError(f"{name} must be {limits}, got {value!r}")
    return number


# ------------------------------------------------------------------------------------------------------------ config.json


def read_json(path: Path) -> Any:
    """What a JSON file of a checkpoint says."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON number")

    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: no {path.name} there; expected a Hugging Face checkpoint folder") from None
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None


def load_config(folder: str | Path) -> Config:
    """Reads `folder`/config.json, in DeepSeek's published dialect or in transformers'.

    As in transformers, the ends that generation_config.json names take the place of config.json's.
    """
    path = Path(folder) / "config.json"
    raw, generation = read_json(path), path.with_name("generation_config.json")
    try:
        config = parse_config(raw)
        if generation.exists():
            path = generation
            ends = parse_ends(_dictionary("generation_config.json", read_json(generation)).get("eos_token_id"))
            config = dataclasses.replace(config, eos_token_ids=ends or config.eos_token_ids)
        return config
    except KeyError as error:
        raise CheckpointError(f"{path}: {error.args[0]!r} is missing") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def parse_config(raw: Any) -> Config:
    """Translates a parsed config.json. Raises KeyError for a missing size, ValueError for one that cannot be."""
    raw = _dictionary("config.json", raw)
    if raw.get("model_type") != "deepseek_v4":
        raise ValueError(f"model_type must be 'deepseek_v4', got {raw.get('model_type')!r}")
    for name, value in FIXED.items():
        if raw.get(name) not in (None, value):
            raise ValueError(f"{name} must be {value!r}, got {raw[name]!r}")
    quantisation = _dictionary("quantization_config", raw.get("quantization_config"))
    for name, value in QUANTISATION.items():
        if quantisation.get(name) not in (None, value):
            raise ValueError(f"quantization_config.{name} must be {value!r}, got {quantisation[name]!r}")
    for name, other in (("n_routed_experts", "num_local_experts"), ("moe_intermediate_size", "intermediate_size")):
        _same(f"{other}, {name}", raw.get(other), raw.get(name))

    num_layers = int(_check_number("num_hidden_layers", raw["num_hidden_layers"]))
    if raw.get("layer_types"):
        layers = _names("layer_types", raw["layer_types"], KIND_OF_LAYER_TYPE, num_layers)
    else:  # Published configs append the ratio of the next-token-prediction layer, which decoding does not run.
        layers = _names("compress_ratios", raw["compress_ratios"], KIND_OF_RATIO, num_layers)
    if raw.get("mlp_layer_types"):
        hashed = _names("mlp_layer_types", raw["mlp_layer_types"], {"hash_moe": True, "moe": False}, num_layers)
        num_hash_layers = sum(hashed)
        if any(hashed[num_hash_layers:]):
            raise ValueError("mlp_layer_types must put every 'hash_moe' layer before the first 'moe' layer")
    else:
        num_hash_layers = raw["num_hash_layers"]

    rates = _dictionary("compress_rates", raw.get("compress_rates"))
    csa_ratio = raw.get("compress_rate_csa", rates.get("compressed_sparse_attention", 4))
    hca_ratio = raw.get("compress_rate_hca", rates.get("heavily_compressed_attention", 128))
    translated = dict(layers=tuple(layers), num_hash_layers=num_hash_layers, csa_ratio=csa_ratio, hca_ratio=hca_ratio)
    translated |= dict(mtp=False, packed=False, eos_token_ids=parse_ends(raw.get("eos_token_id")), **_parse_rope(raw))
    same = {f.name: f.default for f in dataclasses.fields(Config) if f.name not in translated}
    return Config(**{name: raw[name] for name, default in same.items() if name in raw or default is dataclasses.MISSING}, **translated)


def parse_ends(eos: object) -> tuple[int, ...]:
    """The end-of-sequence tokens that `eos_token_id` names: one, several or none."""
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    for end in ends:
        if isinstance(end, bool) or not isinstance(end, int) or not 0 <= end <= INT32_MAX:
            raise ValueError(f"eos_token_id must be token ids from 0 to {INT32_MAX}, got {eos!r}")
    return tuple(ends)


def _parse_rope(raw: dict[str, Any]) -> dict[str, Any]:
    """The rotations: `qk_rope_head_dim`, both thetas and `yarn`.

    Either one dictionary, of the layers that compress, or one for them ("compress") and one for those of the window alone ("main").
    YaRN's attention_factor is 1 where none is named, as in DeepSeek's own code.
    """
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = _dictionary(name, raw.get(name))
    thetas: dict[str, Any] = {key: raw[key] for key in ("rope_theta", "compress_rope_theta") if key in raw}
    share = {"partial_rotary_factor": raw.get("partial_rotary_factor")}
    if "main" in rope or "compress" in rope:
        main, compress = (_dictionary(f"{name}.{part}", rope[part]) for part in ("main", "compress"))
        thetas = {"rope_theta": main["rope_theta"], "compress_rope_theta": compress["rope_theta"]}
        share |= {f"{name}.{part}.partial_rotary_factor": rope[part].get("partial_rotary_factor") for part in ("main", "compress")}
        if _rope_type(main) != "default":
            raise ValueError(f"{name}.main must have rope_type 'default', got {_rope_type(main)!r}")
        rope, name = compress, f"{name}.compress"
    else:
        share[f"{name}.partial_rotary_factor"] = rope.get("partial_rotary_factor")
        known = (thetas.get("rope_theta", Config.rope_theta), thetas.get("compress_rope_theta", Config.compress_rope_theta))
        if rope.get("rope_theta") not in (None, *known):  # which of the two it were would not be clear
            raise ValueError(f"{name}.rope_theta must be rope_theta or compress_rope_theta, got {rope['rope_theta']!r}")

    sizes = {key: _rotated(raw, key, value) for key, value in share.items() if value is not None}
    size = _same("qk_rope_head_dim, partial_rotary_factor", raw.get("qk_rope_head_dim"), *sizes.values())
    found: dict[str, Any] = {**thetas, "yarn": None}
    if size is not None:
        found["qk_rope_head_dim"] = size
    if _rope_type(rope) == "yarn":
        for key, wanted in (("attention_factor", 1), ("truncate", True), ("mscale", rope.get("mscale_all_dim"))):
            if rope.get(key) not in (None, wanted):
                raise ValueError(f"{name}.{key} must be {wanted}, got {rope[key]!r}")
        top = raw.get("original_max_position_embeddings")
        given = {field.name: rope[field.name] for field in dataclasses.fields(Yarn) if rope.get(field.name) is not None}
        original = _same("original_max_position_embeddings", top, given.get("original_max_position_embeddings"))
        given["original_max_position_embeddings"] = raw["max_position_embeddings"] if original is None else original
        found["yarn"] = Yarn(**{"factor": rope["factor"], **given})
    elif _rope_type(rope) != "default":
        raise ValueError(f"{name} must have rope_type 'yarn' or 'default', got {_rope_type(rope)!r}")
    return found


def _rope_type(rope: dict[str, Any]) -> object:
    return rope.get("rope_type", rope.get("type", "default"))


def _rotated(raw: dict[str, Any], name: str, factor: object) -> int:
    """How many numbers of a head a `partial_rotary_factor` rotates."""
    return int(_check_number(name, factor, "float") * _check_number("head_dim", raw.get("head_dim", Config.head_dim)))


def _dictionary(name: str, value: object) -> dict[str, Any]:
    """`value`, once it is sure to be an object; null is an empty one."""
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object, got {value!r}")
    return value or {}


def _same(names: str, *values: Any) -> Any:
    """The one value that all those have that are not None."""
    given = [value for value in values if value is not None]
    if any(value != given[0] for value in given):
        raise ValueError(f"{names}: must agree, got {given}")
    return given[0] if given else None


Value = TypeVar("Value")


def _names(name: str, given: object, known: Mapping[Any, Value], count: int) -> list[Value]:
    """What the first `count` of a list of names stand for."""
    if not isinstance(given, list) or len(given) < count or any(isinstance(item, (list, dict)) or item not in known for item in given):
        raise ValueError(f"{name} must name one of {', '.join(map(str, known))} for each of {count} layers, got {given!r}")
    return [known[item] for item in given[:count]]


# ------------------------------------------------------------------------------------------------------------- the presets

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
