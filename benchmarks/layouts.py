"""Verifies, then times sparse_mla_decode on a GPU with DeepSeek-V4.1's cache layouts, with bf16 and with fp8_ds_mla, in one run.

    python -m benchmarks.layouts [--cpu] [--rounds N] [--only TEXT] [--json FILE]

Calls are timed as `benchmarks.cuda` times them. All caches of a case hold the same numbers, which every layout keeps exactly: multiples of
powers of two that e2m1 has. FlashMLA joins on its 584-byte records, as in `benchmarks.cuda`. A contender is named by its two layouts' bytes
a slot: "528+288" is a window of mxfp8_528 and entries of nvfp4_288, both inline; "footer" says that they are not.

Cases: DeepSeek-V4's step; a verification of 6 query tokens a request; a draft's window of 133 keys; 100 entries of 128 heads.

With --cpu the same calls run on the CPU, without FlashMLA and roofline.

The roofline is the larger of operations over the rate of an 8192-cubed bf16 product and bytes (rows, q, out) over the rate of a large copy.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jax_dsv4 as dsv4
from benchmarks import flashmla
from benchmarks.cuda import RUN_US, verified
from benchmarks.measure import Report, compare, medians, options, processor, run, select
from benchmarks.programs import BLOCK, BLOCKS, CALLS, Inputs, Program, calls_program
from benchmarks.roofline import gpu_ceilings
from jax_dsv4.cache import LAYOUTS

Form = tuple[str, str | None]  # layout, arrangement
FP8: Form = ("fp8_ds_mla", None)
BF16: Form = ("bf16", None)
PAIRS: dict[str, tuple[Form, Form]] = {
    "584+584": (FP8, FP8),
    "528+288": (("mxfp8_528", "inline"), ("nvfp4_288", "inline")),
    "528+528": (("mxfp8_528", "inline"), ("mxfp8_528", "inline")),
    "528+288 footer": (("mxfp8_528", "footer"), ("nvfp4_288", "footer")),
    "bf16+bf16": (BF16, BF16),
    "bf16+584": (BF16, FP8),
}


class Case(NamedTuple):
    heads: int
    tokens: int
    swa: int
    extra: int

    @property
    def flop(self) -> int:
        return 2 * self.heads * self.tokens * (self.swa + self.extra) * 1024

    def nbytes(self, pair: str) -> int:
        swa, extra = (LAYOUTS[layout].token_bytes for layout, _ in PAIRS[pair])
        return self.tokens * (self.swa * swa + self.extra * extra + self.heads * 2048)


CASES = {
    **{f"step-t{t}h{h}k128+512": Case(h, t, 128, 512) for h in (64, 128, 16) for t in (1, 32, 128)},
    **{f"verify-r{r}h64k128+512": Case(64, 6 * r, 128, 512) for r in (1, 8, 128)},
    "draft-r25h64k133": Case(64, 5 * 25, 133, 0),
    "step-t128h128k128+100": Case(128, 128, 128, 100),
}


@partial(jax.jit, static_argnums=(0, 1, 2))
def make_cache(blocks: int, seed: int, form: Form) -> dsv4.KVCache:
    slots = blocks * BLOCK
    values = jnp.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], jnp.float32)
    magnitude, sign = jax.random.split(jax.random.key(seed))
    rows = values[jax.random.randint(magnitude, (slots, 512), 0, 8)] * jax.random.rademacher(sign, (slots, 512), jnp.float32) / 4
    rows = rows.at[:, ::16].set(1.5)  # of every scale's numbers the largest
    layout, arrangement = form
    cache = dsv4.KVCache.create(blocks, BLOCK, layout, arrangement=arrangement)
    return dsv4.append(cache, rows.astype(jnp.bfloat16), jnp.arange(slots, dtype=jnp.int32))


def make_inputs(rng: np.random.Generator, case: Case) -> Inputs:
    """Without caches."""
    topks = {"swa": case.swa} | ({"extra": case.extra} if case.extra else {})

    def draw(name: str) -> jax.Array:
        return jnp.asarray(rng.integers(0, BLOCKS[name] * BLOCK, (case.tokens, topks[name])), jnp.int32)

    return Inputs(
        {},
        jnp.asarray(rng.standard_normal((case.tokens, case.heads, 512), np.float32), jnp.bfloat16),
        jnp.asarray(rng.standard_normal(case.heads), jnp.float32),
        {name: jnp.full(case.tokens, topk, jnp.int32) for name, topk in topks.items()},
        [{name: draw(name) for name in topks} for _ in range(CALLS)],
    )


def cpu_turn(program: Program) -> list[float]:
    """Microseconds a call of one run: a CPU has nothing enqueued."""
    start = time.perf_counter()
    program.run()()
    return [(time.perf_counter() - start) / program.calls * 1e6]


def main(argv: Sequence[str] | None = None) -> None:
    parser = options(__doc__, rounds=5)
    parser.add_argument("--cpu", action="store_true", help="on the CPU")
    arguments, names = select(parser, argv, [*CASES])
    implementation = "cpu" if arguments.cpu else "cuda"
    available, detail = dsv4.implementations()[implementation]
    if not available:
        parser.error(f"needs implementation {implementation!r}: {detail}")
    ceilings = {} if arguments.cpu else gpu_ceilings()
    if arguments.cpu:
        report = Report(arguments.json, argv, processor(), implementation=detail.split(", ")[0], results=[])
        print(f"{report}; {report.found['implementation']}; microseconds:", flush=True)
    else:
        report = Report(arguments.json, argv, jax.devices("cuda")[0].device_kind, ceilings=ceilings, results=[])
        print(f"{report}; {ceilings['tflops']:.0f} TFLOP/s, {ceilings['gbps']:.0f} GB/s; microseconds:", flush=True)
    caches = {
        pair: {name: make_cache(blocks, seed, form) for seed, ((name, blocks), form) in enumerate(zip(BLOCKS.items(), forms))}
        for pair, forms in PAIRS.items()
    }
    compiled = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name in names:
            case = CASES[name]
            inputs = {pair: make_inputs(np.random.default_rng(len(name)), case)._replace(caches=caches[pair]) for pair in PAIRS}
            steps = 1 if arguments.cpu else max(2, round(RUN_US / CALLS / max(13.0, 2 * case.flop / ceilings["tflops"] / 1e6)))
            programs: dict[str, Callable[[], Program]] = {
                pair: pool.submit(calls_program, inputs[pair], steps, planned=True, implementation=implementation).result for pair in PAIRS
            }
            if not arguments.cpu and flashmla.LIBRARY and case.heads >= 64 and case.swa % 64 == case.extra % 64 == 0:
                programs["flashmla 584+584"] = partial(flashmla.calls_program, inputs["584+584"], steps, planned=True)
            compiled[name] = verified(programs, cpu_turn if arguments.cpu else Program.turn)
    for name, contenders in compiled.items():
        times, failed = compare(contenders, arguments.rounds)
        case, us = CASES[name], medians(times)
        result: dict[str, Any] = {"case": name, **case._asdict(), "us": us}
        if ceilings:
            result["floor_us"] = {p: max(case.flop / ceilings["tflops"] / 1e6, case.nbytes(p) / ceilings["gbps"] / 1e3) for p in PAIRS}
        report.found["results"].append(result)
        report.note(name, us, failed)
    for over, under in (("528+288", "584+584"), ("528+528", "584+584"), ("flashmla 584+584", "528+288"), ("bf16+bf16", "584+584")):
        for row in report.found["results"]:
            if over in row["us"] and under in row["us"]:
                print(f"{row['case']}: {over} over {under} {row['us'][over] / row['us'][under]:.3f}")
    report.end()


if __name__ == "__main__":
    run(main)
