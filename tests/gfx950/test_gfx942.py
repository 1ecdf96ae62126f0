"""The same machine as a gfx942 (MI300X, MI325X): 64 KB of LDS, fp8 numbers are e4m3fnuz, AITER's kernels and ours for it."""

import shutil

import bridge
import jax
import numpy as np
import pytest
import software_gpu
from aiter_kernel import FNUZ
from calls import attend, check, create_cache, expected, make_cache, make_q, make_scope, plan_for
from numpy.random import default_rng

import jax_dsv4 as dsv4
from jax_dsv4._implementations import aiter


@pytest.fixture
def gfx942(gpu, rocm_library, hsa, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_DSV4_PLANNER", "own")
    path = tmp_path / "libdsv4_rocm.so"
    handlers = bridge.load_handlers(rocm_library, path, hsa, rocm_library.parent)
    for _ in bridge.drive(monkeypatch, aiter.AITER, handlers, path, "gfx942"):
        yield hsa


LAYOUTS = ("aiter_bf16", "aiter_fp8_fnuz")


def test_what_is_there(gfx942):
    found = dsv4.implementations()["aiter"]
    assert found.available, found.detail
    assert found.detail.startswith("gfx942, 8 units")
    folder = f"{gfx942}/gfx942/mla"
    assert f"'aiter_bf16': {folder}/mla_a16w16_qh16_m16x4_n16x1_coex0_mask1_ps.co (one wait mended)" in found.detail
    assert f"'aiter_fp8_fnuz': {folder}/mla_a8w8_qh16_qseqlen1_gqaratio16_ps.co" in found.detail
    reason = "AITER's fp8 kernels take e4m3fnuz on gfx942, layout aiter_fp8_fnuz"
    assert f"'aiter_fp8': {reason}" in found.detail
    assert reason in aiter.AITER.unsupported(16, (create_cache(1, 16, "aiter_fp8"),))
    for layout in LAYOUTS:
        assert "wraps at 4 GiB" in aiter.choose_kernel(layout, 16, 2**32).text.decode()
    chosen = {heads: aiter.choose_kernel("aiter_fp8_fnuz", heads) for heads in (1, 16, 64, 127, 128)}
    passes = {heads: (choice.kernel_heads, choice.head_passes(heads)) for heads, choice in chosen.items()}
    assert passes == {1: (16, 1), 16: (16, 1), 64: (16, 4), 127: (16, 8), 128: (128, 1)}


@pytest.mark.parametrize("name", ["qh64_qseqlen1_gqaratio64_lse_v3_ps", "qh64_qseqlen1_gqaratio64_v3_ps", "qh64_qseqlen4_gqaratio16_ps"])
def test_kernels_that_were_reported_to_fault_are_never_chosen(gfx942, gpu, rocm_library, tmp_path, monkeypatch, name):
    """Newer AITERs have fp8 kernels of 64 heads. Here a known file stands for each."""
    folder = tmp_path / "hsa/gfx942/mla"
    folder.mkdir(parents=True)
    for file in (gfx942 / "gfx942/mla").glob("mla_a8w8_*_ps.co"):
        shutil.copy(file, folder)
    shutil.copy(folder / "mla_a8w8_qh128_m32x4_n16x2_msk0_ps.co", folder / f"mla_a8w8_{name}.co")
    path = tmp_path / "others.so"
    handlers = bridge.load_handlers(rocm_library, path, tmp_path / "hsa", rocm_library.parent)
    for _ in bridge.drive(monkeypatch, aiter.AITER, handlers, path, "gfx942"):
        assert [aiter.choose_kernel("aiter_fp8_fnuz", heads).kernel_heads for heads in (16, 64, 128)] == [16, 16, 128]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [5, 16, 64, 128])
def test_decode(gfx942, layout, heads):
    """Two scopes and a sink; split, empty and holed tokens; more heads than the kernel has. Unattended rows are NaN."""
    rng = default_rng(0)
    cache = make_cache(rng, 400, layout)
    scopes = (make_scope(rng, cache, 400, [300, 0, 17, 64], 300, holes=0.1), make_scope(rng, cache, 400, [0, 0, 90, 5], 100))
    q, sink = make_q(rng, 4, heads), jax.numpy.asarray(rng.normal(size=heads), jax.numpy.float32)
    check(attend(q, scopes, sink, plan_for(scopes, heads)), expected(q, scopes, sink), layout)


@pytest.mark.parametrize("scale", [0.03, 1.0, 2.0**-100, 2.0**100])
@pytest.mark.parametrize("implementation", ["aiter", "xla"])
def test_append_in_fnuz(gfx942, implementation, scale):
    """The bytes of ml_dtypes: every code and the middles between codes, both signs, saturation, infinities and NaN. No -0: 0x80 is NaN."""
    codes = np.arange(256, dtype=np.uint8).view(FNUZ.dtype).astype(np.float32)
    finite = np.sort(codes[np.isfinite(codes)])
    beyond = np.float32([240.1, 247.9, 248, 249, 448, np.inf, 1e-30, 2.0**-11, 2.0**-12])
    numbers = np.concatenate([codes, (finite[1:] + finite[:-1]) / 2, beyond, -beyond])
    rows = np.zeros((2, 512), np.float32)
    rows.flat[: len(numbers)] = numbers
    latents = jax.numpy.asarray(rows * np.float32(scale))
    cache = create_cache(1, 2, "aiter_fp8_fnuz", scale)
    cache = dsv4.append(cache, latents, jax.numpy.arange(2, dtype=jax.numpy.int32), implementation=implementation)
    values = np.clip(np.asarray(latents) * (np.float32(1) / np.float32(scale)), -240, 240)
    want = np.where(np.isnan(values), np.uint8(0x80), values.astype(FNUZ.dtype).view(np.uint8))
    np.testing.assert_array_equal(np.asarray(cache.data)[1, :, :512], want)
    assert (np.asarray(cache.data)[0] == 0).all()
    assert (np.asarray(cache.data)[..., 512:] == 0).all()
    np.testing.assert_array_equal(dsv4.dequantize(cache), want.view(FNUZ.dtype).astype(np.float32) * np.float32(scale))


@pytest.mark.parametrize("latency", [600, 3000])
@pytest.mark.parametrize(("layout", "heads"), [("aiter_bf16", 16), ("aiter_fp8_fnuz", 128)])
def test_however_long_loads_take(gfx942, gpu, layout, heads, latency):
    """As on gfx950, these kernels are wrong here but for a wait that is mended (test_timing)."""
    rng = default_rng(1)
    gpu.options(vm_latency=latency)
    scope, q = make_scope(rng, make_cache(rng, 300, layout), 300, [300, 64], 300), make_q(rng, 2, heads)
    check(attend(q, (scope,)), expected(q, [scope]), layout)


def test_programs_for_another_architecture_are_refused(gfx942, gpu):
    with pytest.raises(software_gpu.HipError, match="NoBinaryForGpu"):
        gpu.function((gfx942 / "gfx950/mla/mla_a16w16_qh16_m16x4_n16x1_coex0_mask1_ps.co").read_bytes(), "kernel")
