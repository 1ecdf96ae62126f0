"""The CUDA half of `python -m benchmarks.decode --platform cuda`: our kernels, FlashMLA and plain XLA on one GPU, in one run.

Every contender runs calls of the same kind back to back, each with slots of its own (so rows come from memory, not from the
last call's cache), as one CUDA graph or one captured XLA program; the time of a call is the program's time over their number. All are
timed in turn, round by round. FlashMLA joins if FLASHMLA_LIBRARY names its compiled op (_flashmla_C.abi3.so of the vllm 0.26.0 wheel)
and torch is there; it reads the same bytes.

The roofline is the larger of operations over the rate of an 8192-cubed bf16 product and bytes (packed rows, q, out) over the rate of
a large copy, both measured here.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_dsv4 as dsv4

TOKENS = (1, 2, 8, 32, 64, 128, 256)
HEADS = (64, 128, 16)
EXTRA = (512, 1024, 0)
SWA = 128
BLOCK = 64
BLOCKS = {"swa": 1024, "extra": 2048}  # together 115 MB of rows: more than the L2 holds
ROUNDS = 5


def calls_of(tokens: int) -> int:
    """Calls in a program: enough that launching it costs nothing beside it."""
    return 32 if tokens <= 8 else 16 if tokens <= 64 else 8


def make_caches() -> dict[str, dsv4.KVCache]:
    caches = {}
    for i, (name, blocks) in enumerate(BLOCKS.items()):
        rows = jax.random.normal(jax.random.key(i), (blocks * BLOCK, 512), jnp.bfloat16)
        cache = dsv4.KVCache.create(blocks, BLOCK)
        caches[name] = jax.jit(dsv4.append)(cache, rows, jnp.arange(blocks * BLOCK, dtype=jnp.int32))
    return caches


def make_calls(rng: np.random.Generator, tokens: int, heads: int, extra: int, count: int) -> list[dict[str, jax.Array]]:
    def scope(name: str, topk: int) -> dict[str, jax.Array]:
        slots = rng.integers(0, BLOCKS[name] * BLOCK, (tokens, topk))
        return {f"{name}_indices": jnp.asarray(slots, jnp.int32), f"{name}_lengths": jnp.full(tokens, topk, jnp.int32)}

    calls = []
    for _ in range(count):
        call = {"q": jnp.asarray(rng.standard_normal((tokens, heads, 512), np.float32), jnp.bfloat16), **scope("swa", SWA)}
        calls.append({**call, **(scope("extra", extra) if extra else {})})
    return calls


def program(caches: dict[str, dsv4.KVCache], calls: list[dict[str, jax.Array]], sink: jax.Array, *, planned: bool, **options: Any) -> Any:
    """A compiled program of all calls -> the first and the last output; with `planned`, one plan serves them all.

    A call's queries are the call before's output, as in a model. What a program returns has new addresses every time, and XLA updates
    its graph for each: only temporaries are free.
    """

    def run(caches: Any, calls: Any, sink: Any) -> Any:
        plan, outs = None, []
        for call in calls:
            q = outs[-1] if outs else call["q"]
            scopes = [dsv4.Scope(caches[n], call[f"{n}_indices"], call[f"{n}_lengths"]) for n in BLOCKS if f"{n}_indices" in call]
            if planned and plan is None:
                extra = {"extra_lengths": scopes[1].lengths, "extra_topk": scopes[1].indices.shape[1]} if len(scopes) > 1 else {}
                plan = dsv4.plan_decode(scopes[0].lengths, num_heads=sink.shape[0], swa_topk=SWA, **extra, **options)
            outs.append(dsv4.sparse_mla_decode(q, *scopes, attn_sink=sink, plan=plan, **options))
        return outs[0], outs[-1]

    compiled = jax.jit(run).lower(caches, calls, sink).compile()
    return lambda: compiled(caches, calls, sink)


def flashmla_programs(caches: dict[str, dsv4.KVCache], calls: list[dict[str, jax.Array]], sink: jax.Array) -> dict[str, Any]:
    """FlashMLA on the same buffers, as CUDA graphs: with its schedule made before, and made by every call."""
    import torch

    if not hasattr(torch.ops._flashmla_C, "sparse_decode_fwd"):
        torch.ops.load_library(os.environ["FLASHMLA_LIBRARY"])
    op = torch.ops._flashmla_C.sparse_decode_fwd
    view = lambda x: torch.from_dlpack(x)  # noqa: E731
    pad = max(0, 64 - sink.shape[0])  # it takes 64 or 128 heads
    torch_sink = torch.nn.functional.pad(view(sink), (0, pad))

    def arguments(call: dict[str, jax.Array], name: str) -> list[Any]:
        if f"{name}_indices" not in call:
            return [None, None, None]
        data = view(caches[name].data)
        cache = data.as_strided((BLOCKS[name], BLOCK, 1, 584), (data.stride(0), 584, 584, 1))
        return [cache, view(call[f"{name}_indices"]).unsqueeze(1), view(call[f"{name}_lengths"])]

    queries = [torch.nn.functional.pad(view(c["q"]), (0, 0, 0, pad)).unsqueeze(1) for c in calls]
    swa, extra = ([arguments(c, name) for c in calls] for name in ("swa", "extra"))

    def call(i: int, schedule: tuple[Any, Any]) -> Any:
        return op(queries[i], *swa[i], torch_sink, *schedule, *extra[i], 512, 512**-0.5, None)

    schedule = tuple(call(0, (None, None))[2:])
    programs = {}
    for name, given in (("flashmla", schedule), ("flashmla_unplanned", (None, None))):
        eager = [call(i, given)[0] for i in range(2)]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs = [call(i, given)[0] for i in range(len(calls))]
        # A schedule made inside a graph is timed but its results were seen to be wrong on replay: the eager ones are checked there.
        programs[name] = (graph.replay, eager if given[0] is None else outs)
    return programs


def measure_ceilings() -> dict[str, float]:
    """TFLOP/s of a large bf16 product and GB/s, read and written, of a large copy."""
    a = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    x = jnp.zeros(2**28, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    seconds = {}
    for name, call in (("product", lambda: product(a)), ("copy", lambda: copy(x))):
        call().block_until_ready()
        times = []
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(10):
                out = call()
            out.block_until_ready()
            times.append((time.perf_counter() - start) / 10)
        seconds[name] = statistics.median(times)
    return {"tflops": 2 * 8192**3 / seconds["product"] / 1e12, "gbps": 2 * x.nbytes / seconds["copy"] / 1e9}


def time_in_turn(programs: dict[str, Any], calls: int, synchronise: Any) -> dict[str, list[float]]:
    """Microseconds a call, per round."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(ROUNDS + 1):  # the first warms up
        for name, run in programs.items():
            repeats = 2 if name.startswith("xla") else 5
            start = time.perf_counter()
            for _ in range(repeats):
                kept = run()
            synchronise(kept)
            if turn:
                times[name].append((time.perf_counter() - start) / repeats / calls * 1e6)
    return times


