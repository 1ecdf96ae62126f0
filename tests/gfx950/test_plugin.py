"""The handlers as JAX registers them for ROCm, under JAX's own plugin: XLA compiles, captures and replays; HIP and the GPU are software.

Everything else that takes fixture `rocm` runs under the plugin too, in a session that has it.
"""

import ctypes
import functools
import itertools
import json
import os
import pathlib
import subprocess
import sys
import time

import aiter_kernel
import jax
import jax.numpy as jnp
import numpy as np
import plugin
import pytest
from aiter_kernel import LATENT
from calls import GFX950_LAYOUTS, attend, check, expected, make_cache, make_q, make_scope
from compare import assert_same_bits
from jax.sharding import NamedSharding, PartitionSpec

import jax_dsv4 as dsv4
from jax_dsv4 import _ffi

pytestmark = pytest.mark.skipif(bool(plugin.missing()), reason=plugin.missing())

ROOT = pathlib.Path(__file__).parents[2]
LAYERS = 4
HEADS, TOPK, SLOTS = 16, 40, 64
NO_GRAPHS = {"xla_gpu_enable_command_buffer": ""}


@pytest.fixture
def plugged(rocm, hsa):
    """The plugin's device as the default one."""
    if hsa != _ffi.aiter_directory():
        pytest.skip("this process has AITER's kernels from another place")
    return jax.devices("rocm")[0]


def decode_calls():
    """Executions of the decode handler so far, and how many of them a capture recorded."""
    library, _ = _ffi.load_rocm()
    calls = (ctypes.c_int64 * 2)()
    library.dsv4_rocm_calls(calls)
    return np.array(calls)


def step(q, caches, indices, lengths, latents, slots):
    """A token each of two requests through all layers: appended, planned once, decoded."""
    plan = dsv4.plan_decode(lengths, num_heads=HEADS, swa_topk=TOPK, implementation="aiter")
    caches = [dsv4.append(cache, latents, slots, implementation="aiter") for cache in caches]
    outs = [attend(q, (dsv4.Scope(cache, indices, lengths),), None, plan) for cache in caches]
    return caches, outs


def variants(rng, steps):
    """What changes from step to step: the slots to read, how many of them, what is appended and where."""
    lengths = np.resize([[7, 40], [0, 33], [40, 1]], (steps, 2))
    slots = np.arange(steps)[:, None] * [1, -1] + [0, SLOTS - 1]
    indices, latents = rng.integers(-1, SLOTS, (steps, 2, TOPK)), rng.normal(size=(steps, 2, LATENT))
    return *(jnp.asarray(x, jnp.int32) for x in (indices, lengths)), jnp.asarray(latents, jnp.bfloat16), jnp.asarray(slots, jnp.int32)


def of_step(given, n):
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, n, keepdims=False), given)


def bytes_in_use(device):
    return device.memory_stats()["bytes_in_use"]


def wait_until_freed(device, in_use):
    """Until no more memory is in use. XLA frees a program's workspaces on a thread of its own."""
    give_up = time.monotonic() + 60
    while (now := bytes_in_use(device)) > in_use:
        assert time.monotonic() < give_up, f"{now} bytes are in use, and {in_use} should be"
        time.sleep(0.001)


