"""`python examples/serve.py` as a user meets it."""

from __future__ import annotations

import dataclasses
import json
import os
import string
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from example_support import (
    PRESETS,
    decode,
    golden_folder,
    load_weights,
    quantised_checkpoint,
    safetensors,
    said_in_one_line,
    serve,
    serving,
    strict_types,  # noqa: F401
    train_tiny,
)

SMALL = dataclasses.replace(
    PRESETS["tiny"], layers=("swa",), hidden_size=32, vocab_size=53, n_routed_experts=2, moe_intermediate_size=32, num_hash_layers=0
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Its tokens are letters, and the space."""
    train_tiny.save(tmp_path, train_tiny.initialise(SMALL), SMALL, [*string.ascii_letters, " "])
    return tmp_path


def give(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """`text` as stdin."""
    reader, writer = os.pipe()
    os.write(writer, text.encode())
    os.close(writer)
    monkeypatch.setattr(sys, "stdin", os.fdopen(reader))


SIZES = ["--slots", "3", "--prefill-chunk", "16", "--context", "160"]


def test_prompts_from_stdin_are_answered_by_their_lines_numbers(checkpoint, monkeypatch, capsys) -> None:
    """All of them, but for one that does not fit and one without a token, and the last though its line does not end."""
    give(monkeypatch, "\n".join(["abc", "", "x" * 150, *"def", "..", "g.", "h"]))
    out = checkpoint / "out.json"
    assert serve.main(["--checkpoint", str(checkpoint), *SIZES, "--max-new-tokens", "110", "--json", str(out)]) == 2
    said = capsys.readouterr()
    assert "serve.py: line 3: a prompt of 150 tokens and 110 new ones do not fit a cache of 160 tokens\n" in said.err
    assert "serve.py: the tokenizer has no token for '.' of line 8: left out\n" in said.err
    assert "serve.py: line 7: a prompt must have at least one token\n" in said.err
    assert said.err.endswith("serve.py: 2 of 8 prompts could not be served\n")
    requests = json.loads(out.read_text())["requests"]
    assert [len(request["prompt_ids"]) for request in requests] == [3, 1, 1, 1, 1, 1]
    for number, request in zip((1, 4, 5, 6, 8, 9), requests, strict=True):
        lines = [line.removeprefix(f"{number}: ") for line in said.out.splitlines() if line.startswith(f"{number}: ")]
        text = "".join([*string.ascii_letters, " "][token] for token in request["tokens"])
        assert len(text) == 110
        assert "".join(lines) == text
        assert max(map(len, lines)) <= serve.LINE


def test_a_load_is_measured(checkpoint, capsys) -> None:
    out = checkpoint / "out.json"
    (checkpoint / "pieces.json").unlink()
    command = ["--checkpoint", str(checkpoint), *SIZES, "--max-new-tokens", "8", "--json", str(out)]
    command += ["--rate", "200", "--requests", "7", "--prompt-tokens", "20", "--shared-tokens", "70"]
    assert serve.main(command) == 0
    report, said = json.loads(out.read_text()), capsys.readouterr().out
    requests = report["requests"]
    assert len(requests) == 7
    assert len({tuple(request["prompt_ids"][:70]) for request in requests}) == 1
    assert len({tuple(request["prompt_ids"][70:]) for request in requests}) == 7
    for request in requests:
        assert 80 <= len(request["prompt_ids"]) <= 90
        assert 4 <= len(request["tokens"]) == len(request["drawn"]) <= 8
        assert np.all(np.diff([request["arrived"], *request["drawn"]]) >= 0)
    assert report["tokens"] == sum(len(request["tokens"]) for request in requests)
    assert report["tokens_per_second"] == pytest.approx(report["tokens"] / report["seconds"])
    first = [request["drawn"][0] - request["arrived"] for request in requests]
    assert report["first_token_seconds"]["median"] == pytest.approx(np.median(first))
    assert 0 < report["occupancy"] <= 1
    assert report["pages_shared"] == 6  # of 64 tokens, as the window's blocks are: of all requests but the first
    assert report["prompt_tokens_shared"] == 6 * 63
    assert f"{report['tokens_per_second']:.1f}  tokens/s (7 requests" in said
    assert "6  pages of 64 tokens shared" in said


def test_packed_weights_and_fp8_keys(tmp_path) -> None:
    """A server's tokens are the loop's, which reads the same weights dequantised and keeps the keys in a row."""
    sizes: dict[str, Any] = dict(hidden_size=256, q_lora_rank=128, o_lora_rank=128, moe_intermediate_size=128, index_topk=5)
    config = dataclasses.replace(SMALL, layers=("csa",), **sizes)
    (tmp_path / "config.json").write_text(json.dumps(train_tiny.config_json(config)))
    safetensors.write(tmp_path / "model.safetensors", quantised_checkpoint(config))
    out = tmp_path / "out.json"
    command = ["--checkpoint", str(tmp_path), *SIZES, "--max-new-tokens", "9", "--json", str(out), "--weights", "packed"]
    command += ["--rate", "200", "--requests", "3", "--prompt-tokens", "60", "--shared-tokens", "9", "--index-keys", "fp8"]
    assert serve.main(command) == 0
    report = json.loads(out.read_text())
    prompts = [np.array(request["prompt_ids"]) for request in report["requests"]]
    limits = [len(request["tokens"]) for request in report["requests"]]
    weights = load_weights(tmp_path, config, np.float32)
    looped = decode(config, weights, prompts, limits, max_tokens=160, chunk=16, layout="fp8_ds_mla", fp8_keys=True)
    assert [request["tokens"] for request in report["requests"]] == looped
    assert report["weights_bytes"] < 0.6 * sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    assert (report["weights"], report["index_keys"]) == ("packed", "fp8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "0"], "--rate must be positive, got 0.0"),
        (["--rate", "1", "--shared-tokens", "-1"], "--shared-tokens must be at least 0, got -1"),
        (
            ["--rate", "1", "--context", "800"],
            "--shared-tokens 600, --prompt-tokens 128 and --max-new-tokens 128 do not fit a cache of 800 tokens",
        ),
        (["--rate", "1", "--chat"], "--chat is for prompts from stdin, not for a load (--rate)"),
        (["--requests", "4"], "--requests is for a load (--rate), not for prompts from stdin"),
        (["--shared-tokens", "0"], "--shared-tokens is for a load (--rate), not for prompts from stdin"),
        (["--slots", "0"], "must be at least 1, got 0"),
        (["--rate", "1", "--context", "5000"], "--context must be at most max_position_embeddings = 4096, got 5000"),
        (["--max-new-tokens", "4096"], "--max-new-tokens must leave room for a prompt in a context of 4096 tokens, got 4096"),
        (["--rate", "1", "--max-new-tokens", str(10**30)], "--max-new-tokens must leave room for a prompt in a context of 4096 tokens"),
        (["--checkpoint", "/nowhere"], "no config.json there"),
        (["--checkpoint", str(golden_folder("hca"))], "has no tokenizer for prompts from stdin"),
        (["--rate", "1", "--cache-layout", "fp3"], "--cache-layout must be one of fp8_ds_mla, bf16, "),
        (["--rate", "1", "--cache-layout", "mxfp8_528"], "--cache-layout must be one of fp8_ds_mla, bf16, "),
        (["--json", "/nowhere/out.json"], "--json must name a file in a folder that exists"),
    ],
)
def test_errors_are_one_line_and_exit_2(arguments, message, capsys) -> None:
    assert message in said_in_one_line(serve, arguments, capsys)


def test_no_stdin_is_one_line(monkeypatch, capsys) -> None:
    """`<&-`: Python has None for it."""
    monkeypatch.setattr(sys, "stdin", None)
    assert serve.main([]) == 2
    assert capsys.readouterr().err == "serve.py: stdin is closed, and prompts come from there: give --rate for a load\n"


def test_what_goes_wrong_while_it_serves_is_one_line(checkpoint, monkeypatch, capsys) -> None:
    """Ctrl-C; a disk that is full; a model that computes NaN."""
    command = ["--checkpoint", str(checkpoint), *SIZES, "--max-new-tokens", "3"]

    def interrupt(self: serving.Server) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        give(patch, "a\n")
        patch.setattr(serving.Server, "step", interrupt)
        assert serve.main(command) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "serve.py: interrupted"

    if Path("/dev/full").exists():
        with open("/dev/full", "w") as full, monkeypatch.context() as patch:
            give(patch, "a\n")
            patch.setattr(sys, "stdout", full)
            assert serve.main(command) == 2
        assert capsys.readouterr().err.splitlines()[-1] == "serve.py: the output cannot be written: No space left on device"

    weights = train_tiny.initialise(SMALL)
    train_tiny.save(checkpoint, {**weights, "embed": weights["embed"].at[1].set(np.nan)}, SMALL, [*string.ascii_letters, " "])
    give(monkeypatch, "a\nab\n")
    assert serve.main(command) == 1
    assert "the model computes NaN or infinite logits for line " in capsys.readouterr().err.splitlines()[-1]
