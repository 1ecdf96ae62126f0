"""Verifies, then times sparse_mla_decode against what a JAX user could write instead, in one run on one machine.

    python -m benchmarks.decode [--rounds N] [--only TEXT] [--json FILE] [--platform cuda]

Per case: our op, planning included, and the two best forms in plain JAX: a batched gather, and `lax.map` over tokens. All are called
in turn, round by round (once untimed, then three times), so that a slow spell of the machine hits them alike; medians are compared.
GFLOP/s counts 2 * tokens * heads * keys * (512 + 512) operations; the FMA peak is measured between the rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np

import jax_dsv4 as dsv4
from jax_dsv4._implementations import xla

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from cases import Case, Problem, make, tagged
from compare import LSE, OUT_BF16, assert_close

from benchmarks import hopper
from benchmarks.roofline import fma_meter

PEERS = ("xla_batched", "xla_map")


def contenders(case: Case, problem: Problem) -> dict[str, Callable[[], Any]]:
    """Name -> a call that returns (out, lse)."""
    ours = jax.jit(partial(dsv4.sparse_mla_decode, return_lse=True))

    def plain(form: Any) -> Any:
        def call(q: Any, swa: Any, extra: Any, sink: Any) -> Any:
            out, lse = form(q, (swa, extra), sink)
            return out.astype(q.dtype), lse

        return jax.jit(call)

    operands = (problem.q, problem.swa, problem.extra)
    sink = problem.attn_sink
    batched = plain(partial(xla.attend_batched, scale=case.scale))
    by_token = plain(partial(xla.attend_by_token, scale=case.scale))
    return {
        "ours": lambda: ours(*operands, attn_sink=sink),
        "xla_batched": lambda: batched(*operands, sink),
        "xla_map": lambda: by_token(*operands, sink),
    }


def time_case(case: Case, rounds: int, peak: Callable[[], float]) -> dict[str, Any]:
    problem = make(case)
    calls = contenders(case, problem)
    for name, call in calls.items():
        out, lse = jax.block_until_ready(call())
        assert_close(f"{case} {name} out", out, problem.out, OUT_BF16)
        assert_close(f"{case} {name} lse", lse, problem.lse, LSE)
    times: dict[str, list[float]] = {name: [] for name in calls}
    peaks = []
    order = list(calls)
    for _ in range(rounds):
        peaks.append(peak())
        order.append(order.pop(0))  # or one of them would always be the first after the peak's measurement
        for name in order:
            call = calls[name]
            jax.block_until_ready(call())  # what the others left in the caches and the allocator is not this one's to pay
            for _ in range(3):
                start = time.perf_counter()
                jax.block_until_ready(call())
                times[name].append((time.perf_counter() - start) * 1e3)
    medians = {name: statistics.median(t) for name, t in times.items()}
    flop = 2 * case.tokens * case.heads * (case.swa.topk + case.extra.topk) * 1024
    gflops = flop / medians["ours"] / 1e6
    return {
        "case": case.name,
        "tokens": case.tokens,
        "heads": case.heads,
        "topk": f"{case.swa.topk}+{case.extra.topk}",
        "median_ms": medians,
        "quartiles_ms": {name: list(np.percentile(t, (25, 75))) for name, t in times.items()},
        "gflops": gflops,
        "fma_peak_gflops": statistics.median(peaks),
        "fraction_of_fma_peak": gflops / statistics.median(peaks),
        "best_xla_over_ours": min(medians[p] for p in PEERS) / medians["ours"],
    }


def device() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "device": f"{model}, {len(os.sched_getaffinity(0))} cores",
        "implementation": dsv4.implementations()["cpu"].detail.split(",")[0],
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "jaxlib": jaxlib.__version__},
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m benchmarks.decode " + " ".join(sys.argv[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="rounds of every case (default 11)")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--platform", choices=("cpu", "cuda"), default="cpu", help="cuda: benchmarks/hopper.py (default cpu)")
    arguments = parser.parse_args()
    if arguments.platform == "cuda":
        hopper.main(arguments.json)
        return
    peak = fma_meter()
    report = device()
    print(f"{report['device']}; {report['implementation']}; {report['versions']}; {report['date']}")
    heading = f"{'tokens':>6} {'heads':>5} {'topk':>9} | {'ours':>8} {'batched':>8} {'map':>8} ms"
    print(heading + f" | {'GFLOP/s':>7} {'of peak':>7} | {'speedup':>7}")
    results = []
    for case in tagged("perf"):
        if arguments.only not in case.name:
            continue
        r = time_case(case, arguments.rounds, peak)
        results.append(r)
        ms = r["median_ms"]
        print(
            f"{r['tokens']:6} {r['heads']:5} {r['topk']:>9} | {ms['ours']:8.3f} {ms['xla_batched']:8.3f} "
            f"{ms['xla_map']:8.3f}    | {r['gflops']:7.0f} {r['fraction_of_fma_peak']:7.2f} | {r['best_xla_over_ours']:6.2f}x",
            flush=True,
        )
    if results:
        ratios = [r["best_xla_over_ours"] for r in results]
        print(f"best XLA form over ours: geomean {math.exp(statistics.fmean(map(math.log, ratios))):.2f}x, least {min(ratios):.2f}x")
    if arguments.json:
        arguments.json.write_text(json.dumps({**report, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
