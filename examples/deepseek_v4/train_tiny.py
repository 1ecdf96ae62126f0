"""Trains the tiny model that this repository ships, on the prose of Python's own documentation.

    python examples/deepseek_v4/train_tiny.py [--steps N] [--out DIR]

It is the model of model.py and nothing else: every sequence is one `forward` over an empty float32 cache, with
`implementation="xla"`, the one that differentiates. The indexer's choice has no gradient; training sequences are short
enough for it to choose every entry, and beyond that length it is as it was initialised. 600 steps take a loss of 7.4 to
about 1.0 nats per token, in a quarter of an hour on two idle cores.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import json
import pydoc_data.topics
import re
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array

from deepseek_v4 import safetensors
from deepseek_v4.config import TINY, Config
from deepseek_v4.model import Cache, create_cache, forward, logits, read_streams
from deepseek_v4.tokenizer import Pieces
from deepseek_v4.weights import Tensor, map_schema, schema

SEQUENCE = 256
CHUNK = 64
BATCH = 4
PEAK_RATE = 3e-3
WARMUP = 50


ASCII = str.maketrans({"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'", "\u2013": "-", "\u2014": "-"})
"""Typographer's quotes and dashes, in plain."""


def corpus() -> str:
    """Full sentences of Python's reference: one paragraph per line, plain ASCII."""
    lines = []
    for topic in pydoc_data.topics.topics.values():
        for paragraph in re.split(r"\n\s*\n", topic):
            text = " ".join(paragraph.split()).translate(ASCII)
            indented = paragraph.startswith("      ")  # code
            if text.isascii() and not indented and re.fullmatch(r"[A-Z].{40,}[.:]", text):
                lines.append(text)
    return "\n".join(dict.fromkeys(lines)) + "\n"


def make_pieces(text: str, size: int) -> list[str]:
    """A vocabulary of `size` strings: every character, then what byte-pair encoding merges most often within words."""
    words = collections.Counter(re.findall(r" ?[A-Za-z]+|[^A-Za-z]", text))
    split = {word: list(word) for word in words}
    pieces = sorted(set(text))
    while len(pieces) < size:
        pairs: collections.Counter[tuple[str, str]] = collections.Counter()
        for word, parts in split.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += words[word]
        (left, right), _ = max(pairs.items(), key=lambda item: (item[1], item[0]))
        pieces.append(left + right)
        for parts in split.values():
            for i in range(len(parts) - 1, 0, -1):
                if parts[i - 1 : i + 1] == [left, right]:
                    parts[i - 1 : i + 1] = [left + right]
    return pieces


def initialise(config: Config, seed: int = 0) -> Any:
    """Random weights: matrices by their fan-in, norms and scales 1, sinks and biases 0, hash routes at random."""
    random = np.random.default_rng(seed)

    def array(tensor: Tensor) -> Array:
        if tensor.name.endswith("tid2eid"):
            routes = random.random((tensor.shape[0], config.n_routed_experts)).argsort(axis=-1)
            return jnp.array(routes[:, : tensor.shape[1]], jnp.int32)
        if tensor.name.endswith(("norm.weight", "_scale")):
            return jnp.ones(tensor.shape)
        if len(tensor.shape) == 1 or tensor.name.endswith(".ape"):
            return jnp.zeros(tensor.shape)
        spread = 1.0 if tensor.name == "embed.weight" else tensor.shape[-1] ** -0.5
        return jnp.array(spread * random.standard_normal(tensor.shape), jnp.float32)

    return map_schema(array, config)


