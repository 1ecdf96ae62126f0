"""The stand-in HIP runtime: capture and replay, and the refusals that make capture mode a proof."""

import ctypes

import numpy as np
import pytest
import software_gpu

UNSUPPORTED, INVALIDATED, IMPLICIT, CAPTURED_EVENT, UNJOINED, NOT_FOUND = 900, 901, 906, 907, 904, 500


@pytest.fixture
def stream(gpu):
    s = ctypes.c_void_p()
    gpu.call("hipStreamCreateWithFlags", ctypes.byref(s), 0)
    yield s
    gpu.call("hipStreamDestroy", s)


@pytest.fixture
def adder(gpu, assembler):
    """A kernel that adds 1 to 64 numbers: arguments (in, out)."""
    text = software_gpu._ASSEMBLY.format(
        loads="  global_load_dword v10, v1, s[4:5]", body="v_add_u32 v40, 1, v10", stores="  global_store_dword v1, v40, s[6:7]", lds=0
    )
    return gpu.function(software_gpu.assemble(text), "kernel")


def pointers(*buffers):
    return np.uint64([b.pointer for b in buffers]).tobytes()


def begin(gpu, stream, mode=1):
    gpu.call("hipStreamBeginCapture", stream, mode)


def end(gpu, stream):
    graph = ctypes.c_void_p()
    gpu.call("hipStreamEndCapture", stream, ctypes.byref(graph))
    return graph


def instantiate(gpu, graph):
    execution = ctypes.c_void_p()
    gpu.call("hipGraphInstantiate", ctypes.byref(execution), graph, None, None, 0)
    return execution


def test_replay_sees_new_values_at_old_addresses(gpu, stream, adder):
    x, y = gpu.array(np.arange(64, dtype=np.uint32)), gpu.array(np.zeros(64, np.uint32))
    begin(gpu, stream)
    gpu.call("hipMemsetD32Async", ctypes.c_void_p(y.pointer), 7, ctypes.c_size_t(64), stream)
    gpu.launch(adder, 1, 64, pointers(x, x), stream)
    execution = instantiate(gpu, end(gpu, stream))
    assert (y.read() == 0).all()
    assert x.read()[0] == 0
    for n in (1, 2):
        gpu.call("hipGraphLaunch", execution, stream)
        np.testing.assert_array_equal(x.read(), np.arange(64) + n)
    x.write(np.full(64, 50, np.uint32))
    gpu.call("hipGraphLaunch", execution, stream)
    assert (x.read() == 51).all()
    assert (y.read() == 7).all()
    y.free()
    with pytest.raises(software_gpu.HipError, match="not live"):  # a graph keeps addresses, not buffers
        gpu.call("hipGraphLaunch", execution, stream)


SIZE = ctypes.c_size_t(64)


def read_event(gpu, stream, **_):
    event = ctypes.c_void_p()
    gpu.call("hipEventCreate", ctypes.byref(event))
    gpu.call("hipEventRecord", event, stream)
    gpu.call("hipEventQuery", event)


