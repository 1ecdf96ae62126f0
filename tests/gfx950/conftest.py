import ctypes
import os
import shutil

import pytest
import software_gpu


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
def assembler(gpu):
    """Runs assembly over 64 lanes: run(body, inputs, outputs) with inputs in v10, v11, ... and results from v40, v41, ..."""
    if not software_gpu.tool("clang"):
        pytest.skip("assembling gfx950 needs clang with an AMDGPU target (Debian: apt install clang-22 lld-22)")

    def run(body, inputs=(), outputs=1, waves=1, lds_bytes=4096):
        return software_gpu.run_assembly(gpu, body, inputs, outputs, waves, lds_bytes)

    return run


@pytest.fixture(scope="session")
def shared_rocm(shared_gpu, tmp_path_factory):
    """The ROCm implementation of jax_dsv4 on platform cpu, over the software GPU of 8 units. -> (handlers, bridge)

    The library of handlers is a copy: its process-wide state (the HIP library, the kernels found) stays this fixture's own.
    """
    import aiter_kernel
    import bridge
    from jax_dsv4 import _ffi

    built = _ffi.find_library("libdsv4_rocm")
    if built is None or not built.with_name("dsv4_gfx950.co").exists():
        pytest.skip("libdsv4_rocm.so and dsv4_gfx950.co are not installed: install jax-dsv4 where clang-22 and lld-22 are")
    hsa = aiter_kernel.tree_directory() or aiter_kernel.wheel_directory()
    if hsa is None:
        pytest.skip("no amd-aiter here: pip install --no-deps amd-aiter")
    copy = tmp_path_factory.mktemp("rocm") / "libdsv4_rocm.so"
    shutil.copy(built, copy)
    gpu_library = software_gpu.library()
    environment = {"JAX_DSV4_HIP_LIBRARY": str(gpu_library), "GFX950_UNITS": "8"}
    os.environ.update(environment)
    handlers = ctypes.CDLL(str(copy))
    handlers.dsv4_rocm_directories(os.fsencode(hsa), os.fsencode(built.parent))
    yield handlers, bridge.connect(copy, gpu_library)
    for name in environment:
        del os.environ[name]


@pytest.fixture
def rocm(gpu, shared_rocm, monkeypatch):
    """As shared_rocm, with `implementation="aiter"` available on platform cpu for the time of a test."""
    from jax_dsv4 import _ffi
    from jax_dsv4.implementations import aiter

    handlers, bridge = shared_rocm
    monkeypatch.setattr(_ffi, "load_rocm", lambda: (handlers, "the software GPU"))
    monkeypatch.setattr(aiter.AITER, "platforms", ("cpu",))
    aiter.choose_kernel.cache_clear()
    bridge.bridge_replay(0)
    yield bridge
    bridge.bridge_replay(0)
    aiter.choose_kernel.cache_clear()
