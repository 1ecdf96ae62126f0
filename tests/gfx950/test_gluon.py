"""AITER's Gluon kernel on the software GPU, compiled from an AITER source tree, through the handlers that we ship."""

import ast
import contextlib
import functools
import json
import math
import os
import subprocess
import sys
import warnings
from typing import ClassVar

import gluon
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import OUT_BF16, Answer, Tolerance, assert_answer, assert_same_bits
from conformance import Conformance

import jax_dsv4 as dsv4
from jax_dsv4 import _ffi, _gluon, build_aiter, doctor, reference
from jax_dsv4._implementations import aiter_gluon


class TestGluon(Conformance):
    implementation = "aiter_gluon"
    log2_magnitude = -3  # the softmax's weights are bf16, as FlashMLA's are
    out_tolerance: ClassVar = {"bfloat16": OUT_BF16}
    reruns = 3  # a second each

    @pytest.fixture(autouse=True)
    def on_software(self, on_gluon):
        """Every access of every kernel is checked there."""

    def refusal(self, case):
        if case.dtype != "bfloat16":
            return "it takes q in bfloat16"
        scopes = [s for s in (case.swa, case.extra) if s is not None]
        if any(s.layout != "fp8_ds_mla" for s in scopes):
            return "it reads layout fp8_ds_mla"
        if any(s.stride_extra_bytes % 2 for s in scopes):
            return "it needs an even block stride"
        if "ci" not in case.tags:
            return "FlashMLA's grid takes minutes a case on the software GPU"
        return None

    def run(self, p, fused=None, plan=None):
        gluon.compile_for(p.q, [s for s in (p.swa, p.extra) if s is not None], p.scale, fused is not False)
        return super().run(p, fused, plan)


def problem(rng, lengths, block_size=64, slots=300, heads=16, topks=(140, 100), nan=(0,)):
    """q and two scopes on one cache: holes at the front of full tiles, slots beyond the cache, NaN wherever nobody attends."""
    cache = gluon.make_cache(rng, slots, block_size, nan)
    q = jnp.asarray(rng.normal(size=(len(lengths), heads, 512)), jnp.bfloat16)
    scopes = []
    for topk in topks:
        indices = rng.integers(1, slots, (len(lengths), topk))
        indices[:, ::3] = rng.choice([-1, cache.num_slots, 2**31 - 1, -(2**31)], indices[:, ::3].shape)
        for t, n in enumerate(lengths):
            indices[t, n:] = slots
        scopes.append(dsv4.Scope(cache, jnp.asarray(indices, jnp.int32), jnp.minimum(jnp.asarray(lengths, jnp.int32), topk)))
    gluon.compile_for(q, scopes)
    return q, scopes


def check(got, q, scopes, sink=None):
    rows = [np.asarray(dsv4.dequantize(s.cache), np.float64) for s in scopes]
    keys = [reference.ReferenceScope(r, np.asarray(s.indices), np.asarray(s.lengths)) for r, s in zip(rows, scopes)]
    want = Answer(*reference.decode(np.asarray(q, np.float64), keys, sink, 512**-0.5))
    assert_answer(got, want, Tolerance(abs=1e-2, rel=2.0**-6, cosine=5e-6))


@pytest.fixture
def two_splits(monkeypatch):
    """As few as there are, so that a split of some hundred keys has full tiles, in which AITER's kernel does not look at a slot."""
    monkeypatch.setattr(aiter_gluon, "choose_splits", lambda *_: 2)


def test_holes_and_foreign_slots_are_harmless(on_gluon, two_splits):
    """AITER's kernel would read slot 0 for a hole in a full tile, where NaN lies here, and whatever lies where a foreign slot points."""
    q, scopes = problem(np.random.default_rng(0), [300, 0, 64, 1], topks=(300, 250))
    check(gluon.attend(q, scopes), q, scopes)


