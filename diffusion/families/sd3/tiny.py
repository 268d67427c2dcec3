"""Tiny SD3 and SD3.5 folders: every component of the published ones, with their classes and their layout, and random weights.

Sizes and weights are all that differs: two CLIP text encoders of unequal width with tokenizers of their own, a T5, an autoencoder
that shrinks by 8 and has 16 channels, a scheduler of shift 3. Nothing is downloaded: both vocabularies are written down here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from diffusion.families.tiny import WORDS, stirred, t5_tokenizer

Style = Literal["sd3", "sd35", "sd35-large"]

WIDTH = 96
"""Channels of the joined embeddings: more than both CLIPs have together, so that some are zeros."""


def clip_tokenizer(pad: str = "<|endoftext|>") -> Any:
    """A `CLIPTokenizer` in the layout of the published ones: bytes, bytes that end a word, merges, then the two special tokens."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        left = word[0]
        for i, letter in enumerate(word[1:], 2):
            right = letter + "</w>" * (i == len(word))
            merges[left, right] = None
            left += right
    pieces = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), "<|startoftext|>", "<|endoftext|>"]
    make: Any = CLIPTokenizer
    return make(vocab={piece: i for i, piece in enumerate(pieces)}, merges=list(merges), pad_token=pad, model_max_length=77)


def write_like(folder: Path, parts: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the tiny one of a policy's kind: its style, and with a T5 where it has one.

    Args:
        parts: the policy's components, by name, and the keys of their config.json.

    Raises:
        ValueError: it has no VAE, which every tiny folder has.
    """
    if "vae" not in parts:
        raise ValueError("it has CLIP's text encoders and no vae/, and a tiny policy of that layout is not known")
    network = parts["transformer"]
    newer: Style = "sd35" if network.get("dual_attention_layers") else "sd35-large"
    write_tiny(folder, newer if network.get("qk_norm") else "sd3", "text_encoder_3" in parts)


def write_tiny(folder: Path, style: Style = "sd35", t5: bool = True, seed: int = 0) -> None:
    """Write a pipeline's folder, 1 MB, that `StableDiffusion3Pipeline.from_pretrained` opens (without T5: given `text_encoder_3=None, tokenizer_3=None`).

    Args:
        style: `sd35` (medium) has what SD3 lacks: qk-norm, and a second attention in the first half of its blocks; `sd35-large` qk-norm alone.
        t5: with `text_encoder_3` and `tokenizer_3`; without, model_index.json says null.
        seed: of all weights. The process's own random state stays as it was.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        _pipeline(style, t5).save_pretrained(folder)


def _pipeline(style: Style, t5: bool) -> Any:
    import diffusers as found
    import transformers as text

    diffusers: Any = found
    transformers: Any = text
    tokens, tokens_2 = clip_tokenizer(), clip_tokenizer(pad="!")
    common = {"vocab_size": len(tokens), "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 77, "bos_token_id": len(tokens) - 2}
    # 2 as in the published files: the end-of-text is then the largest id of a prompt, whatever its number
    clip = transformers.CLIPTextConfig(
        hidden_size=24, intermediate_size=48, projection_dim=20, hidden_act="quick_gelu", eos_token_id=2, pad_token_id=tokens.pad_token_id, **common
    )
    clip_2 = transformers.CLIPTextConfig(
        hidden_size=40, intermediate_size=80, projection_dim=28, hidden_act="gelu", eos_token_id=len(tokens) - 1, pad_token_id=tokens_2.pad_token_id, **common
    )
    norm, dual = {"qk_norm": "rms_norm"}, {"dual_attention_layers": (0, 1)}
    newer: dict[Style, Any] = {"sd3": {}, "sd35": norm | dual, "sd35-large": norm}
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=48,
        pos_embed_max_size=16,
        **newer[style],
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    tokens_3 = t5_tokenizer() if t5 else None
    shape = {"d_model": WIDTH, "d_kv": 12, "d_ff": 64, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
    text_encoder_3 = stirred(transformers.T5EncoderModel(transformers.T5Config(vocab_size=len(tokens_3), **shape))) if tokens_3 else None
    return diffusers.StableDiffusion3Pipeline(
        transformer=stirred(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=stirred(vae),
        text_encoder=stirred(transformers.CLIPTextModelWithProjection(clip)),
        tokenizer=tokens,
        text_encoder_2=stirred(transformers.CLIPTextModelWithProjection(clip_2)),
        tokenizer_2=tokens_2,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokens_3,
    )
