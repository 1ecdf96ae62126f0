"""Verifies, then times sparse_mla_decode on a GPU against FlashMLA and plain XLA, in one run.

    python -m benchmarks.cuda [--rounds N] [--only TEXT] [--json FILE]

A call is timed as a decode step of many layers has it: CALLS calls, each with slots of its own, are repeated for some milliseconds
within one program (a `fori_loop`; for FlashMLA a CUDA graph of as many calls, replayed as often). Several runs of the program are
enqueued; the time from the first one's end to the last one's end, over the number of calls, is the time of a call. All contenders of a
shape take turns, round by round. A case is named by tokens, heads and keys ("perf-t1h64k128+512"), or by what its contexts are drawn from,
log-uniformly, and by the tokens of a request if there are several ("mix-csa-t128h64q4"). Of the latter there are the errors of ours and of
FlashMLA's as well, against float64. The planner alone ("plan-t1h64k128+512") and what running a program costs besides its calls ("launch")
are cases of their own. FlashMLA joins, on the same bytes, if FLASHMLA_LIBRARY names its compiled op (_flashmla_C.abi3.so of the vllm 0.26.0
wheel); that needs torch.

The roofline is the larger of operations over the rate of an 8192-cubed bf16 product and bytes (packed rows, q, out) over the rate of
a large copy, both measured here.

Nothing is compiled while something is timed or captured: compiling allocates and measures on the device, which would disturb both. A
contender that fails is reported by name, the others go on, and the exit status is 1.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np

import jax_dsv4 as dsv4
from benchmarks import flashmla
from benchmarks.measure import Prepare, Report, Time, Turn, compare, medians, options, ratios, run, select
from benchmarks.programs import (
    BLOCK,
    BLOCKS,
    CALLS,
    MIXES,
    Inputs,
    Program,
    Shape,
    calls_program,
    layers_program,
    make_cache,
    make_inputs,
    plans_program,
)
from benchmarks.roofline import gpu_ceilings
from jax_dsv4 import reference

TOKENS = (1, 2, 8, 32, 64, 128, 256)
HEADS = (64, 128, 16)
EXTRA = (512, 1024, 0)
RUN_US = 5000
XLA_CALLS = 2  # plain XLA takes several times as long
LAYERS = 61  # of a program whose launch is timed

CASES = {f"perf-{s}": s for s in [Shape(heads, tokens, extra) for extra in EXTRA for heads in HEADS for tokens in TOKENS]}
PLANS = {f"plan-{s}": s for s in [Shape(heads, tokens, extra) for heads, extra in ((64, 512), (128, 1024)) for tokens in (*TOKENS, 1024)]}
MIX_TOKENS = (3, 8, 32, 64, 128, 200)
MIXED = [Shape(heads, tokens, mix.extra, name) for name, mix in MIXES.items() for heads in (64, 128) for tokens in MIX_TOKENS]
MIXED += [Shape(heads, tokens, 512, "csa", queries) for heads in (64, 128) for tokens, queries in ((128, 4), (2048, 1))]
MIXED += [Shape(8, tokens, mix.extra, name) for name, mix in MIXES.items() for tokens in (3, 64)]
CASES |= {f"mix-{s}": s for s in MIXED}
ERROR_TOKENS = 32  # whose errors are looked at
LAUNCH = "launch"


def compile_all(
    names: Sequence[str], caches: dict[str, dsv4.KVCache], ceilings: dict[str, float], errors: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Prepare[float]]]:
    """The contenders of each case, all of ours and XLA's compiled. `errors`: where those of the mixes will be."""
    rng = np.random.default_rng(0)
    latents = {
        name: reference.unpack_fp8_ds_mla(np.asarray(caches[name].data), BLOCK) for name in caches if any(CASES[n].mix for n in names)
    }
    queries = rng.standard_normal((max(TOKENS), max(HEADS), 512), np.float32)
    cases = {}
    # Compiling plain XLA's measures candidates on the device: few at a time.
    with ThreadPoolExecutor(os.cpu_count()) as pool, ThreadPoolExecutor(3) as measuring:
        for name in names:
            shape = CASES[name]
            if shape.tokens > max(TOKENS):
                queries = rng.standard_normal((shape.tokens, max(HEADS), 512), np.float32)
            inputs = make_inputs(rng, caches, queries, shape)
            steps = max(2, round(RUN_US / CALLS / max(13.0, 2 * shape.floor_us(ceilings))))
            programs: dict[str, Callable[[], Program]] = {
                "ours": pool.submit(calls_program, inputs, steps, planned=True, implementation="cuda").result,
                "ours_unplanned": pool.submit(calls_program, inputs, steps, planned=False, implementation="cuda").result,
            }
            if shape.mix:
                del programs["ours_unplanned"]
                invariant = partial(calls_program, inputs, steps, planned=True, implementation="cuda", batch_invariant=True)
                programs["invariant"] = pool.submit(invariant).result
            elif shape.extra == 512:
                programs["per_scope"] = pool.submit(calls_program, inputs, steps, planned=True, implementation="cuda", fused=False).result
            if shape.tokens in (1, 32, 128) and shape.extra != 1024 and not shape.mix:
                few = inputs._replace(indices=inputs.indices[:XLA_CALLS])
                programs["xla"] = measuring.submit(calls_program, few, steps, planned=True, implementation="xla").result
            if flashmla.LIBRARY:
                programs["flashmla"] = partial(flashmla.calls_program, inputs, steps, planned=True)
                if not shape.mix:
                    programs["flashmla_unplanned"] = partial(flashmla.calls_program, inputs, steps, planned=False)
            look = ErrorsOf(inputs, latents, errors.setdefault(name, {})) if shape.mix else None
            cases[name] = verified(programs, Program.turn, look)
    return cases


