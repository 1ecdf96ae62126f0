"""Text to token ids and back: a Hugging Face tokenizer.json, or the plain list of pieces of the tiny model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from deepseek_v4.config import CheckpointError, read_json


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def left_out(self, text: str) -> str:
        """The characters of `text` that no token stands for."""
        ...

    def number(self, token: str) -> int | None:
        """The id of a token that stands for just this."""
        ...


class Pieces:
    """A vocabulary of strings; text is cut into the longest piece that fits, again and again."""

    def __init__(self, pieces: Sequence[str]):
        self.pieces = pieces
        self.ids = {piece: i for i, piece in enumerate(pieces)}
        self.longest = max(map(len, pieces))

    def cut(self, text: str) -> Iterator[str]:
        """Pieces, and each character that none begins with."""
        at = 0
        while at < len(text):
            fitting = (text[at : at + n] for n in range(self.longest, 0, -1))
            yield (piece := next((piece for piece in fitting if piece in self.ids), text[at]))
            at += len(piece)

    def encode(self, text: str) -> list[int]:
        return [self.ids[piece] for piece in self.cut(text) if piece in self.ids]

    def left_out(self, text: str) -> str:
        return "".join(dict.fromkeys(piece for piece in self.cut(text) if piece not in self.ids))

    def number(self, token: str) -> int | None:
        return self.ids.get(token)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.pieces[i] if i < len(self.pieces) else "\N{REPLACEMENT CHARACTER}" for i in ids)


class HuggingFace:
    """tokenizer.json, read by the `tokenizers` package.

    If tokenizer_config.json asks for a beginning-of-sequence token (`add_bos_token`), every text begins with one.
    """

    def __init__(self, path: Path):
        try:
            import tokenizers
        except ImportError:
            raise CheckpointError(f"{path} needs the package tokenizers: pip install 'jax-dsv4[example]'") from None
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises no narrower type
            raise CheckpointError(f"{path}: {error}") from None
        self.begin = self._begin(path.with_name("tokenizer_config.json"))

    def _begin(self, path: Path) -> list[int]:
        """The tokens that every text must begin with."""
        settings = read_json(path) if path.exists() else {}
        if not isinstance(settings, dict):
            raise CheckpointError(f"{path}: must be a JSON object")
        if settings.get("add_eos_token"):
            raise CheckpointError(f"{path}: add_eos_token must be false, as a prompt is to be continued")
        if not settings.get("add_bos_token"):
            return []
        token = settings.get("bos_token")
        token = token.get("content") if isinstance(token, dict) else token
        number = self.number(token) if isinstance(token, str) else None
        if number is None:
            raise CheckpointError(f"{path}: add_bos_token needs a bos_token that the tokenizer knows, got {token!r}")
        return [number]

    def encode(self, text: str) -> list[int]:
        ids = list(self.tokenizer.encode(text).ids)
        return ids if ids[: len(self.begin)] == self.begin else self.begin + ids

    def left_out(self, text: str) -> str:
        return ""

    def number(self, token: str) -> int | None:
        return self.tokenizer.token_to_id(token)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids)))


def encode_chat(tokenizer: Tokenizer, question: str, think: bool) -> list[int]:
    """A question as DeepSeek-V4 was trained to meet it: an answer follows, or the thinking that comes before one."""
    marks = ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>" if think else "</think>")  # noqa: RUF001
    known = [tokenizer.number(mark) for mark in marks]
    if None in known:
        raise CheckpointError(f"--chat needs a tokenizer that has the token {marks[known.index(None)]}")
    begin, user, assistant, mode = (number for number in known if number is not None)
    ids = tokenizer.encode(question)
    return [begin, user, *(ids[1:] if ids[:1] == [begin] else ids), assistant, mode]


def load_tokenizer(folder: str | Path) -> Tokenizer | None:
    """The tokenizer in `folder`, if there is one."""
    folder = Path(folder)
    if (folder / "tokenizer.json").exists():
        return HuggingFace(folder / "tokenizer.json")
    path = folder / "pieces.json"
    if not path.exists():
        return None
    pieces = read_json(path)
    if not isinstance(pieces, list) or not pieces or not all(isinstance(piece, str) and piece for piece in pieces):
        raise CheckpointError(f"{path}: must be a list of strings")
    return Pieces(pieces)
