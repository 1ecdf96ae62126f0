"""The benchmarks' commands: what they select, verify and write, and what becomes of a contender that fails. No number is looked at."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, ScopeCase

import jax_dsv4 as dsv4
from jax_dsv4 import _ffi

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import capture, cpu, cuda, flashmla, model, programs, scaling, scaling_model, vllm_cpu
from benchmarks.measure import Report, compare

LIBRARY, DETAIL = _ffi.load("libdsv4_cpu", "cpu")
ROOT = Path(__file__).resolve().parent.parent
BROKEN = "CUDA error: operation failed due to a previous error during capture"


def fail(*_, **__):
    raise RuntimeError(BROKEN)


def contender(log: list[str], name: str, turns: int = 1000):
    """One that fails after so many turns."""

    def turn() -> list[float]:
        log.append(name)
        if log.count(name) > turns:
            fail()
        return [float(log.count(name))]

    return lambda: turn


def test_contenders_take_turns() -> None:
    log: list[str] = []
    times, failed = compare({name: contender(log, name) for name in "abc"}, rounds=2, between=lambda: log.append("|"))
    assert "".join(log) == "|bca|cab|abc"
    assert times == {name: [2.0, 3.0] for name in "abc"}  # the first was to warm up
    assert failed == {}


def test_the_others_go_on() -> None:
    log: list[str] = []
    contenders = {"unprepared": fail, "stops": contender(log, "stops", turns=2), "good": contender(log, "good")}
    times, failed = compare(contenders, rounds=3)
    assert times == {"good": [2.0, 3.0, 4.0]}
    assert failed == dict.fromkeys(("stops", "unprepared"), f"RuntimeError: {BROKEN}")
    assert log.count("stops") == 3


def test_an_interruption_is_no_failure() -> None:
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare({"a": interrupt}, rounds=1)


def test_report_grows(tmp_path, capsys) -> None:
    path = tmp_path / "report.json"
    report = Report(path, ["--only", "a b"], "a device", results=[])
    report.found["results"].append({"case": "one"})
    report.note("one", {"us": 1.5}, {})
    assert json.loads(path.read_text())["results"] == [{"case": "one"}]
    report.end()
    report.found["results"].append({"case": "two"})
    report.note("two", {}, {"peer": BROKEN})
    found = json.loads(path.read_text())
    assert (found["device"], found["failed"]) == ("a device", {"two": {"peer": BROKEN}})
    assert found["command"].endswith("--only 'a b'")
    assert found["versions"]["jax"] == jax.__version__
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    output = capsys.readouterr()
    assert output.out.split() == ["one", "us", "1.5", "two"]
    assert output.err == f"two: peer failed: {BROKEN}\n"
    with pytest.raises(SystemExit, match=r"^failed: two: peer$"):
        report.end()


@pytest.mark.parametrize("command", [cpu, cuda])
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only", "nothing"], "--only must be part of a name"),
        (["--rounds", "0"], "at least 1, got 0"),
        (["--json", "/nowhere/out.json"], "argument --json: must name a file in a folder that can be written, got /nowhere/out.json"),
        (["--json", "/"], "argument --json: must name a file in a folder that can be written, got /"),
    ],
)
def test_wrong_options(command, argv, message, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def small_cpu(monkeypatch):
    """Two small cases, and no compiler."""
    cases = [Case(f"perf-{name}", 4, 2, ScopeCase(16), ScopeCase(8), tags=("perf",)) for name in ("small", "other")]
    monkeypatch.setattr(cpu, "tagged", lambda *_: cases)
    monkeypatch.setattr(cpu, "cpu_meters", lambda: {"fma": lambda: 100.0})
    monkeypatch.setattr(cpu, "our_fp32_kernels", lambda call: call)  # whichever this machine has
    monkeypatch.setattr(vllm_cpu, "PYTHON", None)


def test_cpu(small_cpu, tmp_path, monkeypatch, capsys) -> None:
    turns, prepare = [], cpu.prepare

    def counted(call, problem):
        turn = prepare(call, problem)
        return lambda: turns.append(1) or turn()

    monkeypatch.setattr(cpu, "prepare", counted)
    cpu.main(["--only", "small", "--rounds", "2", "--json", str(tmp_path / "out.json")])
    printed = capsys.readouterr().out
    (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert len(turns) == 6 * (1 + 2)  # contenders, rounds
    assert result["case"] == "perf-small"
    xla = {"xla_batched", "xla_map", "xla_batched_bf16", "xla_map_bf16"}
    assert set(result["median_ms"]) == set(result["quartiles_ms"]) == {"ours", "ours_avx512"} | xla
    ms = result["median_ms"]
    assert result["best_xla_over_ours"] == min(ms[name] for name in xla) / ms["ours"]
    assert result["best_fp32_xla_over_ours"] == min(ms["xla_batched"], ms["xla_map"]) / ms["ours"]
    assert result["fraction_of_fma_peak"] == result["gflops"] / 100
    assert result["ours_avx512_over_ours"] == ms["ours_avx512"] / ms["ours"]
    best = result["best_xla_over_ours"]
    assert f"best XLA form over ours: geomean {best:.2f}x over 1 cases, from {best:.2f}x to {best:.2f}x\n    4 heads: geomean" in printed
    assert f"4 heads: {result['gflops']:.0f} to {result['gflops']:.0f} GFLOP/s" in printed


@pytest.mark.skipif(LIBRARY is None, reason=DETAIL)
def test_cpu_with_fp32_kernels() -> None:
    """They run in the call, and what ran before runs after it."""
    chosen, ran = _ffi.cpu_isa(LIBRARY), []
    limited = cpu.our_fp32_kernels(lambda: ran.append(_ffi.cpu_isa(LIBRARY).name))
    if _ffi.CPU_ISAS.index(chosen.name) <= _ffi.CPU_ISAS.index("avx512"):
        assert limited is None
        return
    limited()
    assert ran == ["avx512"]
    assert _ffi.cpu_isa(LIBRARY) == chosen


def test_cpu_with_a_wrong_contender(small_cpu, tmp_path, monkeypatch) -> None:
    """It is verified: one number off by a tenth is found."""

    def contenders(case, problem, real=cpu.contenders):
        def wrong():
            out, lse = real(case, problem)["xla_map"]()
            return out.at[0, 0, 0].add(jnp.asarray(0.1, out.dtype)), lse

        return real(case, problem) | {"xla_map": wrong}

    monkeypatch.setattr(cpu, "contenders", contenders)
    with pytest.raises(SystemExit, match=r"^failed: perf-small: xla_map; perf-other: xla_map$"):
        cpu.main(["--rounds", "1", "--json", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    right = {"ours", "ours_avx512", "xla_batched", "xla_batched_bf16", "xla_map_bf16"}
    assert [set(r["median_ms"]) for r in found["results"]] == [right] * 2
    assert "best_xla_over_ours" not in found["results"][0]
    assert found["failed"]["perf-small"]["xla_map"].startswith("AssertionError: out: 1 of ")


def test_cpu_with_a_peer_that_cannot_be_loaded(small_cpu, tmp_path, monkeypatch) -> None:
    """Its process says why, and the others are timed."""
    monkeypatch.setattr(vllm_cpu, "PYTHON", sys.executable)
    with pytest.raises(SystemExit, match=r"^failed: perf-small: vllm_cpu$"):
        cpu.main(["--only", "small", "--rounds", "1", "--json", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["failed"]["perf-small"]["vllm_cpu"].startswith("RuntimeError: ModuleNotFoundError: ")
    assert "best_xla_over_ours" not in found["results"][0]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(programs, "BLOCKS", {"swa": 2, "extra": 4})
    caches = {name: programs.make_cache(blocks, seed) for seed, (name, blocks) in enumerate(programs.BLOCKS.items())}
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((2, 4, 512), np.float32)
    return lambda extra: programs.make_inputs(rng, caches, queries, programs.Shape(heads=4, tokens=2, extra=extra))


@pytest.mark.parametrize("extra", [64, 0])
def test_programs_agree(small_blocks, extra) -> None:
    """The programs that a GPU is timed with, on a CPU: with a plan, without, per scope, in plain XLA."""
    inputs = small_blocks(extra)
    contenders = {
        "ours": partial(programs.calls_program, inputs, 2, planned=True, implementation="cpu"),
        "ours_unplanned": partial(programs.calls_program, inputs, 2, planned=False, implementation="cpu"),
        "per_scope": partial(programs.calls_program, inputs, 2, planned=True, implementation="cpu", fused=False),
        "xla": partial(programs.calls_program, inputs, 2, planned=True, implementation="xla"),
        "other": partial(programs.calls_program, inputs._replace(q=-inputs.q), 2, planned=True, implementation="cpu"),
    }
    times, failed = compare(cuda.verified(contenders, programs.Program.turn), rounds=1)
    assert set(times) == set(contenders) - {"other"}
    assert failed["other"].startswith("AssertionError: ours and other differ by ")
    assert contenders["ours"]().calls == 2 * programs.CALLS + 1


def fake_program(calls: int = 1) -> programs.Program:
    return programs.Program(lambda: lambda: None, calls, lambda: np.ones(2, np.float32))


@pytest.fixture
def run_cuda(monkeypatch, tmp_path):
    """The command, where there is no GPU: its programs do nothing, but those of FlashMLA fail, and those of ours that have options in
    `broken`. -> what it writes, the exit's message, how often a turn was taken"""

    def run(*argv: str, broken: tuple[dict, ...] = ()):
        turns = []

        def program(*_, **options) -> programs.Program:
            return fail() if options in broken else programs.Program(lambda: lambda: turns.append(1), 1, lambda: np.ones(2))

        monkeypatch.setattr(cuda.dsv4, "implementations", lambda: {"cuda": SimpleNamespace(available=True)})
        monkeypatch.setattr(cuda.jax, "devices", lambda _: [SimpleNamespace(device_kind="a GPU")])
        monkeypatch.setattr(cuda, "gpu_ceilings", lambda: {"tflops": 700.0, "gbps": 3000.0})
        monkeypatch.setattr(cuda, "make_cache", lambda blocks, seed: None)
        for name in ("calls_program", "layers_program", "plans_program"):
            monkeypatch.setattr(cuda, name, program)
        monkeypatch.setattr(flashmla, "LIBRARY", "flashmla.so")
        monkeypatch.setattr(flashmla, "calls_program", fail)
        path, message = tmp_path / "out.json", ""
        try:
            cuda.main([*argv, "--json", str(path)])
        except SystemExit as stop:
            message = str(stop)
        return json.loads(path.read_text()), message, len(turns)

    return run


