"""What is found, what is refused, and the reasons that `implementations()` and NotImplementedError give; programs for another machine."""

import contextlib
import pathlib
import re
import shutil
import struct
from functools import partial

import aiter_kernel
import bridge
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import software_gpu
from calls import create_cache

import jax_dsv4 as dsv4
from jax_dsv4 import _ffi, doctor
from jax_dsv4._implementations import aiter

KERNELS = {"aiter_bf16": "mla_a16w16_qh16_m16x4_n16x1_coex0_mask1_ps", "aiter_fp8": "mla_a8w8_qh16_qseqlen1_gqaratio16_ps"}
TYPES = {"aiter_bf16": "bf16", "aiter_fp8": "fp8"}


@pytest.fixture
def one_kernel(tmp_path, layout):
    """A directory as AITER's hsa that holds the wheel's 16-head kernel for a layout, alone."""
    wheel = aiter_kernel.wheel_directory()
    if wheel is None:
        pytest.skip("no amd-aiter here: pip install --no-deps amd-aiter")
    folder = tmp_path / "hsa/gfx950/mla"
    folder.mkdir(parents=True)
    shutil.copy(wheel / f"gfx950/mla/{KERNELS[layout]}.co", folder)
    return tmp_path / "hsa"


@pytest.fixture
def find(gpu, one_kernel, rocm_library, tmp_path, monkeypatch):
    """find(...) loads the handlers over the software GPU, this AITER and our own kernels, or others, and says whether "aiter" can run."""
    monkeypatch.setenv("JAX_DSV4_PLANNER", "own")

    def load(hip=None, aiter_hsa=one_kernel, own=rocm_library.parent):
        monkeypatch.setenv("JAX_DSV4_HIP_LIBRARY", str(hip or software_gpu.library()))
        handlers = bridge.load_handlers(rocm_library, tmp_path / "handlers.so", aiter_hsa, own)
        monkeypatch.setattr(_ffi, "load_rocm", lambda: (handlers, str(rocm_library)))
        monkeypatch.setattr(_ffi, "find_library", lambda name: pathlib.Path(own, f"{name}.so"))
        monkeypatch.setattr(_ffi, "aiter_directory", lambda: aiter_hsa)
        aiter.choose_kernel.cache_clear()
        return dsv4.implementations()["aiter"]

    yield load
    aiter.choose_kernel.cache_clear()


def decode(layout):
    scope = dsv4.Scope(create_cache(2, 16, layout), jnp.zeros((1, 8), jnp.int32))
    return dsv4.sparse_mla_decode(jnp.zeros((1, 16, 512)), scope, implementation="aiter")


def assert_refused(availability, reason, layout):
    assert not availability.available
    assert re.search(reason, availability.detail)
    with pytest.raises(NotImplementedError, match=reason):
        decode(layout)
    with pytest.raises(NotImplementedError, match=reason):
        dsv4.plan_decode(jnp.zeros(1, jnp.int32), num_heads=16, swa_topk=8, implementation="aiter")
    with pytest.raises(NotImplementedError, match=reason):
        dsv4.append(create_cache(2, 16, layout), jnp.zeros((1, 512)), jnp.zeros(1, jnp.int32), implementation="aiter")


def test_all_is_here(find, one_kernel, layout):
    found = find()
    assert found.available, found.detail
    assert f"'{layout}': {one_kernel}" in found.detail
    assert ("one wait mended" in found.detail) == (layout == "aiter_bf16")
    other = next(name for name in KERNELS if name != layout)
    reason = f"no {TYPES[other]} kernel for 16 heads"
    assert f"'{other}': {reason}" in found.detail
    with pytest.raises(NotImplementedError, match=reason):
        decode(other)
    assert "gfx950, 256 units" in found.detail
    assert "plan" in found.detail


