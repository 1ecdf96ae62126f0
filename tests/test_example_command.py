"""`python examples/decode_loop.py` as a user meets it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from example_support import (
    NOT_A_TOKEN,
    PRESETS,
    REJECTED,
    ROOT,
    decode_loop,
    golden,
    golden_folder,
    memory,
    said_in_one_line,
    strict_types,  # noqa: F401
    train_tiny,
)


def test_default_run_prints_words(tmp_path):
    """From another folder, in a process of its own, as the README has it."""
    command = [sys.executable, ROOT / "examples" / "decode_loop.py", "--json", tmp_path / "out.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300)
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["text"][0] in done.stdout
    assert len(report["tokens"]) == 1
    assert len(report["tokens"][0]) == 128
    assert len({"the", "a", "is", "of", "to", "in", "The", "and"} & set(report["text"][0].split())) >= 3
    assert "tokens/s" in done.stdout
    assert "in attention" in done.stdout
    assert "bytes of cache" in done.stdout
    assert "compiling" in done.stderr


def test_checkpoint_decodes_as_transformers_does(tmp_path):
    _, _, answers = golden("hca")
    prompt = answers["prompt"].tolist()
    ids = ";".join(",".join(map(str, request)) for request in (prompt, prompt[:1]))
    options = ["--prompt-ids", ids, "--max-new-tokens", "64", "--cache-layout", "float32", "--dtype", "float32"]
    out = tmp_path / "out.json"
    assert decode_loop.main(["--checkpoint", str(golden_folder("hca")), *options, "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["prompt_ids"] == [prompt, prompt[:1]]
    assert report["tokens"][0] == answers["tokens"].tolist()
    assert len(report["tokens"][1]) == 64
    assert report["tokens_per_second"] > 0
    assert report["text"] is None


def test_strict_switches_change_no_token(tmp_path):
    """What users have set in their own environment: 64-bit types, strict promotion, no implicit ranks."""
    out, arguments = tmp_path / "out.json", ["--prompt-ids", "5,6,7;9,8", "--max-new-tokens", "18"]

    def tokens() -> list[list[int]]:
        assert decode_loop.main([*arguments, "--json", str(out)]) == 0
        return json.loads(out.read_text())["tokens"]

    want = tokens()
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        assert tokens() == want


def test_memory_table(capsys):
    assert decode_loop.main(["--memory"]) == 0
    assert "| v4-flash | 156 GB | 156 GB | 569 GB |" in capsys.readouterr().out


HCA = str(golden_folder("hca"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "/nowhere"], "no config.json there"),
        (["--checkpoint", HCA], "has no tokenizer: give --prompt-ids"),
        (["--checkpoint", HCA, "--prompt-ids", "1;"], "--prompt-ids must be like"),
        (["--checkpoint", HCA, "--prompt-ids", "1,96"], "token ids must be in [0, 96), got 96"),
        (["--prompt", ""], "a prompt must have at least one token"),
        (["--prompt-ids", "1,2,3", "--context", "100"], "3 tokens and 128 new ones do not fit a cache of 100 tokens"),
        (["--prompt-ids", "1;2;3", "--batch", "2"], "--batch must be at least the number of prompts = 3, got 2"),
        (["--max-new-tokens", "5000"], "do not fit a cache of 4096 tokens"),
        (["--context", "5000"], "--context must be at most max_position_embeddings = 4096, got 5000"),
        (["--prefill-chunk", "0"], "must be at least 1, got 0"),
        (["--chat"], "--chat needs a tokenizer that has the token <｜begin▁of▁sentence｜>"),  # noqa: RUF001
        (["--chat", "--prompt-ids", "1"], "--chat is for text: it goes with --prompt, not with --prompt-ids"),
        (["--think"], "--think goes with --chat"),
        (["--max-new-tokens", "0"], "must be at least 1, got 0"),
        (["--cache-layout", "fp3"], "--cache-layout must be one of fp8_ds_mla, bf16, "),
        (["--cache-layout", "nvfp4_288"], "--cache-layout must be one of fp8_ds_mla, bf16, "),
        (["--cache-layout", "aiter_fp8", "--cache-scale", "0"], "scale must be positive"),
        (["--cache-scale", "0.5"], "scale must be 1 for layout 'fp8_ds_mla'"),
        (["--implementation", "abacus"], "--implementation must be one of"),
        (["--temperature", "-1"], "--temperature must be at least 0"),
        (["--top-p", "0"], "--top-p must be in (0, 1]"),
        (["--json", "/nowhere/out.json"], "--json must name a file in a folder that exists"),
        pytest.param(
            ["--checkpoint", "/nowhere", "--json", "/proc/uptime"],
            "--json /proc/uptime cannot be written: ",
            marks=pytest.mark.skipif(not Path("/proc/uptime").exists(), reason="no file here that cannot be written, whoever asks"),
        ),
        (["--dtype", "int3"], "invalid choice"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_errors_are_one_line_and_exit_2(arguments, message, capsys):
    assert message in said_in_one_line(decode_loop, arguments, capsys)


def test_a_missing_shard_or_tensor_exits_2(tmp_path, capsys):
    for file in golden_folder("hca").glob("*"):
        shutil.copy(file, tmp_path)
    (tmp_path / "model-00002-of-00004.safetensors").unlink()
    assert decode_loop.main(["--checkpoint", str(tmp_path), "--prompt-ids", "1"]) == 2
    index = tmp_path / "model.safetensors.index.json"
    wanted = f"decode_loop.py: {tmp_path}/model-00002-of-00004.safetensors: named in {index.name} but not there\n"
    assert capsys.readouterr().err == wanted
    index.unlink()
    assert decode_loop.main(["--checkpoint", str(tmp_path), "--prompt-ids", "1"]) == 2
    assert capsys.readouterr().err.endswith(" is missing\n")


def test_hugging_face_tokenizer_is_used_when_present(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="needs the example extra: pip install -e '.[example]'")
    for file in golden_folder("hca").glob("*"):
        shutil.copy(file, tmp_path)
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *(f"w{i}" for i in range(1, 96))])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    out = tmp_path / "out.json"
    assert decode_loop.main(["--checkpoint", str(tmp_path), "--prompt", "w5 w7", "--max-new-tokens", "3", "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["prompt_ids"] == [[5, 7]]
    assert report["text"][0].split() == [f"w{token}" for token in report["tokens"][0]]
    assert np.all(np.array(report["tokens"]) > 0)


# --- What goes wrong while it runs

COMMAND = [sys.executable, str(ROOT / "examples" / "decode_loop.py")]
needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk here that is always full")


SMALL = dataclasses.replace(
    PRESETS["tiny"], layers=("swa",), hidden_size=32, vocab_size=64, n_routed_experts=2, moe_intermediate_size=32, num_hash_layers=0
)


def test_a_model_that_computes_nan_says_so(tmp_path, capsys):
    """From the first time on that it reads a certain token, which it draws itself."""
    weights, out = train_tiny.initialise(SMALL), tmp_path / "out.json"
    command = ["--checkpoint", str(tmp_path), "--prompt-ids", "4,8;7", "--max-new-tokens", "12", "--json", str(out)]
    train_tiny.save(tmp_path, weights, SMALL, ["a"])
    assert decode_loop.main(command) == 0
    first, second = json.loads(out.read_text())["tokens"]
    out.unlink()
    spoilt = next(token for token in first[1:-1] if token not in (4, 8, 7, *second))

    train_tiny.save(tmp_path, {**weights, "embed": weights["embed"].at[spoilt].set(np.nan)}, SMALL, ["a"])
    capsys.readouterr()
    assert decode_loop.main(command) == 1
    captured = capsys.readouterr()
    assert "decode_loop.py: the model computes NaN or infinite logits for request 0: weights or config are damaged\n" in captured.err
    assert "tokens/s" not in captured.out
    assert not out.exists()


def test_requests_without_numbers_are_named():
    tokens = np.array([[3, 4], [5, NOT_A_TOKEN], [6, -1], [NOT_A_TOKEN, -1]])
    assert decode_loop.numbers_only(tokens[[0, 2]]) is not None
    with pytest.raises(decode_loop.ModelError, match="for request 1, 3: weights or config"):
        decode_loop.numbers_only(tokens)


def test_looking_whether_a_file_can_be_written_leaves_it_as_it_was(tmp_path):
    new, old = tmp_path / "new.json", tmp_path / "old.json"
    old.write_text("old")
    for file in (new, old):
        assert decode_loop.main(["--checkpoint", "/nowhere", "--json", str(file)]) == 2
    assert not new.exists()
    assert old.read_text() == "old"


class Letters:
    """A tokenizer of bytes, as the pieces of its text may be."""

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def test_tokens_are_printed_as_they_come(capsys):
    """The first request's at once, the next one's once it has ended; a character once all its bytes are there."""
    stream = decode_loop.Stream([b"ab", b"c"], Letters(), 4, must_arrive=True, silent=False)
    printed = []
    for drawn in ([[0x64], [0x65]], [[0xC3], [0xC3]], [[0xA9], [-1]], [[0x66], [-1]]):
        stream.add(np.array(drawn))
        printed.append(capsys.readouterr().out)
    assert printed == ["\nabd", "", "é", "f\n\nce\N{REPLACEMENT CHARACTER}\n"]
    assert stream.tokens == [[0x64, 0xC3, 0xA9, 0x66], [0x65, 0xC3]]
    assert not stream.running


def test_drafts_in_vain_are_counted(capsys):
    stream = decode_loop.Stream([[1]], None, 3, must_arrive=True, silent=False)
    stream.add(np.array([[5, REJECTED]]))
    assert stream.running
    stream.add(np.array([[6, 7, -1, -1]]))
    assert (stream.tokens, stream.rejected, stream.running) == ([[5, 6, 7]], [1], False)
    assert capsys.readouterr().out == "\n5,6,7\n"


@needs_full
def test_a_text_that_cannot_be_printed(monkeypatch):
    """Ends the work, unless a file is to have the tokens: then that is said at the end."""
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(decode_loop.UsageError, match="the output cannot be written: No space left on device"):
            decode_loop.Stream([[1]], None, 3, must_arrive=True, silent=False).add(np.array([[5]]))
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        stream = decode_loop.Stream([[1]], None, 3, must_arrive=False, silent=False)
        stream.add(np.array([[5]]))
        stream.add(np.array([[6, 7]]))
        monkeypatch.undo()
    assert stream.tokens == [[5, 6, 7]]
    assert "No space left" in str(stream.failed)


def test_programs_are_compiled_for_buckets():
    assert [decode_loop.bucket(n) for n in (1, 2, 3, 4, 5, 33)] == [1, 2, 4, 4, 8, 64]


def test_chunks_of_the_prompt_change_no_token(tmp_path):
    out, chunk = tmp_path / "out.json", 5
    command = ["--checkpoint", HCA, "--prompt-ids", ",".join(map(str, range(1, 41))), "--max-new-tokens", "6", "--json", str(out)]
    command += ["--cache-layout", "float32"]
    tokens = []
    for asked, used in ((None, 64), (chunk, chunk), (10**11, 64)):
        assert decode_loop.main([*command, *(["--prefill-chunk", str(asked)] if asked else [])]) == 0
        report = json.loads(out.read_text())
        tokens.append(report["tokens"])
        assert report["prefill_chunk"] == used
    assert tokens[0] == tokens[1] == tokens[2]


REPORT = {
    "tokens": [[1, 2]],
    "text": None,
    "tokens_per_second": 9.0,
    "seconds_per_step": 0.1,
    "tokens_per_step": 1.0,
    "attention_seconds_per_step": 0.01,
    "implementation": "cpu",
    "compile_seconds": 1.0,
    "prompt_ids": [[7, 8, 9]],
    "prefill_seconds": 0.5,
    "prefill_chunk": 32,
    "load_seconds": 0.25,
    "weights": "bf16",
    "weights_bytes": 4_000_000,
    "products": "XLA",
    "cache_bytes": 5,
    "cache_tokens_per_request": 3,
    "cache_layout": "bf16",
    "device": "cpu",
}


@needs_full
def test_the_report_is_printed_where_its_file_cannot_be_written(capsys):
    with pytest.raises(decode_loop.UsageError, match="--json /dev/full cannot be written: No space left on device"):
        decode_loop.deliver(REPORT, Path("/dev/full"))
    printed = capsys.readouterr().out
    assert "9.0  tokens/s (1 requests" in printed
    assert "timed alone (10%); by cpu" in printed
    assert "0.500  s to read 3 tokens of prompts (6.0 tokens/s, in chunks of 32)" in printed
    assert "5  bytes of cache (3 tokens per request, bf16)" in printed
    assert "4 MB of weights" in printed


@needs_full
def test_the_file_is_written_where_the_report_cannot_be_printed(tmp_path, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(decode_loop.UsageError, match="the output cannot be written: No space left on device"):
            decode_loop.deliver(REPORT, tmp_path / "out.json")
        monkeypatch.undo()
    assert json.loads((tmp_path / "out.json").read_text()) == REPORT


def test_streams_that_are_closed(monkeypatch):
    """`>&-` and `2>&-`: Python has None for them."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        with pytest.raises(decode_loop.UsageError, match="the output cannot be written: it is closed"):
            decode_loop.run(decode_loop.parse_arguments(["--memory"]))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)
        decode_loop.tolerate_streams()
        print("nowhere", file=sys.stderr)
        sys.stderr.close()