def test_cuda_without_its_peer(run_cuda) -> None:
    found, message, turns = run_cuda("--only", "perf-t1h", "--rounds", "2")
    assert [r["case"] for r in found["results"]] == [f"perf-t1h{heads}k128+{extra}" for extra in (512, 1024, 0) for heads in (64, 128, 16)]
    assert [set(r["us"]) for r in found["results"][2:4]] == [{"ours", "ours_unplanned", "per_scope", "xla"}, {"ours", "ours_unplanned"}]
    assert turns == 2 * (1 + 2) * (3 * 4 + 3 * 2 + 3 * 3)  # the first and the last run's ends, rounds, contenders
    assert set(found["failed"]) == {r["case"] for r in found["results"]}
    assert found["failed"]["perf-t1h16k128+0"] == dict.fromkeys(("flashmla", "flashmla_unplanned"), f"RuntimeError: {BROKEN}")
    assert message.startswith("failed: perf-t1h64k128+512: flashmla, flashmla_unplanned; perf-t1h128k")
    assert (found["planner_us"], found["launch_us"]) == ([], {})


def test_cuda_without_ours(run_cuda) -> None:
    """Nothing is timed that could not be compared."""
    found, _, turns = run_cuda("--only", "perf-t2h64k128+1024", broken=({"planned": True, "implementation": "cuda"},))
    assert (found["results"][0]["us"], turns) == ({}, 0)
    failed = found["failed"]["perf-t2h64k128+1024"]
    assert failed["ours"] == f"RuntimeError: {BROKEN}"
    assert failed["ours_unplanned"] == "RuntimeError: cannot be verified, as ours failed"