def loss(weights: Any, routes: Any, tokens: Array, config: Config) -> Array:
    """Mean cross-entropy, in nats, of each token of [b, t + 1] given those before it; read in chunks, as prompts are."""
    weights = merge(weights, routes)
    b, t = tokens.shape[0], tokens.shape[1] - 1

    def chunks(ids: Array) -> Array:  # [b, t] → [t / CHUNK, b, CHUNK]
        return ids.reshape(b, t // CHUNK, CHUNK).swapaxes(0, 1)

    def of_chunk(cache: Cache, chunk: tuple[Array, Array]) -> tuple[Cache, Array]:
        inputs, targets = chunk
        counts = jnp.full(b, CHUNK, jnp.int32)
        x, cache = forward(weights, cache, inputs, counts, config=config, implementation="xla")
        hidden = read_streams(x, weights, config)
        predicted = jax.nn.log_softmax(logits(weights, hidden))
        return cache, -jnp.take_along_axis(predicted, targets[..., None], axis=-1).mean()

    cache = create_cache(config, b, t, layout="float32", chunk=CHUNK, dtype=jnp.float32)
    _, losses = jax.lax.scan(of_chunk, cache, (chunks(tokens[:, :-1]), chunks(tokens[:, 1:])))
    return losses.mean()


def split(weights: Any) -> tuple[Any, Any]:
    """The float leaves, which are trained, and the integer ones; each with None where the other has a leaf."""

    def is_float(leaf: Array) -> bool:
        return jnp.issubdtype(leaf.dtype, jnp.floating)

    return (
        jax.tree.map(lambda leaf: leaf if is_float(leaf) else None, weights),
        jax.tree.map(lambda leaf: None if is_float(leaf) else leaf, weights),
    )


def merge(trained: Any, routes: Any) -> Any:
    return jax.tree.map(lambda a, b: b if a is None else a, trained, routes, is_leaf=lambda leaf: leaf is None)


@partial(jax.jit, static_argnames="config", donate_argnames=("weights", "moments"))
def update(
    weights: Any, moments: tuple[Any, Any], routes: Any, tokens: Array, step: Array, rate: Array, config: Config
) -> tuple[Any, tuple[Any, Any], Array]:
    """One step of AdamW, gradients clipped to norm 1."""
    value, grads = jax.value_and_grad(loss)(weights, routes, tokens, config)
    norm = jnp.sqrt(sum(jnp.vdot(grad, grad) for grad in jax.tree.leaves(grads)))
    grads = jax.tree.map(lambda grad: grad / jnp.maximum(norm, 1), grads)
    first = jax.tree.map(lambda m, grad: 0.9 * m + 0.1 * grad, moments[0], grads)
    second = jax.tree.map(lambda v, grad: 0.99 * v + 0.01 * grad * grad, moments[1], grads)

    def moved(weight: Array, m: Array, v: Array) -> Array:
        direction = m / (1 - 0.9**step) / (jnp.sqrt(v / (1 - 0.99**step)) + 1e-8)
        decay = 0.1 if weight.ndim > 1 else 0.0
        return weight - rate * (direction + decay * weight)

    return jax.tree.map(moved, weights, first, second), (first, second), value


def batches(ids: np.ndarray, seed: int = 0) -> Iterator[np.ndarray]:
    """Random stretches [BATCH, SEQUENCE + 1] of the text, each from the start of a piece anywhere in it."""
    random = np.random.default_rng(seed)
    while True:
        starts = random.integers(0, len(ids) - SEQUENCE - 1, BATCH)
        yield np.stack([ids[start : start + SEQUENCE + 1] for start in starts])


def save(folder: Path, weights: Any, config: Config, pieces: list[str]) -> None:
    """A checkpoint as DeepSeek publishes them: config.json and bfloat16 matrices under the published names."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {}
    leaves = jax.tree.leaves(schema(config), is_leaf=lambda leaf: isinstance(leaf, Tensor))
    for tensor, leaf in zip(leaves, jax.tree.leaves(weights), strict=True):
        array = np.asarray(leaf)
        array = array.astype(ml_dtypes.bfloat16) if tensor.dtype is None else array
        if "*" in tensor.name:
            tensors.update((tensor.name.replace("*", str(e)), expert) for e, expert in enumerate(array))
        else:
            tensors[tensor.name] = array
    safetensors.write(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config_json(config), indent=1) + "\n")
    (folder / "pieces.json").write_text(json.dumps(pieces) + "\n")


def config_json(config: Config) -> dict[str, Any]:
    """`config` in the published dialect."""
    raw = dataclasses.asdict(config)
    raw.pop("mtp")
    yarn = raw.pop("yarn")
    kinds = raw.pop("layers")
    ratios = {"swa": 0, "csa": raw.pop("csa_ratio"), "hca": raw.pop("hca_ratio")}
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "num_hidden_layers": len(kinds),
        "compress_ratios": [ratios[kind] for kind in kinds],
        "rope_scaling": {"type": "yarn", **yarn},
        "scoring_func": "sqrtsoftplus",
        "eos_token_id": list(raw.pop("eos_token_ids")) or None,
        **raw,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny")
    args = parser.parse_args()

    config, text = TINY, corpus()
    pieces = make_pieces(text, config.vocab_size)
    ids = np.array(Pieces(pieces).encode(text), np.int32)
    weights, routes = split(initialise(config))
    size = sum(leaf.size for leaf in jax.tree.leaves(weights))
    print(f"{len(text)} characters, {len(ids)} tokens; {size} weights", flush=True)

    zeros = partial(jax.tree.map, jnp.zeros_like)
    moments, began = (zeros(weights), zeros(weights)), time.perf_counter()
    for step, tokens in zip(range(1, args.steps + 1), batches(ids)):
        # The rate rises for WARMUP steps and falls in a straight line to a twentieth.
        rate = PEAK_RATE * min(step / WARMUP, 1 - 0.95 * step / args.steps)
        weights, moments, value = update(weights, moments, routes, tokens, jnp.float32(step), jnp.float32(rate), config)
        if step == 1 or step % 20 == 0:
            print(f"step {step}  loss {value:.3f}  {time.perf_counter() - began:.0f} s", flush=True)
    save(args.out, merge(weights, routes), config, pieces)


if __name__ == "__main__":
    main()