def run(json_path: Path | None) -> dict[str, Any]:
    peer = "FLASHMLA_LIBRARY" in os.environ
    if peer:
        import torch

    def synchronise(kept: Any) -> None:
        jax.block_until_ready(kept)
        if peer:
            torch.cuda.synchronize()

    ceilings, caches, rng, results = measure_ceilings(), make_caches(), np.random.default_rng(0), []
    device = jax.devices("cuda")[0]
    report = {
        "device": device.device_kind,
        "versions": {"jax": jax.__version__, **({"torch": torch.__version__} if peer else {})},
        "date": time.strftime("%Y-%m-%d"),
        "ceilings": ceilings,
        "results": results,
    }
    print(f"{report['device']}; {report['versions']}; {report['date']}; {ceilings['tflops']:.0f} TFLOP/s, {ceilings['gbps']:.0f} GB/s")
    print("heads  keys      tokens |   ours unplanned per-scope | flashmla unplanned |     xla | TFLOP/s  GB/s | of floor")
    with ThreadPoolExecutor(4) as pool:
        for extra in EXTRA:
            for heads in HEADS:
                sink = jnp.asarray(rng.standard_normal(heads), jnp.float32)
                for tokens in TOKENS:
                    calls = make_calls(rng, tokens, heads, extra, calls_of(tokens))
                    args = (caches if extra else {"swa": caches["swa"]}, calls, sink)
                    making = {
                        "ours": pool.submit(program, *args, planned=True, implementation="cuda"),
                        "ours_unplanned": pool.submit(program, *args, planned=False, implementation="cuda"),
                    }
                    if extra == 512:
                        making["per_scope"] = pool.submit(program, *args, planned=True, implementation="cuda", fused=False)
                    if tokens in (1, 32, 128) and extra != 1024:
                        few = (args[0], calls[:4], sink)
                        making["xla"] = pool.submit(program, *few, planned=False, implementation="xla")
                    programs = {name: future.result() for name, future in making.items()}
                    first = np.asarray(programs["ours"]()[0], np.float32)
                    if peer:
                        for name, (replay, outs) in flashmla_programs(*args).items():
                            programs[name] = replay
                            replay()
                            torch.cuda.synchronize()
                            close(first, outs[0][:, 0, :heads].float().cpu().numpy(), name)
                    if "xla" in programs:
                        close(first, np.asarray(programs["xla"]()[0], np.float32), "xla")
                    times = time_in_turn(programs, len(calls), synchronise)
                    if "xla" in times:
                        times["xla"] = [t * len(calls) / 4 for t in times["xla"]]
                    us = {name: statistics.median(t) for name, t in times.items()}
                    keys = SWA + extra
                    flop, size = 2 * heads * tokens * keys * 1024, tokens * (keys * 584 + heads * 2048)
                    floor = max(flop / ceilings["tflops"] / 1e6, size / ceilings["gbps"] / 1e3)
                    spread = {name: [min(t), max(t)] for name, t in times.items()}
                    results.append({"heads": heads, "extra": extra, "tokens": tokens, "us": us, "spread_us": spread, "floor_us": floor})
                    cell = lambda name, width: f"{us[name]:{width}.1f}" if name in us else " " * width  # noqa: B023, E731
                    print(
                        f"{heads:5}  128+{extra:<5} {tokens:5} | {cell('ours', 6)} {cell('ours_unplanned', 9)} {cell('per_scope', 9)} | "
                        f"{cell('flashmla', 8)} {cell('flashmla_unplanned', 9)} | {cell('xla', 7)} | {flop / us['ours'] / 1e6:7.0f} "
                        f"{size / us['ours'] / 1e3:5.0f} | {us['ours'] / floor:5.1f}x",
                        flush=True,
                    )
                    if json_path:
                        json_path.write_text(json.dumps(report, indent=1) + "\n")
    return report