FORBIDDEN = {
    "malloc": (UNSUPPORTED, lambda gpu, out, **_: gpu.call("hipMalloc", out, SIZE)),
    "free": (UNSUPPORTED, lambda gpu, device, **_: gpu.call("hipFree", device)),
    "stream synchronize": (UNSUPPORTED, lambda gpu, stream, **_: gpu.call("hipStreamSynchronize", stream)),
    "stream query": (UNSUPPORTED, lambda gpu, stream, **_: gpu.call("hipStreamQuery", stream)),
    "device synchronize": (UNSUPPORTED, lambda gpu, **_: gpu.call("hipDeviceSynchronize")),
    "device to host": (UNSUPPORTED, lambda gpu, stream, host, device, **_: gpu.call("hipMemcpyAsync", host, device, SIZE, 2, stream)),
    "host to device": (UNSUPPORTED, lambda gpu, stream, host, device, **_: gpu.call("hipMemcpyAsync", device, host, SIZE, 1, stream)),
    "blocking copy": (UNSUPPORTED, lambda gpu, host, device, **_: gpu.call("hipMemcpy", host, device, SIZE, 2)),
    "blocking memset": (UNSUPPORTED, lambda gpu, device, **_: gpu.call("hipMemset", device, 0, SIZE)),
    "module load": (UNSUPPORTED, lambda gpu, out, host, **_: gpu.call("hipModuleLoadData", out, host)),
    "default stream": (IMPLICIT, lambda gpu, device, **_: gpu.call("hipMemsetD32Async", device, 0, ctypes.c_size_t(16), None)),
    "event query": (CAPTURED_EVENT, read_event),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_forbidden_under_capture(gpu, stream, name):
    code, call = FORBIDDEN[name]
    x = gpu.array(np.zeros(16, np.uint32))
    out, host = ctypes.byref(ctypes.c_void_p()), ctypes.create_string_buffer(64)
    begin(gpu, stream)
    with pytest.raises(software_gpu.HipError) as error:
        call(gpu=gpu, stream=stream, out=out, host=host, device=ctypes.c_void_p(x.pointer))
    assert error.value.code == code
    with pytest.raises(software_gpu.HipError) as error:  # and the capture is lost
        end(gpu, stream)
    assert error.value.code == INVALIDATED
    assert gpu.counters()["calls_refused_under_capture"] == 1


def test_other_streams_join_and_must_return(gpu, stream, adder):
    x = gpu.array(np.zeros(64, np.uint32))
    other, fork, join = (ctypes.c_void_p() for _ in range(3))
    gpu.call("hipStreamCreateWithFlags", ctypes.byref(other), 0)
    for event in (fork, join):
        gpu.call("hipEventCreate", ctypes.byref(event))
    for returns in (True, False):
        begin(gpu, stream)
        gpu.call("hipEventRecord", fork, stream)
        gpu.call("hipStreamWaitEvent", other, fork, 0)
        gpu.launch(adder, 1, 64, pointers(x, x), other)
        if returns:
            gpu.call("hipEventRecord", join, other)
            gpu.call("hipStreamWaitEvent", stream, join, 0)
            gpu.call("hipGraphLaunch", instantiate(gpu, end(gpu, stream)), stream)
            assert (x.read() == 1).all()
        else:
            with pytest.raises(software_gpu.HipError) as error:
                end(gpu, stream)
            assert error.value.code == UNJOINED
    gpu.call("hipStreamDestroy", other)


def test_launch_errors(gpu, adder):
    x = gpu.array(np.zeros(64, np.uint32))
    with pytest.raises(software_gpu.HipError, match="argument buffer of 8 bytes, the kernel takes 16"):
        gpu.launch(adder, 1, 64, pointers(x))
    with pytest.raises(software_gpu.HipError, match="hipErrorInvalidConfiguration"):
        gpu.launch(adder, 1, 2048, pointers(x, x))
    with pytest.raises(software_gpu.HipError, match="hipErrorInvalidImage"):
        gpu.function(b"\0" * 64, "kernel")


def test_other_architectures_are_refused(gpu, assembler):
    with pytest.raises(software_gpu.HipError, match="hipErrorNoBinaryForGpu"):
        gpu.function(software_gpu.compile_hip('extern "C" __attribute__((global)) void f(int* p) { *p = 1; }', "gfx942"), "f")


def test_device(gpu, monkeypatch):
    value = ctypes.c_int()
    gpu.call("hipDeviceGetAttribute", ctypes.byref(value), 63, 0)
    assert value.value == 256
    monkeypatch.setenv("GFX950_UNITS", "8")
    gpu.call("hipDeviceGetAttribute", ctypes.byref(value), 63, 0)
    assert value.value == 8
    properties = ctypes.create_string_buffer(1472)
    gpu.call("hipGetDevicePropertiesR0600", properties, 0)
    assert properties.raw[1160:].startswith(b"gfx950")
