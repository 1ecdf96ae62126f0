"""The CUDA half of `python -m benchmarks.decode --platform cuda`: our kernels, FlashMLA and plain XLA on one GPU, in one run.

A call is timed as a decode step of many layers has it: CALLS calls, each with slots of its own, are repeated for some milliseconds
within one program (a `fori_loop`; for FlashMLA a CUDA graph of as many calls, replayed as often). Several runs of the program are
enqueued; the time from the first one's end to the last one's end, over the number of calls, is the time of a call. All contenders of a
shape are timed in turn, round by round. What running a program costs besides its calls is measured and printed by itself, and so is the
planner. FlashMLA joins if FLASHMLA_LIBRARY names its compiled op (_flashmla_C.abi3.so of the vllm 0.26.0 wheel) and torch is there; it
reads the same bytes.

The roofline is the larger of operations over the rate of an 8192-cubed bf16 product and bytes (packed rows, q, out) over the rate of
a large copy, both measured here.
"""

from __future__ import annotations

import collections
import json
import math
import os
import re
import statistics
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
RUNS = 4  # of a program, enqueued together
RUN_US = 5000
CALLS = 16
XLA_CALLS = 2  # plain XLA takes several times as long
LAYERS = 61  # of a program whose launch is timed


class Shape(NamedTuple):
    heads: int
    tokens: int
    extra: int

    def floor_us(self, ceilings: dict[str, float]) -> float:
        return max(self.flop / ceilings["tflops"] / 1e6, self.nbytes / ceilings["gbps"] / 1e3)

    @property
    def flop(self) -> int:
        return 2 * self.heads * self.tokens * (SWA + self.extra) * 1024

    @property
    def nbytes(self) -> int:
        return self.tokens * ((SWA + self.extra) * 584 + self.heads * 2048)


class Inputs(NamedTuple):
    """What all contenders of a shape are given; every call has indices of its own."""

    caches: dict[str, dsv4.KVCache]
    q: jax.Array
    sink: jax.Array
    lengths: dict[str, jax.Array]
    indices: list[dict[str, jax.Array]]


def make_caches() -> dict[str, dsv4.KVCache]:
    caches = {}
    for i, (name, blocks) in enumerate(BLOCKS.items()):
        rows = jax.random.normal(jax.random.key(i), (blocks * BLOCK, 512), jnp.bfloat16)
        cache = dsv4.KVCache.create(blocks, BLOCK)
        caches[name] = jax.jit(dsv4.append)(cache, rows, jnp.arange(blocks * BLOCK, dtype=jnp.int32))
    return caches


def make_inputs(rng: np.random.Generator, caches: dict[str, dsv4.KVCache], queries: np.ndarray, shape: Shape) -> Inputs:
    topks = {"swa": SWA} | ({"extra": shape.extra} if shape.extra else {})

    def draw(name: str) -> jax.Array:
        return jnp.asarray(rng.integers(0, BLOCKS[name] * BLOCK, (shape.tokens, topks[name])), jnp.int32)

    return Inputs(
        {name: caches[name] for name in topks},
        jnp.asarray(queries[: shape.tokens, : shape.heads], jnp.bfloat16),
        jnp.asarray(rng.standard_normal(shape.heads), jnp.float32),
        {name: jnp.full(shape.tokens, topk, jnp.int32) for name, topk in topks.items()},
        [{name: draw(name) for name in topks} for _ in range(CALLS)],
    )


def make_plan(lengths: dict[str, jax.Array], indices: dict[str, jax.Array], heads: int, **options: Any) -> dsv4.DecodePlan:
    topks = {f"{name}_topk": i.shape[1] for name, i in indices.items()}
    return dsv4.plan_decode(**{f"{name}_lengths": n for name, n in lengths.items()}, num_heads=heads, **topks, **options)


