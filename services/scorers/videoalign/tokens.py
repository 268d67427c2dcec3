"""A prompt and a number of video tokens in, token ids out: Qwen2-VL's chat layout around VideoAlign's template.

Invariant: a returned sequence holds each reward token once, in order, exactly the wanted number of video tokens, and no
special token that came out of the user's prompt. A prompt is text from strangers; ``<|TA_reward|>`` in it would be read
as the token itself and choose the position that is scored.
"""

from __future__ import annotations

import re
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from services.contract import ScoreFailure
from services.scorers.videoalign.errors import CheckpointError
from services.scorers.videoalign.template import REWARD_TOKENS, fill

VIDEO_TOKEN = "<|video_pad|>"
PAD_TOKEN = "<|endoftext|>"
LAYOUT_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", VIDEO_TOKEN, PAD_TOKEN)
# What Qwen2-VL's chat template makes of one user turn with a video and a text, ready for the assistant to speak.
BEFORE = f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>{VIDEO_TOKEN}<|vision_end|>"
AFTER = "<|im_end|>\n<|im_start|>assistant\n"
CONTROL = re.compile(r"<\|.*?\|>", re.DOTALL)

PROMPT_REFUSED = "prompt_refused"
PROMPT_INVALID = "prompt_invalid"


class RewardTokenizer:
    """The checkpoint's tokenizer with the reward tokens, and the template."""

    def __init__(self, file: Path, template: str) -> None:
        """Read ``tokenizer.json``; reward tokens it lacks are appended in the reference's order. Raises ``CheckpointError``."""
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for every kind of bad file
            raise CheckpointError(f"{file} is not a tokenizer: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in REWARD_TOKENS])
        lacking = [token for token in LAYOUT_TOKENS if self._tokenizer.token_to_id(token) is None]
        if lacking:
            raise CheckpointError(f"{file} is not a Qwen2-VL tokenizer: it lacks {', '.join(lacking)}")
        self._template = template
        self.size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.reward_ids: tuple[int, ...] = tuple(self._id(token) for token in REWARD_TOKENS)
        self.video_id, self.pad_id = self._id(VIDEO_TOKEN), self._id(PAD_TOKEN)
        self._special = frozenset(self._tokenizer.get_added_tokens_decoder())
        self._wanted = [i for i in self._encode("") if i in self._special]

    def encode(self, prompt: str, video_tokens: int) -> list[int] | ScoreFailure:
        """Ids of the whole sequence with ``video_tokens`` copies of the video token, or why the prompt is not accepted."""
        if CONTROL.search(prompt):
            return ScoreFailure(PROMPT_REFUSED, "the prompt holds a control sequence of the form <|…|>, which this model would obey")
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError:
            return ScoreFailure(PROMPT_INVALID, "the prompt is not valid Unicode text")
        ids = self._encode(prompt)
        if [i for i in ids if i in self._special] != self._wanted:
            return ScoreFailure(PROMPT_REFUSED, "the prompt holds a control token of this model")
        at = ids.index(self.video_id)
        return [*ids[:at], *[self.video_id] * video_tokens, *ids[at + 1 :]]

    def _encode(self, prompt: str) -> list[int]:
        text = BEFORE + fill(self._template, prompt) + AFTER
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _id(self, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        assert found is not None
        return int(found)
