"""The kernels of ffi/cuda under the sanitizers, on the software Hopper; and controls, in which the sanitizers must see what is wrong.

    python tests/hopper/watch.py               # thread: data races, fences missing before the tensor cores read; address,undefined
    python tests/hopper/watch.py --all         # every case and control, several schedules

The cases are made here and written to files; a child process, whose sanitizer must be there from its start, runs them with nothing but
NumPy loaded.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import software_hopper
from compare import LSE, OUT_BF16, assert_close

# With 2 processors a block walks many items, one after another. With 16, few tokens get clusters, of up to 5 blocks.
PROCESSORS, CLUSTER_PROCESSORS = 2, 16
CASES = ("heads8", "heads16", "heads32", "heads63", "heads127", "topk65", "topk300", "block53", "block69", "infinite_sinks", "all_holes")
LONG_CASES = ("one_token_split", "many_tokens", "block1", "block2", "block256", "one_scope_no_sink", "swa_empty", "no_keys_at_all")
CLUSTER_CASES = ("heads8", "heads16", "one_scope_no_sink")


class Control(NamedTuple):
    """A piece of the kernels' source, without which they are wrong."""

    file: str
    text: str
    case: str
    finding: str
    processors: int = PROCESSORS


RACE = "ThreadSanitizer: data race"
CONTROLS = (
    # The barrier between an item's last products and the output that takes their tile's place.
    Control("attend.h", "named_barrier_sync(1 + attending, kWarpgroup);  // no warp's products still read the tile", "heads16", RACE),
    # The fence between a converted tile and the tensor cores.
    Control("attend.h", "fence_proxy_async();  // of what producers have stored", "heads16", RACE),
    # The barrier between an item's output in shared memory and those who read it.
    Control("attend.h", "all_attending_sync();  // also: nobody reads this item's Q any more", "heads16", RACE),
    Control("producer.h", "__syncwarp();  // they came through another lane", "heads127", RACE),
    Control("scores.h", "fence_proxy_async();  // of what producers have stored", "heads127", RACE),
    Control("scores.h", "barrier_wait(&shared.p_free[to], handoff.freed());", "heads127", RACE),
    Control("values.h", "barrier_wait(&shared.factor_full[from], handoff.filled());", "heads127", RACE),
    Control("values.h", "wgmma_wait<1>();", "heads127", RACE),
    Control("producer.h", "if (lane == 0) barrier_arrive(&shared.full[buffer][group]);", "heads16", "wait for ever"),
    Control("cluster.h", "if (both) barrier_wait(&shared.added, 0);", "one_scope_no_sink", RACE, CLUSTER_PROCESSORS),
    # What the blocks of a cluster send each other.
    Control("cluster.h", "barrier_wait(&shared.softmax_sent, 0);", "heads8", RACE, CLUSTER_PROCESSORS),
    Control("cluster.h", "if (i < 2) barrier_wait(&shared.slices_sent, 0);", "heads8", RACE, CLUSTER_PROCESSORS),
    Control("cluster.h", "cluster_wait();", "heads8", "has waited for the cluster", CLUSTER_PROCESSORS),
    Control("few_heads_kernel.h", "barrier_init_fence();", "heads8", "no fence shows", CLUSTER_PROCESSORS),
    Control("producer.h", "if (key.slot < 0 || block >= cache.num_blocks) return {nullptr, nullptr};", "heads16", "AddressSanitizer"),
)
# Of cluster.cc, by its mistake: "no_wait" where the stores report, or "plain" ones, which those that report do not take along.
CLUSTERS = {"": "", "no_wait": RACE, "plain": RACE}
SHORT_CONTROLS = (CONTROLS[0], CONTROLS[1], CONTROLS[-4], CONTROLS[-1])


def sanitizer(control: Control) -> str:
    return "address" if control.finding == "AddressSanitizer" else "thread"


def write_case(name: str, folder: Path) -> Path:
    from operands import case_named, operands  # JAX comes with it

    q, scopes, sink, scale, out, lse = operands(case_named(name))
    parts: dict[str, object] = {}
    for i, scope in enumerate(scopes):
        parts |= {f"data{i}": scope.cache.data, f"block_size{i}": scope.cache.block_size}
        parts |= {f"indices{i}": scope.indices, f"lengths{i}": scope.lengths}
    path = folder / f"{name}.npz"
    np.savez(path, q=q, scale=scale, out=out, lse=lse, **parts, **({} if sink is None else {"sink": sink}))
    return path