def test_steps_are_captured_and_replayed(plugged, gpu, layout):
    """XLA records the handlers in its command buffers, which it uses by default, and replays them with new lengths and values in the same
    buffers. After buffers moved it records again, and gives its graph the new nodes. The same bits come out without command buffers."""
    rng = np.random.default_rng(20)
    q, steps = make_q(rng, 2, HEADS), 6
    start, given = (jnp.int32(0), [make_cache(rng, SLOTS, layout) for _ in range(LAYERS)]), variants(rng, steps)

    def next_step(state, given):
        n, caches = state
        caches, outs = step(q, caches, *of_step(given, n))
        return (n + 1, caches), outs

    def run(**options):
        program = jax.jit(next_step, donate_argnums=0, **options)
        state, answers, before, _ = jax.block_until_ready(jax.tree.map(jnp.copy, start)), [], decode_calls(), gpu.counters()
        in_use = bytes_in_use(plugged)
        for n in range(steps):
            if n == 3:
                moved, kept = jax.block_until_ready(jax.tree.map(jnp.copy, state)), state  # both live: what moved is elsewhere
                state, in_use = moved, bytes_in_use(plugged)
            state, outs = program(state, given)
            answers.append(jax.tree.map(np.asarray, outs))
            del outs  # its buffers are the next step's, and so are its workspaces
            wait_until_freed(plugged, in_use)
        counted = decode_calls() - before, gpu.counters()
        indices, lengths, *_ = of_step(given, steps - 1)
        for cache, got in zip(state[1], answers[-1]):
            check(got, expected(q, [dsv4.Scope(cache, indices, lengths)]), layout)
        del kept
        return answers, *counted

    answers, (calls, captured), counters = run()
    assert LAYERS <= captured <= calls < LAYERS * steps
    assert counters["graph_launches"] == steps - 1  # XLA records at a program's second execution
    assert counters["graph_nodes_updated"] > 0
    assert counters["launches_under_capture"] > 0
    assert counters["calls_refused_under_capture"] == 0

    without, (calls, captured), counters = run(compiler_options=NO_GRAPHS)
    assert (calls, captured) == (LAYERS * steps, 0)
    assert counters["graph_launches"] == 0
    for got, want in zip(jax.tree.leaves(answers), jax.tree.leaves(without)):
        assert_same_bits("with command buffers and without", got, want)


def test_scan_over_steps(plugged, layout):
    """The loop on the device gives the bits of steps called one by one."""
    rng = np.random.default_rng(21)
    q, start, steps = make_q(rng, 2, HEADS), [make_cache(rng, SLOTS, layout)], 3
    given = variants(rng, steps)
    end, got = jax.jit(lambda caches: jax.lax.scan(lambda caches, x: step(q, caches, *x), caches, given))(start)
    program, caches = jax.jit(step), start
    for n in range(steps):
        caches, want = program(q, caches, *of_step(given, n))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
            assert_same_bits(f"step {n}", np.asarray(a)[n], np.asarray(b))
    assert_same_bits("caches", end[0].data, caches[0].data)


def test_shard_map_on_two_devices(plugged, layout):
    """Tokens split over two devices, each with the cache: the bits that each half has alone (in fp8, q's scale is of a call)."""
    rng = np.random.default_rng(22)
    cache = make_cache(rng, SLOTS, layout)
    scope, q = make_scope(rng, cache, SLOTS, [30, 7, 0, 25], TOPK, holes=0.1), make_q(rng, 4, HEADS)
    mesh = jax.make_mesh((2,), ("tokens",), devices=jax.devices("rocm"), axis_types=(jax.sharding.AxisType.Auto,))
    by_token, everywhere = PartitionSpec("tokens"), PartitionSpec()
    specs = by_token, dsv4.Scope(everywhere, by_token, by_token)
    split = jax.jit(jax.shard_map(lambda q, scope: attend(q, (scope,)), mesh=mesh, in_specs=specs, out_specs=by_token))
    got = split(*jax.device_put((q, scope), jax.tree.map(functools.partial(NamedSharding, mesh), specs)))
    assert got[0].sharding.device_set == set(jax.devices("rocm"))
    for half in (slice(2), slice(2, 4)):
        want = attend(q[half], (scope._replace(indices=scope.indices[half], lengths=scope.lengths[half]),))
        for a, b in zip(got, want):
            assert_same_bits(f"{half}", np.asarray(a)[half], np.asarray(b))