def test_cuda_planner_and_launch(run_cuda) -> None:
    found, message, _ = run_cuda("--only", "plan-t1024")
    assert [(r["case"], r["heads"], r["tokens"], r["extra"], r["us"] >= 0) for r in found["planner_us"]] == [
        ("plan-t1024h64k128+512", 64, 1024, 512, True),
        ("plan-t1024h128k128+1024", 128, 1024, 1024, True),
    ]
    assert (message, found["results"], found["failed"]) == ("", [], {})
    found, message, _ = run_cuda("--only", "launch")
    assert {name: set(us) for name, us in found["launch_us"].items()} == {"fresh": {"first", "next"}, "donated": {"first", "next"}}
    assert message == "failed: launch: graph_calls, graph"


@pytest.mark.parametrize(("command", "argv"), [(cuda, []), (capture, ["--measure"])])
def test_a_benchmark_says_that_there_is_no_gpu(command, argv, capsys) -> None:
    if dsv4.implementations()["cuda"].available:
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as stop:
        command.main(argv)
    assert stop.value.code == 2
    assert "needs implementation 'cuda': " in capsys.readouterr().err


def test_a_profile_is_grouped() -> None:
    """Kernels' times are added up by group; what runs beside another one is counted once in the part of the busy time."""
    events = [("dense_kernel", 0, 4000), ("streams_kernel", 3000, 3000), ("experts_kernel", 10000, 2000), ("dense_kernel", 11000, 3000)]
    found = model.summary(events, per=2)
    assert found["groups"] == {
        "dense products": {"us": 3.5, "kernels": 1.0},
        "hyper-connections": {"us": 1.5, "kernels": 0.5},
        "experts": {"us": 1.0, "kernels": 0.5},
    }
    assert found["main_of_busy"] == 8 / 10
    assert model.summary([("copy", 0, 1)], per=1)["groups"] == {"others": {"us": 0.0, "kernels": 1.0}}
    assert model.summary([], per=1)["main_of_busy"] == 0


