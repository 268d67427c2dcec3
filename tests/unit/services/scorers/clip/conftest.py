"""Tiny random models in the layouts of the published ones, written by transformers itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

SIDE, PATCH, TEXT_LENGTH, PROJECTION = 32, 8, 24, 16
START, END = "<|startoftext|>", "<|endoftext|>"


def clip_config(vocabulary: int, end: int) -> CLIPConfig:
    text = {"vocab_size": vocabulary, "max_position_embeddings": TEXT_LENGTH, "bos_token_id": end - 1, "eos_token_id": end, "hidden_act": "gelu"}
    both = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "projection_dim": PROJECTION}
    vision = {"hidden_size": 48, "image_size": SIDE, "patch_size": PATCH, "hidden_act": "gelu"}
    return CLIPConfig(text_config={**text, **both, "hidden_size": 32}, vision_config={**vision, **both}, projection_dim=PROJECTION)


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's own kind of tokenizer: every byte with and without the end-of-word mark, a few merges, two special tokens last."""
    letters = sorted(set(bytes_to_characters().values()))
    vocabulary = {token: i for i, token in enumerate([*letters, *(c + "</w>" for c in letters), "re", "red</w>"])}
    vocabulary |= {START: len(vocabulary), END: len(vocabulary) + 1}
    return CLIPTokenizer(vocab=vocabulary, merges=[("r", "e"), ("re", "d</w>")])


def bytes_to_characters() -> dict[int, str]:
    """The printable stand-ins of byte-level BPE."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(rest)}


def write_clip(folder: Path, seed: int = 0) -> CLIPModel:
    """A folder like ``openai/clip-vit-large-patch14`` on the hub."""
    tokenizer = clip_tokenizer()
    torch.manual_seed(seed)
    model = CLIPModel(clip_config(len(tokenizer), tokenizer.eos_token_id)).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name != "logit_scale":  # initial values would score every picture alike
                tensor.copy_(torch.randn_like(tensor) * 0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return model


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    write_clip(folder)
    return folder
