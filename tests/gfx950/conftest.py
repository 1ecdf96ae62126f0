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