def close(got: np.ndarray, want: np.ndarray, name: str) -> None:
    """Both round bf16 weights, at other places: half a per cent of the norm."""
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error < 5e-3, f"ours and {name} differ by {error:.2e}"


def summarise(report: dict[str, Any]) -> list[str]:
    lines = []
    for label, heads, extras, ours, other in (
        ("FlashMLA, plans reused, 64 and 128 heads, both scopes", (64, 128), (512, 1024), "ours", "flashmla"),
        ("FlashMLA, planning included", (64, 128), (512, 1024), "ours_unplanned", "flashmla_unplanned"),
        ("FlashMLA on padded heads, 16 heads, plans reused", (16,), (512, 1024), "ours", "flashmla"),
        ("plain XLA, 32 tokens and more", (16, 64, 128), (512, 0), "ours_unplanned", "xla"),
    ):
        ratios = [
            r["us"][other] / r["us"][ours]
            for r in report["results"]
            if r["heads"] in heads and r["extra"] in extras and other in r["us"] and (other != "xla" or r["tokens"] >= 32)
        ]
        if ratios:
            mean = math.exp(statistics.fmean(map(math.log, ratios)))
            lines.append(f"against {label}: geomean {mean:.2f}x over {len(ratios)} shapes, from {min(ratios):.2f}x to {max(ratios):.2f}x")
    return lines


def plot(report: dict[str, Any], path: Path) -> None:
    """Microseconds against tokens, 128+512 keys."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), sharey=True)
    for axis, heads in zip(axes, HEADS):
        rows = [r for r in report["results"] if r["heads"] == heads and r["extra"] == 512]
        for name, label in (("ours", "jax-dsv4"), ("flashmla", "FlashMLA"), ("xla", "plain XLA")):
            points = [(r["tokens"], r["us"][name]) for r in rows if name in r["us"]]
            if points:
                axis.plot(*zip(*points), marker="o", label=label)
        axis.plot([r["tokens"] for r in rows], [r["floor_us"] for r in rows], linestyle=":", color="grey", label="roofline")
        axis.set(xscale="log", yscale="log", title=f"{heads} heads, 128+512 keys", xlabel="tokens")
        axis.set_xticks(TOKENS, labels=map(str, TOKENS))
    axes[0].set_ylabel(f"µs a call, {report['device']}")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path)


def main(json_path: Path | None) -> None:
    report = run(json_path)
    for line in summarise(report):
        print(line)
    if json_path:
        plot(report, json_path.with_suffix(".svg"))
