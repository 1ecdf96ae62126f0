"""Says what is here and whether it works: `python -m jax_dsv4.doctor`. Send its output with a report."""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
import sys
import traceback

import jax
import jax.numpy as jnp
import numpy as np

import jax_dsv4 as dsv4
from jax_dsv4 import _ffi, reference
from jax_dsv4._implementations import REGISTRY, aiter

# A case is right if it is this close to float64 on the stored cache. AITER's kernels keep q and the softmax's weights in fp8.
COSINE = {"aiter": 0.999}
COSINE_OTHERS = 0.9999


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def print_environment() -> None:
    print(f"python {platform.python_version()} on {platform.platform()}")
    for package in ("jax-dsv4", "jax", "jaxlib", "jax-rocm7-plugin", "jax-cuda13-plugin", "jax-cuda12-plugin", "amd-aiter"):
        print(f"  {package:20} {version(package)}")
    print(f"devices: {', '.join(f'{d.platform} {d.device_kind}' for d in jax.devices())}")


def print_rocm() -> None:
    library, detail = _ffi.load_rocm()
    if library is None:
        print(f"ROCm handlers: {detail}")
        return
    hip = ctypes.create_string_buffer(4096)
    library.dsv4_rocm_hip(hip, ctypes.c_size_t(len(hip)))
    print(f"HIP: {hip.value.decode()}")
    installed = _ffi.find_library("libdsv4_rocm")
    objects = [str(p) for p in sorted(installed.parent.glob("dsv4_gfx*.co"))] if installed else []
    print(f"our kernels for AMD: {', '.join(objects) or 'none were built (no clang with an AMDGPU target)'}")
    print(f"AITER's kernels: {_ffi.aiter_directory() or 'none'}")
    print(f"AITER's plan builder: {_ffi.aiter_plan_builder() or 'not compiled (python -m jax_dsv4.build_aiter); ours is used'}")
    for heads in (16, 64, 128):
        choice = aiter.choose_kernel(heads, 0)
        text = choice.text.decode()
        if choice.found:
            lse = "reports lse" if choice.reports_lse else "lse by splitting every token"
            passes = f"{choice.head_passes(heads)} x {choice.kernel_heads} heads"
            text = f"{passes}, tiles of {choice.tile} keys, {choice.kernarg_bytes} bytes of arguments, {lse}: {text}"
        print(f"  {heads:3} heads: {text}")


# Decodes of one self-test, which must agree to the bit.
RUNS = 5


def self_test(name: str, heads: int) -> str:
    """Appends and decodes two scopes of odd lengths, some times over; what came out, against NumPy."""
    rng = np.random.default_rng(0)
    tokens, topk, slots = 5, 100, 256
    layout, scale = ("aiter_fp8", 0.02) if name == "aiter" else ("fp8_ds_mla", 1.0)
    cache = dsv4.KVCache.create(slots // 64, 64, layout, scale=scale)
    latents = jnp.asarray(rng.normal(size=(slots, 512)), jnp.bfloat16)
    q = jnp.asarray(rng.normal(size=(tokens, heads, 512)), jnp.bfloat16)
    indices = jnp.asarray(rng.integers(0, slots, (tokens, topk)), jnp.int32)
    lengths, sink = jnp.asarray([0, 1, 17, 64, 100], jnp.int32), jnp.asarray(rng.normal(size=heads), jnp.float32)

    @jax.jit
    def run(cache: dsv4.KVCache, latents: jax.Array, q: jax.Array) -> tuple[dsv4.KVCache, jax.Array, jax.Array]:
        cache = dsv4.append(cache, latents, jnp.arange(slots, dtype=jnp.int32), implementation=name)
        scopes = (dsv4.Scope(cache, indices, lengths), dsv4.Scope(cache, indices[:, ::-1], lengths[::-1]))
        out, lse = dsv4.sparse_mla_decode(q, *scopes, attn_sink=sink, implementation=name, return_lse=True)
        return cache, out, lse

    results = [run(cache, latents, q) for _ in range(RUNS)]
    cache, out, lse = results[0]
    same = all(np.array_equal(np.asarray(a), np.asarray(b)) for other in results[1:] for a, b in zip((out, lse), other[1:]))
    rows = np.asarray(dsv4.dequantize(cache), np.float64)
    scopes = [
        reference.ReferenceScope(rows, np.asarray(i), np.asarray(n)) for i, n in ((indices, lengths), (indices[:, ::-1], lengths[::-1]))
    ]
    want, want_lse = reference.decode(np.asarray(q, np.float64), scopes, np.asarray(sink, np.float64), 512**-0.5)
    got = np.asarray(out, np.float64)
    cosine = min((g * w).sum() / np.linalg.norm(g) / np.linalg.norm(w) for g, w in zip(got, want))
    lse_error = np.abs(np.asarray(lse, np.float64) - want_lse).max()
    right = cosine >= COSINE.get(name, COSINE_OTHERS) and lse_error < 0.05
    verdict = "ok" if right and same else "WRONG"
    bits = f"{RUNS} runs alike" if same else f"{RUNS} runs NOT ALIKE"
    errors = f"largest error {np.abs(got - want).max():.2e} in out, {lse_error:.1e} in lse"
    return f"{verdict}: {heads} heads, cosine {cosine:.6f}, {errors}, {bits}"


def main() -> int:
    print_environment()
    failed = False
    print("implementations:")
    found = dsv4.implementations()
    for name, (available, detail) in found.items():
        print(f"  {name:6} {'yes' if available else 'no '}  {detail}")
    print_rocm()
    backend = jax.default_backend()
    print(f"self-test on {backend}:")
    for name, (available, _) in found.items():
        platforms = REGISTRY[name].platforms
        if not available or (platforms and backend not in platforms):
            continue
        for heads in (16, 64, 128) if name == "aiter" else (16,):  # AITER has a kernel for each
            try:
                result = self_test(name, heads)
            except Exception:
                result = "FAILED\n" + traceback.format_exc()
            failed |= not result.startswith("ok")
            print(f"  {name:6} {result}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