def test_a_step_has_weights_for_every_layer() -> None:
    """Layers have those of their kind, and neighbours of a kind others."""
    made = model.layers_of_a_step(list(enumerate(model.MADE.layers)))
    assert [kind for _, kind in made] == list(model.CONFIG.layers)
    csa = [i for i, kind in made if kind == "csa"]
    assert set(csa) == {1, 3}
    assert all(one != following for one, following in pairwise(csa))


@pytest.mark.parametrize("command", [capture, scaling_model])
def test_options_that_there_are_not(command, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(["--only", "nothing"])
    said = capsys.readouterr()
    assert (stop.value.code, said.out) == (2, "")
    assert "unrecognized arguments: --only nothing" in said.err


@pytest.mark.parametrize(("stop", "status", "said"), [("KeyboardInterrupt", 130, "interrupted\n"), ("BrokenPipeError", 141, "")])
def test_a_command_that_is_stopped_says_no_more(stop, status, said) -> None:
    program = f"from benchmarks import measure\ndef main(): raise {stop}\nmeasure.run(main)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", said)


def test_nobody_reads_the_tables() -> None:
    command = subprocess.Popen([sys.executable, "-m", "benchmarks.scaling_model"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert command.stdout
    command.stdout.close()
    _, said = command.communicate()
    assert (command.returncode, said) == (141, b"")


class FakeTorch:
    """What `flashmla.capture` uses of torch 2.11, and what a capture that breaks leaves behind there."""

    def __init__(self, breaks: int) -> None:
        self.breaks, self.current, self.modes = breaks, "main", []
        self.underway: set[int] = set()
        self.released: list[int] = []
        self.pools = iter(range(100))
        self.cuda = SimpleNamespace(
            CUDAGraph=object,
            current_device=lambda: 0,
            graph_pool_handle=lambda: next(self.pools),
            current_stream=lambda: self.current,
            stream=self.stream,
            graph=self.graph,
        )
        self._C = SimpleNamespace(_cuda_endAllocateToPool=self.end, _cuda_releasePool=lambda _, pool: self.released.append(pool))

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph, pool, capture_error_mode):
        assert not self.underway, "INTERNAL ASSERT FAILED: captures_underway.empty()"
        assert not gc.isenabled()
        self.modes.append(capture_error_mode)
        self.current = "capture"
        self.underway.add(pool)
        try:
            yield
        finally:
            self.breaks -= 1
            if self.breaks >= 0:
                fail()  # as capture_end does: the stream and the allocator stay as they are
            self.end(0, pool)
        self.current = "main"

    def end(self, _, pool) -> None:
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)


