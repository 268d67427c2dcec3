"""The text encoders of SD3 and SD3.5: CLIP-L, CLIP-G and T5-XXL, as diffusers' `StableDiffusion3Pipeline.encode_prompt` uses them.

    CLIP L, G   77 tokens, padded and cut, no mask; second last hidden states without the final norm   [77, L + G]
    T5          `t5_tokens` tokens, padded and cut, no mask: the network attends to padding             [t5_tokens, D]
    joined      channels of L and G side by side, zeros up to D, then T5's rows behind                  [77 + t5_tokens, D]
    pooled      the projected end-of-text of L and G side by side                                       [P]

Where a folder has no `text_encoder_3`, its rows are zeros. No prompt is cleaned; what a tokenizer cuts off is not an error, as in
the pipeline. Sources: diffusers `pipeline_stable_diffusion_3.py`; 256 T5 tokens are its default, flow_grpo uses 128.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.families.conditioning import Conditioning, stacked
from diffusion.families.frozen import frozen_model, load_tokenizer, padded_ids

CLIP_CLASS, T5_CLASS = "CLIPTextModelWithProjection", "T5EncoderModel"


class SD3Tokens:
    """The token ids that the encoders of SD3 are given.

    Args:
        clips: tokenizers of CLIP-L and of CLIP-G.
        t5: T5's, None without.
        t5_tokens: T5's rows.
    """

    def __init__(self, clips: tuple[Any, Any], t5: Any, t5_tokens: int) -> None:
        length: int = clips[0].model_max_length
        self.clip_tokens, self._clips = length, [(tokenizer, length) for tokenizer in clips]
        self._t5 = [(t5, t5_tokens)] if t5 is not None else []

    @classmethod
    def load(cls, folder: Path, t5_tokens: int) -> Self:
        """From a pipeline's folder. Raises ValueError with the tokenizer's folder named."""
        large, giant = (load_tokenizer(folder / f"tokenizer{n}", "CLIPTokenizer") for n in ("", "_2"))
        t5 = load_tokenizer(folder / "tokenizer_3", "T5Tokenizer") if (folder / "text_encoder_3").is_dir() else None
        return cls((large, giant), t5, t5_tokens)

    def clip(self, prompts: list[str]) -> list[Tensor]:
        """Ids `[B, 77]` for CLIP-L and for CLIP-G."""
        return [padded_ids(tokenizer, prompts, length) for tokenizer, length in self._clips]

    def t5(self, prompts: list[str]) -> Tensor:
        """Ids `[B, t5_tokens]` for T5, where there is one."""
        [(tokenizer, length)] = self._t5
        return padded_ids(tokenizer, prompts, length)

    def signature(self, prompt: str) -> bytes:
        """See `TextEncoder.signature`: the token ids, which need no forward pass."""
        digest = hashlib.blake2b(digest_size=16)
        for tokenizer, length in self._clips + self._t5:
            digest.update(padded_ids(tokenizer, [prompt], length).numpy().tobytes())
        return digest.digest()


class SD3TextEncoder:
    """See the module's docstring.

    Args:
        tokens: of all encoders.
        clips: CLIP-L and CLIP-G.
        t5: T5, None without.
        width: channels D of the joined embeddings, the network's `joint_attention_dim`.
        t5_tokens: T5's rows.

    Raises:
        ValueError: the encoders' widths do not fit `width`.
    """

    def __init__(self, tokens: SD3Tokens, clips: tuple[Any, Any], t5: Any, width: int, t5_tokens: int = 256) -> None:
        self.tokens, self.clips, self.t5, self.width, self.t5_tokens = tokens, clips, t5, width, t5_tokens
        self.pooled_width = sum(model.config.projection_dim for model in clips)
        joined = sum(model.config.hidden_size for model in clips)
        if joined > width or (t5 is not None and t5.config.d_model != width):
            found = f"CLIP {joined}" + (f", T5 {t5.config.d_model}" if t5 is not None else "")
            raise ValueError(f"channels of the text encoders ({found}) do not fit the network's joint_attention_dim={width}")

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", t5_tokens: int = 256) -> Self:
        """From a pipeline's folder: `text_encoder`, `text_encoder_2`, `text_encoder_3` (may be absent), each with its `tokenizer`.

        Raises:
            ValueError: a part that is missing, damaged or does not fit, with its folder named.
        """
        config = json.loads((folder / "transformer" / "config.json").read_text())
        tokens = SD3Tokens.load(folder, t5_tokens)
        large, giant = (frozen_model(folder / f"text_encoder{n}", CLIP_CLASS, dtype, device) for n in ("", "_2"))
        t5 = frozen_model(folder / "text_encoder_3", T5_CLASS, dtype, device) if (folder / "text_encoder_3").is_dir() else None
        encoder = cls(tokens, (large, giant), t5, config["joint_attention_dim"], t5_tokens)
        if encoder.pooled_width != config["pooled_projection_dim"]:
            pooled = config["pooled_projection_dim"]
            raise ValueError(f"{folder}: pooled vectors of {encoder.pooled_width} channels do not fit the network's pooled_projection_dim={pooled}")
        return encoder

    def encode(self, prompts: list[str]) -> Conditioning:
        """Encode prompts in the encoders' own type; embeddings `[B, 77 + t5_tokens, D]` and pooled `[B, P]` are fp32 on the CPU.

        Each prompt has forward passes of its own: in a batch its rounding would depend on the others. Little is lost by it, since a
        prompt has a hundred tokens and more.
        """
        return stacked([self._encode(prompt) for prompt in prompts])

    @torch.no_grad()
    def _encode(self, prompt: str) -> Conditioning:
        hidden, pooled = [], []
        for ids, model in zip(self.tokens.clip([prompt]), self.clips, strict=True):
            out = model(ids.to(model.device), output_hidden_states=True)
            hidden.append(out.hidden_states[-2])
            pooled.append(out.text_embeds)
        clip = torch.cat(hidden, -1)
        rows = clip.new_zeros(1, self.t5_tokens, self.width) if self.t5 is None else self.t5(self.tokens.t5([prompt]).to(self.t5.device)).last_hidden_state
        embeds = torch.cat([F.pad(clip, (0, self.width - clip.shape[-1])), rows], 1)
        return Conditioning({"prompt_embeds": embeds[0].float().cpu(), "pooled": torch.cat(pooled, -1)[0].float().cpu()})

    def signature(self, prompt: str) -> bytes:
        """See `TextEncoder.signature`."""
        return self.tokens.signature(prompt)