@partial(jax.jit, static_argnames=("implementation", "fused"))  # traced once for all calls of a program
def attend(q: Any, caches: Any, indices: Any, lengths: Any, sink: Any, plan: Any, implementation: str, fused: bool | None = None) -> Any:
    scopes = [dsv4.Scope(caches[name], indices[name], lengths[name]) for name in BLOCKS if name in indices]
    return dsv4.sparse_mla_decode(q, *scopes, attn_sink=sink, plan=plan, implementation=implementation, fused=fused)


def program(inputs: Inputs, steps: int, *, planned: bool, **options: Any) -> Any:
    """A compiled program -> (the output of the first call, that of the last). It makes the first call, then `steps` times all calls.

    A call's queries are the call before's output, as in a model. With `planned` one plan serves all calls, without every call makes its
    own. XLA must not do once, ahead of the loop, what a model does in every call: so a call's lengths come from the plan before (clamped,
    they are the same), and plain XLA's indices depend on the queries.
    """

    def run(inputs: Inputs) -> Any:
        caches, q, sink, lengths, indices = inputs
        shared = make_plan(lengths, indices[0], q.shape[1], **options) if planned else None

        def call(state: Any, indices: Any) -> Any:
            q, swa_lengths = state
            if options["implementation"] == "xla":
                indices = {name: i + (q[0, 0, 0] > 3e38).astype(jnp.int32) for name, i in indices.items()}
            now = lengths | {"swa": swa_lengths}
            plan = shared
            if plan is None:
                plan = make_plan(now, indices, q.shape[1], **options)
                swa_lengths = plan.work[0].kv_lengths
            return attend(q, caches, indices, now, sink, plan, **options), swa_lengths

        def step(_: Any, state: Any) -> Any:
            for i in indices:
                state = call(state, i)
            return state

        first = call((q, lengths["swa"]), indices[0])
        return first[0], jax.lax.fori_loop(0, steps, step, first)[0]

    compiled = jax.jit(run).lower(inputs).compile()
    if options["implementation"] == "cuda":
        scopes = 1 if options.get("fused", True) else len(inputs.caches)
        before, everywhere = (custom_calls(compiled.as_text(), entry) for entry in (True, False))
        assert before == {"dsv4_plan": scopes, "dsv4_decode": scopes}, before
        looped = collections.Counter(dsv4_plan=0 if planned else scopes * CALLS, dsv4_decode=scopes * CALLS)
        assert everywhere - before == looped, everywhere
    return lambda: compiled(inputs)


def custom_calls(hlo: str, entry: bool) -> collections.Counter[str]:
    """How many calls of ours a compiled program has, in its entry computation or in all of it."""
    return collections.Counter(re.findall(r'custom_call_target="(dsv4_\w+)"', hlo[hlo.index("\nENTRY") :] if entry else hlo))


def plan_program(shape: Shape, steps: int) -> Any:
    """As many plans, and nothing else: each from the lengths of the one before."""

    def run(swa: jax.Array, extra: jax.Array) -> Any:
        def step(_: Any, swa: jax.Array) -> jax.Array:
            for _ in range(CALLS):
                plan = dsv4.plan_decode(swa, extra, num_heads=shape.heads, swa_topk=SWA, extra_topk=shape.extra, implementation="cuda")
                swa = plan.work[0].kv_lengths
            return swa

        return jax.lax.fori_loop(0, steps, step, swa)

    lengths = jnp.full(shape.tokens, SWA, jnp.int32), jnp.full(shape.tokens, shape.extra, jnp.int32)
    compiled = jax.jit(run).lower(*lengths).compile()
    assert custom_calls(compiled.as_text(), entry=False)["dsv4_plan"] == CALLS
    return lambda: compiled(*lengths)