class ErrorsOf:
    """Notes how far a contender's answer is from float64's, on the bytes that it read: the cosine difference, and how many numbers leave
    the tolerance of FlashMLA's tests."""

    def __init__(self, inputs: Inputs, latents: dict[str, np.ndarray], found: dict[str, Any]) -> None:
        self.inputs, self.latents, self.found = inputs, latents, found
        self.rows = np.linspace(0, len(inputs.q) - 1, min(len(inputs.q), ERROR_TOKENS)).astype(int)
        self.want: np.ndarray | None = None

    def __call__(self, name: str, out: np.ndarray) -> None:
        if self.want is None:
            rows, (_, q, sink, lengths, indices) = self.rows, self.inputs
            scopes = [
                reference.ReferenceScope(self.latents[scope], np.asarray(indices[0][scope])[rows], np.asarray(lengths[scope])[rows])
                for scope in indices[0]
            ]
            self.want = reference.decode(np.asarray(q, np.float64)[rows], scopes, np.asarray(sink, np.float64))[0]
        got, want = out[self.rows].astype(np.float64), self.want
        off = np.abs(got - want)
        self.found[name] = {
            "cosine_difference": 1 - 2 * float((got * want).sum()) / float((got * got).sum() + (want * want).sum()),
            "misses": int(((off > 1e-3) & (off > 2.01 / 128 * np.abs(want))).sum()),
            "largest": float(off.max()),
        }


def verified(
    programs: Mapping[str, Callable[[], Program]],
    turn: Callable[[Program], list[Time]],
    look: Callable[[str, np.ndarray], None] | None = None,
) -> dict[str, Prepare[Time]]:
    """Contenders whose first calls must give what that of the first of them gives. All round bf16 weights, at different places: half a per
    cent of the norm. `look` is shown what they give."""
    first, wanted = next(iter(programs)), list[np.ndarray]()

    def prepare(name: str) -> Turn[Time]:
        program = programs[name]()
        got = program.output()
        if name == first:
            wanted.append(got)
        if not wanted:
            raise RuntimeError(f"cannot be verified, as {first} failed")
        error = np.linalg.norm(got - wanted[0]) / np.linalg.norm(wanted[0])
        assert error < 5e-3, f"{first} and {name} differ by {error:.2e}"
        if look:
            look(name, got)
        return partial(turn, program)

    return {name: partial(prepare, name) for name in programs}


