"""The two programs of a server: `read` runs a chunk of one request's text, `decode` a step of all slots.

Lengths, block tables, slots and limits are data, so that each is compiled once. A slot without a request that draws is an empty row.
`program` makes jitted functions of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

import jax_dsv4 as dsv4
from deepseek_v4.config import Config, Kind
from deepseek_v4.generate import Sampling, State, draw, generate
from deepseek_v4.index_keys import create_keys
from deepseek_v4.model import (
    BLOCK_SIZE,
    Cache,
    CompressedCache,
    Implementation,
    IndexCache,
    LayerCache,
    create_cache,
    forward,
    logits,
    read_streams,
)
from deepseek_v4.products import compiler_options

Layers = tuple[LayerCache, ...]


class Requests(NamedTuple):
    """Those that a program runs, as the host has them."""

    tables: dict[Kind, Any]  # int32 [b, pages]: each one's blocks
    number: Any  # int32 [b]: draws depend on it, not on the slot
    position: Any  # int32 [b]: tokens in the caches
    shared: Any  # int32 [b], as in `Cache`

    def begin(self, layers: Layers, token: Array, left: Array, seed: Array) -> State:
        key = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(self.number)
        return State(Cache(layers, self.tables, self.position, self.shared), token, left, key)


def create_layers(
    config: Config, slots: int, blocks: dict[Kind, int], chunk: int, dtype: jax.typing.DTypeLike, fp8_keys: bool, **latents: Any
) -> Layers:
    """Caches of `blocks` of each kind, and the compressors' rows of each slot; the rest as `create_cache` takes it."""
    one_block = create_cache(config, 1, 1, chunk=chunk, dtype=dtype, fp8_keys=fp8_keys, **latents)

    def pool(kind: Kind) -> dsv4.KVCache:
        return dsv4.KVCache.create(blocks[kind], BLOCK_SIZE[kind], **latents)

    def rows(one: Array) -> Array:
        return jnp.zeros((slots, *one.shape[1:]), one.dtype)

    def layer(kind: Kind, one: LayerCache) -> LayerCache:
        if one.compressed is None:
            return LayerCache(pool("swa"))
        indexer = one.compressed.indexer
        if indexer is not None:
            keys = create_keys((blocks["csa"], BLOCK_SIZE["csa"], config.index_head_dim), jnp.float8_e4m3fn if fp8_keys else dtype)
            indexer = IndexCache(keys, rows(indexer.rows))
        return LayerCache(pool("swa"), CompressedCache(pool(kind), rows(one.compressed.rows), indexer))

    return tuple(map(layer, config.layers, one_block.layers))


def map_rows(function: Callable[..., Array], layers: Layers, *others: Layers) -> Layers:
    """`layers` with a function of their compressors' rows in the place of these, which are what a slot has for itself."""

    def of_layer(layer: LayerCache, *others: LayerCache) -> LayerCache:
        if layer.compressed is None:
            return layer
        rest: Any = [other.compressed for other in others]
        indexer = layer.compressed.indexer
        if indexer is not None:
            indexer = indexer._replace(rows=function(indexer.rows, *(other.indexer.rows for other in rest)))
        rows = function(layer.compressed.rows, *(other.rows for other in rest))
        return layer._replace(compressed=layer.compressed._replace(rows=rows, indexer=indexer))

    return tuple(map(of_layer, layers, *others))


def read(
    weights: Any,
    layers: Layers,
    requests: Requests,
    slot: Array,
    tokens: Array,
    count: Array,
    seed: Array,
    *,
    config: Config,
    sampling: Sampling,
    implementation: Implementation,
) -> tuple[Layers, Array]:
    """Runs a chunk of one request's text, and draws what follows its last token.

    Args:
        layers: as `create_layers` makes them. Donated.
        requests: the one that is read.
        slot: int32 [], where the compressors' rows are.
        tokens: int32 [1, chunk].
        count: int32 [], how many of them are real.
    """
    mine = map_rows(lambda rows: lax.dynamic_slice_in_dim(rows, slot, 1), layers)
    one = jnp.ones(1, jnp.int32)
    state = requests.begin(mine, one, one, seed)
    x, cache = forward(weights, state.cache, tokens, count[None], config=config, implementation=implementation)
    last = lax.dynamic_slice_in_dim(x, jnp.maximum(count - 1, 0), 1, axis=1)
    state = draw(state._replace(cache=cache), logits(weights, read_streams(last, weights, config)[:, 0]), sampling, config)

    def back(new: Array, old: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(old, new, slot, axis=0)

    return map_rows(back, cache.layers, layers), state.token


def decode(
    weights: Any,
    layers: Layers,
    requests: Requests,
    token: Array,
    left: Array,
    seed: Array,
    *,
    steps: int,
    config: Config,
    sampling: Sampling,
    implementation: Implementation,
) -> tuple[Layers, Array]:
    """`steps` steps of all slots: int32 tokens [slots, steps], −1 after a request's end.

    Of `requests`, one is in each slot. `token` and `left` are as in `State`; `left` is 0 where there is nothing to draw.
    """
    state = requests.begin(layers, token, left, seed)
    state, drawn = generate(weights, state, steps=steps, config=config, sampling=sampling, implementation=implementation)
    return state.cache.layers, drawn


@cache
def program(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`read` or `decode` with these options, jitted for the default device. Servers of the same options share it."""
    return jax.jit(partial(function, **options), donate_argnames="layers", compiler_options=compiler_options())
