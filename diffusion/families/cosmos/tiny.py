"""Tiny Cosmos-Predict2.5 folders: every component of the published ones but the guardrail, with their classes and their layout, and random weights.

Sizes and weights are all that differs: Qwen2.5-VL with a vocabulary and a chat template of its own, the network with its projection of
text, Wan 2.1's autoencoder, UniPC on Karras' grid.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffusion.families.tiny import WORDS, stirred
from diffusion.families.wan.tiny import tiny_vae

LAYERS, HIDDEN = 3, 32
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}{{ part['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
)
"""Turns as the published template makes them, text alone."""


def write_like(folder: Path, parts: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the tiny one of a policy's kind, of which there is one. Raises ValueError where `parts` has no VAE."""
    if "vae" not in parts:
        raise ValueError("it has Cosmos-Reason1 and no vae/, and a tiny policy of that layout is not known")
    write_tiny(folder)


def write_tiny(folder: Path, seed: int = 0) -> None:
    """Write a pipeline's folder, 1 MB, that `Cosmos2_5_PredictBasePipeline.from_pretrained` opens, given a safety checker.

    Args:
        seed: of all weights. The process's own random state stays as it was.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        parts = _parts()
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    library = {"transformer": "diffusers", "vae": "diffusers", "scheduler": "diffusers"}
    index: dict[str, Any] = {"_class_name": "Cosmos2_5_PredictBasePipeline", "safety_checker": [None, None]}
    index |= {name: [library.get(name, "transformers"), type(part).__name__] for name, part in parts.items()}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def _tokenizer() -> Any:
    """A `Qwen2Tokenizer`: bytes, the words with a blank before them, the turns' marks."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        left = "\u0120"
        for letter in word:
            merges[left, letter] = None
            left += letter
    pieces = [*sorted(ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    make: Any = Qwen2Tokenizer
    made = make(
        vocab={piece: i for i, piece in enumerate([*pieces, *marks])},
        merges=list(merges),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=marks,
        padding_side="right",
        model_max_length=1024,
    )
    made.chat_template = CHAT
    return made


def _parts() -> dict[str, Any]:
    import diffusers as found
    import transformers as text

    diffusers: Any = found
    transformers: Any = text
    tokens = _tokenizer()
    language = {
        "vocab_size": len(tokens),
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
        "tie_word_embeddings": False,
        "pad_token_id": tokens.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokens.eos_token_id,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": HIDDEN, "fullatt_block_indexes": [0]}
    transformer = diffusers.CosmosTransformer3DModel(
        in_channels=17,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=18,
        num_layers=3,
        mlp_ratio=2.0,
        text_embed_dim=24,
        adaln_lora_dim=8,
        max_size=(32, 64, 64),
        rope_scale=(1.0, 3.0, 3.0),
        extra_pos_embed_type=None,
        use_crossattn_projection=True,
        crossattn_proj_in_channels=LAYERS * HIDDEN,
        encoder_hidden_states_channels=24,
    )
    reason = transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(text_config=language, vision_config=vision))
    return {
        "tokenizer": tokens,
        "text_encoder": stirred(reason),
        "transformer": stirred(transformer),
        "vae": stirred(tiny_vae(diffusers, 16)),
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, use_karras_sigmas=True, sigma_max=200.0, sigma_min=0.01
        ),
    }