def flashmla_programs(inputs: Inputs, steps: int) -> dict[str, Any]:
    """FlashMLA on the same buffers, as CUDA graphs: with its schedule made before, and made by every call. -> name: (run, outputs)"""
    import torch

    if not hasattr(torch.ops._flashmla_C, "sparse_decode_fwd"):
        torch.ops.load_library(os.environ["FLASHMLA_LIBRARY"])
    op = torch.ops._flashmla_C.sparse_decode_fwd
    view = lambda x: torch.from_dlpack(x)  # noqa: E731
    pad = max(0, 64 - inputs.sink.shape[0])  # it takes 64 or 128 heads
    sink = torch.nn.functional.pad(view(inputs.sink), (0, pad))
    q = torch.nn.functional.pad(view(inputs.q), (0, 0, 0, pad)).unsqueeze(1)

    def arguments(indices: dict[str, jax.Array], name: str) -> list[Any]:
        if name not in indices:
            return [None, None, None]
        data = view(inputs.caches[name].data)
        cache = data.as_strided((BLOCKS[name], BLOCK, 1, 584), (data.stride(0), 584, 584, 1))
        return [cache, view(indices[name]).unsqueeze(1), view(inputs.lengths[name])]

    swa, extra = ([arguments(i, name) for i in inputs.indices] for name in ("swa", "extra"))

    def call(i: int, schedule: tuple[Any, Any]) -> Any:
        return op(q, *swa[i], sink, *schedule, *extra[i], 512, 512**-0.5, None)

    schedule = tuple(call(0, (None, None))[2:])
    programs = {}
    for name, given in (("flashmla", schedule), ("flashmla_unplanned", (None, None))):
        eager = call(0, given)[0]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs = [call(i, given)[0] for i in range(len(swa))]

        def run(graph: Any = graph, kept: Any = (q, swa, extra, sink, given, outs)) -> Any:  # a graph keeps addresses, not tensors
            for _ in range(steps):
                graph.replay()
            end = torch.cuda.Event()
            end.record()
            return end

        # A schedule made inside a graph is timed but its results were seen to be wrong on replay: the eager one is checked there.
        programs[name] = (run, eager if given[0] is None else outs[0])
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


def wait_for(kept: Any) -> None:
    """For what a run returned: arrays, or torch's event."""
    if hasattr(kept, "synchronize"):
        kept.synchronize()
    else:
        jax.block_until_ready(kept)


