"""Times the example's layers at V4-Flash's widths on a GPU: decode steps at 8k context, and reading a prompt; random weights.

    python -m benchmarks.model [--rounds N] [--only TEXT] [--json FILE]

A step is of V4-Flash's 43 layers, each with caches of its own. There are weights for four, one SWA, two CSA and one HCA, which fit one GPU
in bfloat16 too: layers of a kind have the same, or those of the two CSA ones in turn. Between two uses a step reads more than the GPU's L2
cache holds. The vocabulary has 1,024 tokens, and embedding and head are not timed. Weights are made on the device, in bfloat16 or packed as
DeepSeek publishes them; with packed ones the indexer's keys are in fp8. A decode case makes 48 steps in one call, from position 8,000 on;
two are a trip of its loop. A step's tokens depend on what the step before computed. A time is that of a layer: a 43rd of a step.

The floor of a decode case is the bytes that a step must read, as they are held, over the rate of a large copy: all matrices but the
experts, as many experts as that many random choices hit on average, and each request's cached rows and indexer keys. That of a prompt is
its model FLOPs over the rate of a large bf16 product: two for each weight that a token uses, and attention's and the indexer's products.

The profile of each case groups a step's kernels: what they are for, by name. XLA may run them one by one while it is made; with
XLA_FLAGS=--xla_enable_command_buffers_during_profiling=true it runs its CUDA graphs.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

import jax_dsv4 as dsv4
from benchmarks.measure import Report, compare, medians, options, run, select
from benchmarks.roofline import gpu_ceilings

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from deepseek_v4.config import V4_FLASH, Config
from deepseek_v4.index_keys import Fp8Keys, quantize
from deepseek_v4.memory import nbytes
from deepseek_v4.model import create_cache, forward
from deepseek_v4.packed import Fp4, Fp8
from deepseek_v4.products import compiler_options, in_use
from deepseek_v4.weights import Tensor, map_schema

CONFIG = dataclasses.replace(V4_FLASH, vocab_size=1024)
MADE = dataclasses.replace(CONFIG, layers=("swa", "csa", "hca", "csa"), num_hash_layers=1)
"""The layers that there are weights for."""
POSITION, ROOM, STEPS, TRIP, PROMPT = 8000, 8192, 48, 2, 4096
LATENT_BYTES = 584  # of a cached row


class Case(NamedTuple):
    weights: str
    requests: int
    tokens: int  # of each request, in a step


CASES = {
    **{f"decode-{w}-r{r}": Case(w, r, 1) for w in ("packed", "bf16") for r in (1, 8, 64)},
    **{f"prompt-{w}-{PROMPT}": Case(w, 1, PROMPT) for w in ("packed", "bf16")},
}


# ------------------------------------------------------------------------------------------------------------ random weights


@partial(jax.jit, static_argnums=(0, 1, 2))
def make_leaf(shape: tuple[int, ...], dtype: Any, below: int | None, key: Array) -> Array:
    if below:
        return jax.random.randint(key, shape, 0, below, dtype)
    if len(shape) == 1:
        return jnp.full(shape, 0.5, dtype)
    if dtype == jnp.bfloat16:  # from bits, which is fast: 2^-8 to 2^-5 with either sign
        return lax.bitcast_convert_type((jax.random.bits(key, shape, jnp.uint16) & 0x80FF) | jnp.uint16(0x3C00), dtype)
    return 0.01 * jax.random.normal(key, shape, dtype)


@partial(jax.jit, static_argnums=0)
def make_packed(form: Any, key: Array) -> Any:
    codes = jax.random.bits(key, form.codes.shape, form.codes.dtype)
    if isinstance(form, Fp8):
        return Fp8(codes & 0xBFBF, jnp.full(form.scale.shape, 127 - 6, form.scale.dtype))  # no NaN, numbers under 2
    return Fp4(codes, jnp.full(form.scale.shape, 0x77777777, form.scale.dtype))  # 2^-8


def make_weights(config: Config) -> Any:
    """Random weights, of a size that keeps activations finite."""
    count = 0

    def make(tensor: Tensor) -> Any:
        nonlocal count
        key = jax.random.key(count := count + 1, impl="rbg")
        return (
            make_packed(tensor.packed, key) if tensor.packed else make_leaf(tensor.shape, tensor.dtype or jnp.bfloat16, tensor.below, key)
        )

    return jax.block_until_ready(map_schema(make, config))


def layers_of_a_step(made: Sequence[Any]) -> list[Any]:
    """Weights for each layer of CONFIG, of those that are made for MADE."""
    places = {kind: [i for i, other in enumerate(MADE.layers) if other == kind] for kind in MADE.layers}
    kinds = CONFIG.layers
    return [made[places[kind][kinds[:i].count(kind) % len(places[kind])]] for i, kind in enumerate(kinds)]


# -------------------------------------------------------------------------------------------------------------- the floors


def bytes_of_a_step(weights: Any, config: Config, case: Case) -> float:
    """That a decode step must read of all layers."""
    each = layers_of_a_step(weights["layers"])
    chosen = case.requests * case.tokens
    hit = 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** chosen
    total = 0.0
    for kind, layer in zip(config.layers, each, strict=True):
        experts = nbytes(layer["ffn"]["experts"])
        total += nbytes(layer) - nbytes(layer["ffn"].get("tid2eid", ())) - experts + hit * experts
        rows = config.sliding_window
        rows += {"swa": 0, "csa": config.index_topk, "hca": POSITION // config.hca_ratio}[kind]
        total += case.requests * rows * LATENT_BYTES
        if kind == "csa":
            key = config.index_head_dim + 4 if case.weights == "packed" else 2 * config.index_head_dim
            total += case.requests * POSITION // config.csa_ratio * key
    return total


def flops_of_a_prompt(config: Config, case: Case) -> float:
    """Model FLOPs of all layers: what the mathematics asks for, whatever is computed."""
    tokens, total = case.tokens, 0.0

    def used(tensor: Tensor) -> float:
        if len(tensor.shape) < 2 or tensor.below:
            return 0.0
        share = config.num_experts_per_tok / config.n_routed_experts if tensor.stored == "fp4" else 1.0
        size = 1
        for n in tensor.shape:
            size *= n
        return share * size

    total += 2 * case.requests * tokens * sum(jax.tree.leaves(map_schema(used, config)["layers"]))
    for kind in config.layers:
        rows = sum(min(p + 1, config.sliding_window) for p in range(tokens))
        if kind == "csa":
            rows += sum(min((p + 1) // config.csa_ratio, config.index_topk) for p in range(tokens))
            entries = sum((p + 1) // config.csa_ratio for p in range(tokens))
            total += 2 * entries * config.index_n_heads * config.index_head_dim
        elif kind == "hca":
            rows += sum((p + 1) // config.hca_ratio for p in range(tokens))
        total += 4 * rows * config.num_attention_heads * config.head_dim
    return total


# ------------------------------------------------------------------------------------------------------------ the programs


class Program:
    """Steps of one case, compiled; a turn runs them once."""

    def __init__(self, weights: Any, case: Case) -> None:
        self.weights, self.steps = weights, STEPS if case.tokens == 1 else 1
        start = POSITION if case.tokens == 1 else 0
        tokens = jnp.arange(case.requests * case.tokens, dtype=jnp.int32).reshape(case.requests, -1) * 7 % CONFIG.vocab_size
        counts = jnp.full(case.requests, case.tokens, jnp.int32)
        self.cache = random_keys(create_cache(CONFIG, case.requests, ROOM, chunk=case.tokens, fp8_keys=case.weights == "packed"))

        def run(weights: Any, cache: Any) -> Any:
            weights = weights | {"layers": layers_of_a_step(weights["layers"])}

            def step(carry: Any, _: None) -> tuple[Any, Array]:
                tokens, cache = carry
                x, cache = forward(weights, cache, tokens, counts, config=CONFIG)
                tokens = (5 * tokens + 1 + (x[:, :, 0, 0] > 0)) % CONFIG.vocab_size
                return (tokens, cache), jnp.isfinite(x[:, -1]).all()

            cache = cache._replace(position=jnp.full(case.requests, start, jnp.int32))
            (_, cache), finite = lax.scan(step, (tokens, cache), length=self.steps, unroll=min(TRIP, self.steps))
            return cache, finite.all()

        self.run = jax.jit(run, donate_argnums=1, compiler_options=compiler_options()).lower(weights, self.cache).compile()
        self()

    def __call__(self) -> list[float]:
        """Microseconds a layer."""
        began = time.perf_counter()
        self.cache, finite = jax.block_until_ready(self.run(self.weights, self.cache))
        us = 1e6 * (time.perf_counter() - began) / self.steps / len(CONFIG.layers)
        if not finite:
            raise ValueError("the layers compute numbers that are not finite")
        return [us]


def random_keys(cache: Any) -> Any:
    """With keys in it for an indexer to choose among."""

    def fill(layer: Any) -> Any:
        if layer.compressed is None or layer.compressed.indexer is None:
            return layer
        indexer = layer.compressed.indexer
        codes = jax.tree.leaves(indexer.keys)[0]
        numbers = jax.random.normal(jax.random.key(0), codes.shape, jnp.float32)
        keys = quantize(numbers) if isinstance(indexer.keys, Fp8Keys) else numbers.astype(codes.dtype)
        return layer._replace(compressed=layer.compressed._replace(indexer=indexer._replace(keys=keys)))

    return cache._replace(layers=tuple(map(fill, cache.layers)))


# ------------------------------------------------------------------------------------------------------------- the profile

GROUPS = (
    ("attention", ("jax_dsv4", "dsv4")),
    ("experts", ("experts_",)),
    ("dense products", ("dense_", "gemm", "nvjet", "cublas", "cutlass", "xmma", "splitK")),
    ("indexer", ("score_", "best_", "sort", "topk", "TopK", "radix", "Radix")),
    ("hyper-connections", ("streams_",)),
)
"""What a kernel is for, by what its name contains; the first that fits. All others are XLA's fusions."""


