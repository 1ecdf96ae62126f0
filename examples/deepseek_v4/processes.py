"""Many processes of one program, one a host: joining them, and making sure that they are the same before anything waits for them."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from deepseek_v4.mesh import MeshError

FACTS_BYTES = 16384  # of a process, as JSON
INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it


def join(coordinator: str, num_processes: int, process_id: int, timeout_seconds: int) -> None:
    """Joins the other processes; to be called before anything asks JAX for a device.

    A process that is not heard of for `timeout_seconds` is taken for dead, and ends the others.
    """
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        initialization_timeout=timeout_seconds,
        heartbeat_timeout_seconds=timeout_seconds,
        shutdown_timeout_seconds=timeout_seconds,
    )


def leave(code: int) -> NoReturn:
    """Ends the program.

    One of many processes first leaves the others in an orderly way. It then does without the destructors of JAX's collectives: after an
    early end some were seen to wait in them for ever (jax 0.12, gloo). So does a program that was interrupted: JAX compiles in a thread,
    which Ctrl-C does not stop, and which crashes when the devices it compiles for are destroyed (jax 0.10).
    """
    together = jax.distributed.is_initialized()
    if together and code != INTERRUPTED:
        jax.distributed.shutdown()
    if together or code == INTERRUPTED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def agree(facts: dict[str, Any]) -> None:
    """Compares what every process would do. All must call it; all raise the same MeshError if one differs.

    Args:
        facts: what must be the same, by name; under "error" what keeps this process from going on, or None.
    """
    if jax.process_count() == 1:
        return
    devices = Counter(device.process_index for device in jax.devices())
    if len(set(devices.values())) > 1:
        raise MeshError(f"every process must have as many devices, got {[devices[i] for i in sorted(devices)]}")
    short = {name: value if value is None else _short(str(value)) for name, value in facts.items()}
    text = json.dumps(short, sort_keys=True).encode()
    assert len(text) <= FACTS_BYTES
    mine = np.frombuffer(text.ljust(FACTS_BYTES), np.uint8)
    everyone = [json.loads(row.tobytes()) for row in np.asarray(multihost_utils.process_allgather(mine))]
    for process, theirs in enumerate(everyone):
        if theirs.get("error"):
            raise MeshError(f"process {process}: {theirs['error']}")
    for process, theirs in enumerate(everyone):
        for name in sorted({*everyone[0], *theirs}):
            if theirs.get(name) != everyone[0].get(name):
                got = f"process {process} has {theirs.get(name)}, and process 0 has {everyone[0].get(name)}"
                raise MeshError(f"every process must be started with the same {name}: {got}")


def _short(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:60]}… ({hashlib.sha256(text.encode()).hexdigest()[:16]})"
