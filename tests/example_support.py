"""What the example's tests share: the example on the path, the golden models, and logits of a given text."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import decode_loop  # noqa: E402, F401
import serve  # noqa: E402, F401
from deepseek_v4 import config as config_module  # noqa: E402, F401
from deepseek_v4 import fused, index_keys, kernels, memory, mesh, model, packed, pages, products, safetensors, serving, terms, train_tiny  # noqa: E402, F401
from deepseek_v4 import weights as weights_module  # noqa: E402, F401
from deepseek_v4.axes import Axes  # noqa: E402, F401
from deepseek_v4.config import PRESETS, CheckpointError, Config, load_config, parse_config  # noqa: E402, F401
from deepseek_v4.generate import GREEDY, NOT_A_TOKEN, REJECTED, Sampling, State, draw, generate, prefill  # noqa: E402, F401
from deepseek_v4.model import (  # noqa: E402, F401
    BLOCK_SIZE,
    Cache,
    create_cache,
    forward,
    hyper_connection,
    logits,
    moe,
    read_streams,
    rms_norm,
    score_entries,
)
from deepseek_v4.products import run_experts, swiglu  # noqa: E402, F401
from deepseek_v4.rope import rope_angle, rotate, turn  # noqa: E402, F401
from deepseek_v4.speculate import one_layer, predict  # noqa: E402, F401
from deepseek_v4.tokenizer import Pieces, load_tokenizer  # noqa: E402, F401
from deepseek_v4.weights import (  # noqa: E402, F401
    RENAMES,
    Tensor,
    abstract_weights,
    dequantize,
    load_weights,
    map_schema,
    open_checkpoint,
    published_name,
    schema,
)

from benchmarks import scaling_model  # noqa: E402, F401

GOLDEN = ("yarn", "hca")

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)

# float32 throughout, sums in another order, and values of order 1 after four layers.
EXACT = 1e-4


def _rope(drop: tuple[str, ...] = (), **edits: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Drops and replaces settings; of `rope_parameters`, the settings of each part."""

    def edit(raw: dict[str, Any]) -> dict[str, Any]:
        for name, value in edits.items():
            if name in ("main", "compress"):
                raw["rope_parameters"][name].update(value)
            else:
                raw[name] = value
        return {name: value for name, value in raw.items() if name not in drop}

    return edit


YARN = dict(factor=4, original_max_position_embeddings=512)

# name: (edit of the golden config "yarn", (rope_theta, compress_rope_theta, rotated numbers, YaRN's factor)).
ROPE_CASES: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], tuple[float, float, int, float | None]]] = {
    "as it is": (_rope(), (10000.0, 160000.0, 64, 16)),
    "nested thetas alone": (
        _rope(("rope_theta", "compress_rope_theta"), main=dict(rope_theta=333.0), compress=dict(rope_theta=4444.0)),
        (333.0, 4444.0, 64, 16),
    ),
    "nested thetas before others": (_rope(rope_theta=1e6, main=dict(rope_theta=50.0)), (50.0, 160000.0, 64, 16)),
    "no dictionary": (_rope(("rope_parameters",), rope_theta=77.0), (77.0, 160000.0, 64, None)),
    "one dictionary": (_rope(rope_parameters=dict(rope_type="yarn", **YARN), compress_rope_theta=88.0), (10000.0, 88.0, 64, 4)),
    "rope_scaling before rope_parameters": (_rope(rope_scaling=dict(type="yarn", **YARN)), (10000.0, 160000.0, 64, 4)),
    "context from max_position_embeddings": (_rope(rope_parameters=dict(rope_type="yarn", factor=4)), (10000.0, 160000.0, 64, 4)),
    "rotated by a fraction": (
        _rope(("rope_parameters", "qk_rope_head_dim"), partial_rotary_factor=0.25),
        (10000.0, 160000.0, 128, None),
    ),
    "rotated by a number": (_rope(("rope_parameters", "partial_rotary_factor"), qk_rope_head_dim=128), (10000.0, 160000.0, 128, None)),
    # Every pair turns more than beta_fast times in the original context, or none does.
    "context that is long": (_rope(compress=dict(rope_theta=20.0, original_max_position_embeddings=10**6)), (10000.0, 20.0, 64, 16)),
    "context that is short": (_rope(compress=dict(original_max_position_embeddings=4)), (10000.0, 160000.0, 64, 16)),
    "betas that are equal": (_rope(compress=dict(beta_fast=3, beta_slow=3)), (10000.0, 160000.0, 64, 16)),
}


@pytest.fixture(autouse=True)
def strict_types():
    """In place of conftest's: dtypes are strict here too, but a model may broadcast [d] against [b, t, d]."""
    with jax.numpy_dtype_promotion("strict"):
        yield


def golden_folder(name: str) -> Path:
    return ROOT / "tests" / "data" / f"example_{name}"


@cache
def golden(name: str) -> tuple[Config, Any, dict[str, np.ndarray]]:
    """A model of make_example_goldens.py: config, float32 weights, answers."""
    folder = golden_folder(name)
    config = load_config(folder)
    return config, load_weights(folder, config, jnp.float32), dict(np.load(folder / "answers.npz"))


