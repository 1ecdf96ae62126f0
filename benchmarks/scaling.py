"""What more devices buy: the op over requests, over heads, and over a context; the example's tokens on a mesh.

    python -m benchmarks.scaling --platform cuda --devices 1 2 4 --json FILE
    python -m benchmarks.scaling --platform cpu --devices 1 2 --small         whether it runs; virtual devices share their cores

requests, heads  every device has as many as one device alone: n devices do n times the work, at best in the same time.
context          the same work on n devices, each with an n-th of every request's entries, merged over them.
loop             the tiny model of examples/ in float32 on meshes of n devices: its tokens must be one device's.

A program makes `--calls` calls, each with the call before's output as its queries, under one plan. Several runs of it follow one another,
so that the wait for the host before the first counts little. The time of a call is theirs over the number of calls: the median of
`--rounds` rounds in which all contenders run in turn. Before that, the results of n devices are compared with those of one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_dsv4 as dsv4

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from compare import OUT_BF16, assert_close

BLOCK = 64
SWA = 128


class Sizes(NamedTuple):
    requests: int  # a device's, spread over requests or heads
    heads: int  # a device's, spread over requests
    extra: int  # entries a request
    context_requests: int
    context_heads: int
    context_entries: int


FULL = Sizes(requests=128, heads=128, extra=512, context_requests=128, context_heads=128, context_entries=8192)
SMALL = Sizes(requests=4, heads=8, extra=64, context_requests=4, context_heads=8, context_entries=256)
# Both sides are rounded to bf16, the merged one twice.
TOLERANCE = OUT_BF16._replace(cosine=3 * OUT_BF16.cosine)
MOST_HEADS = 128  # of a call, on all devices together
RUNS = 10  # of a program, between two looks at the clock


class Problem(NamedTuple):
    q: jax.Array
    swa: dsv4.Scope
    extra: dsv4.Scope
    sink: jax.Array


@partial(jax.jit, static_argnums=(0, 1))
def make_cache(blocks: int, seed: int) -> dsv4.KVCache:
    rows = jax.random.normal(jax.random.key(seed), (blocks * BLOCK, 512), jnp.bfloat16)
    return dsv4.append(dsv4.KVCache.create(blocks, BLOCK), rows, jnp.arange(blocks * BLOCK, dtype=jnp.int32))


def make_problem(requests: int, heads: int, entries: int) -> Problem:
    """Every request has entries of its own, in blocks dealt to the requests in turn."""
    rng = np.random.default_rng(0)

    def scope(topk: int, seed: int) -> dsv4.Scope:
        entry, request = np.arange(topk), np.arange(requests)[:, None]
        slots = (entry // BLOCK * requests + (request + entry // BLOCK) % requests) * BLOCK + entry % BLOCK
        blocks = -(-topk // BLOCK) * requests
        return dsv4.Scope(make_cache(blocks, seed), jnp.asarray(slots, jnp.int32), jnp.full(requests, topk, jnp.int32))

    q = jnp.asarray(rng.standard_normal((requests, heads, 512), np.float32), jnp.bfloat16)
    return Problem(q, scope(SWA, 0), scope(entries, 1), jnp.asarray(rng.standard_normal(heads), jnp.float32))


def chain(calls: int, context: bool, problem: Problem) -> jax.Array:
    """What a device does: the calls of a step, one after the other, under one plan."""
    q, swa, extra, sink = problem
    if context:
        swa = swa._replace(lengths=jnp.where(jax.lax.axis_index("context") == 0, swa.lengths, 0))
        extra = dsv4.local_scope(extra, "context", placement="interleaved")
    sizes = dict(num_heads=q.shape[1], swa_topk=swa.indices.shape[1], extra_topk=extra.indices.shape[1])
    plan = dsv4.plan_decode(swa.lengths, extra.lengths, **sizes)
    for _ in range(calls):
        if context:
            out, lse = dsv4.merge_over_axis(*dsv4.sparse_mla_decode(q, swa, extra, plan=plan, return_lse=True), "context")
            q = dsv4.apply_attn_sink(out, lse, sink)
        else:
            q = dsv4.sparse_mla_decode(q, swa, extra, attn_sink=sink, plan=plan)
    return q


def spread(problem: Problem, axis: str, devices: list[jax.Device], calls: int) -> tuple[Callable[[], jax.Array], jax.Array]:
    """A compiled program of `calls` calls over devices, and what one call gives."""
    mesh, n = Mesh(np.array(devices), (axis,)), len(devices)
    context = axis == "context" and n > 1
    rows, heads = P(axis) if axis == "requests" else P(), P(axis) if axis == "heads" else P()
    scope = dsv4.Scope(P(), rows, rows)
    q_spec = P(None, axis) if axis == "heads" else rows
    specs = Problem(q_spec, scope, scope._replace(cache=P(axis) if context else P()), heads)
    if context:  # block b of the whole is block b // n of device b % n
        data = problem.extra.cache.data
        order = np.arange(len(data)).reshape(-1, n).T.reshape(-1)
        problem = problem._replace(extra=problem.extra._replace(cache=problem.extra.cache.replace(data[order])))
    put = lambda spec, part: jax.device_put(part, NamedSharding(mesh, spec))  # noqa: E731
    operands = jax.tree.map(put, specs, problem, is_leaf=lambda x: isinstance(x, P))

    def compiled(count: int) -> Any:
        over = jax.shard_map(partial(chain, count, context), mesh=mesh, in_specs=(specs,), out_specs=q_spec)
        return jax.jit(over).lower(operands).compile()

    many = compiled(calls)
    return lambda: many(operands), compiled(1)(operands)


AXES = ("requests", "heads", "context")


def measure(
    devices: list[jax.Device], counts: list[int], sizes: Sizes, calls: int, rounds: int, axes: Sequence[str] = AXES
) -> list[dict[str, Any]]:
    """Each axis over each number of devices."""
    results = []
    for axis in axes:
        programs = {}
        for n in counts:
            if axis == "context":
                problem, work = make_problem(sizes.context_requests, sizes.context_heads, sizes.context_entries), 1
            elif axis == "requests":
                problem, work = make_problem(sizes.requests * n, sizes.heads, sizes.extra), n
            else:
                problem, work = make_problem(sizes.requests, min(sizes.heads, MOST_HEADS // max(counts)) * n, sizes.extra), n
            programs[n], got = spread(problem, axis, devices[:n], calls)
            want = jax.jit(partial(chain, 1, False))(jax.device_put(problem, devices[0]))
            assert_close(f"{axis} over {n} devices", got, np.asarray(want, np.float64), TOLERANCE)
            results.append(
                {"axis": axis, "devices": n, "work": work, "q": list(problem.q.shape), "keys": SWA + problem.extra.indices.shape[1]}
            )
        times: dict[int, list[float]] = {n: [] for n in counts}
        for program in programs.values():
            jax.block_until_ready(program())
        for _ in range(rounds):
            for n, program in programs.items():
                began = time.perf_counter()
                for _ in range(RUNS):
                    last = program()
                jax.block_until_ready(last)
                times[n].append((time.perf_counter() - began) / (RUNS * calls) * 1e6)
        for result in results[-len(counts) :]:
            own, first = (statistics.median(times[n]) for n in (result["devices"], counts[0]))
            result |= {"us": own, "spread_us": [min(times[result["devices"]]), max(times[result["devices"]])]}
            result["speedup"] = first / own * result["work"] / results[-len(counts)]["work"]
            result["of_linear"] = result["speedup"] / (result["devices"] / counts[0])
    return results


def loop_tokens(counts: list[int]) -> list[dict[str, Any]]:
    """Whether the example draws one device's tokens on meshes of n devices."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
    import decode_loop

    def tokens(*options: str) -> list[list[int]]:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            out = Path(folder) / "out.json"
            exact = ["--dtype", "float32", "--cache-layout", "float32", "--batch", str(max(counts)), "--max-new-tokens", "64"]
            assert decode_loop.main([*exact, *options, "--json", str(out)]) == 0
            return json.loads(out.read_text())["tokens"]

    want = tokens()
    axes = [f"data={n}" for n in counts if n > 1] + ["model=2"] * (max(counts) > 1) + [f"context={n}" for n in counts if n > 1]
    return [{"mesh": mesh, "same_tokens": tokens("--mesh", mesh) == want} for mesh in axes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platform", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4], help="numbers of devices, ascending (default 1 2 4)")
    parser.add_argument("--calls", type=int, default=8, help="of a program (default 8)")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--small", action="store_true", help="sizes to see whether it runs")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    arguments = parser.parse_args()
    if arguments.platform == "cpu":
        jax.config.update("jax_num_cpu_devices", max(arguments.devices))
    devices = jax.devices(arguments.platform)
    if len(devices) < max(arguments.devices):
        parser.error(f"--devices asks for {max(arguments.devices)}, and there are {len(devices)}")
    report = {
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "versions": {"jax": jax.__version__},
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m benchmarks.scaling " + " ".join(sys.argv[1:]),
    }
    print(f"{report['device']}; jax {jax.__version__}; {report['date']}; {report['command']}")
    sizes = SMALL if arguments.small else FULL
    results = measure(devices, arguments.devices, sizes, arguments.calls, arguments.rounds)
    for r in results:
        speed = f"{r['speedup']:.2f}x, {r['of_linear']:.2f} of linear"
        print(f"{r['axis']:>8} over {r['devices']}: {r['us']:10.1f} us a call, q {r['q']}, {r['keys']} keys; {speed}", flush=True)
    loops = loop_tokens(arguments.devices)
    for loop in loops:
        print(f"    loop on {loop['mesh']}: {'the' if loop['same_tokens'] else 'NOT the'} tokens of one device")
    if arguments.json:
        arguments.json.write_text(json.dumps({**report, "results": results, "loop": loops}, indent=1) + "\n")


if __name__ == "__main__":
    main()
