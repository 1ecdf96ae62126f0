"""The example model over 8 devices, on paper: bytes on each, bytes between them, and microseconds. Nothing is allocated.

    python -m benchmarks.scaling_model     the tables of docs/scaling.md

Bytes follow from the shapes, and tests/test_example_mesh.py compares those between devices with the compiled program's. Times are
modelled, a decode step of one token a request, per layer, averaged over the layers:

    read        (weights that the step's tokens use + the indexer's keys) / memory bandwidth
    attention   base + slope * roofline of one device's call, of requests, heads and keys there
    move        for each collective: latency + bytes on the wire / link bandwidth; the wire of n devices takes 2 (n - 1) / n of an
                all-reduce's bytes, (n - 1) / n of an all-gather's result and of a reduce-scatter's argument

Nothing overlaps, and what is not named takes no time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from deepseek_v4.axes import AXES, shares_groups
from deepseek_v4.config import PRESETS, Config, Kind
from deepseek_v4.memory import CONTEXTS, human, nbytes, stored_bytes
from deepseek_v4.mesh import NAMES, devices_along
from deepseek_v4.model import BLOCK_SIZE, create_cache
from deepseek_v4.weights import Tensor, schema

from benchmarks.measure import run

RESULTS = Path(__file__).parent / "results" / "hopper-h200.json"
LATENT_DIM, LATENT_BYTES = 512, 584
USABLE = 0.9  # of a device's memory, for weights and caches
LATENCY_US = 10.0  # of a collective: an assumption, not a measurement
BUSY = 64  # requests of the modelled step, if as many fit


class Device(NamedTuple):
    name: str
    memory: float  # bytes
    gbps: float
    tflops: float  # bf16, dense
    link_gbps: float  # bus bandwidth of an all-reduce


class Collective(NamedTuple):
    """One collective of a decode step, as one device sees it."""

    axes: tuple[str, ...]
    devices: int  # along them
    what: str
    kind: str
    nbytes: int  # of its result
    times: int  # a step

    @property
    def wire_bytes(self) -> float:
        times = {"all-reduce": 2, "reduce-scatter": self.devices}.get(self.kind, 1)
        return self.nbytes * times * (self.devices - 1) / self.devices

    def us(self, link_gbps: float) -> float:
        return self.times * (LATENCY_US + self.wire_bytes / link_gbps / 1e3)


@cache
def measured() -> tuple[Device, float, float]:
    """An H200 as benchmarks/cuda.py found it, and base and slope of a planned call's microseconds over its roofline (least squares of
    the relative errors)."""
    found = json.loads(RESULTS.read_text())
    us, roofline = (np.array(x) for x in zip(*((r["us"]["ours"], r["floor_us"]) for r in found["results"])))
    base, slope = np.linalg.lstsq(np.stack([1 / us, roofline / us], axis=1), np.ones(len(us)))[0]
    # The link: an all-reduce of 1 GiB over 4 H100 of one host, measured elsewhere.
    return Device("H200", 141e9, found["ceilings"]["gbps"], found["ceilings"]["tflops"], 355), float(base), float(slope)


# From AMD's data sheet, nothing measured: 288 GB, 8 TB/s, 2.5 PFLOP/s, 7 links of 76.8 GB/s each way.
MI355X = Device("MI355X", 288e9, 8000, 2500, 537)

# Of a merge over a context.
WAYS = {
    "shares": "parts in float32, in an all-to-all: each device has its share of the heads, or of the requests",
    "shares of half the bytes": "the same, of parts in float16 or bf16",
    "everywhere": "parts in float32 in an all-to-all, the result in bf16 and lse in all-gathers: each device has all",
    "all-reduce": "a maximum of lse, a sum of the weights, a sum of float32 out",
}

MESHES = ((8, 1, 1), (4, 2, 1), (2, 4, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2), (1, 2, 4), (1, 1, 8))


def collectives(config: Config, sizes: dict[str, int], requests: int, max_tokens: int, activation_bytes: int) -> list[Collective]:
    """What moves in a decode step of `requests` requests in all, whose cache has room for `max_tokens` each."""
    here = requests // sizes["data"]  # on a device
    row, layers = config.hidden_size * activation_bytes, config.num_hidden_layers
    compressed = sum(kind != "swa" for kind in config.layers)
    # Of the layers with a compressed cache, the context's devices have a share of the groups of the output projection each, if they can.
    shared = compressed if shares_groups(config.o_groups // sizes["model"], sizes["context"]) else 0
    entries = -(-page_slots(config, sizes["context"], max_tokens) // devices_along(AXES.peers, sizes))
    chosen = here * min(config.index_topk, entries) * devices_along(AXES.peers, sizes)

    def over(axes: tuple[str, ...], *each: tuple[str, str, int, int]) -> list[Collective]:
        return [Collective(axes, devices_along(axes, sizes), *of) for of in each]

    moved = over(
        AXES.data,
        ("numbers of the tokens", "all-gather", 4 * requests, 1),
        ("tokens to the experts", "all-gather", row * requests, layers),
        ("sums of the experts, back", "reduce-scatter", row * here, layers),
    )
    moved += over(
        AXES.peers,
        ("sums of the experts", "all-reduce", row * here, layers),
        ("sums of the output projection, of shared groups", "all-reduce", row * here, shared),
        ("entries that the indexer chose, and their scores", "all-gather", 2 * 4 * chosen, config.layers.count("csa")),
    )
    moved += over(
        AXES.model,
        ("sums of the output projection", "all-reduce", row * here, layers - shared),
        ("logits", "all-gather", 4 * here * config.vocab_size, 1),
    )
    heads = here * config.num_attention_heads // sizes["model"]
    moved += merge(heads, config.head_dim, sizes["context"], compressed, gathered_bytes=0 if shared else activation_bytes)
    return [each for each in moved if each.devices > 1 and each.times]


def merge(rows: int, dim: int, devices: int, times: int, part_bytes: int = 4, gathered_bytes: int = 0) -> list[Collective]:
    """What `merge_over_axis` moves: parts, to the devices that merge them; with `gathered_bytes` a number, the result to all of them."""
    rows = -(-rows // devices) * devices
    over = partial(Collective, AXES.context, devices)
    moved = [over("parts of attention, with lse", "all-to-all", rows * (dim * part_bytes + 4), times)]
    if gathered_bytes:
        moved += [over("attention, and lse", "all-gather", rows * size, times) for size in (dim * gathered_bytes, 4)]
    return moved


def page_slots(config: Config, context: int, max_tokens: int) -> int:
    """Entries of a CSA layer that a request's pages have room for."""
    share = context * BLOCK_SIZE["csa"]
    return -(-max(max_tokens // config.csa_ratio, 1) // share) * share


def device_weights(config: Config, sizes: dict[str, int]) -> int:
    """Bytes on a device, of weights as they are published."""
    tensors = jax.tree.leaves(schema(config), is_leaf=lambda leaf: isinstance(leaf, Tensor))
    return sum(stored_bytes(t) // (1 if t.split is None else devices_along(t.over, sizes)) for t in tensors)


@cache
def device_cache(config: Config, devices: int, peers: int, context: int) -> int:
    """Bytes on a device, of one of its requests' cache, spread over `devices` of a context among `peers`."""
    return nbytes(jax.eval_shape(partial(create_cache, config, 1, context, context=devices, peers=peers)))


def requests_that_fit(config: Config, sizes: dict[str, int], device: Device, context: int) -> int:
    room = USABLE * device.memory - device_weights(config, sizes)
    return max(0, int(room // device_cache(config, sizes["context"], devices_along(AXES.peers, sizes), context))) * sizes["data"]


def attention_us(device: Device, requests: int, heads: int, keys: float) -> float:
    """Modelled microseconds of one device's call."""
    _, base, slope = measured()
    moved = requests * (keys * LATENT_BYTES + heads * LATENT_DIM * 2 * 2)  # packed rows; q and out in bf16
    return base + slope * max(2 * requests * heads * keys * 2 * LATENT_DIM / device.tflops / 1e6, moved / device.gbps / 1e3)


def spread_call(requests: int, heads: int, keys: int, devices: int) -> tuple[float, float, dict[str, float]]:
    """Microseconds of one call on an H200; on each of several, with its share of the keys; and of each way to merge over them, by name.

    Of a merge: its collectives, and what it reads and writes in memory. Attention leaves parts in float32.
    """
    device = measured()[0]
    moved = partial(merge, requests * heads, LATENT_DIM, devices, 1)
    summed = [Collective(AXES.context, devices, "", "all-reduce", requests * heads * size, 1) for size in (4, 4, 4 * LATENT_DIM)]
    # With the bytes for each number of out: parts are packed, and merged.
    ways = {
        "shares": (moved(), 4 + 4 + 4 + 2 / devices),
        "shares of half the bytes": (moved(part_bytes=2), 4 + 2 + 2 + 2 / devices),
        "everywhere": (moved(gathered_bytes=2), 4 + 4 + 4 + 2 / devices + 2 + 2),
        "all-reduce": (summed, 4 + 4 + 4 + 2),
    }
    numbers = requests * heads * LATENT_DIM
    merging = {
        name: sum(c.us(device.link_gbps) for c in way) + numbers * nbytes / device.gbps / 1e3 for name, (way, nbytes) in ways.items()
    }
    return attention_us(device, requests, heads, keys), attention_us(device, requests, heads, keys / devices), merging


def layer_us(config: Config, sizes: dict[str, int], device: Device, requests: int, context: int) -> tuple[float, float, float]:
    """Modelled microseconds a layer: read, attention, move."""
    here, layers = requests // sizes["data"], config.num_hidden_layers
    tensors = jax.tree.leaves(schema(config)["layers"], is_leaf=lambda leaf: isinstance(leaf, Tensor))
    used = 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** requests  # of the routed experts, drawn evenly

    def read(t: Tensor) -> float:
        return stored_bytes(t) / (1 if t.split is None else devices_along(t.over, sizes)) * (used if "*" in t.name else 1)

    entries = here * config.layers.count("csa") * (context // config.csa_ratio)
    keys = entries * config.index_head_dim * 2 / devices_along(AXES.peers, sizes)
    heads = config.num_attention_heads // sizes["model"]

    def attention(kind: Kind) -> float:
        compressed = {"swa": 0, "csa": min(config.index_topk, context // config.csa_ratio), "hca": context // config.hca_ratio}[kind]
        return attention_us(device, here, heads, config.sliding_window + compressed / sizes["context"])

    step = collectives(config, sizes, requests, context, 2)
    moved = sum(c.us(device.link_gbps) for c in step)
    return (sum(map(read, tensors)) + keys) / device.gbps / 1e3 / layers, sum(map(attention, config.layers)) / layers, moved / layers


def tables() -> str:
    """Markdown: bytes between devices for a token, then meshes."""
    h200, base, slope = measured()
    alone, quarter, merging = spread_call(128, 128, 8192, 4)
    lines = _moved()
    lines += [
        "",
        f"Attention on an H200: {base:.1f} µs + {slope:.2f} · roofline. A collective's latency is taken to be {LATENCY_US:.0f} µs. "
        f"One call of 128 requests, 128 heads and 8192 entries: {alone:.0f} µs; over 4 devices of a context {quarter:.0f} "
        "µs and the merge:",
        "",
        "| merge | what moves | µs | times as fast as one device |",
        "|---|---|---:|---:|",
        *(f"| {name} | {WAYS[name]} | {us:.0f} | {alone / (quarter + us):.2f} |" for name, us in merging.items()),
        "",
        "| model, device | data, model, context | weights a device | cache of a request a device: 8k | 128k | 1M "
        "| requests that fit: 8k | 128k | 1M | µs a layer at 128k | read + attention + move |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for device in (h200, MI355X):
        for name in ("v4-flash", "v4-pro"):
            lines += [_row(name, device, dict(zip(NAMES, shape, strict=True))) for shape in MESHES]
    return "\n".join(lines)


def _moved() -> list[str]:
    """Lines of Markdown: each collective of a step, on meshes with one request for each device along `data`."""
    columns = [("v4-flash", (8, 1, 1)), ("v4-flash", (4, 2, 1)), ("v4-flash", (2, 2, 2)), ("v4-pro", (4, 2, 1))]
    steps = []
    for name, shape in columns:
        sizes = dict(zip(NAMES, shape, strict=True))
        steps.append(collectives(PRESETS[name], sizes, sizes["data"], CONTEXTS["128k"], 2))
    header = " | ".join(f"{name}: {', '.join(map(str, shape))}" for name, shape in columns)
    lines = [f"| what moves | collective | along | {header} |", "|---|---|---|" + "---:|" * len(columns)]
    for of in dict.fromkeys((each.axes, each.what, each.kind) for step in steps for each in step):
        found = [[each for each in step if (each.axes, each.what, each.kind) == of] for step in steps]
        cells = [f"{each[0].times} · {sum(e.nbytes for e in each):,}" if each else "" for each in found]
        lines.append(f"| {of[1]} | {of[2]} | {', '.join(of[0])} | {' | '.join(cells)} |")
    for what, total in (("collectives", lambda each: each.times), ("bytes on a device's wire", lambda each: each.times * each.wire_bytes)):
        averages = [sum(map(total, step)) / PRESETS[name].num_hidden_layers for (name, _), step in zip(columns, steps, strict=True)]
        lines.append(f"| **{what}, a layer** | | | {' | '.join(f'{n:,.1f}' if n < 100 else f'{n:,.0f}' for n in averages)} |")
    return lines


def _row(name: str, device: Device, sizes: dict[str, int]) -> str:
    config = PRESETS[name]
    fit = {context: requests_that_fit(config, sizes, device, n) for context, n in CONTEXTS.items()}
    busy = min(BUSY, fit["128k"]) // sizes["data"] * sizes["data"]
    cells = [f"{name}, {device.name}", ", ".join(map(str, sizes.values())), human(device_weights(config, sizes))]
    cells += [human(device_cache(config, sizes["context"], devices_along(AXES.peers, sizes), n)) for n in CONTEXTS.values()]
    cells += [f"{count:,}" for count in fit.values()]
    if busy:
        parts = layer_us(config, sizes, device, busy, CONTEXTS["128k"])
        cells += [f"{sum(parts):.0f} for {busy} requests", " + ".join(f"{part:.0f}" for part in parts)]
    else:
        cells += ["does not fit", ""]
    return f"| {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    print(tables())


if __name__ == "__main__":
    run(main)
