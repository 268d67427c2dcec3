"""A tiny CLIP folder in the layout of the published ones: a `CLIPModel`, its tokenizer, its image processor, random weights.

Sizes and weights are all that differs, so a reward on CLIP's two towers runs without a download. Its scores mean nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SIDE, PATCH, TEXT_LENGTH, PROJECTION = 32, 8, 24, 16
START, END = "<|startoftext|>", "<|endoftext|>"


def clip_config(vocabulary: int, end: int) -> Any:
    """A `CLIPConfig` of two layers a tower; `end` is the id of the end-of-text, the start's is one less."""
    from transformers import CLIPConfig

    text = {"vocab_size": vocabulary, "max_position_embeddings": TEXT_LENGTH, "bos_token_id": end - 1, "eos_token_id": end, "hidden_act": "gelu"}
    both = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "projection_dim": PROJECTION}
    vision = {"hidden_size": 48, "image_size": SIDE, "patch_size": PATCH, "hidden_act": "gelu"}
    make: Any = CLIPConfig
    return make(text_config={**text, **both, "hidden_size": 32}, vision_config={**vision, **both}, projection_dim=PROJECTION)


def clip_tokenizer() -> Any:
    """CLIP's own kind of tokenizer: every byte with and without the end-of-word mark, a few merges, two special tokens last."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*letters, *(c + "</w>" for c in letters), "re", "red</w>"])}
    vocabulary |= {START: len(vocabulary), END: len(vocabulary) + 1}
    make: Any = CLIPTokenizer
    return make(vocab=vocabulary, merges=[("r", "e"), ("re", "d</w>")])


def write_clip(folder: Path, seed: int = 0) -> Any:
    """Write a folder like ``openai/clip-vit-large-patch14`` on the hub, 0.4 MB; returns its model. The process's random state stays."""
    from transformers import CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = clip_tokenizer()
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(seed)
        build: Any = CLIPModel
        model = build(clip_config(len(tokenizer), tokenizer.eos_token_id)).eval()
        for name, tensor in model.named_parameters():
            if name != "logit_scale":  # initial values would score every picture alike
                tensor.copy_(torch.randn_like(tensor) * 0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    make: Any = CLIPImageProcessorPil
    make(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return model
