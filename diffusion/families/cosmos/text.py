"""The text encoder of Cosmos-Predict2.5: the language model of Cosmos-Reason1 (Qwen2.5-VL), as diffusers' pipeline uses it.

    chat     a system message that belongs to the model, then the prompt; cut and padded on the right to 512 tokens, no mask
    layers   the hidden states of every layer (the last one normed), each token's normalised over its channels
    rows     all layers side by side                                                       [512, layers x hidden] = [512, 100352]

Where the network's own projection of these rows is frozen (an adapter is trained), it is applied here: 512 x 1024 numbers of a prompt
are kept and sent instead of a hundred times as many. Rows of padding take part: they are computed, kept and attended to. The vision
tower and the head of the language model, 1.2 of 8.3 billion parameters, are never read. Source: diffusers 0.42.1,
`pipeline_cosmos2_5_predict.py::_get_prompt_embeds`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.config import ModelConfig
from diffusion.families.conditioning import Conditioning, stacked
from diffusion.families.cosmos.config import CosmosConfig
from diffusion.families.frozen import Part, frozen_model, load_tokenizer
from diffusion.weights import tensors_of

REASON_CLASS = "Qwen2_5_VLForConditionalGeneration"
LANGUAGE_CLASS = "Qwen2_5_VLTextModel"
LANGUAGE = Part("text_config", others=("visual.", "model.visual.", "lm_head."), renamed={r"^model\.language_model\.": "model."})
"""The language model in a folder of `REASON_CLASS`; published files name its tensors `model.…`, files of newer classes `model.language_model.…`."""
TOKENS = 512
SYSTEM = "You are a helpful assistant who will provide prompts to an image generator."
"""System message that the policies were trained with, to the letter (cosmos-predict2.5 50369b8, `text_encoder.py`)."""
PROJECTION = "crossattn_proj.0"
"""The network's projection of text features."""


def frozen_projection(config: ModelConfig) -> bool:
    """Whether the projection is the folder's for good: an adapter is trained, beside the folder's weights, and has no part in it."""
    targets = () if isinstance(config.lora.targets, str) else config.lora.targets
    adapted = any(target == PROJECTION or PROJECTION.endswith("." + target) for target in targets)
    return config.lora.rank > 0 and not config.init and not adapted


class CosmosTokens:
    """The token ids that the language model is given. Raises ValueError for a tokenizer that pads on the left."""

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.padding_side != "right":
            raise ValueError("Cosmos' tokenizer must pad on the right: on the left it would move every token; set padding_side in tokenizer_config.json")
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, folder: Path) -> Self:
        """From a pipeline's folder. Raises ValueError with the tokenizer's folder named."""
        return cls(load_tokenizer(folder / "tokenizer", "AutoTokenizer"))

    def ids(self, prompt: str) -> Tensor:
        """Ids `[1, 512]`."""
        chat = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in (("system", SYSTEM), ("user", prompt))]
        found: Any = self._tokenizer.apply_chat_template(
            chat, tokenize=True, add_generation_prompt=False, max_length=TOKENS, truncation=True, padding="max_length"
        )
        return torch.tensor([found["input_ids"] if not isinstance(found, list) else found])

    def signature(self, prompt: str) -> bytes:
        """See `TextEncoder.signature`."""
        return hashlib.blake2b(self.ids(prompt).numpy().tobytes(), digest_size=16).digest()


class CosmosTextEncoder:
    """See the module's docstring.

    Args:
        tokens: its tokenizer.
        model: the language model of a `Qwen2_5_VLForConditionalGeneration`.
        projection: weight and bias of the network's projection; None = rows are kept as they are.
    """

    def __init__(self, tokens: CosmosTokens, model: Any, projection: tuple[Tensor, Tensor] | None = None) -> None:
        self.tokens, self.model, self.projection = tokens, model, projection

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", project: bool = False) -> Self:
        """From a pipeline's folder: `tokenizer`, `text_encoder`, and with `project` the projection of its `transformer`.

        Raises:
            ValueError: a part that is missing, damaged or does not fit, with its folder named.
        """
        config = CosmosConfig.from_dict(json.loads((folder / "transformer" / "config.json").read_text()))
        tokens = CosmosTokens.load(folder)
        model = frozen_model(folder / "text_encoder", LANGUAGE_CLASS, dtype, device, LANGUAGE)
        width = model.config.num_hidden_layers * model.config.hidden_size
        if width != config.prompt_channels:
            raise ValueError(f"{folder}/text_encoder makes rows of {width} channels, the network takes {config.prompt_channels}")
        if not project or not config.use_crossattn_projection:
            return cls(tokens, model)
        wanted = (f"{PROJECTION}.weight", f"{PROJECTION}.bias")
        found = {name: tensor.to(device, dtype) for name, tensor in tensors_of(folder / "transformer", wanted)}
        return cls(tokens, model, (found[wanted[0]], found[wanted[1]]))

    def encode(self, prompts: list[str]) -> Conditioning:
        """Encode prompts in the encoder's own type; `prompt_embeds` `[B, 512, D]` fp32 on the CPU. Each has a forward pass of its own."""
        return stacked([self._encode(prompt) for prompt in prompts])

    @torch.no_grad()
    def _encode(self, prompt: str) -> Conditioning:
        states = self.model(self.tokens.ids(prompt).to(self.model.device), output_hidden_states=True).hidden_states[1:]
        rows = torch.cat([(h - h.mean(-1, keepdim=True)) / (h.std(-1, keepdim=True) + 1e-8) for h in states], -1)[0]
        if self.projection is not None:
            rows = F.gelu(F.linear(rows, *self.projection))
        return Conditioning({"prompt_embeds": rows.float().cpu()})

    def signature(self, prompt: str) -> bytes:
        """See `TextEncoder.signature`."""
        return self.tokens.signature(prompt)