def time_launch(inputs: Inputs, rounds: int) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Microseconds that a run of LAYERS calls takes beyond its calls: `next` where runs follow one another, `first` on an idle device.

    "fresh": what the program returns has a new address in every run; "donated": it is given the output of the run before, and returns
    its own in the same place; "graph": FlashMLA's.
    """

    def first_and_next(program: Program) -> list[tuple[float, float]]:
        def us(runs: int) -> float:
            start = time.perf_counter()
            for _ in range(runs):
                wait = program.run()
            wait()
            return (time.perf_counter() - start) * 1e6

        return [(us(1), (us(40) - us(20)) / 20)]

    def calls_alone(program: Program) -> list[tuple[float, float]]:
        return [(us * LAYERS, us * LAYERS) for us in program.turn()]

    loops = {"calls": partial(calls_program, inputs, 20, planned=True, implementation="cuda")}
    runs = {name: partial(layers_program, inputs, LAYERS, donated=name == "donated") for name in ("fresh", "donated")}
    contenders = verified(loops, calls_alone) | verified(runs, first_and_next)
    if flashmla.LIBRARY:
        layers = inputs._replace(indices=(LAYERS * inputs.indices)[:LAYERS])
        contenders |= verified({"graph_calls": partial(flashmla.calls_program, inputs, 20, planned=True)}, calls_alone)
        contenders |= verified({"graph": partial(flashmla.calls_program, layers, 1, planned=True)}, first_and_next)
    times, failed = compare(contenders, rounds)
    us = {name: [statistics.median(column) for column in zip(*found)] for name, found in times.items()}
    of = {"fresh": "calls", "donated": "calls", "graph": "graph_calls"}
    found = {name: [run - alone for run, alone in zip(us[name], us[of[name]])] for name in of if name in us and of[name] in us}
    return {name: dict(zip(("first", "next"), beyond)) for name, beyond in found.items()}, failed


def summarise(results: list[dict[str, Any]]) -> None:
    def line(
        label: str, over: str, under: str, heads: tuple[int, ...], extras: tuple[int, ...], least_tokens: int = 1, mix: str = ""
    ) -> None:
        rows = [r for r in results if r["heads"] in heads and r["extra"] in extras and r["tokens"] >= least_tokens and r["mix"] == mix]
        times = [{**r["us"], "roofline": r["floor_us"]} for r in rows]
        if values := [us[over] / us[under] for us in times if over in us and under in us]:
            print(f"{label}: {ratios(values)}")

    both = (512, 1024)
    line("against FlashMLA, plans reused, 64 and 128 heads, both scopes", "flashmla", "ours", (64, 128), both)
    line("against FlashMLA, planning included", "flashmla_unplanned", "ours_unplanned", (64, 128), both)
    line("against FlashMLA on padded heads, 16 heads, plans reused", "flashmla", "ours", (16,), both)
    line("against plain XLA, 32 tokens and more, planning included", "xla", "ours_unplanned", HEADS, EXTRA, 32)
    line("time over roofline, 128 tokens and more, both scopes", "ours", "roofline", (64, 128), both, 128)
    for name, mix in MIXES.items():
        for heads in (64, 128, 8):
            line(f"against FlashMLA, {name}, {heads} heads", "flashmla", "ours", (heads,), (mix.extra,), mix=name)
        line(f"batch-invariant over not, {name}", "invariant", "ours", (64, 128, 8), (mix.extra,), mix=name)
    pairs = [r["errors"] for r in results if r["mix"] and {"ours", "flashmla"} <= r["errors"].keys()]
    for key in ("cosine_difference", "misses", "largest") if pairs else ():
        worse = sum(errors["ours"][key] > errors["flashmla"][key] for errors in pairs)
        print(f"mixes whose {key} is above FlashMLA's: {worse} of {len(pairs)}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__, rounds=5)
    arguments, names = select(parser, argv, [*CASES, *PLANS, LAUNCH])
    cuda = dsv4.implementations()["cuda"]
    if not cuda.available:
        parser.error(f"needs implementation 'cuda': {cuda.detail}")
    ceilings = gpu_ceilings()
    caches = {name: make_cache(blocks, seed) for seed, (name, blocks) in enumerate(BLOCKS.items())}
    report = Report(arguments.json, argv, jax.devices("cuda")[0].device_kind, ceilings=ceilings, planner_us=[], results=[], launch_us={})
    print(f"{report}; {ceilings['tflops']:.0f} TFLOP/s, {ceilings['gbps']:.0f} GB/s; microseconds:", flush=True)
    errors: dict[str, dict[str, Any]] = {}
    cases = compile_all([name for name in names if name in CASES], caches, ceilings, errors)
    for name in list(cases):
        shape, (times, failed) = CASES[name], compare(cases.pop(name), arguments.rounds)
        us, spread = medians(times), {name: [min(found), max(found)] for name, found in times.items()}
        result = {"case": name, **shape._asdict(), "us": us, "spread_us": spread, "floor_us": shape.floor_us(ceilings)}
        if name in errors:
            result["errors"] = errors.pop(name)
        report.found["results"].append(result)
        rates = {"TFLOP/s": shape.flop / us["ours"] / 1e6, "GB/s": shape.nbytes / us["ours"] / 1e3} if "ours" in us else {}
        report.note(name, {**us, "roofline": result["floor_us"], **rates}, failed)
    for name in (name for name in names if name in PLANS):
        program = verified({"us": partial(plans_program, PLANS[name], RUN_US // CALLS // 5)}, Program.turn)
        times, failed = compare(program, arguments.rounds)
        report.found["planner_us"].append({"case": name, **PLANS[name]._asdict(), **medians(times)})
        report.note(name, medians(times), failed)
    if LAUNCH in names:
        rng, shape = np.random.default_rng(1), Shape(heads=64, tokens=1, extra=512)
        inputs = make_inputs(rng, caches, rng.standard_normal((shape.tokens, shape.heads, 512), np.float32), shape)
        report.found["launch_us"], failed = time_launch(inputs, arguments.rounds)
        report.note(LAUNCH, {f"{name}, {at}": us for name, both in report.found["launch_us"].items() for at, us in both.items()}, failed)
    summarise(report.found["results"])
    report.end()


if __name__ == "__main__":
    run(main)
