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

import faulthandler
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
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

from benchmarks.measure import Prepare, Report, Turn, compare, options, run
from benchmarks.programs import BLOCK, SWA, make_cache

ROOT = Path(__file__).resolve().parent.parent


class Sizes(NamedTuple):
    """A device's, and all devices' together over a context."""

    requests: int
    heads: int  # fewer, spread over heads
    entries: int  # of a request
    context_entries: int


FULL = Sizes(requests=128, heads=128, entries=512, context_entries=8192)
SMALL = Sizes(requests=4, heads=8, entries=64, context_entries=256)
# Both sides are rounded to bf16, the merged one twice.
TOLERANCE = OUT_BF16._replace(cosine=3 * OUT_BF16.cosine)
MOST_HEADS = 128  # of a call, on all devices together
RUNS = 10  # of a program, between two looks at the clock


class Problem(NamedTuple):
    q: jax.Array
    swa: dsv4.Scope
    extra: dsv4.Scope
    sink: jax.Array


def plan_of(p: Problem) -> dsv4.DecodePlan:
    swa_topk, extra_topk = (scope.indices.shape[-1] for scope in (p.swa, p.extra))
    assert p.swa.lengths is not None
    return dsv4.plan_decode(p.swa.lengths, p.extra.lengths, num_heads=p.q.shape[-2], swa_topk=swa_topk, extra_topk=extra_topk)


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
    share: int | None = None  # the dimension that is shared out; None: all have all
    all_reduce: bool = False


