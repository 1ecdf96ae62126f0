"""First aid: what is here, whether it works and how fast, and what to do about what is missing.

    python -m jax_dsv4.doctor [--json]

Every implementation is named with what it is, or why it is absent and the command that helps. Each that is there decodes for about a
second, and is compared with NumPy in float64. Send the output with a report.

The exit status is 1 if a result is wrong, if JAX has a device whose own implementations are all absent, or if it has no device; 2 if the
output cannot be written; otherwise 0.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import itertools
import json
import os
import platform
import re
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_dsv4 as dsv4
from jax_dsv4 import _ffi, _gluon, reference
from jax_dsv4._implementations import REGISTRY, aiter
from jax_dsv4._work import MAX_HEADS

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "jax-rocm7-plugin", "amd-aiter")
# A result is right if it is this close to float64 on the stored cache. In fp8, AITER's kernels keep q and the softmax's weights in it too.
COSINE = dict.fromkeys(("aiter_fp8", "aiter_fp8_fnuz"), 0.999)
COSINE_OTHERS = 0.9999
LSE_ERROR = 0.05
# The case of a self-test: a token's two scopes have as many keys each.
WINDOW, EXTRA = (0, 1, 100, 128), (512, 64, 17, 1)
RUNS = 5  # must agree to the bit
SECONDS = 1.0
HEADS = 16, 64, 128  # that AITER has assembly kernels for
BLOCK_SIZE = 64
WIDTH, INDENT = 110, 20
NAME_WIDTH = max(map(len, REGISTRY)) + 1


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {"jax-dsv4": dsv4.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def devices(platforms: Sequence[str] = ()) -> list[jax.Device]:
    """JAX's devices of these platforms, or its default ones."""
    found = []
    for each in platforms or (None,):
        try:
            found += jax.devices(each)
        except (RuntimeError, AssertionError):  # no such platform here
            continue
    return found