def test_holes_before_scores_far_below_zero(on_gluon, two_splits):
    """After a tile of nothing but holes AITER's kernel would compare scores with 0, and these would vanish."""
    rng = np.random.default_rng(12)
    cache = dsv4.KVCache.create(2, 64)
    latents = jnp.asarray(rng.normal(size=(128, 512)) * 0.1 - 1, jnp.float32)
    cache = dsv4.append(cache, latents, jnp.arange(128, dtype=jnp.int32), implementation="xla")
    indices = np.full((1, 300), -1)
    indices[0, -50:] = rng.integers(0, 128, 50)
    q, scopes = jnp.full((1, 16, 512), 8, jnp.bfloat16), [dsv4.Scope(cache, jnp.asarray(indices, jnp.int32), jnp.asarray([300], jnp.int32))]
    gluon.compile_for(q, scopes)
    out, lse = gluon.attend(q, scopes)
    assert (np.asarray(lse) < -150).all()
    check((out, lse), q, scopes)


def test_infinite_sinks_and_tokens_without_keys(on_gluon):
    q, scopes = problem(np.random.default_rng(1), [140, 0, 5])
    sink = np.full(16, -np.inf, np.float32)
    sink[:3] = np.inf, 1e30, 3.0
    out, lse = gluon.attend(q, scopes, jnp.asarray(sink))
    check((out, lse), q, scopes, sink)
    assert (np.asarray(out[:, :2], np.float32) == 0).all()
    assert (np.asarray(lse[1]) == -np.inf).all()


def test_a_token_alone_has_the_bits_it_has_in_a_batch(on_gluon, monkeypatch):
    """Where the same variant serves both. The number of splits is chosen by the number of tokens, and other splits round otherwise."""
    monkeypatch.setattr(aiter_gluon, "choose_splits", lambda *_: 4)
    q, scopes = problem(np.random.default_rng(2), [140, 0, 64, 1, 129])
    out, lse = gluon.attend(q, scopes)
    for t in range(len(q)):
        alone = [s._replace(indices=s.indices[t : t + 1], lengths=s.lengths[t : t + 1]) for s in scopes]
        for got, want in zip(gluon.attend(q[t : t + 1], alone), (out, lse)):
            assert_same_bits(f"token {t}", got[0], want[t])


def test_more_tokens_than_a_launch_can_address(on_gluon, gpu, monkeypatch):
    q, scopes = problem(np.random.default_rng(3), [140, 0, 64, 1, 129, 7])
    sink = jnp.zeros(16)
    want = gluon.attend(q, scopes, sink)
    jax.clear_caches()
    monkeypatch.setattr(aiter_gluon, "tokens_per_launch", lambda *_: 4)
    gpu.kernels()
    got = gluon.attend(q, scopes, sink)
    jax.block_until_ready(got)
    (launches,) = (cost.launches for name, cost in gpu.kernels().items() if name.startswith("_pa_decode_sparse"))
    assert launches == 2
    for a, b in zip(got, want):
        assert_same_bits("in two launches", a, b)


@pytest.mark.parametrize(("heads", "splits"), [(1, 2), (16, 16), (128, 2), (128, 16), (127, 8)])
def test_tokens_per_launch(heads, splits):
    tokens = aiter_gluon.tokens_per_launch(heads, splits)
    assert tokens % 4 == 0
    assert tokens * splits * heads * 512 * 4 <= 2**31 - 1 < (tokens + 4) * splits * heads * 512 * 4


def test_a_cache_of_2_gib(on_gluon):
    """Its rows beyond are read by a variant with 64-bit offsets; the other kind would wrap."""
    rng = np.random.default_rng(4)
    near = gluon.make_cache(rng, 128)
    stride = near.data.shape[1]
    blocks = 2**31 // stride + 3
    memory = np.zeros(blocks * stride + 64, np.uint8)  # pages that nobody touches take no memory
    start = -memory.ctypes.data % 64  # where JAX takes it as it is
    data = memory[start:][: blocks * stride].reshape(blocks, stride)
    data[-2:] = near.data[:2]
    cache = dsv4.KVCache(jnp.asarray(data), block_size=64)
    q = jnp.asarray(rng.normal(size=(1, 16, 512)), jnp.bfloat16)
    indices = jnp.asarray(rng.integers(0, 128, (1, 100)), jnp.int32)
    (needed,) = gluon.variant(q, [dsv4.Scope(cache, indices)])
    assert needed.wide
    scopes = [[dsv4.Scope(c, indices + first)] for c, first in ((near, 0), (cache, 64 * (blocks - 2)))]
    for each in scopes:
        gluon.compile_for(q, each)
    for got, want in zip(gluon.attend(q, scopes[1]), gluon.attend(q, scopes[0])):
        assert_same_bits("far", got, want)


