"""The Hopper handlers, on a GPU."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cases import PACKED, Case, make, tagged
from compare import LSE, OUT_BF16, assert_close, assert_same_bits
from conformance import NativeConformance, attend, named, plan_of, with_work
from cuda_steps import LAYERS, calls, decode_step, step_arguments
from hostile import KINDS, draw_rows, written

import jax_dsv4 as dsv4
from jax_dsv4 import _work, reference
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
    for overhead, granularity, cut_cost, segment, topks in (
        (2, 64, 2, 0, (128, 1024)),
        (2, 64, 0, 0, (128, 1024)),
        (0, 64, 1, 0, (128, 0)),
        (16, 16, 0, 0, (0, 512)),
        (5, 1, 300, 0, (70, 300)),
        (2, 64, 0, 4, (128, 1024)),
    ):
        geometry = _work.Geometry(workers, granularity, overhead, cut_cost, segment)
        segments = -(-sum(topks) // (segment * granularity)) if segment else 1
        plan = jax.jit(lambda a, b: native.plan_call((a, b), topks, geometry, segments=segments))  # noqa: B023
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


class Tokens(NamedTuple):
    """Tokens of lengths from 1 to topk, evenly spread over the logarithm."""

    q: jax.Array
    scopes: list[dsv4.Scope]
    sink: jax.Array

    @classmethod
    def drawn(cls, tokens: int, heads: int, topks: tuple[int, int], seed: int = 0) -> Tokens:
        rng, slots = np.random.default_rng(seed), 4096
        scopes = []
        for topk in topks:
            latents = jnp.asarray(rng.standard_normal((slots, 512), np.float32) / 8)
            cache = dsv4.append(dsv4.KVCache.create(slots // 64, 64), latents, jnp.arange(slots, dtype=jnp.int32))
            lengths = np.exp(rng.uniform(0, np.log(topk + 1), tokens)).astype(np.int32)
            scopes.append(dsv4.Scope(cache, jnp.asarray(rng.integers(-1, slots, (tokens, topk)), jnp.int32), jnp.asarray(lengths)))
        q = jnp.asarray(rng.standard_normal((tokens, heads, 512), np.float32), jnp.bfloat16)
        return cls(q, scopes, jnp.asarray(rng.standard_normal(heads), jnp.float32))

    def of(self, rows: jax.Array) -> Tokens:
        return self._replace(q=self.q[rows], scopes=[s._replace(indices=s.indices[rows], lengths=s.lengths[rows]) for s in self.scopes])

    def attend(self, *rows: jax.Array, **options):
        """out and lse of each of several calls with some of the tokens."""
        calls = [self.of(r) for r in rows]
        return [dsv4.sparse_mla_decode(t.q, *t.scopes, attn_sink=t.sink, return_lse=True, implementation="cuda", **options) for t in calls]


@pytest.mark.parametrize("heads", [16, 64, 128])
def test_batch_invariance(heads: int) -> None:
    """500 tokens, each of one to three segments: alone, in batches of 2 to 300 and in one of all, at any place, with a plan of the call's
    own or made before, captured into a graph or not."""
    tokens, rng = Tokens.drawn(500, heads, (128, 2600)), np.random.default_rng(heads)
    attend = jax.jit(lambda tokens, *rows: tokens.attend(*rows, batch_invariant=True))
    alone = [attend(tokens, jnp.array([i]))[0] for i in range(500)]
    want = [np.concatenate([np.asarray(x[field]) for x in alone]) for field in (0, 1)]
    batches = [rng.integers(0, 500, n) for n in (2, 3, 7, 16, 33, 64, 131, 200, 300)] + [rng.permutation(500)]
    for rows in batches:
        for field, got in enumerate(attend(tokens, jnp.asarray(rows))[0]):
            assert_same_bits(f"a batch of {len(rows)}", got, want[field][rows])
    rows = batches[6]
    some = tokens.of(jnp.asarray(rows))
    topks = {"swa_topk": 128, "extra_topk": 2600, "implementation": "cuda", "batch_invariant": True}
    plan = dsv4.plan_decode(*(s.lengths for s in some.scopes), num_heads=heads, **topks)
    got = some.attend(jnp.arange(len(rows)), plan=plan, batch_invariant=True)[0]
    assert_same_bits("with a plan", got[0], want[0][rows])
    before = calls()[1]
    for _ in range(3):
        together = attend(tokens, *map(jnp.asarray, batches))
    for rows, got in zip(batches, together):
        assert_same_bits(f"captured, a batch of {len(rows)}", got[0], want[0][rows])
    assert calls()[1] > before, "nothing was captured"


def test_many_tokens() -> None:
    """16,384 tokens, four to a request, in one call."""
    tokens = Tokens.drawn(16384, 8, (64, 96))
    q = tokens.q.reshape(4096, 4, 8, 512)
    scopes = [s._replace(indices=s.indices.reshape(4096, 4, -1), lengths=s.lengths.reshape(4096, 4)) for s in tokens.scopes]
    out, lse = dsv4.sparse_mla_decode(q, *scopes, attn_sink=tokens.sink, return_lse=True, implementation="cuda")
    rows = np.random.default_rng(0).integers(0, 16384, 100)
    some = tokens.of(jnp.asarray(rows))
    keys = [reference.ReferenceScope(dsv4.dequantize(s.cache), np.asarray(s.indices), np.asarray(s.lengths)) for s in some.scopes]
    want, want_lse = reference.decode(np.asarray(some.q, np.float64), keys, np.asarray(some.sink, np.float64))
    assert_close("out", np.asarray(out, np.float64).reshape(16384, 8, 512)[rows], want, OUT_BF16)
    assert_close("lse", np.asarray(lse).reshape(16384, 8)[rows], want_lse, LSE)


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
