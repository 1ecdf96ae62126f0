"""Verifies, then times sparse_mla_decode on a CPU against what a JAX user could write instead, in one run on one machine.

    python -m benchmarks.cpu [--rounds N] [--only TEXT] [--json FILE]

Per case: our op, planning included, and the best forms in plain JAX: a batched gather, and `lax.map` over tokens, each with products in
float32 and in bfloat16. Where our bf16 kernels run, our fp32 ones too ("ours_avx512"). If VLLM_CPU_PYTHON names an interpreter, vllm-cpu's
op too (benchmarks/vllm_cpu.py). All take turns, round by round (a rest, 10 ms of calls untimed, three timed); medians are compared.
GFLOP/s counts 2 * tokens * heads * keys * (512 + 512) operations; the FMA peak, and the rate of AMX where there is one, is measured between
the rounds. A contender that fails is reported by name, the others go on, and the exit status is 1.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_dsv4 as dsv4
from jax_dsv4 import _ffi
from jax_dsv4._implementations import xla

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from cases import Case, Problem, make, tagged
from compare import LSE, OUT_BF16, assert_close

from benchmarks import vllm_cpu
from benchmarks.measure import Report, compare, medians, options, processor, ratios, run, select
from benchmarks.roofline import cpu_meters

REST = 0.05
"""Seconds before each turn. What the contender before it has left running comes to an end: threads of OpenMP look for work for milliseconds
before they sleep, and memory is given back."""


def contenders(case: Case, problem: Problem) -> dict[str, Callable[[], Any]]:
    """Name -> a call that returns (out, lse)."""
    ours = jax.jit(partial(dsv4.sparse_mla_decode, return_lse=True))

    def plain(form: Callable[..., Any]) -> Callable[[], Any]:
        @jax.jit
        def call(q: Any, swa: Any, extra: Any, sink: Any) -> Any:
            out, lse = form(q, (swa, extra), sink, scale=case.scale)
            return out.astype(q.dtype), lse

        return lambda: call(problem.q, problem.swa, problem.extra, problem.attn_sink)

    def native() -> Any:
        return ours(problem.q, problem.swa, problem.extra, attn_sink=problem.attn_sink)

    fp32_kernels = our_fp32_kernels(native)
    return {
        "ours": native,
        **({"ours_avx512": fp32_kernels} if fp32_kernels else {}),
        "xla_batched": plain(xla.attend_batched),
        "xla_map": plain(xla.attend_by_token),
        "xla_batched_bf16": plain(partial(xla.attend_batched, products=jnp.bfloat16)),
        "xla_map_bf16": plain(partial(xla.attend_by_token, products=jnp.bfloat16)),
    }


def our_fp32_kernels(call: Callable[[], Any]) -> Callable[[], Any] | None:
    """A call of ours on the "avx512" kernels; None where these or lower ones run anyway."""
    library, _ = _ffi.load("libdsv4_cpu", "cpu")
    assert library is not None
    if _ffi.CPU_ISAS.index(_ffi.cpu_isa(library).name) <= _ffi.CPU_ISAS.index("avx512"):
        return None

    def limited() -> Any:
        _ffi.name_cpu_isa(library, "avx512")
        try:
            return jax.block_until_ready(call())
        finally:
            _ffi.name_cpu_isa(library, os.environ.get("JAX_DSV4_CPU_ISA") or None)

    return limited


def prepare(call: Callable[[], Any], problem: Problem) -> Callable[[], list[float]]:
    """Verifies a call against float64. -> its turn, in milliseconds."""
    out, lse = call()
    assert_close("out", out, problem.out, OUT_BF16)
    assert_close("lse", lse, problem.lse, LSE)

    def turn() -> list[float]:
        time.sleep(REST)
        return vllm_cpu.turn(lambda: jax.block_until_ready(call()))

    return turn


def prepare_vllm(peer: vllm_cpu.Peer, problem: Problem) -> Callable[[], list[float]]:
    assert problem.extra is not None
    arrays: dict[str, Any] = {"q": np.asarray(problem.q).view(np.uint16), "sink": np.asarray(problem.attn_sink)}
    numbers = {"scale": problem.scale}
    for name, scope in (("swa", problem.swa), ("extra", problem.extra)):
        arrays |= {f"{name}_cache": np.asarray(scope.cache.data), f"{name}_slots": np.asarray(scope.indices, np.int64)}
        numbers[f"{name}_block_size"] = scope.cache.block_size
    assert_close("out", peer.prepare(arrays, numbers), problem.out, OUT_BF16)

    def turn() -> list[float]:
        time.sleep(REST)
        return peer.turn()

    return turn


def time_case(
    case: Case, rounds: int, meters: Mapping[str, Callable[[], float]], peer: vllm_cpu.Peer | None
) -> tuple[dict[str, Any], dict[str, str]]:
    assert case.extra is not None
    problem, peaks = make(case), {name: list[float]() for name in meters}
    prepared = {name: partial(prepare, call, problem) for name, call in contenders(case, problem).items()}
    if peer is not None:
        prepared["vllm_cpu"] = partial(prepare_vllm, peer, problem)

    def measure_peaks() -> None:
        for name, meter in meters.items():
            peaks[name].append(meter())

    times, failed = compare(prepared, rounds, measure_peaks)
    ms = medians(times)
    result: dict[str, Any] = {
        "case": case.name,
        "tokens": case.tokens,
        "heads": case.heads,
        "topk": f"{case.swa.topk}+{case.extra.topk}",
        "median_ms": ms,
        "quartiles_ms": {name: list(np.percentile(found, (25, 75))) for name, found in times.items()},
        **{f"{name}_peak_gflops": statistics.median(found) for name, found in peaks.items()},
    }
    if "ours" in ms:
        result["gflops"] = 2 * case.tokens * case.heads * (case.swa.topk + case.extra.topk) * 1024 / ms["ours"] / 1e6
        result["fraction_of_fma_peak"] = result["gflops"] / result["fma_peak_gflops"]
    if not failed:
        result["best_xla_over_ours"] = min(time for name, time in ms.items() if name.startswith("xla")) / ms["ours"]
        result["best_fp32_xla_over_ours"] = min(ms["xla_batched"], ms["xla_map"]) / ms["ours"]
        for peer_name in ("vllm_cpu", "ours_avx512"):
            if peer_name in ms:
                result[f"{peer_name}_over_ours"] = ms[peer_name] / ms["ours"]
    return result, failed


PEERS = {
    "best_xla_over_ours": "best XLA form",
    "best_fp32_xla_over_ours": "best fp32 XLA form",
    "vllm_cpu_over_ours": "vllm-cpu",
    "ours_avx512_over_ours": "our avx512 kernels",
}


def summary(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a run comes to, over all shapes and by number of heads."""
    heads = sorted({result["heads"] for result in results})
    lines = []
    for key, peer_name in PEERS.items():
        if found := [result for result in results if key in result]:
            lines.append(f"{peer_name} over ours: {ratios([result[key] for result in found])}")
            groups = {h: [result[key] for result in found if result["heads"] == h] for h in heads}
            lines += [f"    {h} heads: {ratios(group)}" for h, group in groups.items() if group]
    for h in heads:
        rates = [result["gflops"] for result in results if result["heads"] == h and "gflops" in result]
        if rates:
            lines.append(f"{h} heads: {min(rates):.0f} to {max(rates):.0f} GFLOP/s")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    cases = {case.name: case for case in tagged("perf")}
    arguments, names = select(options(__doc__, rounds=11), argv, cases)
    meters = cpu_meters()
    report = Report(arguments.json, argv, processor(), implementation=dsv4.implementations()["cpu"].detail.split(", ")[0], results=[])
    print(f"{report}; {report.found['implementation']}; milliseconds:")
    if vllm_cpu.PYTHON is None:
        print("vllm-cpu is not among the contenders: VLLM_CPU_PYTHON names no interpreter")
    with vllm_cpu.Peer(vllm_cpu.PYTHON) if vllm_cpu.PYTHON else nullcontext() as peer:
        for name in names:
            result, failed = time_case(cases[name], arguments.rounds, meters, peer)
            report.found["results"].append(result)
            rates = {key: result[key] for key in ("gflops", "fraction_of_fma_peak", *PEERS) if key in result}
            report.note(name, result["median_ms"] | rates, failed)
    print(*summary(report.found["results"]), sep="\n")
    report.end()


if __name__ == "__main__":
    run(main)