# ---- Capture: the bridge captures every call, so what is forbidden there has failed already.


def test_launches(on_gluon, gpu):
    """Both scopes and the sink in one launch of AITER's, three of ours around it; all of them recorded, none refused."""
    q, scopes = problem(np.random.default_rng(5), [140, 64])
    for _ in range(2):  # the first round loads code, in the initialize stage
        gpu.counters(), gpu.kernels()
        jax.block_until_ready(gluon.attend(q, scopes, jnp.zeros(16)))
    counters, kernels = gpu.counters(), gpu.kernels()
    assert counters["calls_refused_under_capture"] == 0
    assert counters["launches_under_capture"] == counters["launches"] == 4
    ours = {name for name in kernels if name.startswith("dsv4_")}
    assert ours == {"dsv4_count_slots", "dsv4_gather_slots", "dsv4_combine_splits"}
    assert sum(name.startswith("_pa_decode_sparse") for name in kernels) == 1


def test_replay_sees_new_lengths_and_values(on_gluon):
    """A decode loop whose graphs are captured once: the cache grows and lengths change in the same buffers."""
    rng = np.random.default_rng(6)
    steps, topk = 6, 80
    latents = jnp.asarray(rng.normal(size=(steps, 512)), jnp.bfloat16)
    q = jnp.asarray(rng.normal(size=(steps, 2, 16, 512)), jnp.bfloat16)
    start = gluon.make_cache(rng, 128)
    indices = jnp.asarray(rng.permutation(topk)[None].repeat(2, 0), jnp.int32)
    gluon.compile_for(q[0], [dsv4.Scope(start, indices)])

    def step(cache, i):
        cache = dsv4.append(cache, jax.lax.dynamic_slice_in_dim(latents, i, 1), i[None], implementation="aiter_gluon")
        lengths = jnp.stack([7 * i + 30, jnp.where(i % 2, 0, 80 - i)]).astype(jnp.int32)
        return cache, gluon.attend(q[i], [dsv4.Scope(cache, indices, lengths)])

    loop = jax.jit(lambda cache: jax.lax.scan(step, cache, jnp.arange(steps)))
    _, want = jax.block_until_ready(loop(start))
    on_gluon.bridge_replay(1)
    _, got = jax.block_until_ready(loop(start))
    assert on_gluon.bridge_replayed() >= steps - 2  # XLA's buffers settle in the first rounds
    for a, b in zip(got, want):
        assert_same_bits("replayed", a, b)


def test_all_kernels_wait_for_their_data(on_gluon, gpu):
    """By the letter of the ISA. AITER's assembly kernels do not; LLVM places the waits of this one."""
    q, scopes = problem(np.random.default_rng(7), [140, 0, 65])
    gpu.options(hazards=True)
    jax.block_until_ready(gluon.attend(q, scopes, jnp.zeros(16)))
    assert gpu.hazards() == []


# ---- Append.


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("scale", [1.0, 2.0**-20, 2.0**120])
def test_append_writes_the_bytes_of_plain_jax(a_variant, dtype, scale):
    """Every magnitude, zeros of both signs, subnormals, saturation, infinities, NaNs; blocks aligned to two bytes."""
    rng = np.random.default_rng(10)
    rows = scale * rng.normal(size=(12, 512)) * np.exp(3 * rng.normal(size=(12, 1)))
    corners = [0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1e-45, -1e-45, 1e-38, 3e38, -3e38, 1.0]
    rows[0], rows[1], rows[2], rows[3] = 0, np.inf, -np.inf, np.nan
    for tile in range(8):
        rows[4 + tile % 2, 64 * tile : 64 * tile + len(corners)] = corners
    latents = jnp.asarray(np.clip(rows, -3e38, 3e38, where=np.isfinite(rows), out=rows).astype(np.float32), dtype)
    cache = dsv4.KVCache.create(3, 5, block_stride_bytes=5 * 584 + 2)
    ours, plain = (dsv4.append(cache, latents, jnp.arange(12, dtype=jnp.int32), implementation=i) for i in ("aiter_gluon", "xla"))
    np.testing.assert_array_equal(ours.data, plain.data)


