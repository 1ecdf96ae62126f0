"""Text to token ids: the tiny model's pieces, and Hugging Face tokenizers with what tokenizer_config.json asks for."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from example_support import (
    ROOT,
    CheckpointError,
    Pieces,
    decode_loop,
    load_tokenizer,
    strict_types,  # noqa: F401
)

TINY = ROOT / "examples" / "deepseek_v4" / "tiny"


def prepare(folder: Path, *options: str) -> list[list[int]]:
    """The prompts that the command would run."""
    return decode_loop.prepare(decode_loop.parse_arguments(["--checkpoint", str(folder), *options]))[2]


@pytest.fixture
def folder(tmp_path):
    """The tiny checkpoint without its tokenizer."""
    for file in TINY.glob("*"):
        if file.name != "pieces.json":
            shutil.copy(file, tmp_path)
    return tmp_path


def test_pieces_take_the_longest_that_fits():
    pieces = Pieces(["a", "b", "ab", "abb", " "])
    assert pieces.encode("abbab aé") == [3, 2, 4, 0]
    assert pieces.decode([3, 2, 4, 0]) == "abbab a"


def test_characters_without_a_piece_are_named(capsys):
    assert Pieces(["a", "bc"]).left_out("abcébéca") == "ébc"
    assert load_tokenizer(TINY).left_out("A plain sentence, in ASCII.\n") == ""
    (prompt,) = prepare(TINY, "--prompt", "a → b → 東京")
    assert prompt == load_tokenizer(TINY).encode("a  b  ")
    assert capsys.readouterr().err == "decode_loop.py: the tokenizer has no token for '→東京' of the prompt: left out\n"


def test_a_token_beyond_the_pieces_is_shown_as_unknown():
    assert Pieces(["a", "b"]).decode([1, 2, 0, 10**6]) == "b\ufffda\ufffd"


@pytest.mark.parametrize(
    "text", ["", "[", "{}", '{"a": 0}', "[]", '["a", 3]', '["a", ""]', '["a", null]', '"abc"', "7", "null", "[" * 50_000]
)
def test_a_list_of_pieces_that_is_none_is_one_line(folder, text):
    (folder / "pieces.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"pieces\.json: (must be a list of strings|not readable as JSON)") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_a_list_of_pieces_that_is_cut_off_is_one_line(folder):
    text = (TINY / "pieces.json").read_text().rstrip()
    for end in np.linspace(0, len(text) - 1, 20).astype(int):
        (folder / "pieces.json").write_text(text[:end])
        with pytest.raises(CheckpointError, match="not readable as JSON"):
            load_tokenizer(folder)


# --- Token ids


@pytest.mark.parametrize("name", ["pieces.json", "tokenizer.json"])
def test_token_ids_need_no_tokenizer(folder, name, capsys):
    (folder / name).write_text("[")
    assert prepare(folder, "--prompt-ids", "5,6;7") == [[5, 6], [7]]
    said = capsys.readouterr().err
    assert said.startswith(f"decode_loop.py: tokens alone, no text: {folder}/{name}")
    assert said.count("\n") == 1
    with pytest.raises(CheckpointError, match=name):
        prepare(folder, "--prompt", "a")


# --- Chats


@pytest.mark.parametrize("text", ["ab", "<｜begin▁of▁sentence｜>ab"])  # noqa: RUF001
@pytest.mark.parametrize(("options", "mode"), [([], 4), (["--think"], 3)])
def test_a_chat_has_the_published_form(folder, text, options, mode):
    """Token ids: 0 begin of sentence, 1 user, 2 assistant, 3 thinking begins, 4 ends."""
    pieces = ["<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "a", "b"]  # noqa: RUF001
    (folder / "pieces.json").write_text(json.dumps(pieces))
    assert prepare(folder, "--chat", "--prompt", text, *options) == [[0, 1, 5, 6, 2, mode]]
    (folder / "pieces.json").write_text(json.dumps(pieces[:2] + pieces[3:]))
    with pytest.raises(CheckpointError, match=r"--chat needs a tokenizer that has the token <.Assistant.>"):
        prepare(folder, "--chat", "--prompt", text)


# --- tokenizer.json


@pytest.fixture
def words(folder):
    """A function that writes a tokenizer of words, and a tokenizer_config.json if one is given."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs the example extra: pip install -e '.[example]'")
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<begin>", "<end>", *(f"w{i}" for i in range(3, 90))])}

    def write(settings: object = None, begins_by_itself: bool = False) -> Path:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        tokenizer.add_special_tokens(["<begin>", "<end>"])
        if begins_by_itself:
            tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", 1)])
        tokenizer.save(str(folder / "tokenizer.json"))
        if settings is not None:
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return folder

    return write


TOKEN = {"content": "<begin>", "__type": "AddedToken"}


@pytest.mark.parametrize(
    ("settings", "begins"),
    [
        (None, False),
        ({}, False),
        ({"bos_token": TOKEN}, False),
        ({"add_bos_token": False, "bos_token": TOKEN}, False),
        ({"add_bos_token": True, "bos_token": TOKEN}, True),
        ({"add_bos_token": True, "bos_token": "<begin>", "add_eos_token": False}, True),
    ],
)
def test_a_prompt_begins_as_tokenizer_config_says(words, settings, begins):
    begin = [1] if begins else []
    assert prepare(words(settings), "--prompt", "w8 w5") == [[*begin, 8, 5]]
    assert prepare(words(settings), "--prompt", "<begin> w5") == [[1, 5]]  # never twice
    assert prepare(words(settings, begins_by_itself=True), "--prompt", "w5") == [[1, 5]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "must be a JSON object"),
        ({"add_bos_token": True}, "add_bos_token needs a bos_token that the tokenizer knows, got None"),
        ({"add_bos_token": True, "bos_token": "<s>"}, "add_bos_token needs a bos_token that the tokenizer knows, got '<s>'"),
        ({"add_bos_token": True, "bos_token": {"content": 4}}, "add_bos_token needs a bos_token that the tokenizer knows, got 4"),
        ({"add_eos_token": True}, "add_eos_token must be false"),
    ],
)
def test_a_tokenizer_config_that_cannot_be_followed_is_one_line(words, settings, message):
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(words(settings))
    assert f"tokenizer_config.json: {message}" in str(caught.value)


def test_words_beyond_the_model_are_refused(words):
    folder = words()
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(re.sub(r'"w89": *89', '"w89": 5000', text))
    with pytest.raises(decode_loop.UsageError, match=r"token ids must be in \[0, 1024\), got 5000"):
        prepare(folder, "--prompt", "w3 w89")
