"""The Hopper handlers, on a GPU."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cases import PACKED, Case, make, tagged
from compare import OUT_BF16, assert_close, assert_same_bits
from conformance import NativeConformance, attend, named, plan_of, with_work
from cuda_steps import LAYERS, calls, decode_step, step_arguments
from hostile import KINDS, draw_rows, written

import jax_dsv4 as dsv4
from jax_dsv4 import _work
from jax_dsv4._implementations import native

AVAILABLE, DETAIL = dsv4.implementations()["cuda"]
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not AVAILABLE, reason=DETAIL)]


class TestCUDA(NativeConformance):
    implementation = "cuda"
    log2_magnitude = -3  # the tensor cores multiply bf16 weights, as FlashMLA's do
    # Unlike the CPU's, the kernels do not look whether a token's items fit together.
    guarded = ("kv_lengths", "reduce_final_map")

    def refusal(self, case: Case) -> str | None:
        """As `implementations()` and the error say (below)."""
        float32 = case.dtype == "float32" or any(scope and scope.layout == "float32" for scope in (case.swa, case.extra))
        return "it takes no float32" if float32 else None

    @pytest.mark.parametrize("seed", range(100, 300))
    def test_many_seeds(self, seed: int) -> None:
        cases = [case for case in tagged("ci") if not self.refusal(case)]
        self.hold(cases[seed % len(cases)], seed)


def test_what_it_cannot_take_is_said() -> None:
    p = make(named("fp8_ds_mla-q_float32"))
    with pytest.raises(NotImplementedError, match=r"cuda: its kernels take q in bfloat16, not float32"):
        dsv4.sparse_mla_decode(p.q, p.swa, p.extra, implementation="cuda")
    with pytest.raises(NotImplementedError, match=r"cuda: its kernels do not read layout 'float32'"):
        dsv4.append(dsv4.KVCache.create(4, 64, layout="float32"), jnp.zeros((1, 512)), jnp.zeros(1, jnp.int32), implementation="cuda")


def on(platform: str, call, *arrays: np.ndarray):
    """call(*arrays) on a platform's first device."""
    with jax.default_device(jax.devices(platform)[0]):
        return jax.block_until_ready(call(*map(jnp.asarray, arrays)))


def draw_lengths(rng: np.random.Generator, kind: str, tokens: int, topk: int) -> np.ndarray:
    draw = {
        "full": lambda: np.full(tokens, topk),
        "zero": lambda: np.zeros(tokens),
        "full or empty": lambda: topk * (rng.random(tokens) < 0.9),
        "any": lambda: rng.integers(-3, topk + 4, tokens),
        "short": lambda: rng.integers(0, min(topk, 70) + 1, tokens),
        "sparse": lambda: np.where(rng.random(tokens) < 0.8, 0, rng.integers(0, topk + 1, tokens)),
        "extreme": lambda: rng.choice(np.array([-(2**31), -1, 0, 1, topk, 10**9, 2**31 - 1]), tokens),
    }
    return draw[kind]().astype(np.int32)


@pytest.mark.parametrize("workers", [1, 66, 132, 320])
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 31, 132, 256, 300, 511, 512, 513, 1025, 5000])
def test_plan_is_the_cpus(tokens: int, workers: int) -> None:
    """The planner's pieces give the plan of ffi/common/plan.h's serial scan, whatever the lengths."""
    rng = np.random.default_rng([tokens, workers])
    for overhead, granularity, cut_cost, topks in (
        (2, 64, 2, (128, 1024)),
        (2, 64, 0, (128, 1024)),
        (0, 64, 1, (128, 0)),
        (16, 16, 0, (0, 512)),
        (5, 1, 300, (70, 300)),
    ):
        geometry = _work.Geometry(workers, granularity, overhead, cut_cost)
        plan = jax.jit(lambda a, b: native.plan_call((a, b), topks, geometry))  # noqa: B023
        for kind in ("full", "full or empty", "zero", "any", "short", "sparse", "extreme"):
            lengths = [draw_lengths(rng, kind, tokens, topk) for topk in topks]
            cpu, cuda = (on(platform, plan, *lengths) for platform in ("cpu", "cuda"))
            for field in cpu._fields:
                assert_same_bits(f"{field}, {kind}, {geometry}", getattr(cuda, field), getattr(cpu, field))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("block_size", "stride"), [(1, 584), (5, 2921), (64, 37440)])