EXPORT = """
import sys, jax, jax.numpy as jnp, jax_dsv4 as dsv4
from jax.export import DisabledSafetyCheck, export
def decode(q, data, indices, lengths):
    cache = dsv4.KVCache(data, block_size=16, layout="aiter_bf16")
    return dsv4.sparse_mla_decode(q, dsv4.Scope(cache, indices, lengths), implementation="aiter", return_lse=True)
shape = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype)
arguments = shape((2, 16, 512), jnp.bfloat16), shape(DATA, jnp.bfloat16), shape((2, 40), jnp.int32), shape((2,), jnp.int32)
checks = [DisabledSafetyCheck.custom_call("dsv4_aiter_decode"), DisabledSafetyCheck.custom_call("dsv4_aiter_plan")]
open(sys.argv[1], "wb").write(export(jax.jit(decode), platforms=("rocm",), disabled_checks=checks)(*arguments).serialize())
"""


@pytest.mark.parametrize("layout", ["aiter_bf16"])
def test_exported_on_a_machine_without_a_gpu(plugged, tmp_path, layout):
    """By a process that has neither GPU nor plugin, for the 256 units of an MI355X; run here, on a device of 8."""
    rng = np.random.default_rng(23)
    cache = make_cache(rng, SLOTS, layout)
    scope, q = make_scope(rng, cache, SLOTS, [33, 5], TOPK), make_q(rng, 2, HEADS)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DSV4_ROCM_ARCHITECTURE": "gfx950", "JAX_DSV4_HIP_LIBRARY": "/nowhere"}
    text = EXPORT.replace("DATA", str(cache.data.shape))
    subprocess.run([sys.executable, "-c", text, tmp_path / "program"], env=environment, check=True)
    exported = jax.export.deserialize(bytearray((tmp_path / "program").read_bytes()))
    assert exported.platforms == ("rocm",)
    assert "workers = 256 : i32" in exported.mlir_module()
    check(jax.jit(exported.call)(q, cache.data, scope.indices, scope.lengths), expected(q, [scope]), layout)


def run(*arguments):
    """What a program prints whose default device is the plugin's."""
    environment = {**os.environ, "GFX950_DEVICES": "1", "PYTHONPATH": f"{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.run(
        [sys.executable, plugin.__file__, *arguments], env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    ).stdout


def test_decode_loop(tmp_path):
    """A model with a layer of each kind, in its default layout here: the CPU's text. float32 draws these tokens too, and another sixth."""
    if aiter_kernel.wheel_directory() is None:
        pytest.skip("AITER's kernels are not here: pip install --no-deps amd-aiter")
    command = ["examples/decode_loop.py", "--max-new-tokens", "5", "--prefill-chunk", "4", "--context", "32"]  # 3 tokens of a prompt
    run(*command, "--json", tmp_path / "rocm")
    got = json.loads((tmp_path / "rocm").read_text())
    assert (got["cache_layout"], got["implementation"], got["device"]) == ("aiter_bf16", "aiter", "AMD Instinct MI355X (software)")
    options = ["--dtype", "bfloat16", "--cache-layout", "aiter_bf16", "--json", tmp_path / "cpu"]
    subprocess.run([sys.executable, *command, *options], cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=True)
    want = json.loads((tmp_path / "cpu").read_text())
    assert (got["tokens"], got["text"]) == (want["tokens"], want["text"])


DOCTOR = """
from jax_dsv4 import doctor
doctor.RUNS, doctor.SECONDS = 2, 0.0
doctor.main(["--json"])
"""


def test_doctor(tmp_path):
    """Finds the device and tests on it what runs there, for each layout and head count that AITER may have a kernel for."""
    if aiter_kernel.wheel_directory() is None:
        pytest.skip("AITER's kernels are not here: pip install --no-deps amd-aiter")
    (tmp_path / "doctor.py").write_text(DOCTOR)
    report = json.loads(run(tmp_path / "doctor.py"))
    assert report["devices"] == ["gpu AMD Instinct MI355X (software)"]
    tests = report["implementations"]["aiter"]["self_tests"]
    cases = itertools.product(GFX950_LAYOUTS, (16, 64, 128))
    assert [(test["layout"], test["heads"], test["ok"]) for test in tests] == [(*case, True) for case in cases]
    (test,) = report["implementations"]["xla"]["self_tests"]
    assert test["ok"]
