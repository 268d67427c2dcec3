"""The text encoder of Wan: UMT5-XXL, as diffusers' `WanPipeline.encode_prompt` uses it.

    cleaned   ftfy, HTML entities twice, runs of white space to one blank
    tokens    512 at most, `</s>` among them
    rows      the last hidden states of the prompt's own tokens, then zeros up to 512        [512, D]

Rows of zeros take part: the network has no mask, and its text projection makes constant rows of them. The encoder is given a
prompt without its padding, which its mask would hide: the same numbers up to rounding, at the cost of what the prompt holds.
ftfy is optional in diffusers, which then encodes some prompts otherwise; the original code (Wan-Video/Wan2.1, `tokenizers.py`)
always uses it, and so do we. Source: diffusers 0.42.1, `pipelines/wan/pipeline_wan.py`.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.families.conditioning import Conditioning, stacked
from diffusion.families.frozen import frozen_model, load_tokenizer

UMT5_CLASS = "UMT5EncoderModel"
TOKENS = 512
"""Rows of a prompt, what the pipelines' `__call__` takes."""


def cleaned(prompt: str) -> str:
    """A prompt as the pipeline hands it to the tokenizer. Raises ValueError without ftfy."""
    try:
        import ftfy
    except ImportError:
        raise ValueError("prompts of Wan are cleaned by ftfy: pip install 'ddrl[models]'") from None
    text = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
    return re.sub(r"\s+", " ", text).strip()


class WanTokens:
    """The token ids that UMT5 is given."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, folder: Path) -> Self:
        """From a pipeline's folder. Raises ValueError with the tokenizer's folder named."""
        return cls(load_tokenizer(folder / "tokenizer", "T5Tokenizer"))

    def ids(self, prompt: str) -> Tensor:
        """Ids of a prompt's own tokens `[1, n]`, n <= 512."""
        found: Tensor = self._tokenizer([cleaned(prompt)], truncation=True, max_length=TOKENS, return_tensors="pt").input_ids
        return found

    def signature(self, prompt: str) -> bytes:
        """See `TextEncoder.signature`."""
        return hashlib.blake2b(self.ids(prompt).numpy().tobytes(), digest_size=16).digest()


class WanTextEncoder:
    """See the module's docstring.

    Args:
        tokens: its tokenizer.
        model: a `UMT5EncoderModel`.
    """

    def __init__(self, tokens: WanTokens, model: Any) -> None:
        self.tokens, self.model = tokens, model

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Self:
        """From a pipeline's folder: `tokenizer`, `text_encoder`.

        Raises:
            ValueError: a part that is missing, damaged or does not fit the network, with its folder named.
        """
        width = json.loads((folder / "transformer" / "config.json").read_text())["text_dim"]
        model = frozen_model(folder / "text_encoder", UMT5_CLASS, dtype, device)
        if model.config.d_model != width:
            raise ValueError(f"{folder}/text_encoder has {model.config.d_model} channels, the network's text_dim is {width}")
        if not torch.equal(model.shared.weight, model.encoder.embed_tokens.weight):
            raise ValueError(f"{folder}/text_encoder: the encoder's own embedding is not the shared one, which its file holds; install transformers 5.23")
        return cls(WanTokens.load(folder), model)

    def encode(self, prompts: list[str]) -> Conditioning:
        """Encode prompts in the encoder's own type; `prompt_embeds` `[B, 512, D]` fp32 on the CPU. Each has a forward pass of its own."""
        return stacked([self._encode(prompt) for prompt in prompts])

    @torch.no_grad()
    def _encode(self, prompt: str) -> Conditioning:
        rows = self.model(self.tokens.ids(prompt).to(self.model.device)).last_hidden_state[0].float().cpu()
        return Conditioning({"prompt_embeds": F.pad(rows, (0, 0, 0, TOKENS - len(rows)))})

    def signature(self, prompt: str) -> bytes:
        """See `TextEncoder.signature`."""
        return self.tokens.signature(prompt)