def all_reduced(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The other way to do it: a maximum, and sums of float32. No row is without keys here."""
    top = lax.pmax(lse, "context")
    weight = jnp.exp(lse - top)
    total, weight = lax.psum((weight[..., None] * out.astype(jnp.float32), weight), "context")
    return (total / weight[..., None]).astype(jnp.bfloat16), top + jnp.log(weight)


REQUESTS_AXIS, HEADS_AXIS = 0, 1
MERGES = {
    "all-reduce": Merge(jnp.bfloat16, all_reduce=True),
    "everywhere, float32 parts": Merge(jnp.float32),
    "everywhere, float16 parts": Merge(jnp.float16),
    "shares of heads, float32 parts": Merge(jnp.float32, HEADS_AXIS),
    "shares of heads, float16 parts": Merge(jnp.float16, HEADS_AXIS),
    "shares of heads, bfloat16 parts": Merge(jnp.bfloat16, HEADS_AXIS),
    "shares of requests, float16 parts": Merge(jnp.float16, REQUESTS_AXIS),
}


def share_of(x: jax.Array, axis: int) -> jax.Array:
    size = x.shape[axis] // lax.axis_size("context")
    return lax.dynamic_slice_in_dim(x, lax.axis_index("context") * size, size, axis)


def chain(calls: int, way: Merge | None, problem: Problem) -> jax.Array:
    """What a device does: the calls of a step, one after the other, under one plan. `way`: of a context over devices."""
    q, swa, extra, sink = problem
    if way:
        swa, extra = dsv4.split_scope(swa, "context"), dsv4.local_scope(extra, "context", placement="interleaved")
    plan = plan_of(problem._replace(swa=swa, extra=extra))
    for _ in range(calls):
        if way is None:
            out = q = dsv4.sparse_mla_decode(q, swa, extra, attn_sink=sink, plan=plan)
            continue
        part = jnp.float32 if way.parts == jnp.float16 else way.parts
        out, lse = dsv4.sparse_mla_decode(q, swa, extra, plan=plan, out_dtype=part, return_lse=True)
        out = out.astype(way.parts)
        if way.all_reduce:
            out, lse = all_reduced(out, lse)
        else:
            out, lse = dsv4.merge_over_axis(out, lse, "context", scatter_dimension=way.share, out_dtype=jnp.bfloat16)
        out = dsv4.apply_attn_sink(out, lse, share_of(sink, 0) if way.share == HEADS_AXIS else sink)
        if way.share is None:
            q = out
        else:
            q = lax.dynamic_update_slice_in_dim(q, out, lax.axis_index("context") * out.shape[way.share], way.share)
    return out


def prepare(
    problem: Problem, want: np.ndarray, axis: str, way: Merge | None, devices: list[jax.Device], calls: int
) -> Turn[tuple[float, float]]:
    """Calls over devices, compiled and verified. A turn: microseconds a call, in all and until the host had launched them."""
    mesh, n = Mesh(np.array(devices), (axis,)), len(devices)
    specs = specs_of(axis, split=way is not None)
    out_spec = specs.q if way is None else {None: P(), HEADS_AXIS: P(None, axis), REQUESTS_AXIS: P(axis)}[way.share]
    if way:  # block b of the whole is block b // n of device b % n
        data = problem.extra.cache.data
        order = np.arange(len(data)).reshape(-1, n).T.reshape(-1)
        problem = problem._replace(extra=problem.extra._replace(cache=problem.extra.cache.replace(data[order])))
    operands = place(mesh, specs, problem)

    def compiled(count: int) -> Any:
        over = jax.shard_map(partial(chain, count, way), mesh=mesh, in_specs=(specs,), out_specs=out_spec)
        return jax.jit(over).lower(operands).compile()

    assert_close("out", compiled(1)(operands), want, TOLERANCE)
    program = compiled(calls)

    def turn() -> list[tuple[float, float]]:
        began = time.perf_counter()
        for _ in range(RUNS):
            last = program(operands)
        launched = time.perf_counter() - began
        jax.block_until_ready(last)
        us = 1e6 / (RUNS * calls)
        return [((time.perf_counter() - began) * us, launched * us)]

    return turn


def specs_of(axis: str, split: bool = False) -> Any:
    """How a problem is spread over an axis. `split`: its cache of entries is."""
    rows, heads = P(axis) if axis == "requests" else P(), P(axis) if axis == "heads" else P()
    extra = dsv4.Scope._make((P(axis) if split else P(), rows, rows))
    return Problem._make((P(None, axis) if axis == "heads" else rows, dsv4.Scope._make((P(), rows, rows)), extra, heads))


def place(mesh: Mesh, specs: Problem, problem: Problem) -> Problem:
    return jax.device_put(problem, jax.tree.map(partial(NamedSharding, mesh), specs, is_leaf=lambda x: isinstance(x, P)))


AXES = ("requests", "heads", "context")
PARTS = ("loop", "bits", *AXES)


def measure(axis: str, devices: list[jax.Device], counts: list[int], sizes: Sizes, calls: int, rounds: int) -> list[dict[str, Any]]:
    """One axis over each number of devices, the first of which is 1."""
    contenders: dict[tuple[int, str], Prepare[tuple[float, float]]] = {}
    results: dict[tuple[int, str], dict[str, Any]] = {}
    for n in counts:
        requests = sizes.requests * (n if axis == "requests" else 1)
        heads = min(sizes.heads, MOST_HEADS // max(counts)) * n if axis == "heads" else sizes.heads
        entries = sizes.context_entries if axis == "context" else sizes.entries
        problem = jax.device_put(make_problem(requests, heads, entries), devices[0])
        want = np.asarray(jax.jit(partial(chain, 1, None))(problem), np.float64)
        for name, way in MERGES.items() if axis == "context" and n > 1 else [("", None)]:
            contenders[n, name] = partial(prepare, problem, want, axis, way, devices[:n], calls)
            results[n, name] = {"axis": axis, "devices": n, "merge": name, "work": 1 if axis == "context" else n}
            results[n, name] |= {"q": list(problem.q.shape), "keys": SWA + entries, "error": ""}
    times, failed = compare(contenders, rounds)
    if (1, "") in failed:
        raise RuntimeError(f"{axis}: one device, with which all are compared, failed: {failed[1, '']}")
    for key, result in results.items():
        if key in failed:
            result["error"] = failed[key]
            continue
        us, host_us = zip(*times[key])
        result |= {"us": statistics.median(us), "spread_us": [min(us), max(us)], "host_us": statistics.median(host_us)}
        result["speedup"] = results[1, ""]["us"] / result["us"] * result["work"]
        result["of_linear"] = result["speedup"] / result["devices"]
    return list(results.values())


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
        plan = plan_of(problem) if planned else None
        return dsv4.sparse_mla_decode(q, swa, extra, attn_sink=sink, plan=plan, return_lse=True)

    def raw(results: tuple[jax.Array, jax.Array]) -> list[bytes]:
        return [np.asarray(x).tobytes() for x in results]

    found, alone = [], jax.device_put(problem, devices[0])
    want = {planned: raw(jax.jit(partial(call, planned))(alone)) for planned in (False, True)}
    for planned, n, axis, mode in product(want, counts[1:], ("requests", "heads"), (AxisType.Auto, AxisType.Explicit)):
        mesh = jax.make_mesh((n,), (axis,), axis_types=(mode,), devices=devices[:n])
        operands = place(mesh, specs_of(axis), problem)
        program = jax.jit(partial(call, planned)).lower(operands).compile()
        same, moved = raw(program(operands)) == want[planned], [c.kind for c in collectives(program)]
        found.append({"axis": axis, "devices": n, "mode": mode.name, "plan": planned, "same": same, "moved": moved})
    return found


def loop_tokens(platform: str, counts: list[int], seconds: float) -> list[dict[str, Any]]:
    """Whether the example draws one device's tokens on meshes of n devices. Before this process takes the devices for itself."""
    meshes = [f"data={n}" for n in counts if n > 1] + ["model=2"] * (max(counts) > 1) + [f"context={n}" for n in counts if n > 1]
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if platform == "cpu":
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={max(counts)}"
        environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    exact = ["--dtype", "float32", "--cache-layout", "float32", "--batch", str(max(counts)), "--max-new-tokens", "64"]

    def tokens(mesh: str) -> tuple[Any, str]:
        """What it draws, or what went wrong."""
        with tempfile.NamedTemporaryFile() as file:
            command = [sys.executable, str(ROOT / "examples" / "decode_loop.py"), *exact, "--json", file.name]
            command += ["--mesh", mesh] if mesh else []
            try:
                run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
            except subprocess.TimeoutExpired:
                return None, f"no end after {seconds:.0f} s"
            if run.returncode:
                return None, f"exit code {run.returncode}: {((run.stdout + run.stderr).splitlines() or ['it said nothing'])[-1]}"
            return json.loads(Path(file.name).read_text())["tokens"], ""

    with ThreadPoolExecutor(len(meshes) + 1) as pool:
        (alone, error), *found = pool.map(tokens, ["", *meshes])
    errors = [own or error for _, own in found]
    return [{"mesh": m, "same_tokens": not e and drawn == alone, "error": e} for m, e, (drawn, _) in zip(meshes, errors, found)]


def main() -> None:
    parser = options(__doc__, rounds=11)
    parser.add_argument("--platform", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4], help="numbers of devices, ascending from 1 (default 1 2 4)")
    parser.add_argument("--calls", type=int, default=32, help="of a program (default 32)")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="parts to run (default: all)")
    parser.add_argument("--small", action="store_true", help="sizes to see whether it runs")
    parser.add_argument("--timeout", type=float, default=540, metavar="SECONDS", help="for all; the loop gets half of it (default 540)")
    arguments = parser.parse_args()
    counts = arguments.devices
    if counts != sorted(set(counts)) or counts[0] != 1:
        parser.error(f"--devices must be ascending, from 1, got {' '.join(map(str, counts))}")
    faulthandler.dump_traceback_later(arguments.timeout, exit=True)
    loop = loop_tokens(arguments.platform, counts, arguments.timeout / 2) if "loop" in arguments.only else []
    if arguments.platform == "cpu":
        jax.config.update("jax_num_cpu_devices", max(counts))
    devices = jax.devices(arguments.platform)
    if len(devices) < max(counts):
        parser.error(f"--devices asks for {max(counts)}, and there are {len(devices)}")
    device, flags = f"{len(devices)} x {devices[0].device_kind}", os.environ.get("XLA_FLAGS", "")
    report = Report(arguments.json, None, device, flags=flags, loop=[], bits=[], results=[])
    for r in loop:
        report.found["loop"].append(r)
        report.note(f"loop on {r['mesh']}", {}, {} if r["same_tokens"] else {"tokens": r["error"] or "not one device's"})
    for r in bits(devices, counts) if "bits" in arguments.only else ():
        report.found["bits"].append(r)
        plan = "with" if r["plan"] else "without"
        wrong = {} if r["same"] and not r["moved"] else {"bits": f"one device's: {r['same']}; moved: {r['moved']}"}
        report.note(f"bits of {r['axis']} over {r['devices']}, {r['mode']}, {plan} a plan", {}, wrong)
    for axis in (axis for axis in AXES if axis in arguments.only):
        for r in measure(axis, devices, counts, SMALL if arguments.small else FULL, arguments.calls, arguments.rounds):
            report.found["results"].append(r)
            what = f"{axis} over {r['devices']}: {r['q'][0]} requests, {r['q'][1]} heads, {r['keys']} keys; {r['merge']}"
            numbers: dict[str, float] = {name: r[name] for name in ("us", "host_us", "speedup", "of_linear") if name in r}
            report.note(what, numbers, {"call": r["error"]} if r["error"] else {})
    report.end()


if __name__ == "__main__":
    run(main)
