"""`python examples/decode_loop.py` as a user meets it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from example_support import ROOT, decode_loop, golden, golden_folder, strict_types  # noqa: F401


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


def test_memory_table(capsys):
    assert decode_loop.main(["--memory"]) == 0
    assert "| v4-flash | 156 GB | 569 GB |" in capsys.readouterr().out


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
        (["--max-new-tokens", "0"], "must be at least 1, got 0"),
        (["--cache-layout", "fp3"], "layout must be one of"),
        (["--implementation", "abacus"], "--implementation must be one of"),
        (["--temperature", "-1"], "--temperature must be at least 0"),
        (["--top-p", "0"], "--top-p must be in (0, 1]"),
        (["--json", "/nowhere/out.json"], "--json must name a file in a folder that exists"),
        (["--dtype", "int3"], "invalid choice"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_errors_are_one_line_and_exit_2(arguments, message, capsys):
    try:
        code = decode_loop.main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    captured = capsys.readouterr()
    assert code == 2
    assert message in captured.err
    assert captured.err.startswith("decode_loop.py: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


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