def run_case(path: Path, gpu: software_hopper.SoftwareHopper) -> None:
    part = dict(np.load(path))
    scopes = [
        software_hopper.Scope(
            software_hopper.Cache(part[f"data{i}"], int(part[f"block_size{i}"])), part[f"indices{i}"], part[f"lengths{i}"]
        )
        for i in range(2)
        if f"data{i}" in part
    ]
    plan = gpu.plan(scopes, part["q"].shape[1])
    out, lse = gpu.decode(part["q"], scopes, part.get("sink"), float(part["scale"]), plan)
    assert_close(f"{path.stem} lse", lse, part["lse"], LSE)
    assert_close(f"{path.stem} out", software_hopper.from_bf16(out), part["out"], OUT_BF16)


def child(library: str, schedule: str, processors: str, *cases: str) -> None:
    gpu = software_hopper.SoftwareHopper(int(processors), int(schedule), Path(library))
    for case in cases:
        if case.startswith("neighbours"):
            gpu.neighbours(2, 4, *case.split()[1:])
        else:
            run_case(Path(case), gpu)


def fixed_addresses() -> list[str]:
    """GCC's ThreadSanitizer knows no addresses as random as newer kernels'. Some containers do not let them be fixed."""
    fixed = ["setarch", "-R"]
    return fixed if shutil.which("setarch") and not subprocess.run([*fixed, "true"], capture_output=True).returncode else []


def cannot_watch(sanitize: str, library: Path) -> str:
    """Why a sanitizer does not run here, or an empty string. Any other failure is one of the runs that follow."""
    inabilities = ("unexpected memory mapping", "cannot be preloaded", "interleaves with an existing memory mapping")
    report = watched(sanitize, library, 0, []).splitlines()
    return next((f"{sanitize} does not run here: {line}" for line in report if any(i in line for i in inabilities)), "")


def watched(sanitize: str, library: Path, schedule: int, cases: Sequence[Path | str], processors: int = PROCESSORS) -> str:
    """What the sanitizer, or the run, finds; empty if nothing."""
    names = ("tsan",) if sanitize == "thread" else ("asan", "ubsan")
    runtimes = [subprocess.check_output(["g++", f"-print-file-name=lib{name}.so"], text=True).strip() for name in names]
    environment = {
        "LD_PRELOAD": " ".join(runtimes),
        "TSAN_OPTIONS": "history_size=4:halt_on_error=1:exitcode=66",
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "OPENBLAS_NUM_THREADS": "1",  # its threads are not ours to watch
    }
    command = [*fixed_addresses(), sys.executable, __file__, "--child", str(library), str(schedule), str(processors), *map(str, cases)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every case and control, several schedules")
    everything = parser.parse_args().all
    names = CASES + (LONG_CASES if everything else ())
    failed, cannot = [], set()

    def say(what: str, good: bool, report: str) -> None:
        print(f"{what}: {'as it should be' if good else 'NOT as it should be'}", flush=True)
        if not good:
            failed.append(what)
            print(report[:8000], flush=True)

    # Most of the time is compiling, which is one thread for a library.
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        cases = {name: write_case(name, Path(folder)) for name in {*names, *CLUSTER_CASES, *(c.case for c in CONTROLS)}}
        sanitizers = ("thread", "address,undefined")
        for sanitize, library in zip(sanitizers, pool.map(software_hopper.library, sanitizers)):
            if reason := cannot_watch(sanitize, library):
                print(f"not run: {reason}", flush=True)
                cannot.add(sanitize)
                continue
            for schedule in range(4 if everything and sanitize == "thread" else 1):
                for some, processors in ((names, PROCESSORS), (CLUSTER_CASES, CLUSTER_PROCESSORS)):
                    report = watched(sanitize, library, schedule, [cases[name] for name in some], processors)
                    what = f"{len(some)} cases, {processors} processors, {sanitize}, schedule {schedule}"
                    say(f"{what}: no finding", not report, report)
                for mistake, finding in CLUSTERS.items() if sanitize == "thread" else ():
                    report = watched(sanitize, library, schedule, [f"neighbours {mistake}"])
                    good = finding in report if finding else not report
                    say(f"clusters, {mistake or 'right'}, schedule {schedule}: {finding or 'no finding'}", good, report or "no finding")

        def run_control(control: Control) -> str:
            sanitize = sanitizer(control)
            library = software_hopper.library(sanitize, (control.file, control.text, ""))
            return watched(sanitize, library, 0, [cases[control.case]], control.processors)

        controls = [c for c in (CONTROLS if everything else SHORT_CONTROLS) if not any(sanitizer(c) in other for other in cannot)]
        for control, report in zip(controls, pool.map(run_control, controls)):
            what = f"control, {control.file} without {control.text!r}: {control.finding}"
            say(what, control.finding in report, report or "no finding")
    if failed:
        sys.exit(f"{len(failed)} not as they should be")


if __name__ == "__main__":
    main()