def test_append_slots(a_variant, gpu):
    """Slots outside the cache are passed over, of equal ones the last counts and is written alone."""
    rng = np.random.default_rng(11)
    slots = rng.integers(0, 32, 200)
    slots[rng.random(200) < 0.3] = -1
    slots[[3, 50, 77, 199]] = [32, 2**31 - 1, -(2**31), 40]
    latents = jnp.asarray(rng.normal(size=(200, 512)), jnp.float32)
    cache = dsv4.KVCache.create(4, 8)
    gpu.kernels()
    ours, plain = (dsv4.append(cache, latents, jnp.asarray(slots, jnp.int32), implementation=i) for i in ("aiter_gluon", "xla"))
    np.testing.assert_array_equal(ours.data, plain.data)
    assert gpu.kernels()["dsv4_append_packed"].bytes_written == len(set(slots) & set(range(32))) * 584


def test_append_donates(a_variant):
    append = jax.jit(lambda c, x, s: dsv4.append(c, x, s, implementation="aiter_gluon"), donate_argnums=0)
    text = append.lower(dsv4.KVCache.create(4, 8), jnp.zeros((2, 512)), jnp.zeros(2, jnp.int32)).compile().as_text()
    assert not [line for line in text.splitlines() if " copy(" in line and "u8[4," in line]


# ---- Variants.


@contextlib.contextmanager
def directory(shared_packed):
    """The handlers look where JAX_DSV4_CACHE_DIR says now, for a time."""
    handlers = shared_packed[0]
    handlers.dsv4_rocm_gluon_directory(os.fsencode(_ffi.gluon_directory()))
    yield
    handlers.dsv4_rocm_gluon_directory(os.fsencode(gluon.CACHE / _ffi.gluon_directory().name))


def test_what_is_not_compiled_is_asked_for(on_gluon, shared_packed, tmp_path, monkeypatch):
    """The error names the command; after it the call runs."""
    monkeypatch.setenv("JAX_DSV4_CACHE_DIR", str(tmp_path))
    available, detail = dsv4.implementations()["aiter_gluon"]
    assert not available
    assert "python -m jax_dsv4.build_aiter --source AITER --heads 64" in detail
    build_aiter.build_gluon(gluon.source(), [])
    (_ffi.gluon_directory() / "pa_decode_sparse-another.co").touch()
    rng = np.random.default_rng(8)
    cache = gluon.make_cache(rng, 30, block_size=2)
    scopes = [dsv4.Scope(cache, jnp.asarray(rng.integers(0, 30, (1, 9)), jnp.int32), jnp.asarray([9], jnp.int32))]
    q = jnp.asarray(rng.normal(size=(1, 3, 512)), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"has no kernel compiled for this call\. Run: python -m") as error:
        gluon.attend(q, scopes)
    command = str(error.value).split("Run: ")[1].replace("AITER", str(gluon.source())).split()
    done = subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True, text=True)
    assert f"4 variants are in {_ffi.gluon_directory()}" in done.stdout
    with directory(shared_packed):
        check(gluon.attend(q, scopes), q, scopes)


OTHER_KERNELS = [
    ("nothing", "too short for an ELF file"),
    ("dsv4_gfx950.co", "not the kernel that is"),  # several kernels
    ("hsa/gfx950/mla/mla_a8w8_qh16_qseqlen1_gqaratio16_ps.co", "not the kernel that is"),  # one, with other arguments
]


