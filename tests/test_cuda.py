"""The Hopper handlers, on a GPU."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, make, tagged
from compare import OUT_BF16, assert_close, assert_same_bits
from conformance import Conformance

import jax_dsv4 as dsv4
from jax_dsv4 import _ffi

AVAILABLE, DETAIL = dsv4.implementations()["cuda"]
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not AVAILABLE, reason=DETAIL)]


def takes(case: Case) -> bool:
    """Whether the kernels take such a call at all; `implementations()` and the error say so where they do not."""
    layouts = {scope.layout for scope in (case.swa, case.extra) if scope is not None}
    return case.dtype == "bfloat16" and layouts == {"fp8_ds_mla"}


class TestCUDA(Conformance):
    implementation = "cuda"
    log2_magnitude = -3  # the tensor cores multiply bf16 weights, as FlashMLA's do

    def supports(self, case: Case) -> bool:
        return takes(case)

    @pytest.mark.parametrize("case", tagged("flashmla-large"), ids=str)
    def test_flashmla_grid_large(self, case: Case) -> None:
        self.hold(case)

    @pytest.mark.parametrize("seed", range(100, 300))
    def test_many_seeds(self, seed: int) -> None:
        cases = [case for case in tagged("ci") if takes(case)]
        self.hold(cases[seed % len(cases)], seed)


def test_what_it_cannot_take_is_said() -> None:
    case = next(c for c in tagged("ci") if c.name == "fp8_ds_mla-q_float32")
    p = make(case)
    with pytest.raises(NotImplementedError, match=r"cuda: its kernels take q in bfloat16, not float32"):
        dsv4.sparse_mla_decode(p.q, p.swa, p.extra, implementation="cuda")
    with pytest.raises(NotImplementedError, match=r"cuda: its kernels read caches in layout 'fp8_ds_mla', not 'bf16'"):
        dsv4.append(dsv4.KVCache.create(4, 64, layout="bf16"), jnp.zeros((1, 512)), jnp.zeros(1, jnp.int32), implementation="cuda")


@pytest.mark.parametrize("tokens", [1, 7, 132, 300, 1500])
def test_plan_is_the_cpus(tokens: int) -> None:
    """The planner of ffi/common/plan.h gives the same plan on the device as the serial one on the CPU."""
    rng = np.random.default_rng(tokens)
    swa, extra = (jnp.asarray(rng.integers(-3, n + 3, tokens), jnp.int32) for n in (128, 1024))
    from jax_dsv4.implementations import native

    geometry = native.Geometry(workers=66, granularity=64, overhead=2)
    plans = []
    for platform in ("cpu", "cuda"):
        with jax.default_device(jax.devices(platform)[0]):
            a, b = (jax.device_put(np.asarray(x)) for x in (swa, extra))
            plans.append(jax.jit(lambda a, b: native.plan_call((a, b), (128, 1024), geometry))(a, b))
    for field, cpu, cuda in zip(plans[0]._fields, *plans):
        assert_same_bits(field, cuda, cpu)


def test_append_writes_the_cpus_bytes() -> None:
    rng = np.random.default_rng(0)
    latents = jnp.asarray(rng.standard_normal((300, 512)) * np.exp2(rng.integers(-20, 8, (300, 1))), jnp.bfloat16)
    slots = jnp.asarray(rng.integers(-2, 400, 300), jnp.int32)  # some invalid, many equal
    caches = []
    for platform in ("cpu", "cuda"):
        with jax.default_device(jax.devices(platform)[0]):
            a, b = jax.device_put(np.asarray(latents)), jax.device_put(np.asarray(slots))
            caches.append(dsv4.append(dsv4.KVCache.create(6, 61), a, b, implementation=platform).data)
    assert_same_bits("cache", caches[1], caches[0])


def calls() -> tuple[int, int]:
    """Handler calls so far, and those during capture."""
    library, _ = _ffi.load("libdsv4_cuda", "CUDA")
    counts = (ctypes.c_int64(), ctypes.c_int64())
    library.dsv4_cuda_calls(*(ctypes.byref(c) for c in counts))
    return counts[0].value, counts[1].value


LAYERS = 8


@functools.cache
def decode_step():
    """A step of LAYERS layers under one plan, each of which appends to its cache, in place, and attends."""

    @functools.partial(jax.jit, donate_argnums=1)
    def step(q, caches, indices, lengths, latents, slots):
        plan = dsv4.plan_decode(lengths, num_heads=q.shape[1], swa_topk=indices.shape[1])
        caches = [dsv4.append(cache, latents, slots) for cache in caches]
        outs = [dsv4.sparse_mla_decode(q, dsv4.Scope(cache, indices, lengths), plan=plan) for cache in caches]
        return jnp.stack(outs), caches

    return step


def step_arguments(seed: int, tokens: int = 3):
    """q, caches, and four variants of what changes from step to step: slots to read, lengths, what is appended and where."""
    rng = np.random.default_rng(seed)
    rows = jnp.asarray(rng.standard_normal((LAYERS, 640, 512)), jnp.bfloat16)
    caches = [dsv4.append(dsv4.KVCache.create(10, 64), rows[i], jnp.arange(640, dtype=jnp.int32)) for i in range(LAYERS)]
    variants = [
        (
            jnp.asarray(rng.integers(-1, 640, (tokens, 128)), jnp.int32),
            jnp.asarray(rng.integers(1, 129, tokens), jnp.int32),
            jnp.asarray(rng.standard_normal((tokens, 512)), jnp.bfloat16),
            jnp.asarray(rng.permutation(640)[:tokens], jnp.int32),
        )
        for _ in range(4)
    ]
    return jnp.asarray(rng.standard_normal((tokens, 64, 512)), jnp.bfloat16), caches, variants


def test_steps_are_captured() -> None:
    """1000 steps of 8 layers hardly ever call their handlers, and new values in the same buffers give new results."""
    step = decode_step()
    q, caches, variants = step_arguments(0)
    for i in range(20):  # XLA keeps a graph for each set of buffer addresses
        out, caches = step(q, caches, *variants[i % 4])
    out.block_until_ready()
    before, _ = calls()
    for i in range(1000):
        out, caches = step(q, caches, *variants[i % 4])
    out.block_until_ready()
    after, captured = calls()
    assert captured > 0, "no handler was called during capture"
    assert after - before < 50, f"{after - before} handler calls in 1000 steps"
    for i, variant in enumerate(variants):
        out, caches = step(q, caches, *variant)
        for layer, cache in enumerate(caches):
            want = dsv4.sparse_mla_decode(q, dsv4.Scope(cache, *variant[:2]), implementation="xla")
            assert_close(f"variant {i}, layer {layer}", out[layer], np.asarray(want, np.float64), OUT_BF16._replace(abs=2e-2))


def test_captured_bits_are_eager_bits() -> None:
    step = decode_step()
    q, caches, variants = step_arguments(1)
    for variant in variants * 5:
        out, caches = step(q, caches, *variant)
        plan = dsv4.plan_decode(variant[1], num_heads=64, swa_topk=128)
        for layer, cache in enumerate(caches):
            alone = dsv4.sparse_mla_decode(q, dsv4.Scope(cache, *variant[:2]), plan=plan)
            assert_same_bits(f"layer {layer}", out[layer], alone)


def test_control_without_command_buffers() -> None:
    """With command buffers off every step calls its handlers, none of them during capture: the counters mean what they say."""
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_cuda as t\n"
        "step = t.decode_step(); q, caches, variants = t.step_arguments(0); before = t.calls()\n"
        "for _ in range(10): out, caches = step(q, caches, *variants[0]); out.block_until_ready()\n"
        "print(t.calls()[0] - before[0], t.calls()[1])\n"
    )
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": flags}
    )
    all_calls, captured = map(int, done.stdout.split())
    assert captured == 0
    assert all_calls >= 10 * (2 * LAYERS + 1)
