"""Prompts on their way into a text tower: text → token ids of one fixed length, from a folder's ``tokenizer.json``.

A prompt is text from strangers: one that holds the text of a special token (``<|endoftext|>``, ``[SEP]``) would be read
as that token and choose the position that is scored, so it is refused.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from services.contract import ScoreFailure
from services.scorers.clip.errors import ModelFolderError

PROMPT_REFUSED = "prompt_refused"
PROMPT_INVALID = "prompt_invalid"


class PromptTokenizer:
    """Fixed-length ids; what does not fit is cut off at the end, as the reference scorers do."""

    def __init__(self, folder: Path, length: int, pad_token: str, unknown_token: str | None = None) -> None:
        """Read ``tokenizer.json``. ``unknown_token`` stands for words outside the vocabulary and is no reason to refuse."""
        file = folder / "tokenizer.json"
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for every kind of bad file
            raise ModelFolderError(f"{file} is not a tokenizer: {error}") from error
        pad = self._tokenizer.token_to_id(pad_token)
        if pad is None:
            raise ModelFolderError(f"{file} has no token {pad_token!r}; is it another model's?")
        self.pad_id: int = pad
        self.length = length
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(i for i, token in added.items() if token.special and token.content != unknown_token)
        self._tokenizer.enable_truncation(length)
        self._tokenizer.no_padding()

    def encode(self, prompt: str) -> list[int] | ScoreFailure:
        """Ids with the model's own start and end tokens, not padded; or why the prompt is not accepted."""
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError:
            return ScoreFailure(PROMPT_INVALID, "the prompt is not valid Unicode text")
        if self._special.intersection(self._tokenizer.encode(prompt, add_special_tokens=False).ids):
            return ScoreFailure(PROMPT_REFUSED, "the prompt holds a special token of this model")
        ids: list[int] = self._tokenizer.encode(prompt).ids
        return ids

    def padded(self, ids: list[int]) -> list[int]:
        """``ids`` at the fixed length."""
        return ids + [self.pad_id] * (self.length - len(ids))