@pytest.mark.parametrize(("content", "reason"), OTHER_KERNELS)
def test_another_kernel_of_the_name(on_gluon, shared_packed, tmp_path, monkeypatch, rocm_library, content, reason):
    """A file is read before it is launched: it may be no code object, or have other arguments."""
    monkeypatch.setenv("JAX_DSV4_CACHE_DIR", str(tmp_path))
    other = gluon.source() / content if content.startswith("hsa") else rocm_library.with_name(content)
    scope = dsv4.Scope(dsv4.KVCache.create(4, 4), jnp.zeros((1, 9), jnp.int32))
    q = jnp.zeros((1, 5, 512), jnp.bfloat16)
    (needed,) = gluon.variant(q, [scope])
    _ffi.gluon_directory().mkdir()
    (_ffi.gluon_directory() / f"{needed.name}-lds1024.co").write_bytes(other.read_bytes() if other.exists() else b"")
    with directory(shared_packed), pytest.raises(Exception, match=reason):
        jax.block_until_ready(gluon.attend(q, [scope]))


def test_splits_are_chosen_as_aiter_chooses(on_gluon):
    """AITER's own function, from its source, for our numbers of splits."""
    text = (gluon.source() / "aiter/ops/triton/attention/pa_decode_sparse.py").read_text()
    (function,) = (n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == "_decode_num_splits")
    scope = {"math": math, "get_num_sms": lambda: 256}
    exec(compile(ast.Module([function], []), "aiter", "exec"), scope)
    agreed = 0
    for tokens in (1, 3, 16, 64, 128, 500):
        for heads in (16, 64, 128):
            for topks in ((128,), (128, 512), (128, 1024), (128, 8192)):
                aiters = scope["_decode_num_splits"](tokens, -(-heads // 16), *topks)
                ours = aiter_gluon.choose_splits(tokens, heads, topks, 256)
                if aiters in _gluon.SPLITS:
                    assert ours == aiters
                    agreed += 1
    assert agreed > 20


# ---- Choice and refusals.


def test_preferred_for_its_layout(on_gluon, monkeypatch):
    """On ROCm, where it is compiled; and programs for it are made elsewhere."""
    monkeypatch.setattr(aiter_gluon.AITER_GLUON, "platforms", ("rocm",))
    monkeypatch.setenv("JAX_DSV4_ROCM_ARCHITECTURE", "gfx950")
    aiter_gluon.describe_device.cache_clear()
    assert aiter_gluon.describe_device().units == 256
    scope = dsv4.Scope(dsv4.KVCache.create(4, 64), jnp.zeros((2, 90), jnp.int32))
    q = jnp.zeros((2, 16, 512), jnp.bfloat16)
    gluon.compile_for(q, [scope])
    traced = jax.jit(lambda q, s: dsv4.sparse_mla_decode(q, s)).trace(q, scope)
    assert "dsv4_aiter_gluon_decode" in traced.lower(lowering_platforms=("rocm",)).as_text()
    assert "dsv4_aiter_gluon_decode" not in traced.lower(lowering_platforms=("cpu",)).as_text()


@pytest.fixture
def a_variant(packed, monkeypatch):
    """As if something had been compiled."""
    monkeypatch.setattr(_gluon, "compiled", lambda: ["pa_decode_sparse-some.co"])


@pytest.mark.parametrize(
    ("dtype", "layout", "reason"),
    [(jnp.float32, "fp8_ds_mla", "it takes bfloat16 queries, not float32"), (jnp.bfloat16, "bf16", "it reads layout 'fp8_ds_mla'")],
)
def test_refused(a_variant, dtype, layout, reason):
    scope = dsv4.Scope(dsv4.KVCache.create(4, 64, layout), jnp.zeros((1, 8), jnp.int32))
    with pytest.raises(NotImplementedError, match=reason):
        dsv4.sparse_mla_decode(jnp.zeros((1, 16, 512), dtype), scope, implementation="aiter_gluon")


def test_an_odd_stride_is_refused(a_variant):
    cache = dsv4.KVCache.create(4, 64, block_stride_bytes=64 * 584 + 1)
    with pytest.raises(NotImplementedError, match="it needs an even block stride, and the cache's is 37377 bytes"):
        dsv4.sparse_mla_decode(
            jnp.zeros((1, 16, 512), jnp.bfloat16), dsv4.Scope(cache, jnp.zeros((1, 8), jnp.int32)), implementation="aiter_gluon"
        )


def test_other_architectures_are_refused(packed, monkeypatch):
    monkeypatch.setenv("JAX_DSV4_ROCM_ARCHITECTURE", "gfx942")
    aiter_gluon.describe_device.cache_clear()
    assert "AITER's Gluon kernel is for gfx950; this is gfx942" in dsv4.implementations()["aiter_gluon"].detail


def test_handler_checks_in_the_words_of_python(packed):
    def decode(splits=2, tokens_per_launch=4, stride=37440):
        i32, f32, tokens, heads, topk = jnp.int32, jnp.float32, 1, 16, 8
        shapes = [((tokens, heads, 512), jnp.bfloat16), ((tokens, heads), f32), ((2, tokens), i32)]
        shapes += 2 * [((tokens + 1,), i32), ((tokens, topk), i32)]
        shapes += 2 * [((tokens, splits, heads), f32)] + [((tokens, splits, heads, 512), f32)]
        scope = jnp.zeros((2, stride), jnp.uint8), jnp.zeros((tokens, topk), i32), jnp.zeros(tokens, i32)
        numbers = dict(swa_block_size=64, extra_block_size=64, tokens_per_launch=tokens_per_launch)
        call = jax.ffi.ffi_call("dsv4_aiter_gluon_decode", [jax.ShapeDtypeStruct(*s) for s in shapes])
        call = functools.partial(call, scale=np.float32(0.1), has_sink=False, **{k: np.int32(v) for k, v in numbers.items()})
        jax.block_until_ready(call(jnp.zeros((tokens, heads, 512), jnp.bfloat16), jnp.zeros(0, f32), *scope, *scope))

    with pytest.raises(Exception, match="sparse_mla_decode: partial_out must have at least 2 splits, got 1"):
        decode(splits=1)
    with pytest.raises(Exception, match="tokens_per_launch must be a multiple of 4 whose partial_out has less than 2 GiB, got 1048576"):
        decode(tokens_per_launch=1 << 20)
    with pytest.raises(Exception, match=r"swa\.cache's block stride must be even, got 37377"):
        decode(stride=37377)
    with pytest.raises(Exception, match=r"kernel pa_decode_sparse-h16-s3dcccccd-b64\+64-a16-narrow-x2 is not in "):
        decode()


def test_what_is_not_needed_is_not_missed(packed, tmp_path, monkeypatch):
    """Where another kernel serves the platform, no call warns of the absence of this one, and `doctor` does not fail for it."""
    monkeypatch.setenv("JAX_DSV4_CACHE_DIR", str(tmp_path))
    scope = dsv4.Scope(dsv4.KVCache.create(4, 64), jnp.zeros((1, 8), jnp.int32))
    with warnings.catch_warnings(action="error"):
        dsv4.sparse_mla_decode(jnp.zeros((1, 16, 512), jnp.bfloat16), scope)
    assert not doctor.examine("aiter_gluon")["missing"]


def test_doctor(on_gluon, short_doctor, shared_packed, tmp_path, monkeypatch, capsys):
    """It tests what was compiled."""
    monkeypatch.setenv("JAX_DSV4_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_gluon, "SPLITS", (2,))
    build_aiter.build_gluon(gluon.source(), [_gluon.Variant(16, 512**-0.5, (64, 64))])
    capsys.readouterr()
    with directory(shared_packed):
        assert doctor.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    fact = "AITER's Gluon kernel: pa_decode_sparse-h16-s3d3504f3-b64+64-a16-narrow-x2-lds68608.co"
    assert fact in report["rocm"]
    (test,) = report["implementations"]["aiter_gluon"]["self_tests"]
    assert (test["heads"], test["ok"]) == (16, True)
    assert test["cosine"] > 1 - 5e-6