MAIN = 3
"""The groups, at the front, that a step should be spending its time on."""


def profile(program: Program) -> dict[str, Any]:
    """A call's kernels: microseconds a layer and kernels a layer, by group, and the largest ones. And what part of the time in which the
    GPU was busy one of the MAIN groups' kernels was running."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            program()
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    lines = (line for plane in data.planes if "GPU" in plane.name for line in plane.lines if "Stream" in line.name)
    events = [(event.name, event.start_ns, event.duration_ns) for line in lines for event in line.events]
    return summary(events, program.steps * len(CONFIG.layers))


def summary(events: Sequence[tuple[str, float, float]], per: int) -> dict[str, Any]:
    """Of kernels: names, begins and durations in nanoseconds."""
    kernels: dict[str, list[float]] = {}
    groups: dict[str, list[float]] = {}
    main: list[tuple[float, float]] = []
    for name, start, duration in events:
        number = next((i for i, (_, parts) in enumerate(GROUPS) if any(part in name for part in parts)), len(GROUPS))
        for found in (kernels.setdefault(name, [0.0, 0.0]), groups.setdefault((*dict(GROUPS), "others")[number], [0.0, 0.0])):
            found[0] += duration / 1e3 / per
            found[1] += 1 / per
        if number < MAIN:
            main.append((start, start + duration))
    busy = covered((start, start + duration) for _, start, duration in events)
    largest = sorted(kernels.items(), key=lambda item: -item[1][0])[:25]
    rounded = lambda items: {name[:90]: {"us": round(us, 2), "kernels": round(times, 2)} for name, (us, times) in items}  # noqa: E731
    by_time = sorted(groups.items(), key=lambda item: -item[1][0])
    return {"groups": rounded(by_time), "main_of_busy": covered(main) / busy if busy else 0.0, "largest": rounded(largest)}


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """How much is in at least one of them."""
    total, end = 0.0, -math.inf
    for first, last in sorted(spans):
        total += max(last - max(first, end), 0)
        end = max(end, last)
    return total


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__, rounds=5)
    arguments, names = select(parser, argv, [*CASES])
    cuda = dsv4.implementations()["cuda"]
    if not cuda.available:
        parser.error(f"needs implementation 'cuda': {cuda.detail}")
    jax.config.update("jax_numpy_rank_promotion", "allow")
    ceilings = gpu_ceilings()
    device = jax.devices("cuda")[0].device_kind
    settings = dict(products=in_use(), compiler_options=compiler_options(), layers=CONFIG.layers, made=MADE.layers)
    report = Report(arguments.json, argv, device, ceilings=ceilings, **settings, results=[])
    print(f"{report}; {ceilings['tflops']:.0f} TFLOP/s, {ceilings['gbps']:.0f} GB/s; microseconds a layer", flush=True)
    print(f"XLA's options, besides its defaults: {compiler_options()}", flush=True)
    for form in ("packed", "bf16"):
        if not any(CASES[name].weights == form for name in names):
            continue
        weights = make_weights(dataclasses.replace(MADE, packed=form == "packed"))
        for name in names:
            case = CASES[name]
            if case.weights == form:
                measure(name, case, weights, report, arguments.rounds)
        del weights
    report.end()


def measure(name: str, case: Case, weights: Any, report: Report, rounds: int) -> None:
    made: list[Program] = []

    def prepare() -> Callable[[], list[float]]:
        made.append(Program(weights, case))
        return made[0]

    times, failed = compare({"layer": prepare}, rounds)
    row: dict[str, Any] = {"case": name, **case._asdict(), "us": medians(times)}
    numbers = dict(row["us"])
    if times:
        if case.tokens == 1:
            row["bytes"] = bytes_of_a_step(weights, CONFIG, case)
            floor = row["bytes"] / report.found["ceilings"]["gbps"] / 1e3 / len(CONFIG.layers)
        else:
            row["flops"] = flops_of_a_prompt(CONFIG, case)
            floor = row["flops"] / report.found["ceilings"]["tflops"] / 1e6 / len(CONFIG.layers)
        row |= {"floor_us": floor, "held_bytes": nbytes(weights["layers"]), "profile": profile(made[0])}
        numbers |= {"floor": floor, "ratio": row["us"]["layer"] / floor}
    report.found["results"].append(row)
    report.note(name, numbers, failed)
    for group, found in row.get("profile", {}).get("groups", {}).items():
        print(f"    {group:20} {found['us']:9.1f} us {found['kernels']:7.1f} kernels", flush=True)
    if "profile" in row:
        main = ", ".join(name for name, _ in GROUPS[:MAIN])
        print(f"    {main}: {row['profile']['main_of_busy']:.0%} of the time that the GPU was busy", flush=True)


if __name__ == "__main__":
    run(main)