@pytest.mark.parametrize(
    ("there", "environment", "reason"),
    [
        ({"hip": "/nowhere/libamdhip64.so"}, {}, r"no HIP library: .*/nowhere/libamdhip64.so.*JAX_DSV4_HIP_LIBRARY"),
        ({"hip": "libm.so.6"}, {}, "the HIP library has no hipGetDeviceCount"),
        ({}, {"GFX950_DEVICES": "0"}, "hipGetDeviceProperties failed: .*hipErrorInvalidDevice|invalid device"),
        ({"aiter_hsa": ""}, {}, "AITER is not installed .*pip install --no-deps amd-aiter.*JAX_DSV4_AITER_HSA"),
        ({"aiter_hsa": "."}, {}, "none of the kernels that are known"),
        ({"own": "."}, {}, r"dsv4_gfx950.co was not built \(JAX_DSV4_COMPILERS=pypi pip install -e "),
        ({}, {"GFX950_ARCHITECTURE": "gfx942"}, "gfx942/mla has none of the kernels that are known"),
        ({}, {"GFX950_ARCHITECTURE": "gfx1100"}, "on gfx950 and gfx942 only; this is gfx1100"),
    ],
    ids=["no HIP", "another library", "no device", "no AITER", "no kernels of AITER", "no kernels of ours", "gfx942", "gfx1100"],
)
@pytest.mark.parametrize("layout", ["aiter_bf16"])
def test_refused(find, layout, tmp_path, monkeypatch, there, environment, reason):
    monkeypatch.chdir(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert_refused(find(**there), reason, layout)


@pytest.mark.parametrize(("damage", "reason"), [
    (lambda data: b"not an ELF file", "too short for an ELF file"),
    (lambda data: b"\0" * len(data), "not an AMDGPU ELF file"),
    (lambda data: data[:32] + b"\xff" * 8 + data[40:], "truncated program headers"),
    (lambda data: data[:48] + struct.pack("<I", 0x4C) + data[52:], "for another architecture"),
    # msgpack: 256 or 288 bytes of arguments made 304
    (lambda data: re.sub(b"segment_size\xcd\x01[\x00\x20]", b"segment_size\xcd\x01\x30", data), r"not one that is known \(304 bytes\)"),
])  # fmt: skip
def test_a_file_that_is_not_known(find, one_kernel, layout, damage, reason):
    path = one_kernel / f"gfx950/mla/{KERNELS[layout]}.co"
    path.write_bytes(damage(path.read_bytes()))
    assert_refused(find(), reason, layout)


@pytest.mark.parametrize("layout", ["aiter_bf16"])
def test_what_is_mended(gpu, one_kernel, layout, rocm_library, tmp_path, monkeypatch):
    """The file that the mend is for, byte for byte, also when it is loaded. Another is used as it is."""
    file, path = one_kernel / f"gfx950/mla/{KERNELS[layout]}.co", tmp_path / "handlers.so"
    known = file.read_bytes()
    for found, loaded, mended in ((known, known + b"\0", True), (known + b"\0", known + b"\0", False)):
        file.write_bytes(found)
        handlers = bridge.load_handlers(rocm_library, path, one_kernel, rocm_library.parent)
        for _ in bridge.drive(monkeypatch, aiter.AITER, handlers, path):
            assert ("one wait mended" in dsv4.implementations()["aiter"].detail) == mended
            file.write_bytes(loaded)
            with pytest.raises(Exception, match="has changed since it was found") if mended else contextlib.nullcontext():
                jax.block_until_ready(decode(layout))
        path = tmp_path / "others.so"


HEADER = "qType,kvType,Gqa,ps,qSeqLen,prefill,causal,lse,cprr,knl_name,co_name\n"
GFX942_HEADER = HEADER.replace("cprr,", "")


@pytest.mark.parametrize(("row", "reason"), [
    ("{type},{type},16,1,1,0,0,0,0,{symbol},{file}", None),
    (GFX942_HEADER + "{type},{type},16,1,1,0,0,0,{symbol},{file}", None),
    ("{type},{type},16,1,1,0,0,0,1,{symbol},{file}", "registry does not list it"),
    ("", "registry does not list it"),
    ("{other},{other},16,1,1,0,0,0,0,{symbol},{file}", "registry names another type or symbol"),
    ("bf16,fp8,16,1,1,0,0,0,0,{symbol},{file}", "registry does not list it"),
    ("{type},{type},16,0,1,0,0,0,0,{symbol},{file}", "registry does not list it"),
    ("{type},{type},16,1,1,0,0,0,0,another,{file}", "registry names another type or symbol"),
])  # fmt: skip
def test_registry(find, one_kernel, layout, row, reason):
    name = KERNELS[layout]
    symbol = f"_ZN5aiter{len(name)}{name}E"
    other = next(TYPES[other] for other in KERNELS if other != layout)
    row = row.format(type=TYPES[layout], other=other, symbol=symbol, file=f"{name}.co")
    text = row if row.startswith("qType") else HEADER + row
    (one_kernel / "gfx950/mla/mla_asm.csv").write_text(text + "\n")
    found = find()
    if reason is None:
        assert found.available, found.detail
    else:
        assert_refused(found, reason, layout)


@pytest.mark.parametrize("layout", ["aiter_bf16"])
def test_doctor_on_a_machine_without_any_of_it(find, short_doctor, capsys):
    find(hip="/nowhere/libamdhip64.so", aiter_hsa="")
    assert doctor.main([]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert re.search(r"aiter no no HIP library: .*\(install ROCm, or name libamdhip64.so in JAX_DSV4_HIP_LIBRARY\)", text)
    assert "rocm" not in text


# ---- Programs made where there is no such device: JAX_DSV4_ROCM_ARCHITECTURE.

OUR_CALLS = [jax.export.DisabledSafetyCheck.custom_call(target) for target in _ffi.AITER_TARGETS]


def step(data, latents, slots, q, indices, lengths, implementation=None):
    """All three ops, of arrays alone."""
    layout = "aiter_fp8" if data.dtype == jnp.uint8 else "aiter_bf16"
    cache = create_cache(1, 8, layout).replace(data)
    cache = dsv4.append(cache, latents, slots, implementation=implementation)
    plan = dsv4.plan_decode(lengths, num_heads=32, swa_topk=40, implementation=implementation)
    scope = dsv4.Scope(cache, indices, lengths)
    return cache.data, dsv4.sparse_mla_decode(q, scope, plan=plan, implementation=implementation, return_lse=True)


def arguments(layout):
    rng = np.random.default_rng(0)
    f32, i32 = jnp.float32, jnp.int32
    latents, q = (jnp.asarray(rng.normal(size=shape), f32) for shape in ((32, 512), (3, 32, 512)))
    indices = jnp.asarray(rng.integers(0, 32, (3, 40)), i32)
    return create_cache(4, 8, layout).data, latents, jnp.arange(32, dtype=i32), q, indices, jnp.asarray([40, 0, 17], i32)


def test_export_for_rocm(find, layout, monkeypatch):
    """No HIP library, no device: a program with AITER's calls for an MI355X all the same."""
    monkeypatch.setenv("JAX_DSV4_ROCM_ARCHITECTURE", "gfx950")
    found = find(hip="/nowhere/libamdhip64.so")
    assert found.available, found.detail
    assert "gfx950, 256 units (for export: JAX_DSV4_ROCM_ARCHITECTURE)" in found.detail
    exported = jax.export.export(jax.jit(step), platforms=("rocm",), disabled_checks=OUR_CALLS)(*arguments(layout))
    text = jax.export.deserialize(exported.serialize()).mlir_module()
    for target in ("dsv4_aiter_append", "dsv4_aiter_decode"):
        assert f"@{target}(" in text
    assert "kernel_heads = 16 : i32" in text
    assert "workers = 128 : i32" in text  # 256 units, shared by the two passes


def test_an_exported_program_runs(bridge, layout, monkeypatch):
    """Made for 256 units, run on a device of 8."""
    monkeypatch.setenv("JAX_DSV4_PLANNER", "own")
    program = jax.jit(partial(step, implementation="aiter"))
    want_data, (want_out, want_lse) = program(*arguments(layout))
    monkeypatch.setenv("JAX_DSV4_ROCM_ARCHITECTURE", "gfx950")
    aiter.choose_kernel.cache_clear()
    jax.clear_caches()
    exported = jax.export.export(program, platforms=("cpu",), disabled_checks=OUR_CALLS)(*arguments(layout))
    passes = min(choice.head_passes(32) for choice in aiter._choices(32))
    assert f"workers = {256 // passes} : i32" in exported.mlir_module()
    monkeypatch.delenv("JAX_DSV4_ROCM_ARCHITECTURE")
    data, (out, lse) = jax.jit(jax.export.deserialize(exported.serialize()).call)(*arguments(layout))
    np.testing.assert_array_equal(data, want_data)
    np.testing.assert_allclose(lse, want_lse, atol=1e-3)
    np.testing.assert_allclose(out, want_out, atol=1e-2)


@pytest.mark.parametrize("layout", ["aiter_fp8"])  # in bf16 a newer kernel takes any number of heads
def test_a_program_made_for_another_kernel(rocm, layout, monkeypatch):
    monkeypatch.setenv("JAX_DSV4_PLANNER", "own")
    other = aiter.Choice.from_buffer_copy(aiter.choose_kernel(layout, 16))
    other.kernel_heads = 48
    with monkeypatch.context() as patch:
        patch.setattr(aiter, "choose_kernel", lambda *call: other)
        with pytest.raises(Exception, match="was made for AITER's kernel of 48 heads, which the AITER installed here has not"):
            jax.block_until_ready(jax.jit(partial(step, implementation="aiter"))(*arguments(layout)))