@partial(jax.jit, static_argnames=("config", "implementation"), donate_argnames="cache")
def score(weights: Any, cache: Any, tokens: Any, counts: Any, *, config: Config, implementation: Any = None) -> Any:
    x, cache = forward(weights, cache, tokens, counts, config=config, implementation=implementation)
    return logits(weights, read_streams(x, weights, config)), cache


def score_text(
    config: Config,
    weights: Any,
    tokens: np.ndarray,
    *,
    chunk: int = 32,
    count: int | None = None,
    single_from: int | None = None,
    max_tokens: int | None = None,
    layout: str = "float32",
    implementation: Any = None,
) -> np.ndarray:
    """Logits [n, vocabulary] after each of `tokens`: `count` (default: all) of each chunk up to `single_from`, then one
    token per step. What is compiled depends on `chunk` and `max_tokens` alone."""
    single_from = len(tokens) if single_from is None else single_from
    count = count or chunk
    cache = create_cache(config, 1, max_tokens or len(tokens), layout=layout, chunk=chunk, dtype=jnp.float32)
    steps = [(i, min(count, single_from - i), chunk) for i in range(0, single_from, count)]
    steps += [(i, 1, 1) for i in range(single_from, len(tokens))]
    found = []
    for start, count, width in steps:
        padded = np.zeros((1, width), np.int32)
        padded[0, :count] = tokens[start : start + count]
        out, cache = score(weights, cache, padded, np.array([count], np.int32), config=config, implementation=implementation)
        found.append(np.asarray(out)[0, :count])
    return np.concatenate(found)


def golden_length(name: str) -> int:
    """Tokens of a golden prompt and its answer."""
    answers = golden(name)[2]
    return len(answers["prompt"]) + len(answers["tokens"])


def decode(
    config: Config,
    weights: Any,
    prompts: list[np.ndarray],
    new_tokens: int | list[int],
    *,
    max_tokens: int,
    chunk: int = 32,
    sampling: Sampling = GREEDY,
    layout: str = "float32",
    fp8_keys: bool = False,
    implementation: Any = None,
) -> list[list[int]]:
    """New tokens of each request, through `prefill` and `generate`."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    # One width for all prompts of a model: what is compiled depends on it.
    padded = np.zeros((len(prompts), -(-max_tokens // chunk) * chunk), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    limits = np.broadcast_to(np.array(new_tokens, np.int32), lengths.shape)
    options: Any = dict(config=config, sampling=sampling, implementation=implementation)
    cache = create_cache(config, len(prompts), max_tokens, layout=layout, chunk=chunk, dtype=jnp.float32, fp8_keys=fp8_keys)
    state = prefill(weights, cache, padded, lengths, limits, jnp.uint32(0), chunk=chunk, **options)
    first = np.asarray(state.token)[:, None]
    state, rest = generate(weights, state, steps=int(limits.max()) - 1, **options)
    return [[int(t) for t in row if t >= 0] for row in np.concatenate([first, np.asarray(rest)], axis=1)]


def leaves(config) -> list[Tensor]:
    return jax.tree.leaves(schema(config), is_leaf=lambda leaf: isinstance(leaf, Tensor))


def quantised_checkpoint(config) -> dict[str, np.ndarray]:
    """Random bytes under the published names, stored as DeepSeek stores each tensor."""
    random, tensors = np.random.default_rng(0), {}
    for tensor in leaves(config):
        experts = range(tensor.shape[0]) if "*" in tensor.name else [0]
        shape = tensor.shape[1:] if "*" in tensor.name else tensor.shape
        for expert in experts:
            name = tensor.name.replace("*", str(expert))
            scale_name = name.removesuffix(".weight") + ".scale"
            if tensor.stored == "fp8":
                tensors[name] = random.standard_normal(shape).astype(FP8)
                grid = -(-shape[0] // 128), -(-shape[1] // 128)
            elif tensor.stored == "fp4":
                tensors[name] = random.integers(-128, 128, (shape[0], shape[1] // 2)).astype(np.int8)
                grid = shape[0], shape[1] // 32
            elif tensor.stored == "int64":
                tensors[name] = random.integers(0, config.n_routed_experts, shape)
                continue
            else:
                dtype = ml_dtypes.bfloat16 if tensor.stored == "bf16" else np.float32
                tensors[name] = random.standard_normal(shape).astype(dtype)
                continue
            tensors[scale_name] = (2.0 ** random.integers(-3, 4, grid)).astype(ml_dtypes.float8_e8m0fnu)
    return tensors


def said_in_one_line(command: Any, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says that cannot be run as it is asked to: one line, on stderr alone, and its exit status is 2."""
    try:
        code = command.main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    said = capsys.readouterr()
    assert (code, said.out, said.err.count("\n")) == (2, "", 1)
    assert said.err.startswith(f"{command.PROGRAM}: ")
    return said.err
