"""What more devices buy: the op over requests, over heads, and over a context; and whether results stay one device's.

    python -m benchmarks.scaling --platform cuda --devices 1 2 4 --json FILE
    python -m benchmarks.scaling --platform cpu --devices 1 2 --small         whether it runs; virtual devices share their cores

loop             the tiny model of examples/ in float32 on meshes of n devices, each a process of its own, all at once: its tokens must be
                 one device's.
bits             16 requests of 64 heads and up to 192 keys, split over requests and over heads, in automatic and explicit mode, with and
                 without a plan: whether out and lse have one device's bits, and what the program moves.
requests, heads  every device has as many as one device alone: n devices do n times the work, at best in the same time.
context          the same work on n devices, each with an n-th of every request's entries and window, merged over them in several ways.

A program makes `--calls` calls under one plan, each with the call before's output as its queries; where a device keeps a share of that,
with its share in its place. Several runs of it follow one another, so that the wait for the host before the first counts little. The time
of a call is theirs over the number of calls: the median of `--rounds` rounds in which all contenders run in turn. `host_us` is the part
of it until the host had launched them all: where it is nearly the whole, the host is what is timed, and more `--calls` help. Before that,
the results of n devices are compared with those of one. After `--timeout` seconds it says where it is, and ends.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_dsv4 as dsv4

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from compare import OUT_BF16, assert_close
from hlo import collectives

ROOT = Path(__file__).resolve().parent.parent
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


class Merge(NamedTuple):
    """How a context's parts come together."""

    parts: Any  # the dtype that they travel in
    share: int | None  # the dimension that is shared out; None: all have all
    call: Callable[..., tuple[jax.Array, jax.Array]]