@pytest.mark.parametrize("breaks", [0, 2, 3])
def test_a_broken_capture_is_tried_again(monkeypatch, breaks) -> None:
    torch = FakeTorch(breaks)
    monkeypatch.setattr(flashmla, "torch", torch, raising=False)
    if breaks < 3:
        _, result = flashmla.capture(lambda: "enqueued")
        assert result == "enqueued"
    else:
        with pytest.raises(RuntimeError, match=BROKEN):
            flashmla.capture(lambda: "enqueued")
    assert torch.modes == ["relaxed"] * min(breaks + 1, 3)
    assert torch.released == list(range(breaks))
    assert (torch.underway, torch.current, gc.isenabled()) == (set(), "main", True)


def test_an_error_of_what_is_captured(monkeypatch) -> None:
    """The capture itself ends well: its pool is the graph's to release."""
    torch = FakeTorch(breaks=0)
    monkeypatch.setattr(flashmla, "torch", torch, raising=False)
    with pytest.raises(RuntimeError, match=BROKEN):
        flashmla.capture(fail)
    assert (torch.underway, torch.released) == (set(), [])


def test_scaling() -> None:
    """It runs, and compares what it times with one device; two calls a program, once each."""
    for axis, merges in (("heads", [""]), ("context", list(scaling.MERGES))):
        one, *two = scaling.measure(axis, jax.devices()[:2], [1, 2], scaling.SMALL, calls=2, rounds=1)
        assert (one["devices"], one["work"], one["of_linear"]) == (1, 1, 1)
        assert [(r["devices"], r["merge"], r["error"]) for r in two] == [(2, merge, "") for merge in merges]
        for r in two:
            assert r["of_linear"] == pytest.approx(one["us"] / r["us"] * r["work"] / 2)
            assert 0 < r["host_us"] <= r["us"]
    for found in scaling.bits(jax.devices()[:2], [1, 2]):
        assert (found["same"], found["moved"]) == (True, [])


def test_plot(tmp_path, capsys) -> None:
    """README's figure, from the committed report."""
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    from benchmarks import plot

    assert f"]({plot.FIGURE.relative_to(plot.ROOT)})" in (plot.ROOT / "README.md").read_text()
    plot.main([str(plot.REPORT), str(tmp_path / "figure.svg")])
    assert 0 < (tmp_path / "figure.svg").stat().st_size < 100_000
    (tmp_path / "other.json").write_text("{}")
    for report in ("other.json", "nowhere.json", "figure.svg"):
        with pytest.raises(SystemExit):
            plot.main([str(tmp_path / report)])
        assert f"{report} is no report of benchmarks.cuda: " in capsys.readouterr().err