def time_in_turn(programs: dict[str, Any]) -> dict[str, list[float]]:
    """Microseconds a run, per round."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(ROUNDS + 1):  # the first warms up
        for name, run in programs.items():
            kept = [run() for _ in range(RUNS)]
            wait_for(kept[0])
            start = time.perf_counter()
            wait_for(kept[-1])
            if turn:
                times[name].append((time.perf_counter() - start) / (RUNS - 1) * 1e6)
    return times


def measure_launch(inputs: Inputs, peer: bool) -> dict[str, dict[str, float]]:
    """Microseconds that a run of LAYERS calls takes beyond its calls: `next` where runs follow one another, `first` on an idle device.

    "fresh": what the program returns has a new address in every run; "donated": it is given the output of the run before, and returns
    its own in the same place; "graph": FlashMLA's.
    """

    def step(inputs: Inputs, q: Any) -> Any:
        plan = make_plan(inputs.lengths, inputs.indices[0], q.shape[1], implementation="cuda")
        for i in range(LAYERS):
            q = attend(q, inputs.caches, inputs.indices[i % CALLS], inputs.lengths, inputs.sink, plan, implementation="cuda")
        return q

    def again_and_again(donated: tuple[int, ...]) -> Any:
        compiled = jax.jit(step, donate_argnums=donated).lower(inputs, inputs.q).compile()
        state = [inputs.q + 0]

        def run() -> Any:
            state[0] = compiled(inputs, state[0])
            return state[0]

        return run

    def seconds(run: Any, runs: int) -> float:
        start = time.perf_counter()
        for _ in range(runs):
            kept = run()
        wait_for(kept)
        return time.perf_counter() - start

    steps = 20
    programs = {"fresh": again_and_again(()), "donated": again_and_again((1,))}
    calls = dict.fromkeys(programs, statistics.median(time_in_turn({"": program(inputs, steps, planned=True, implementation="cuda")})[""]))
    calls = {name: us * LAYERS / (steps * CALLS + 1) for name, us in calls.items()}
    if peer:
        many, _ = flashmla_programs(inputs, steps)["flashmla"]
        calls["graph"] = statistics.median(time_in_turn({"": many})[""]) / (steps * CALLS) * LAYERS
        programs["graph"], _ = flashmla_programs(inputs._replace(indices=(4 * inputs.indices)[:LAYERS]), 1)["flashmla"]
    launch = {}
    for name, run in programs.items():
        rounds = [(seconds(run, 1), seconds(run, 20), seconds(run, 40)) for _ in range(ROUNDS + 1)][1:]
        first, few, many_runs = (statistics.median(r[i] for r in rounds) * 1e6 for i in range(3))
        launch[name] = {"first": first - calls[name], "next": (many_runs - few) / 20 - calls[name]}
    return launch


class Work(NamedTuple):
    shape: Shape
    inputs: Inputs
    steps: int
    programs: dict[str, Future[Any]]


def submit_all(caches: dict[str, dsv4.KVCache], ceilings: dict[str, float], rng: np.random.Generator) -> list[Work]:
    """Compiles every program, all of them before anything is timed."""
    queries = rng.standard_normal((max(TOKENS), max(HEADS), 512), np.float32)
    work = []
    # Compiling plain XLA's measures candidates on the device: few at a time.
    with ThreadPoolExecutor(os.cpu_count()) as pool, ThreadPoolExecutor(3) as measuring:
        for shape in (Shape(heads, tokens, extra) for extra in EXTRA for heads in HEADS for tokens in TOKENS):
            inputs = make_inputs(rng, caches, queries, shape)
            steps = max(2, round(RUN_US / CALLS / max(13.0, 2 * shape.floor_us(ceilings))))
            programs = {
                "ours": pool.submit(program, inputs, steps, planned=True, implementation="cuda"),
                "ours_unplanned": pool.submit(program, inputs, steps, planned=False, implementation="cuda"),
            }
            if shape.extra == 512:
                programs["per_scope"] = pool.submit(program, inputs, steps, planned=True, implementation="cuda", fused=False)
            if shape.tokens in (1, 32, 128) and shape.extra != 1024:
                few = inputs._replace(indices=inputs.indices[:XLA_CALLS])
                programs["xla"] = measuring.submit(program, few, steps, planned=True, implementation="xla")
            work.append(Work(shape, inputs, steps, programs))
    return work


def run(json_path: Path | None) -> dict[str, Any]:
    peer = "FLASHMLA_LIBRARY" in os.environ
    if peer:
        import torch

    ceilings, caches, rng, results, planner = measure_ceilings(), make_caches(), np.random.default_rng(0), [], []
    report: dict[str, Any] = {
        "device": jax.devices("cuda")[0].device_kind,
        "versions": {"jax": jax.__version__, **({"torch": torch.__version__} if peer else {})},
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m benchmarks.decode " + " ".join(sys.argv[1:]),
        "ceilings": ceilings,
        "planner_us": planner,
        "results": results,
    }
    print(f"{report['device']}; {report['versions']}; {report['date']}; {ceilings['tflops']:.0f} TFLOP/s, {ceilings['gbps']:.0f} GB/s")
    print("heads  keys      tokens |   ours unplanned per-scope | flashmla unplanned |     xla | TFLOP/s  GB/s | of floor", flush=True)
    for shape, inputs, steps, futures in submit_all(caches, ceilings, rng):
        programs = {name: future.result() for name, future in futures.items()}
        first = np.asarray(programs["ours"]()[0], np.float32)
        for name in set(programs) - {"ours"}:
            close(first, np.asarray(programs[name]()[0], np.float32), name)
        if peer:
            for name, (replay, out) in flashmla_programs(inputs, steps).items():
                programs[name] = replay
                wait_for(replay())
                close(first, out[:, 0, : shape.heads].float().cpu().numpy(), name)
        calls = {name: steps * CALLS + (not name.startswith("flashmla")) for name in programs} | {"xla": steps * XLA_CALLS + 1}
        times = {name: [t / calls[name] for t in runs] for name, runs in time_in_turn(programs).items()}
        us = {name: statistics.median(t) for name, t in times.items()}
        floor = shape.floor_us(ceilings)
        results.append({**shape._asdict(), "us": us, "spread_us": {n: [min(t), max(t)] for n, t in times.items()}, "floor_us": floor})
        cell = lambda name, width: f"{us[name]:{width}.1f}" if name in us else " " * width  # noqa: B023, E731
        columns = [cell(n, w) for n, w in (("ours", 6), ("ours_unplanned", 9), ("per_scope", 9))]
        peers = [cell(n, w) for n, w in (("flashmla", 8), ("flashmla_unplanned", 9))]
        rates = f"{shape.flop / us['ours'] / 1e6:7.0f} {shape.nbytes / us['ours'] / 1e3:5.0f} | {us['ours'] / floor:5.1f}x"
        start = f"{shape.heads:5}  128+{shape.extra:<5} {shape.tokens:5}"
        print(start, "|", *columns, "|", *peers, "|", cell("xla", 7), "|", rates, flush=True)
        if json_path:
            json_path.write_text(json.dumps(report, indent=1) + "\n")
    for shape in (Shape(heads, tokens, extra) for heads, extra in ((64, 512), (128, 1024)) for tokens in (*TOKENS, 1024)):
        steps = RUN_US // CALLS // 5
        times = time_in_turn({"plan": plan_program(shape, steps)})["plan"]
        planner.append({**shape._asdict(), "us": statistics.median(times) / steps / CALLS})
    one = make_inputs(rng, caches, rng.standard_normal((1, 64, 512), np.float32), Shape(64, 1, 512))
    report["launch_us"] = measure_launch(one, peer)
    if json_path:
        json_path.write_text(json.dumps(report, indent=1) + "\n")
    return report


def close(got: np.ndarray, want: np.ndarray, name: str) -> None:
    """Both round bf16 weights, at other places: half a per cent of the norm."""
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error < 5e-3, f"ours and {name} differ by {error:.2e}"


def summarise(report: dict[str, Any]) -> list[str]:
    lines, both = [], (512, 1024)

    def line(label: str, ratio: Any, heads: tuple[int, ...], extras: tuple[int, ...], least_tokens: int = 1) -> None:
        rows = [r for r in report["results"] if r["heads"] in heads and r["extra"] in extras and r["tokens"] >= least_tokens]
        ratios = [ratio(r) for r in rows if ratio(r) is not None]
        if ratios:
            mean = math.exp(statistics.fmean(map(math.log, ratios)))
            lines.append(f"{label}: geomean {mean:.2f}x over {len(ratios)} shapes, from {min(ratios):.2f}x to {max(ratios):.2f}x")

    def over(other: str, ours: str) -> Any:
        return lambda r: r["us"][other] / r["us"][ours] if other in r["us"] else None

    line("against FlashMLA, plans reused, 64 and 128 heads, both scopes", over("flashmla", "ours"), (64, 128), both)
    line("against FlashMLA, planning included", over("flashmla_unplanned", "ours_unplanned"), (64, 128), both)
    line("against FlashMLA on padded heads, 16 heads, plans reused", over("flashmla", "ours"), (16,), both)
    line("against plain XLA, 32 tokens and more, planning included", over("xla", "ours_unplanned"), HEADS, EXTRA, 32)
    line("time over roofline, 128 tokens and more, both scopes", lambda r: r["us"]["ours"] / r["floor_us"], (64, 128), both, 128)
    for heads, extra in sorted({(r["heads"], r["extra"]) for r in report["planner_us"]}):
        rows = [r for r in report["planner_us"] if (r["heads"], r["extra"]) == (heads, extra)]
        cells = ", ".join(f"{r['tokens']}: {r['us']:.1f}" for r in rows)
        lines.append(f"the planner alone, {heads} heads, 128+{extra} keys, µs by tokens: {cells}")
    launch = ", ".join(f"{name} {us['next']:.0f} (first {us['first']:.0f})" for name, us in report["launch_us"].items())
    lines.append(f"µs that a run of {LAYERS} calls takes beyond its calls, after another run (and on an idle device): {launch}")
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