def all_reduced(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The other way to do it: a maximum, and sums of float32. No row is without keys here."""
    top = lax.pmax(lse, "context")
    weight = jnp.exp(lse - top)
    total, weight = lax.psum((weight[..., None] * out.astype(jnp.float32), weight), "context")
    return (total / weight[..., None]).astype(jnp.bfloat16), top + jnp.log(weight)


def merge(share: int | None, out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    return dsv4.merge_over_axis(out, lse, "context", scatter_dimension=share, out_dtype=jnp.bfloat16)


HEADS_AXIS, REQUESTS_AXIS = 1, 0
MERGES = {
    "all-reduce": Merge(jnp.bfloat16, None, all_reduced),
    "everywhere, float32 parts": Merge(jnp.float32, None, partial(merge, None)),
    "everywhere, float16 parts": Merge(jnp.float16, None, partial(merge, None)),
    "shares of heads, float32 parts": Merge(jnp.float32, HEADS_AXIS, partial(merge, HEADS_AXIS)),
    "shares of heads, float16 parts": Merge(jnp.float16, HEADS_AXIS, partial(merge, HEADS_AXIS)),
    "shares of heads, bfloat16 parts": Merge(jnp.bfloat16, HEADS_AXIS, partial(merge, HEADS_AXIS)),
    "shares of requests, float16 parts": Merge(jnp.float16, REQUESTS_AXIS, partial(merge, REQUESTS_AXIS)),
}


def share_of(x: jax.Array, axis: int) -> jax.Array:
    size = x.shape[axis] // lax.axis_size("context")
    return lax.dynamic_slice_in_dim(x, lax.axis_index("context") * size, size, axis)


def chain(calls: int, way: Merge | None, problem: Problem) -> jax.Array:
    """What a device does: the calls of a step, one after the other, under one plan. `way`: of a context over devices."""
    q, swa, extra, sink = problem
    if way:
        swa, extra = dsv4.split_scope(swa, "context"), dsv4.local_scope(extra, "context", placement="interleaved")
    sizes = dict(num_heads=q.shape[1], swa_topk=swa.indices.shape[1], extra_topk=extra.indices.shape[1])
    plan = dsv4.plan_decode(swa.lengths, extra.lengths, **sizes)
    for _ in range(calls):
        if way is None:
            out = q = dsv4.sparse_mla_decode(q, swa, extra, attn_sink=sink, plan=plan)
            continue
        part = jnp.float32 if way.parts == jnp.float16 else way.parts
        out, lse = dsv4.sparse_mla_decode(q, swa, extra, plan=plan, out_dtype=part, return_lse=True)
        out, lse = way.call(out.astype(way.parts), lse)
        out = dsv4.apply_attn_sink(out, lse, share_of(sink, 0) if way.share == HEADS_AXIS else sink)
        q = (
            out
            if way.share is None
            else lax.dynamic_update_slice_in_dim(q, out, lax.axis_index("context") * out.shape[way.share], way.share)
        )
    return out


def spread(
    problem: Problem, axis: str, way: Merge | None, devices: list[jax.Device], calls: int
) -> tuple[Callable[[], jax.Array], jax.Array]:
    """A compiled program of `calls` calls over devices, and what one call gives."""
    mesh, n = Mesh(np.array(devices), (axis,)), len(devices)
    rows, heads = P(axis) if axis == "requests" else P(), P(axis) if axis == "heads" else P()
    scope = dsv4.Scope(P(), rows, rows)
    q_spec = P(None, axis) if axis == "heads" else rows
    out_spec = q_spec if way is None else {None: P(), HEADS_AXIS: P(None, axis), REQUESTS_AXIS: P(axis)}[way.share]
    specs = Problem(q_spec, scope, scope._replace(cache=P(axis) if way else P()), heads)
    if way:  # block b of the whole is block b // n of device b % n
        data = problem.extra.cache.data
        order = np.arange(len(data)).reshape(-1, n).T.reshape(-1)
        problem = problem._replace(extra=problem.extra._replace(cache=problem.extra.cache.replace(data[order])))
    operands = place(mesh, specs, problem)

    def compiled(count: int) -> Any:
        over = jax.shard_map(partial(chain, count, way), mesh=mesh, in_specs=(specs,), out_specs=out_spec)
        return jax.jit(over).lower(operands).compile()

    many = compiled(calls)
    return lambda: many(operands), compiled(1)(operands)


def place(mesh: Mesh, specs: Problem, problem: Problem) -> Problem:
    put = lambda spec, part: jax.device_put(part, NamedSharding(mesh, spec))  # noqa: E731
    return jax.tree.map(put, specs, problem, is_leaf=lambda x: isinstance(x, P))


AXES = ("requests", "heads", "context")
PARTS = ("loop", "bits", *AXES)


def measure(axis: str, devices: list[jax.Device], counts: list[int], sizes: Sizes, calls: int, rounds: int) -> list[dict[str, Any]]:
    """One axis over each number of devices, the first of which is 1."""
    contenders, results = {}, []
    for n in counts:
        if axis == "context":
            problem, work = make_problem(sizes.context_requests, sizes.context_heads, sizes.context_entries), 1
        elif axis == "requests":
            problem, work = make_problem(sizes.requests * n, sizes.heads, sizes.extra), n
        else:
            problem, work = make_problem(sizes.requests, min(sizes.heads, MOST_HEADS // max(counts)) * n, sizes.extra), n
        problem = jax.device_put(problem, devices[0])
        want = np.asarray(jax.jit(partial(chain, 1, None))(problem), np.float64)
        for name, way in MERGES.items() if axis == "context" and n > 1 else [("", None)]:
            result = {"axis": axis, "devices": n, "merge": name, "work": work, "q": list(problem.q.shape)}
            result |= {"keys": SWA + problem.extra.indices.shape[1], "error": ""}
            results.append(result)
            try:
                program, got = spread(problem, axis, way, devices[:n], calls)
                assert_close("out", got, want, TOLERANCE)
                jax.block_until_ready(program())
                contenders[n, name] = program, result
            except (AssertionError, jax.errors.JaxRuntimeError) as error:  # the others can still be measured
                if n == 1:
                    raise
                result["error"] = " ".join(str(error).split())[:300]
    times: dict[tuple[int, str], list[tuple[float, float]]] = {key: [] for key in contenders}
    for _ in range(rounds):
        for key, (program, _) in contenders.items():
            began = time.perf_counter()
            for _ in range(RUNS):
                last = program()
            launched = time.perf_counter() - began
            jax.block_until_ready(last)
            times[key].append(tuple(t / (RUNS * calls) * 1e6 for t in (time.perf_counter() - began, launched)))
    alone = statistics.median(us for us, _ in times[1, ""])
    for key, (_, result) in contenders.items():
        us, host_us = zip(*times[key])
        result |= {"us": statistics.median(us), "spread_us": [min(us), max(us)], "host_us": statistics.median(host_us)}
        result["speedup"] = alone / result["us"] * result["work"]
        result["of_linear"] = result["speedup"] / result["devices"]
    return results


def bits(devices: list[jax.Device], counts: list[int]) -> list[dict[str, Any]]:
    """Of one call, split in every way that needs no collective."""
    rng = np.random.default_rng(0)
    problem = make_problem(16, 64, 64)
    problem = problem._replace(
        swa=problem.swa._replace(lengths=jnp.asarray(rng.integers(0, SWA + 1, 16), jnp.int32)),
        extra=problem.extra._replace(lengths=jnp.asarray(rng.integers(0, 65, 16), jnp.int32)),
    )

    def call(planned: bool, problem: Problem) -> tuple[jax.Array, jax.Array]:
        q, swa, extra, sink = problem
        plan = dsv4.plan_decode(swa.lengths, extra.lengths, num_heads=64, swa_topk=SWA, extra_topk=64) if planned else None
        return dsv4.sparse_mla_decode(q, swa, extra, attn_sink=sink, plan=plan, return_lse=True)

    def raw(results: tuple[jax.Array, jax.Array]) -> list[bytes]:
        return [np.asarray(x).tobytes() for x in results]

    found = []
    for planned in (False, True):
        want = raw(jax.jit(partial(call, planned))(jax.device_put(problem, devices[0])))
        for n in counts[1:]:
            for axis in ("requests", "heads"):
                for mode in (AxisType.Auto, AxisType.Explicit):
                    mesh = jax.make_mesh((n,), (axis,), axis_types=(mode,), devices=devices[:n])
                    rows, heads = (P(axis), P()) if axis == "requests" else (P(), P(axis))
                    scope = dsv4.Scope(P(), rows, rows)
                    operands = place(mesh, Problem(rows if axis == "requests" else P(None, axis), scope, scope, heads), problem)
                    program = jax.jit(partial(call, planned)).lower(operands).compile()
                    same, moved = raw(program(operands)) == want, [c.kind for c in collectives(program)]
                    found.append({"axis": axis, "devices": n, "mode": mode.name, "plan": planned, "same": same, "moved": moved})
    return found


def loop_tokens(platform: str, counts: list[int], seconds: float) -> list[dict[str, Any]]:
    """Whether the example draws one device's tokens on meshes of n devices. Before this process takes the devices for itself."""
    axes = [f"data={n}" for n in counts if n > 1] + ["model=2"] * (max(counts) > 1) + [f"context={n}" for n in counts if n > 1]
    virtual = f" --xla_force_host_platform_device_count={max(counts)}" if platform == "cpu" else ""
    environment = os.environ | {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + virtual,
        **({"JAX_PLATFORMS": "cpu"} if platform == "cpu" else {}),
    }
    exact = ["--dtype", "float32", "--cache-layout", "float32", "--batch", str(max(counts)), "--max-new-tokens", "64"]
    with tempfile.TemporaryDirectory() as folder:
        began, runs = time.monotonic(), {}
        for mesh in ("", *axes):
            command = [sys.executable, str(ROOT / "examples" / "decode_loop.py"), *exact, *(["--mesh", mesh] if mesh else [])]
            with open(Path(folder) / f"{mesh}.log", "w") as log:
                runs[mesh] = subprocess.Popen([*command, "--json", f"{folder}/{mesh}.json"], env=environment, stdout=log, stderr=log)
        tokens, ends = {}, {}
        try:
            for mesh, run in runs.items():
                ends[mesh] = f"no end after {seconds:.0f} s"
                code = run.wait(max(0.1, began + seconds - time.monotonic()))
                lines = (Path(folder) / f"{mesh}.log").read_text().splitlines()
                ends[mesh] = "" if code == 0 else f"exit code {code}: {(lines or ['it said nothing'])[-1]}"
                tokens[mesh] = json.loads((Path(folder) / f"{mesh}.json").read_text())["tokens"] if code == 0 else None
        except subprocess.TimeoutExpired:
            pass
        finally:
            for run in runs.values():
                run.kill()
    same = {mesh: tokens.get(mesh) is not None and tokens.get(mesh) == tokens.get("") for mesh in axes}
    return [{"mesh": mesh, "same_tokens": same[mesh], "error": ends.get(mesh, ends[""]) or ends[""]} for mesh in axes]


def table(report: dict[str, Any]) -> str:
    """Markdown, of all that was found."""
    lines = ["| | devices | µs a call | times one device | of linear |", "|---|---:|---:|---:|---:|"]
    for r in report["results"]:
        what = f"{r['axis']}: {r['q'][0]} requests, {r['q'][1]} heads, {r['keys']} keys" + (f"; {r['merge']}" if r["merge"] else "")
        cells = f"{r['us']:.1f} | {r['speedup']:.2f} | {r['of_linear']:.2f}" if "us" in r else f"{r['error']} | |"
        lines.append(f"| {what} | {r['devices']} | {cells} |")
    if report["bits"]:
        lines += ["", "| one device's bits | automatic | explicit |", "|---|---|---|"]
    for b in report["bits"]:
        if b["mode"] == "Auto":
            other = next(o for o in report["bits"] if {**o, "same": 0, "moved": 0} == {**b, "mode": "Explicit", "same": 0, "moved": 0})
            cells = (("yes" if x["same"] else "NO") + (f", moved {', '.join(x['moved'])}" if x["moved"] else "") for x in (b, other))
            plan = "with" if b["plan"] else "without"
            lines.append(f"| {b['axis']} over {b['devices']}, {plan} a plan | {' | '.join(cells)} |")
    if report["loop"]:
        lines += ["", "| loop in float32 | one device's tokens |", "|---|---|"]
    lines += [f"| {r['mesh']} | {'yes' if r['same_tokens'] else 'NO'}{': ' * bool(r['error'])}{r['error']} |" for r in report["loop"]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platform", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4], help="numbers of devices, ascending from 1 (default 1 2 4)")
    parser.add_argument("--calls", type=int, default=32, help="of a program (default 32)")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="parts to run (default: all)")
    parser.add_argument("--small", action="store_true", help="sizes to see whether it runs")
    parser.add_argument(
        "--timeout", type=float, default=540, metavar="SECONDS", help="for everything; the loop gets half of it (default 540)"
    )
    parser.add_argument("--json", type=Path, help="write everything measured to this file, as far as it has come")
    arguments = parser.parse_args()
    counts = arguments.devices
    if counts != sorted(set(counts)) or counts[0] != 1:
        parser.error(f"--devices must be ascending, from 1, got {' '.join(map(str, counts))}")
    faulthandler.dump_traceback_later(arguments.timeout, exit=True)
    began = time.monotonic()
    report: dict[str, Any] = {"loop": [], "bits": [], "results": []}
    if "loop" in arguments.only:
        report["loop"] = loop_tokens(arguments.platform, counts, arguments.timeout / 2)
        found = [(r["mesh"], r["same_tokens"], r["error"]) for r in report["loop"]]
        print(f"[{time.monotonic() - began:4.0f} s] loop: {found}", flush=True)

    if arguments.platform == "cpu":
        jax.config.update("jax_num_cpu_devices", max(counts))
    devices = jax.devices(arguments.platform)
    if len(devices) < max(counts):
        parser.error(f"--devices asks for {max(counts)}, and there are {len(devices)}")
    report = {
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "versions": {"jax": jax.__version__},
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m benchmarks.scaling " + " ".join(sys.argv[1:]),
        "flags": os.environ.get("XLA_FLAGS", ""),
        **report,
    }

    def note(part: str, found: list[dict[str, Any]]) -> None:
        report[part] += found
        print(f"[{time.monotonic() - began:4.0f} s] {part}: {found[-1]}", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=1) + "\n")

    if max(counts) > 1 and "bits" in arguments.only:
        note("bits", bits(devices, counts))
    for axis in (axis for axis in AXES if axis in arguments.only):
        note("results", measure(axis, devices, counts, SMALL if arguments.small else FULL, arguments.calls, arguments.rounds))
    print(f"\n{report['device']}; jax {jax.__version__}; {report['date']}; {report['command']}\n\n{table(report)}")


if __name__ == "__main__":
    main()
