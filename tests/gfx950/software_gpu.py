"""Builds the software gfx950 and drives it through the HIP interface that it offers.

`library()` is the path of a stand-in `libamdhip64.so`; `SoftwareGpu` is a handle on it for tests that bring their own kernels.
"""

import ctypes
import os
import pathlib
import shutil
import subprocess
import tempfile
import typing

import numpy as np
from compiled import compiled

HERE = pathlib.Path(__file__).parent
FFI = HERE.parents[1] / "ffi"
SOURCES = (
    *(HERE / f"{name}.cc" for name in ("memory", "program", "machine", "instructions", "hip", "hip_for_xla")),
    FFI / "rocm/code_object.cc",
)
# -ffp-contract=off: a * b + c must round twice unless the instruction is an fma. -Wno-restrict: GCC bug 105651.
FLAGS = ("-std=c++20", "-O3", "-march=native", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-restrict")


def missing() -> str:
    """Why the software GPU cannot be built or used here, or an empty string."""
    if not shutil.which("g++"):
        return "the software gfx950 needs g++ (C++20)"
    if not os.environ.get("JAX_DSV4_LLVM_OBJDUMP") and not tool("llvm-objdump"):
        return "the software gfx950 needs llvm-objdump that knows gfx950 (Debian: apt install llvm-22)"
    return ""


def tool(name: str) -> str | None:
    """The newest LLVM tool of this name that is on the path."""
    return next((p for v in ("-22", "-21", "-20", "") if (p := shutil.which(name + v))), None)


def _machine() -> str:
    """What -march=native depends on, so that a cache shared by machines does not serve foreign code."""
    cpuinfo = pathlib.Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    return next((line for line in cpuinfo.splitlines() if line.startswith("flags")), "")


def library() -> pathlib.Path:
    """libamdhip64.so (15 s to compile)."""
    headers = [*HERE.glob("*.h"), FFI / "rocm/hip.h", FFI / "rocm/code_object.h"]
    command = ["g++", *FLAGS, f"-I{FFI}", "-shared", "-Wl,-soname,libamdhip64.so.7"]
    return compiled("libamdhip64", command, SOURCES, headers, _machine())


class HipError(RuntimeError):
    def __init__(self, call: str, code: int, message: str):
        super().__init__(f"{call}: {message} ({code})")
        self.code = code


class Buffer:
    """Device memory. `read()` copies it back; it is freed with the object."""

    def __init__(self, gpu: "SoftwareGpu", array: np.ndarray):
        self.gpu, self.shape, self.dtype, self.bytes = gpu, array.shape, array.dtype, array.nbytes
        pointer = ctypes.c_void_p()
        gpu.call("hipMalloc", ctypes.byref(pointer), ctypes.c_size_t(max(array.nbytes, 1)))
        self.pointer = pointer.value
        self.write(array)

    def write(self, array: np.ndarray) -> None:
        array = np.ascontiguousarray(array)
        assert array.nbytes == self.bytes
        self.gpu.call("hipMemcpy", ctypes.c_void_p(self.pointer), ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(self.bytes), 1)

    def read(self) -> np.ndarray:
        out = np.empty(self.shape, self.dtype)
        self.gpu.call("hipMemcpy", ctypes.c_void_p(out.ctypes.data), ctypes.c_void_p(self.pointer), ctypes.c_size_t(self.bytes), 2)
        return out

    def free(self) -> None:
        if self.pointer:
            self.gpu.call("hipFree", ctypes.c_void_p(self.pointer))
            self.pointer = None


class InPlace:
    """An array of the host's as read-only device memory, for what is too large to copy."""

    def __init__(self, gpu: "SoftwareGpu", array: np.ndarray):
        self.gpu, self.array, self.pointer = gpu, array, array.ctypes.data
        gpu.lib.gfx950_register(ctypes.c_void_p(self.pointer), ctypes.c_size_t(array.nbytes), 0)

    def free(self) -> None:
        self.gpu.lib.gfx950_unregister(ctypes.c_void_p(self.pointer), ctypes.c_size_t(self.array.nbytes))


class KernelCost(typing.NamedTuple):
    """All launches of a kernel together."""

    launches: int
    workgroups: int
    instructions: int  # of waves
    if_all_were_the_busiest: int  # instructions, had every workgroup of a launch taken as many as its busiest
    bytes_read: int  # of global memory, by kernels
    bytes_written: int

    @property
    def busiest(self) -> float:
        """Instructions of the busiest workgroup of a launch."""
        return self.if_all_were_the_busiest / self.workgroups

    @property
    def imbalance(self) -> float:
        """The same over the mean."""
        return self.if_all_were_the_busiest / self.instructions


class SoftwareGpu:
    """The stand-in runtime, loaded. Every HIP call that fails raises HipError with what the software GPU has to say."""

    def __init__(self):
        self.lib = ctypes.CDLL(str(library()))
        for name in ("gfx950_message", "gfx950_counters", "gfx950_kernels", "gfx950_hazards", "gfx950_not_modelled", "hipGetErrorName"):
            getattr(self.lib, name).restype = ctypes.c_char_p

    def call(self, name: str, *arguments) -> None:
        if code := getattr(self.lib, name)(*arguments):
            error = self.lib.hipGetErrorName(code).decode()
            detail = self.lib.gfx950_message().decode() if code in (1, 200, 209, 700) else ""
            raise HipError(name, code, f"{error} {detail}".strip())

    def array(self, array) -> Buffer:
        return Buffer(self, np.asarray(array))

    def in_place(self, array: np.ndarray) -> InPlace:
        return InPlace(self, array)

    def function(self, code_object: bytes, name: str) -> ctypes.c_void_p:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("hipModuleLoadData", ctypes.byref(module), code_object)
        self.call("hipModuleGetFunction", ctypes.byref(function), module, name.encode())
        return function

    def launch(self, function, grid: int, block: int, arguments: bytes, stream=None) -> None:
        buffer = ctypes.create_string_buffer(arguments, len(arguments))
        size = ctypes.c_size_t(len(arguments))
        extra = (ctypes.c_void_p * 5)(1, ctypes.addressof(buffer), 2, ctypes.addressof(size), 3)
        self.call("hipModuleLaunchKernel", function, grid, 1, 1, block, 1, 1, 0, stream, None, extra)

    def not_modelled(self, code_object: bytes) -> list[str]:
        """The instructions of a code object that the interpreter does not know; they fault when they are reached."""
        return self.lib.gfx950_not_modelled(code_object).decode().splitlines()

    def options(self, hazards=False, exact_lgkm=False, lds_latency=-1, vm_latency=-1) -> None:
        self.lib.gfx950_options(int(hazards), int(exact_lgkm), lds_latency, vm_latency)

    def counters(self, reset: bool = True) -> dict[str, int]:
        lines = self.lib.gfx950_counters(int(reset)).decode().splitlines()
        return {name: int(value) for name, value in (line.split() for line in lines)}

    def kernels(self, reset: bool = True) -> dict[str, "KernelCost"]:
        """What was launched, by the kernels' names."""
        lines = [line.split() for line in self.lib.gfx950_kernels(int(reset)).decode().splitlines()]
        return {name: KernelCost(*map(int, numbers)) for name, *numbers in lines}

    def hazards(self, reset: bool = True) -> list[str]:
        return self.lib.gfx950_hazards(int(reset)).decode().splitlines()


def assemble(text: str) -> bytes:
    """A code object from assembly text, for what the machine says it is."""
    architecture = os.environ.get("GFX950_ARCHITECTURE", "gfx950")
    return _compile(["-x", "assembler", "-target", "amdgcn-amd-amdhsa", f"-mcpu={architecture}"], ".s", text.encode())


def _compile(flags: list[str], suffix: str, source: bytes) -> bytes:
    clang = tool("clang")
    with tempfile.TemporaryDirectory() as scratch:
        path, out = pathlib.Path(scratch, "kernel" + suffix), pathlib.Path(scratch, "kernel.co")
        path.write_bytes(source)
        subprocess.run([clang, *flags, str(path), "-o", str(out)], check=True)
        return out.read_bytes()


def compile_hip(source: str, architecture: str = "gfx950") -> bytes:
    """A code object from HIP source that uses only the compiler's builtins."""
    flags = ["-x", "hip", "--cuda-device-only", "--no-gpu-bundle-output", f"--offload-arch={architecture}"]
    return _compile([*flags, "-nogpuinc", "-nogpulib", "-O2"], ".hip", source.encode())


_ASSEMBLY = """
.text
.globl kernel
.p2align 8
.type kernel,@function
kernel:
  s_load_dwordx4 s[4:7], s[0:1], 0x0   // inputs, outputs
  v_and_b32 v0, 0x3ff, v0              // lane of the workgroup
  v_lshlrev_b32 v1, 2, v0
  s_waitcnt lgkmcnt(0)
{loads}
  s_waitcnt vmcnt(0)
{body}
{stores}
  s_endpgm
.rodata
.p2align 6
.amdhsa_kernel kernel
  .amdhsa_group_segment_fixed_size {lds}
  .amdhsa_user_sgpr_kernarg_segment_ptr 1
  .amdhsa_next_free_vgpr 512
  .amdhsa_next_free_sgpr 96
  .amdhsa_accum_offset 256
.end_amdhsa_kernel
.amdgpu_metadata
---
amdhsa.version: [1, 2]
amdhsa.kernels:
  - .name: kernel
    .symbol: kernel.kd
    .kernarg_segment_size: 16
    .kernarg_segment_align: 8
    .group_segment_fixed_size: {lds}
    .private_segment_fixed_size: 0
    .wavefront_size: 64
    .sgpr_count: 96
    .vgpr_count: 512
    .max_flat_workgroup_size: 1024
    .args:
      - {{.size: 8, .offset: 0, .value_kind: global_buffer, .address_space: global}}
      - {{.size: 8, .offset: 8, .value_kind: global_buffer, .address_space: global}}
...
.end_amdgpu_metadata
"""


def run_assembly(gpu: SoftwareGpu, body: str, inputs, outputs: int, waves: int, lds_bytes: int) -> np.ndarray:
    """uint32 [outputs, 64 * waves] from inputs of 64 * waves 32-bit numbers each. s[4:5] and s[6:7] point to both."""
    lanes = 64 * waves
    step = 4 * lanes
    loads = "\n".join(f"  v_add_u32 v2, {k * step}, v1\n  global_load_dword v{10 + k}, v2, s[4:5]" for k in range(len(inputs)))
    stores = "\n".join(f"  v_add_u32 v2, {k * step}, v1\n  global_store_dword v2, v{40 + k}, s[6:7]" for k in range(outputs))
    code = assemble(_ASSEMBLY.format(loads=loads, body=body, stores=stores, lds=lds_bytes))
    data = np.stack([np.ascontiguousarray(x).view(np.uint32) for x in inputs]) if len(inputs) else np.zeros(1, np.uint32)
    source, target = gpu.array(data), gpu.array(np.zeros((outputs, lanes), np.uint32))
    try:
        arguments = np.uint64([source.pointer, target.pointer]).tobytes()
        gpu.launch(gpu.function(code, "kernel"), 1, lanes, arguments)
        return target.read()
    finally:
        source.free(), target.free()
