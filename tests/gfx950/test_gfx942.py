"""The same machine as a gfx942 (MI300X, MI325X): 64 KB of LDS, no instruction on fp8 numbers, AITER's kernel and ours for it."""

import aiter_kernel
import bridge
import jax
import pytest
import software_gpu
from calls import attend, check, create_cache, expected, make_cache, make_q, make_scope, plan_for
from numpy.random import default_rng

import jax_dsv4 as dsv4
from jax_dsv4._implementations import aiter


@pytest.fixture
def gfx942(gpu, rocm_library, tmp_path, monkeypatch):
    if (hsa := aiter_kernel.wheel_directory()) is None:
        pytest.skip("no amd-aiter here: pip install --no-deps amd-aiter")
    monkeypatch.setenv("JAX_DSV4_PLANNER", "own")
    path = tmp_path / "libdsv4_rocm.so"
    handlers = bridge.load_handlers(rocm_library, path, hsa, rocm_library.parent)
    for _ in bridge.drive(monkeypatch, aiter.AITER, handlers, path, "gfx942"):
        yield hsa


def test_what_is_there(gfx942):
    found = dsv4.implementations()["aiter"]
    assert found.available, found.detail
    assert found.detail.startswith("gfx942, 8 units")
    assert f"'aiter_bf16': {gfx942}/gfx942/mla/mla_a16w16_qh16_m16x4_n16x1_coex0_mask1_ps.co" in found.detail
    reason = "AITER's fp8 kernels take e4m3fnuz on gfx942, and layout aiter_fp8 holds e4m3fn; use aiter_bf16"
    assert f"'aiter_fp8': {reason}" in found.detail
    assert reason in aiter.AITER.unsupported(16, (create_cache(1, 16, "aiter_fp8"),))
    assert "wraps at 4 GiB" in aiter.choose_kernel("aiter_bf16", 16, 2**32).text.decode()


@pytest.mark.parametrize("heads", [5, 16, 64])
def test_decode(gfx942, heads):
    """Two scopes and a sink; split, empty and holed tokens; more heads than the kernel has."""
    rng = default_rng(0)
    cache = make_cache(rng, 400, "aiter_bf16")
    scopes = (make_scope(rng, cache, 400, [300, 0, 17, 64], 300, holes=0.1), make_scope(rng, cache, 400, [0, 0, 90, 5], 100))
    q, sink = make_q(rng, 4, heads), jax.numpy.asarray(rng.normal(size=heads), jax.numpy.float32)
    check(attend(q, scopes, sink, plan_for(scopes, heads)), expected(q, scopes, sink), "aiter_bf16")


@pytest.mark.parametrize("latency", [300, 3000])
def test_however_long_loads_take(gfx942, gpu, latency):
    """As on gfx950, the kernel is wrong from 300 on but for a wait that is mended."""
    rng = default_rng(1)
    gpu.options(vm_latency=latency)
    scope, q = make_scope(rng, make_cache(rng, 300, "aiter_bf16"), 300, [300, 64], 300), make_q(rng, 2, 16)
    check(attend(q, (scope,)), expected(q, [scope]), "aiter_bf16")


def test_programs_for_another_architecture_are_refused(gfx942, gpu):
    with pytest.raises(software_gpu.HipError, match="NoBinaryForGpu"):
        gpu.function((gfx942 / "gfx950/mla/mla_a16w16_qh16_m16x4_n16x1_coex0_mask1_ps.co").read_bytes(), "kernel")


def test_fp8_is_not_modelled(gfx942, gpu):
    """Its numbers are e4m3fnuz there: rather than be computed as e4m3fn, they fault."""
    kernel = (gfx942 / "gfx942/mla/mla_a8w8_qh16_qseqlen1_gqaratio16_ps.co").read_bytes()
    assert any("e4m3fnuz" in line for line in gpu.not_modelled(kernel))