@pytest.mark.parametrize("platform", ["cuda", "abacus"])
def test_a_platform_that_is_not_here_is_one_line(platform):
    command = [*COMMAND, "--prompt", "a", "--max-new-tokens", "1"]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": platform}, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, "")
    assert done.stderr.startswith(f"decode_loop.py: JAX has no device (JAX_PLATFORMS={platform})")


@needs_full
def test_a_switch_that_leaves_nothing_compiled_is_one_line(capsys):
    with jax.disable_jit():
        assert "leave JAX_DISABLE_JIT unset" in said_in_one_line(decode_loop, [], capsys)


def test_an_output_that_takes_nothing_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, "--memory"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (2, "decode_loop.py: the output cannot be written: No space left on device\n")


def test_an_output_that_nobody_reads_is_one_line():
    running = subprocess.Popen([*COMMAND, "--memory"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    running.stdout.close()
    _, said = running.communicate(timeout=300)
    assert (running.returncode, said) == (2, "decode_loop.py: the output cannot be written: Broken pipe\n")


def test_more_memory_than_there_is_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(memory, "free_kilobytes", lambda: 2**12)
    assert decode_loop.main(["--checkpoint", HCA, "--prompt-ids", "1"]) == 2
    wanted = r"decode_loop\.py: weights and cache take [\d.]+ MB, and 4\.19 MB are free\n"
    assert re.fullmatch(wanted, capsys.readouterr().err)

    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 2**20})
    monkeypatch.setattr(decode_loop.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(decode_loop.jax, "local_devices", lambda: [device])
    options = dict(layout="bf16", chunk=32, dtype="bfloat16")
    with pytest.raises(decode_loop.UsageError, match=r"take 569 GB on each of 1 devices with 1\.05 MB; no mesh spreads them"):
        decode_loop.check_memory(PRESETS["v4-flash"], None, 2, 8192, options)
    device.memory_stats = lambda: {"bytes_limit": 141 * 10**9}
    with pytest.raises(decode_loop.UsageError, match=r"with 141 GB; --mesh data=2,model=4 would fit, on 8 of them"):
        decode_loop.check_memory(PRESETS["v4-flash"], None, 2, 8192, options)
    monkeypatch.undo()

    def exhaust(_: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.\nmore")

    monkeypatch.setattr(decode_loop, "run", exhaust)
    assert decode_loop.main([]) == 2
    assert capsys.readouterr().err == "decode_loop.py: out of memory: RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes. more\n"


def test_room_is_what_is_free_or_what_the_container_may_have(tmp_path, monkeypatch):
    assert memory.number_in(str(tmp_path / "nowhere"), r"(\d+)") is None
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.number_in(str(tmp_path / "memory.max"), r"(\d+)") is None
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    5 kB\n")
    assert memory.number_in(str(tmp_path / "meminfo"), r"MemAvailable:\s*(\d+) kB") == 5
    for free, container, want in ((5, None, 5), (5, 3, 3), (5, 7, 5), (None, None, None)):
        monkeypatch.setattr(memory, "free_kilobytes", lambda free=free: free)
        monkeypatch.setattr(memory, "container_kilobytes", lambda container=container: container)
        assert memory.room() == (want and 1024 * want)


INTERRUPTED = """
import os, signal, sys, threading
sys.path.insert(0, sys.argv[1])
import decode_loop, jax
from deepseek_v4 import processes

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it off
compile = jax.stages.Lowered.compile

def interrupted(lowered):
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    return compile(lowered)

jax.stages.Lowered.compile = interrupted
processes.leave(decode_loop.main(sys.argv[2:]))
"""


def test_an_interrupt_while_compiling_is_one_line():
    command = [sys.executable, "-c", INTERRUPTED, str(ROOT / "examples"), "--checkpoint", HCA, "--prompt-ids", "1,2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == "decode_loop.py: interrupted"
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
