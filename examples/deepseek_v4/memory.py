"""Bytes: of a pytree, and of V4-Flash and V4-Pro at the contexts people ask about. Nothing is allocated."""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deepseek_v4.config import PRESETS, Config
from deepseek_v4.model import create_cache
from deepseek_v4.packed import published_shapes
from deepseek_v4.weights import Tensor, abstract_weights, schema

CONTEXTS = {"8k": 8 * 1024, "128k": 128 * 1024, "1M": 1024 * 1024}


def nbytes(tree: Any) -> int:
    """Bytes of all leaves, arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def room() -> int | None:
    """Bytes of memory that a device has, or that are free here if processors are the devices; None if that is not known."""
    if jax.default_backend() != "cpu":
        return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return min((1024 * kilobytes for kilobytes in (free_kilobytes(), container_kilobytes()) if kilobytes is not None), default=None)


def free_kilobytes() -> int | None:
    """Of the machine, with what it would give up: Linux's own estimate."""
    return number_in("/proc/meminfo", r"MemAvailable:\s*(\d+) kB")


def container_kilobytes() -> int | None:
    """That the container may have, where there is one with a limit."""
    most = number_in("/sys/fs/cgroup/memory.max", r"(\d+)")
    return None if most is None else most // 1024


def number_in(file: str, pattern: str) -> int | None:
    try:
        found = re.search(pattern, Path(file).read_text())
    except OSError:
        return None
    return int(found[1]) if found else None


def stored_bytes(tensor: Tensor) -> int:
    """Bytes of one of the weights as DeepSeek publishes it, its scales included."""
    bits = {"fp32": 32, "bf16": 16, "int64": 64, "fp8": 8, "fp4": 4}[tensor.stored]
    size = int(np.prod(tensor.shape))
    scales = int(np.prod(published_shapes(tensor.shape, tensor.stored)[1])) if tensor.stored in ("fp8", "fp4") else 0
    return size * bits // 8 + scales


def published_bytes(config: Config) -> int:
    """Bytes of the weights as DeepSeek publishes them: fp4 experts, fp8 projections, scales included."""
    return sum(map(stored_bytes, jax.tree.leaves(schema(config), is_leaf=lambda leaf: isinstance(leaf, Tensor))))


def cache_bytes(config: Config, max_tokens: int, layout: str) -> int:
    """Bytes of one request's cache: latents, rolling compressor rows, indexer keys, page tables."""
    return nbytes(jax.eval_shape(partial(create_cache, config, 1, max_tokens, layout=layout)))


def table() -> str:
    """Markdown: weights, and cache per request by context and layout."""
    contexts = " | ".join(f"{name} context" for name in CONTEXTS)
    lines = [
        f"| model | weights, published | weights, packed | weights, bf16 | cache layout | {contexts} |",
        "|---|---:|---:|---:|---|" + "---:|" * len(CONTEXTS),
    ]
    for name in ("v4-flash", "v4-pro"):
        config = PRESETS[name]
        kept = nbytes(abstract_weights(dataclasses.replace(config, packed=True)))
        weights = f"{human(published_bytes(config))} | {human(kept)} | {human(nbytes(abstract_weights(config)))}"
        for layout in ("fp8_ds_mla", "bf16"):
            caches = " | ".join(human(cache_bytes(config, tokens, layout)) for tokens in CONTEXTS.values())
            lines.append(f"| {name} | {weights} | {layout} | {caches} |")
    return "\n".join(lines)


def human(count: int) -> str:
    unit = "GB" if count >= 1e9 else "MB"
    return f"{count / (1e9 if unit == 'GB' else 1e6):.3g} {unit}" if count < 1e12 else f"{count / 1e12:.3g} TB"
