"""FlashMLA as a contender: its op on the same buffers, through torch, in CUDA graphs."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import jax
import numpy as np

from benchmarks.programs import Inputs, Program

LIBRARY = os.environ.get("FLASHMLA_LIBRARY")  # its compiled op: _flashmla_C.abi3.so of the vllm 0.26.0 wheel
if LIBRARY:
    import torch

FAILED: list[Any] = []


def calls_program(inputs: Inputs, steps: int, *, planned: bool) -> Program:
    """A graph of all calls, replayed `steps` times. With `planned` its schedule is made before, without by every call."""
    torch.ops.load_library(LIBRARY)
    op, view, heads = torch.ops._flashmla_C.sparse_decode_fwd, torch.utils.dlpack.from_dlpack, inputs.q.shape[1]
    pad = max(0, 64 - heads)  # it takes 64 or 128 heads
    sink = torch.nn.functional.pad(view(inputs.sink), (0, pad))
    q = torch.nn.functional.pad(view(inputs.q), (0, 0, 0, pad)).unsqueeze(1)

    def arguments(indices: dict[str, jax.Array], name: str) -> list[Any]:
        if name not in indices:
            return [None, None, None]
        data, block = view(inputs.caches[name].data), inputs.caches[name].block_size
        cache = data.as_strided((data.shape[0], block, 1, 584), (data.stride(0), 584, 584, 1))
        return [cache, view(indices[name]).unsqueeze(1), view(inputs.lengths[name])]

    swa, extra = ([arguments(i, name) for i in inputs.indices] for name in ("swa", "extra"))

    def call(i: int, schedule: tuple[Any, Any]) -> Any:
        return op(q, *swa[i], sink, *schedule, *extra[i], 512, 512**-0.5, None)

    schedule = tuple(call(0, (None, None))[2:]) if planned else (None, None)
    eager = call(0, schedule)[0]
    torch.cuda.synchronize()
    graph, outs = capture(lambda: [call(i, schedule)[0] for i in range(len(swa))])

    def run(kept: Any = (q, swa, extra, sink, schedule, outs)) -> Callable[[], object]:  # a graph keeps addresses, not tensors
        for _ in range(steps):
            graph.replay()
        end = torch.cuda.Event()
        end.record()
        return end.synchronize

    def output() -> np.ndarray:
        run()()
        # A schedule made inside a graph is timed but its results were seen to be wrong on replay: the eager one is given there.
        return (outs[0] if planned else eager)[:, 0, :heads].float().cpu().numpy()

    return Program(run, steps * len(swa), output)


def capture(call: Callable[[], Any], attempts: int = 3) -> tuple[Any, Any]:
    """A CUDA graph of what a call enqueues, and what it returned.

    In torch's own mode, "global", any other thread's allocation or module load breaks a capture: XLA's, when it compiles. In "relaxed"
    none does. What still breaks one is a wait for the whole device, in any thread, so it is tried again.
    """
    graph, device, pool = torch.cuda.CUDAGraph(), torch.cuda.current_device(), torch.cuda.graph_pool_handle()
    gc.disable()  # to unload a program is to wait for the device
    try:
        # The outer context is for a capture that fails: torch then leaves its own stream the current one.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool, capture_error_mode="relaxed"):
            return graph, call()
    except RuntimeError:
        FAILED.append(graph)  # torch's allocators keep pointers to it
        # They also hold its capture to be underway, and no other could begin. (It is not, if the error was not of the capture.)
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)
        if attempts == 1:
            raise
    finally:
        gc.enable()
    return capture(call, attempts - 1)