def test_append_writes_the_oracles_bytes(block_size: int, stride: int, dtype: str) -> None:
    """Latents of every kind that some step of the quantiser may get wrong, infinities and NaN among them."""
    rng = np.random.default_rng(block_size)
    rows = 256
    latents = draw_rows(KINDS, rng, rows)
    latents = latents.astype(jnp.bfloat16 if dtype == "bfloat16" else np.float32)
    before = rng.integers(0, 256, (-(-2 * rows // block_size), stride), dtype=np.uint8)
    slots = rng.integers(-2, 2 * rows + block_size, rows).astype(np.int32)  # some invalid, some equal

    def append(data, latents, slots):
        return dsv4.append(dsv4.KVCache(data, block_size=block_size), latents, slots, implementation="cuda").data

    after = on("cuda", jax.jit(append), before, latents, slots)
    np.testing.assert_array_equal(after, written(before, latents, slots, block_size, "fp8_ds_mla"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("arrangement", ["inline", "footer"])
@pytest.mark.parametrize("layout", ["mxfp8_528", "nvfp4_288"])
@pytest.mark.parametrize("block_size", [1, 5, 64])
def test_append_writes_the_oracles_bytes_of_v41(block_size: int, layout: str, arrangement: str, dtype: str) -> None:
    rng = np.random.default_rng(block_size)
    rows = 256
    latents = draw_rows(KINDS, rng, rows)
    latents = latents.astype(jnp.bfloat16 if dtype == "bfloat16" else np.float32)
    stride = PACKED[layout].stride(block_size, arrangement, 3)
    before = rng.integers(0, 256, (-(-2 * rows // block_size), stride), dtype=np.uint8)
    slots = rng.integers(-2, 2 * rows + block_size, rows).astype(np.int32)

    def append(data, latents, slots):
        cache = dsv4.KVCache(data, block_size=block_size, layout=layout, arrangement=arrangement)
        return dsv4.append(cache, latents, slots, implementation="cuda").data

    after = on("cuda", jax.jit(append), before, latents, slots)
    np.testing.assert_array_equal(after, written(before, latents, slots, block_size, layout, arrangement))


def test_append_of_bf16() -> None:
    latents = draw_rows(KINDS, np.random.default_rng(0), 64)
    before, slots = np.full((20, 5, 512), np.nan, ml_dtypes.bfloat16), np.arange(64, dtype=np.int32)[::-1]
    append = lambda data, *rows: dsv4.append(dsv4.KVCache(data, block_size=5, layout="bf16"), *rows, implementation="cuda").data  # noqa: E731
    after = np.asarray(on("cuda", append, before, latents, slots))
    np.testing.assert_array_equal(after.view(np.uint16), written(before, latents, slots, 5, "bf16").view(np.uint16))


@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 35, 300, 1000, 8197])
def test_last_of_equal_slots_wins(count: int) -> None:
    rng = np.random.default_rng(count)
    latents = rng.standard_normal((count, 512)).astype(np.float32)
    for distinct in (1, 7, count, 4 * count):
        slots = rng.integers(-1, distinct, count).astype(np.int32)

        def append(latents, slots, implementation):
            return dsv4.append(dsv4.KVCache.create(distinct // 61 + 1, 61), latents, slots, implementation=implementation).data  # noqa: B023

        cpu, cuda = (on(name, functools.partial(append, implementation=name), latents, slots) for name in ("cpu", "cuda"))
        assert_same_bits(f"{distinct} slots", cuda, cpu)


def test_plan_that_names_rows_outside_its_buffers() -> None:
    """Rows to merge that do not exist: NaN for that token, the others right."""
    p = make(named("many_tokens"), log2_magnitude=TestCUDA.log2_magnitude)
    plan = plan_of(p, "cuda")
    work = plan.work[0]
    split = np.flatnonzero(np.diff(work.reduce_indptr))
    rows = np.array(work.reduce_partial_map)
    for token, row in zip(split, (-1, rows.size, 2**31 - 1)):
        rows[work.reduce_indptr[token + 1] - 1] = row
    broken = work._replace(reduce_partial_map=jnp.asarray(rows))
    out = np.asarray(attend(p, "cuda", plan=with_work(plan, broken))[0], np.float64)
    hit = np.isin(np.arange(len(out)), split[:3])
    assert hit.any()
    np.testing.assert_array_equal(np.isnan(out).all((1, 2)), hit)
    assert_close("out", out[~hit], p.out[~hit], OUT_BF16)


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
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import cuda_steps as t\n"
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
