import os

import aiter_kernel
import bridge as xla_bridge
import calls
import gluon
import jax
import plugin
import pytest
import software_gpu

from jax_dsv4 import _ffi, doctor
from jax_dsv4._implementations import aiter, aiter_gluon

# In a session that has JAX's ROCm plugin: two software GPUs beside the CPU, which stays the default device.
UNDER_PLUGIN = not plugin.missing()
if UNDER_PLUGIN:
    os.environ.setdefault("GFX950_DEVICES", "2")
    plugin.connect()
    jax.config.update("jax_platforms", "cpu,rocm")


@pytest.fixture(scope="session")
def shared_gpu():
    if reason := software_gpu.missing():
        pytest.skip(reason)
    return software_gpu.SoftwareGpu()


@pytest.fixture
def gpu(shared_gpu):
    shared_gpu.options()
    shared_gpu.counters(), shared_gpu.hazards()
    yield shared_gpu
    shared_gpu.options()


@pytest.fixture
def table(record_property):
    """table(title, lines) prints at the end of the run (tests/conftest.py), from whichever process of pytest-xdist it comes."""
    return lambda title, lines: record_property("table", "\n".join((title, *lines)))


@pytest.fixture
def short_doctor(monkeypatch):
    """Its self-tests run as often as it takes to see them differ, in software."""
    monkeypatch.setattr(doctor, "RUNS", 2)
    monkeypatch.setattr(doctor, "SECONDS", 0.0)


@pytest.fixture
def assembler(gpu):
    """Runs assembly over 64 lanes: run(body, inputs, outputs) with inputs in v10, v11, ... and results from v40, v41, ..."""
    if not software_gpu.tool("clang"):
        pytest.skip("assembling gfx950 needs clang with an AMDGPU target (Debian: apt install clang-22 lld-22)")

    def run(body, inputs=(), outputs=1, waves=1, lds_bytes=4096):
        return software_gpu.run_assembly(gpu, body, inputs, outputs, waves, lds_bytes)

    return run


@pytest.fixture(scope="session")
def rocm_library(shared_gpu):
    """The installed library of ROCm handlers, with our kernels beside it."""
    built = _ffi.find_library("libdsv4_rocm")
    if built is None or not built.with_name("dsv4_gfx950.co").exists():
        pytest.skip("libdsv4_rocm.so and dsv4_gfx950.co are not installed: install jax-dsv4 where clang-22 and lld-22 are")
    return built


@pytest.fixture(scope="session", params=["wheel", "tree"])
def hsa(request):
    """The directory of AITER's kernels: of its wheel, or of a source tree."""
    directory = aiter_kernel.wheel_directory() if request.param == "wheel" else aiter_kernel.tree_directory()
    if directory is None:
        install = {"wheel": "pip install --no-deps amd-aiter", "tree": "name an AITER source tree in JAX_DSV4_AITER_SOURCE"}
        pytest.skip(f"AITER's kernels are not here: {install[request.param]}")
    return directory


@pytest.fixture(scope="session")
def bridge_handlers(rocm_library, hsa, tmp_path_factory):
    copy = tmp_path_factory.mktemp("rocm") / "libdsv4_rocm.so"
    return xla_bridge.load_handlers(rocm_library, copy, hsa, rocm_library.parent), copy


@pytest.fixture
def bridge(gpu, bridge_handlers, monkeypatch):
    """`implementation="aiter"` on platform cpu for the time of a test. -> the bridge"""
    yield from xla_bridge.drive(monkeypatch, aiter.AITER, *bridge_handlers)


@pytest.fixture(scope="session")
def shared_packed(rocm_library, tmp_path_factory):
    """The ROCm handlers without AITER's assembly kernels, and with the variants of its Gluon kernel in a folder that is kept."""
    copy = tmp_path_factory.mktemp("packed") / "libdsv4_rocm.so"
    handlers = xla_bridge.load_handlers(rocm_library, copy, None, rocm_library.parent)
    handlers.dsv4_rocm_gluon_directory(os.fsencode(gluon.CACHE / _ffi.gluon_directory().name))
    return handlers, copy


@pytest.fixture
def packed(gpu, shared_packed, monkeypatch):
    """`implementation="aiter_gluon"` on platform cpu for the time of a test. -> the bridge"""
    monkeypatch.setenv("JAX_DSV4_CACHE_DIR", str(gluon.CACHE))
    yield from xla_bridge.drive(monkeypatch, aiter_gluon.AITER_GLUON, *shared_packed)


@pytest.fixture
def on_gluon(packed):
    """The same, where AITER's kernel can be compiled."""
    if reason := gluon.missing():
        pytest.skip(reason)
    return packed


@pytest.fixture
def rocm(request, gpu, rocm_library, hsa):
    """`implementation="aiter"` for the time of a test: under JAX's ROCm plugin where it is installed, and over the bridge elsewhere, or
    with AITER's kernels from another place than the process has them from."""
    if not UNDER_PLUGIN or hsa != _ffi.aiter_directory():
        request.getfixturevalue("bridge")
        yield
        return
    aiter.choose_kernel.cache_clear()
    with jax.default_device(jax.devices("rocm")[0]):
        yield
    aiter.choose_kernel.cache_clear()


@pytest.fixture
def own_planner(monkeypatch):
    """Where AITER's is compiled too."""
    monkeypatch.setenv("JAX_DSV4_PLANNER", "own")
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture(params=calls.GFX950_LAYOUTS)
def layout(request):
    """Of the caches."""
    return request.param


@pytest.fixture
def reports_lse(rocm, layout):
    """Whether the kernel of a call with 16 heads writes the lse of unsplit rows itself."""
    return bool(aiter.choose_kernel(layout, 16).reports_lse)
