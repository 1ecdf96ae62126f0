"""The model over a mesh of devices: which axis splits what, and programs that run on each device with its part.

    data                   requests, with all that is remembered of them
    model                  heads, groups of the output projection, vocabulary
    context                the compressed caches' blocks
    model, context         the shared expert's inner size, the indexer's keys
    data, model, context   experts

`Tensor.split` and `Tensor.over` say it of the weights, `cache_specs` of the cache. A device runs deepseek_v4/model.py on its part, inside
`jax.shard_map`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_v4 import memory
from deepseek_v4.axes import AXES, ONE_DEVICE
from deepseek_v4.config import Config, Kind
from deepseek_v4.generate import Sampling, State, attend, generate, prefill
from deepseek_v4.model import Cache, CompressedCache, Implementation, IndexCache, LayerCache, create_cache
from deepseek_v4.products import compiler_options
from deepseek_v4.speculate import Draft, one_layer
from deepseek_v4.weights import Tensor, map_schema, schema

NAMES = AXES.every
REQUESTS = P(AXES.data)


class MeshError(Exception):
    """Such a mesh or such processes cannot be had, or the model cannot be spread over them. The message is one line."""


def parse_mesh(text: str) -> dict[str, int]:
    """The size of each axis, from "data=2,model=2,context=2"; an axis that is left out has size 1."""
    sizes = dict.fromkeys(NAMES, 1)
    given = [item.partition("=") for item in text.split(",")]
    for name, _, size in given:
        if name not in NAMES:
            raise MeshError(f"a mesh has the axes {', '.join(NAMES)}, got {name!r} in {text!r}")
        if not size.isdecimal() or int(size) < 1:
            raise MeshError(f"the axis {name} must have a size of at least 1, as in {name}=2, got {text!r}")
        sizes[name] = int(size)
    if len({name for name, *_ in given}) < len(given):
        raise MeshError(f"each axis must be named once, got {text!r}")
    return sizes


def cannot_split(sizes: dict[str, int], config: Config, requests: int) -> str | None:
    """What the axes do not divide, if anything."""
    for axes, what, count in (
        (AXES.data, "requests", requests),
        (AXES.model, "query heads", config.num_attention_heads),
        (AXES.model, "groups of the output projection", config.o_groups),
        (AXES.model, "words of the vocabulary", config.vocab_size),
        (AXES.peers, "numbers inside an expert", config.moe_intermediate_size),
        (AXES.every, "experts", config.n_routed_experts),
    ):
        if count % devices_along(axes, sizes):
            named = [f"{axis}={sizes[axis]}" for axis in axes if sizes[axis] > 1]
            return f"the {'product of the axes' if len(named) > 1 else 'axis'} {', '.join(named)} must divide the {count} {what}"
    peers = devices_along(AXES.peers, sizes)
    if peers == 1:
        return None
    for tensor in jax.tree.leaves(schema(config), is_leaf=lambda leaf: isinstance(leaf, Tensor)):
        if tensor.packed and tensor.stored == "fp8" and tensor.split is not None and tensor.shape[tensor.split] % (128 * peers):
            return f"{peers} devices must leave whole blocks of 128 of {tensor.name}, of {tensor.shape}: --weights bf16 has no blocks"
    return None


def devices_along(axes: Iterable[str], sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[axis] for axis in axes)


def bytes_per_device(config: Config, sizes: dict[str, int], requests: int, max_tokens: int, options: dict[str, Any]) -> tuple[int, int]:
    """Of the weights and of the cache; `options` as `create_cache` takes them, whose dtype is the weights' too."""

    def part(tensor: Tensor) -> int:
        return memory.nbytes(tensor.struct(options["dtype"])) // (1 if tensor.split is None else devices_along(tensor.over, sizes))

    create = partial(create_cache, config, requests // sizes["data"], max_tokens, **cache_split(sizes), **options)
    return sum(jax.tree.leaves(map_schema(part, config))), memory.nbytes(jax.eval_shape(create))


def cache_split(sizes: Mapping[str, int]) -> dict[str, Any]:
    """Arguments of `create_cache`: how many devices a part of it is on."""
    return {"context": sizes["context"], "peers": devices_along(AXES.peers, sizes)}


def fitting_mesh(room: int, config: Config, requests: int, max_tokens: int, options: dict[str, Any]) -> dict[str, int] | None:
    """The mesh of the fewest devices, up to 64, of `room` bytes each that holds weights and cache, if there is one.

    Of several the one with the most along `data`, then along `model`: these keep no request's latents twice, or move the least.
    """
    powers = [2**i for i in range(7)]
    every = ({"data": data, "model": model, "context": context} for data, model, context in itertools.product(powers, repeat=3))
    possible = [sizes for sizes in every if math.prod(sizes.values()) <= 64 and not cannot_split(sizes, config, requests)]
    possible.sort(key=lambda sizes: (math.prod(sizes.values()), -sizes["data"], -sizes["model"]))
    fitting = (sizes for sizes in possible if sum(bytes_per_device(config, sizes, requests, max_tokens, options)) <= room)
    return next(fitting, None)


def create_mesh(sizes: dict[str, int], config: Config, requests: int) -> jax.sharding.Mesh:
    """The mesh, once it is sure that everything can be spread over it."""
    if reason := cannot_split(sizes, config, requests):
        raise MeshError(reason)
    wanted, there = int(np.prod(list(sizes.values()))), jax.device_count()
    if wanted > there:
        asked = ",".join(f"{name}={size}" for name, size in sizes.items())
        virtual = (
            f"; XLA_FLAGS=--xla_force_host_platform_device_count={wanted} makes virtual ones" if jax.default_backend() == "cpu" else ""
        )
        raise MeshError(f"the mesh {asked} needs {wanted} devices, and there are {there}{virtual}")
    if wanted < there and jax.process_count() > 1:
        raise MeshError(f"a mesh of {jax.process_count()} processes must take all of their {there} devices, got {wanted}")
    devices = np.array(jax.devices()[:wanted]).reshape(*sizes.values())
    return jax.sharding.Mesh(devices, NAMES)


def weight_spec(tensor: Tensor) -> P:
    return P() if tensor.split is None else P(*[None] * tensor.split, tensor.over)


def cache_specs(config: Config) -> Cache:
    """A `Cache` of partitions."""
    # A tree of partitions has the tree's types, and partitions where those say arrays.
    requests: Any = REQUESTS
    blocks: Any = P((*AXES.data, *AXES.context))
    keys: Any = P(AXES.data, AXES.peers)  # and of their scales, where they have any

    def layer(kind: Kind) -> LayerCache:
        indexer = IndexCache(keys, requests) if kind == "csa" else None
        return LayerCache(requests, None if kind == "swa" else CompressedCache(blocks, requests, indexer))

    kinds: set[Kind] = {"swa", *config.layers}
    return Cache(tuple(map(layer, config.layers)), dict.fromkeys(kinds, requests), requests)


class Programs:
    """The loop's programs, each compiled for a mesh or, without one, for the default device."""

    def __init__(self, config: Config, mesh: jax.sharding.Mesh | None, sampling: Sampling, implementation: Implementation):
        self.config, self.mesh, self.sampling = config, mesh, sampling
        self.options: Any = dict(config=config, implementation=implementation, axes=AXES if mesh else ONE_DEVICE)
        self.weights = map_schema(weight_spec, config)
        self.cache = cache_specs(config)
        requests: Any = REQUESTS
        self.ahead = cache_specs(one_layer(config)) if config.mtp else None
        self.state = State(self.cache, requests, requests, requests, Draft(self.ahead, requests) if self.ahead else None)

    def over(self, function: Callable[..., Any], in_specs: Any, out_specs: Any, donate: tuple[int, ...] = ()) -> Any:
        if self.mesh:
            # That devices have something in common, such as the logits after a gather, is not tracked through the loops.
            function = jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return jax.jit(function, donate_argnums=donate, compiler_options=None if self.mesh else compiler_options())

    def create_cache(self, requests: int, max_tokens: int, **options: Any) -> Cache:
        sizes = self.mesh.shape if self.mesh else dict.fromkeys(NAMES, 1)
        create = partial(create_cache, self.config, requests // sizes["data"], max_tokens, **cache_split(sizes), **options)
        return self.over(create, (), self.cache)()

    def create_ahead(self, requests: int, max_tokens: int, **options: Any) -> Cache | None:
        """The cache of the layer that drafts, if there is one."""
        data = self.mesh.shape["data"] if self.mesh else 1
        create = partial(create_cache, one_layer(self.config), requests // data, max_tokens, **options)
        return self.over(create, (), self.ahead)() if self.ahead else None

    def prefill(self, chunk: int) -> Any:
        run = partial(prefill, sampling=self.sampling, chunk=chunk, **self.options)
        specs = (self.weights, self.cache, REQUESTS, REQUESTS, REQUESTS, P())
        return self.over(run, (*specs, self.ahead) if self.ahead else specs, self.state, donate=(1, 6) if self.ahead else (1,))

    def generate(self, steps: int) -> Any:
        run = partial(generate, sampling=self.sampling, steps=steps, **self.options)
        return self.over(run, (self.weights, self.state), (self.state, REQUESTS), donate=(1,))

    def attend(self, dtype: jax.typing.DTypeLike) -> Any:
        return self.over(partial(attend, dtype=dtype, **self.options), (self.cache,), P())  # each device's own sum: nobody looks at it

    def place(self, array: Any, spec: P) -> Any:
        """An array that every process has, as one over the mesh."""
        array = np.asarray(array)
        if self.mesh is None:
            return array
        return jax.make_array_from_callback(array.shape, NamedSharding(self.mesh, spec), lambda i: array[i])

    def fetch(self, array: jax.Array) -> np.ndarray:
        """All of an array of the mesh, on every process."""
        return multihost_utils.process_allgather(array, tiled=True) if self.mesh else np.asarray(array)

    @property
    def sharding(self) -> Callable[[Tensor], NamedSharding] | None:
        """Where each of the weights goes."""
        mesh = self.mesh
        return (lambda tensor: NamedSharding(mesh, weight_spec(tensor))) if mesh else None