def why_no_devices() -> str:
    """JAX's words, where it has no device at all, such as for a JAX_PLATFORMS that is not here."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX 0.10 asserts where a platform has no plugin
        return " ".join(f"none (JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}) {error}".split())
    return ""


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    name = re.search(r"model name\s*: (.*)", text)
    return f"{os.cpu_count()} x {name[1] if name else platform.machine()}"


def rocm_facts() -> list[str]:
    """What the ROCm handlers have found; nothing where there is no HIP."""
    library, _ = _ffi.load_rocm()
    if library is None:
        return []
    hip = ctypes.create_string_buffer(4096)
    library.dsv4_rocm_hip(hip, ctypes.c_size_t(len(hip)))
    if hip.value.startswith(b"no HIP library"):
        return []
    installed = _ffi.find_library("libdsv4_rocm")
    objects = [str(p) for p in sorted(installed.parent.glob("dsv4_gfx*.co"))] if installed else []
    facts = [
        f"HIP: {hip.value.decode()}",
        f"our kernels for AMD: {', '.join(objects) or 'none were built'}",
        f"AITER's kernels: {_ffi.aiter_directory() or 'none'}",
        f"planner: {aiter.planner(aiter.choose_kernel(aiter.LAYOUTS[0], HEADS[0]))}",
    ]
    facts += [f"AITER's Gluon kernel: {', '.join(_gluon.compiled()) or 'not compiled (python -m jax_dsv4.build_aiter --heads)'}"]
    for layout, heads in itertools.product(aiter.LAYOUTS, HEADS):
        choice = aiter.choose_kernel(layout, heads)
        text = choice.text.decode()
        if choice.found:
            lse = "reports lse" if choice.reports_lse else "lse by splitting every token"
            passes = f"{choice.head_passes(heads)} x {choice.kernel_heads} heads"
            text = f"{passes}, tiles of {choice.tile} keys, {choice.kernarg_bytes} bytes of arguments, {lse}: {text}"
        facts.append(f"{layout}, {heads} heads: {text}")
    return facts


def self_test(name: str, layout: str, heads: int) -> dict[str, Any]:
    """Appends, and decodes two scopes for about a second: how long a call takes, and how far it is from NumPy."""
    rng = np.random.default_rng(0)
    slots = 1024
    tokens = len(WINDOW)
    latents = jnp.asarray(rng.normal(size=(slots, 512)), jnp.bfloat16)
    q = jnp.asarray(rng.normal(size=(tokens, heads, 512)), jnp.bfloat16)
    sink = jnp.asarray(rng.normal(size=heads), jnp.float32)
    indices = [jnp.asarray(rng.integers(0, slots, (tokens, max(n))), jnp.int32) for n in (WINDOW, EXTRA)]
    lengths = [jnp.asarray(n, jnp.int32) for n in (WINDOW, EXTRA)]
    scale = dsv4.fp8_scale(latents, layout) if layout in COSINE else None
    append = jax.jit(partial(dsv4.append, implementation=name))
    cache = append(dsv4.KVCache.create(slots // BLOCK_SIZE, BLOCK_SIZE, layout, scale=scale), latents, jnp.arange(slots, dtype=jnp.int32))
    scopes = [dsv4.Scope(cache, *each) for each in zip(indices, lengths)]
    decode = jax.jit(partial(dsv4.sparse_mla_decode, attn_sink=sink, implementation=name, return_lse=True))

    results = [jax.block_until_ready(decode(q, *scopes))]
    seconds: list[float] = []
    while len(seconds) < RUNS - 1 or sum(seconds) < SECONDS:
        start = time.perf_counter()
        result = jax.block_until_ready(decode(q, *scopes))
        seconds.append(time.perf_counter() - start)
        results = [*results, result][:RUNS]

    rows = np.asarray(dsv4.dequantize(cache), np.float64)
    wanted = [reference.ReferenceScope(rows, np.asarray(i), np.asarray(n)) for i, n in zip(indices, lengths)]
    want, want_lse = reference.decode(np.asarray(q, np.float64), wanted, np.asarray(sink, np.float64), 512**-0.5)
    got, lse = (np.asarray(x, np.float64) for x in results[0])
    cosine = min((g * w).sum() / np.linalg.norm(g) / np.linalg.norm(w) for g, w in zip(got, want))
    lse_error = np.abs(lse - want_lse).max()
    alike = all(np.array_equal(a, b) for other in results[1:] for a, b in zip(results[0], other))
    return {
        "layout": layout,
        "heads": heads,
        "ok": bool(alike and cosine >= COSINE.get(layout, COSINE_OTHERS) and lse_error < LSE_ERROR),
        "us": 1e6 * float(np.median(seconds)),
        "cosine": float(cosine),
        "out_error": float(np.abs(got - want).max()),
        "lse_error": float(lse_error),
        "runs_alike": alike,
    }


def cases_to_test(name: str) -> list[tuple[str, int]]:
    """Layouts and heads. AITER has assembly kernels for these, in so far as there are any; its Gluon kernel is there for the heads that it
    was compiled for."""
    if name == "aiter":
        return [case for case in itertools.product(aiter.LAYOUTS, HEADS) if aiter.choose_kernel(*case).found]
    if name == "aiter_gluon":
        variants = {heads: _gluon.Variant(heads, 512**-0.5, (BLOCK_SIZE, BLOCK_SIZE)) for heads in range(1, MAX_HEADS + 1)}
        return [("fp8_ds_mla", heads) for heads, variant in variants.items() if variant.file()]
    return [("fp8_ds_mla", 64)]


def examine(name: str) -> dict[str, Any]:
    """An implementation: whether it is here and what it is or why it is not, whether it is missing where it is wanted, its self-tests."""
    platforms = REGISTRY[name].platforms
    available, detail = dsv4.implementations()[name]
    found = devices(platforms)
    tests = []
    if available and found:
        with jax.default_device(found[0]):
            for layout, heads in cases_to_test(name):
                try:
                    tests.append(self_test(name, layout, heads))
                except Exception as error:
                    tests.append({"layout": layout, "heads": heads, "ok": False, "error": f"{type(error).__name__}: {error}"})
    others = [i for i in REGISTRY.values() if not set(i.platforms).isdisjoint(platforms)]
    missing = bool(found) and not any(i.availability().available for i in others) and not available
    return {"available": available, "detail": detail, "missing": missing, "self_tests": tests}


def verdict(test: dict[str, Any]) -> str:
    if "error" in test:
        return f"FAILED: {test['layout']}, {test['heads']} heads: {test['error']}"
    bits = f"{RUNS} runs {'' if test['runs_alike'] else 'NOT '}alike"
    errors = f"largest error {test['out_error']:.1e} in out, {test['lse_error']:.1e} in lse"
    speed = f"{test['layout']}, {test['heads']} heads, {test['us']:.0f} us a call"
    return f"{'ok' if test['ok'] else 'WRONG'}: {speed}, cosine {test['cosine']:.6f}, {errors}, {bits}"


def print_report(report: dict[str, Any]) -> None:
    def entry(head: str, text: str) -> None:
        lines = textwrap.wrap(text, WIDTH - INDENT, break_long_words=False, break_on_hyphens=False)
        print(head.ljust(INDENT) + f"\n{' ' * INDENT}".join(lines))

    entry("versions", ", ".join(f"{package} {version}" for package, version in report["versions"].items()))
    entry("machine", f"{report['processor']}, {report['platform']}")
    entry("devices", ", ".join(f"{n} x {name}" for name, n in Counter(report["devices"]).items()) or report["no_devices"])
    for name, found in report["implementations"].items():
        state = "yes" if found["available"] else "MISSING" if found["missing"] else "no"
        entry(f"{name:{NAME_WIDTH}}{state}", found["detail"])
        for test in found["self_tests"]:
            entry("", verdict(test))
    for fact in report["rocm"]:
        entry("rocm", fact)
    keys = "/".join(map(str, np.add(WINDOW, EXTRA)))
    entry("", f"(self-tests decode {len(WINDOW)} tokens of {keys} keys in two scopes)")


def main(argv: Sequence[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m jax_dsv4.doctor", description=__doc__, formatter_class=form)
    parser.add_argument("--json", action="store_true", help="print all facts as JSON instead")
    arguments = parser.parse_args(argv)
    found = {name: examine(name) for name in REGISTRY}
    no_devices = why_no_devices()
    ok = not no_devices and not any(each["missing"] or any(not test["ok"] for test in each["self_tests"]) for each in found.values())
    report = {
        "ok": ok,
        "versions": versions(),
        "platform": platform.platform(),
        "processor": processor(),
        "devices": [f"{d.platform} {d.device_kind}" for d in devices()],
        "no_devices": no_devices,
        "implementations": found,
        "rocm": rocm_facts(),
    }
    try:
        if arguments.json:
            print(json.dumps(report, indent=1))
        else:
            print_report(report)
        print(end="", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python would try again on its way out
        print(f"{parser.prog}: the output cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    return int(not ok)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("python -m jax_dsv4.doctor: interrupted", file=sys.stderr, flush=True)
        os._exit(130)  # without JAX's destructors: what it still compiles or runs in its threads would crash in them
