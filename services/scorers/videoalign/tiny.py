"""Tiny VideoAlign checkpoints in their real layouts: names, files and settings as published, random weights, a byte-level tokenizer.

Sizes, weights, tokenizer and the words of the template are all that differs. A run with `--tiny` scores with one; the scorer's tests too.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel

REWARD_TOKENS = ["<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"]
SPECIAL_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
]
# The shape of the real one, in other words: three questions, a token each, the prompt after the second.
TEMPLATE = "\nIs the picture good?  \n<|VQ_reward|>\nEND\nIs the motion good?\n<|MQ_reward|>\nEND\nPrompt: {text_prompt}\nDoes it fit? <|TA_reward|>\nEND\n"
TEMPLATE_SHA256 = hashlib.sha256(TEMPLATE.encode()).hexdigest()
VIDEOREWARD_SPREAD = {"VQ_mean": 3.6757, "VQ_std": 2.2476, "MQ_mean": 1.1646, "MQ_std": 1.3811, "TA_mean": 2.8105, "TA_std": 2.5121}
LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Dims:
    """Sizes of a Qwen2-VL reward model; the defaults are tiny."""

    vocab: int = 256 + len(SPECIAL_TOKENS) + 3
    hidden: int = 64
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 96
    depth: int = 2
    embed: int = 32
    vision_heads: int = 2
    rank: int = 4
    alpha: int = 8
    head_dim: int = 1
    sections: tuple[int, int, int] = (2, 3, 3)


VIDEOREWARD = Dims(151660, 1536, 28, 12, 2, 8960, 32, 1280, 16, 64, 128, 1, (16, 24, 24))


def published_shapes(d: Dims) -> dict[str, tuple[int, ...]]:
    """Names and shapes of ``model.pth`` as VideoAlign publishes it (peft around transformers 4.45)."""
    pre, kv = "base_model.model.", d.hidden // d.heads * d.kv_heads
    shapes: dict[str, tuple[int, ...]] = {f"{pre}visual.patch_embed.proj.weight": (d.embed, 3, 2, 14, 14)}
    inside = {"attn.qkv": (3 * d.embed, d.embed), "attn.proj": (d.embed, d.embed), "mlp.fc1": (4 * d.embed, d.embed), "mlp.fc2": (d.embed, 4 * d.embed)}
    linear = {f"visual.blocks.{i}.{name}": shape for i in range(d.depth) for name, shape in inside.items()}
    linear |= {"visual.merger.mlp.0": (4 * d.embed, 4 * d.embed), "visual.merger.mlp.2": (d.hidden, 4 * d.embed)}
    norms = [f"visual.blocks.{i}.norm{n}" for i in range(d.depth) for n in (1, 2)] + ["visual.merger.ln_q"]
    for name, shape in [*linear.items(), *((name, (d.embed,)) for name in norms)]:
        shapes |= {f"{pre}{name}.weight": shape, f"{pre}{name}.bias": shape[:1]}
    shapes[f"{pre}model.embed_tokens.weight"] = (d.vocab, d.hidden)
    sizes = dict(
        zip(LAYERS, [(d.hidden, d.hidden), (kv, d.hidden), (kv, d.hidden), (d.hidden, d.hidden), *[(d.mlp, d.hidden)] * 2, (d.hidden, d.mlp)], strict=True)
    )
    for i in range(d.layers):
        for name, (out, into) in sizes.items():
            layer = f"{pre}model.layers.{i}.{name}"
            shapes |= {
                f"{layer}.base_layer.weight": (out, into),
                f"{layer}.lora_A.default.weight": (d.rank, into),
                f"{layer}.lora_B.default.weight": (out, d.rank),
            }
            if name in LAYERS[:3]:
                shapes[f"{layer}.base_layer.bias"] = (out,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{pre}model.layers.{i}.{name}.weight"] = (d.hidden,)
    shapes[f"{pre}model.norm.weight"] = (d.hidden,)
    return shapes | {f"{pre}lm_head.weight": (d.vocab, d.hidden), f"{pre}rm_head.weight": (d.head_dim, d.hidden)}


def published_tensors(d: Dims, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under those names, the same with every version of torch; large enough that positions and prompts matter."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in sorted(published_shapes(d).items()):
        values = rng.standard_normal(shape)
        if len(shape) == 1:
            values = 1 + 0.1 * values if name.endswith("weight") else 0.1 * values
        elif "embed_tokens" not in name:
            values *= 0.85 / math.sqrt(math.prod(shape[1:]))
        tensors[name] = torch.from_numpy(values.astype(np.float32))
    tensors["base_model.model.lm_head.weight"] = tensors["base_model.model.model.embed_tokens.weight"].clone()
    return tensors


def model_config(d: Dims, spread: dict[str, float] | None = None) -> dict[str, Any]:
    """``model_config.json`` in the form VideoAlign writes."""
    config: dict[str, Any] = {
        "data_config": {
            "meta_data": "x",
            "data_dir": "x",
            "max_frame_pixels": 200704,
            "num_frames": None,
            "fps": 2.0,
            "eval_dim": ["VQ", "MQ", "TA"],
            "prompt_template_type": "detailed_special",
            "sample_type": "uniform",
            "add_noise": False,
            "use_tied_data": True,
        },
        "training_args": {},
        "model_config": {
            "model_name_or_path": "somebody/Tiny-VL",
            "model_revision": "main",
            "output_dim": d.head_dim,
            "use_special_tokens": True,
            "torch_dtype": "bfloat16",
            "reward_token": "special",
            "loss_type": "btt",
            "freeze_vision_tower": False,
            "tune_merger": True,
        },
        "peft_lora_config": {
            "lora_enable": True,
            "vision_lora": False,
            "lora_r": d.rank,
            "lora_alpha": d.alpha,
            "lora_dropout": 0.05,
            "use_rslora": False,
            "lora_namespan_exclude": ["lm_head", "rm_head", "embed_tokens", "visual"],
            "lora_modules_to_save": None,
            "num_lora_modules": -1,
        },
    }
    return config | ({} if spread is None else {"inference_config": spread})


def base_config(d: Dims) -> dict[str, Any]:
    """``config.json`` of the base model, flat as Qwen publishes it."""
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "vocab_size": d.vocab + 7,
        "hidden_size": d.hidden,
        "intermediate_size": d.mlp,
        "num_hidden_layers": d.layers,
        "num_attention_heads": d.heads,
        "num_key_value_heads": d.kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": list(d.sections)},
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "max_position_embeddings": 32768,
        "torch_dtype": "bfloat16",
        "vision_config": {
            "depth": d.depth,
            "embed_dim": d.embed,
            "num_heads": d.vision_heads,
            "hidden_size": d.hidden,
            "mlp_ratio": 4,
            "in_chans": 3,
            "patch_size": 14,
            "spatial_patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "hidden_act": "quick_gelu",
        },
    }


def write_tokenizer(file: Path, reward_tokens: bool = True) -> None:
    """A byte-level tokenizer in Qwen's format: bytes, no merges, then its special tokens."""
    letters = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.normalizer, tokenizer.decoder = NFC(), ByteLevelDecoder()
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in [*SPECIAL_TOKENS, *(REWARD_TOKENS if reward_tokens else [])]])
    file.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(file))


def write_base(folder: Path, d: Dims, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """The base model's folder: config.json, tokenizer without reward tokens, and weights if ``tensors`` (published names) are given."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(base_config(d)))
    write_tokenizer(folder / "tokenizer.json", reward_tokens=False)
    if tensors is not None:
        plain = {n.removeprefix("base_model.model.").replace(".base_layer.", "."): t for n, t in tensors.items() if ".lora_" not in n and "_head" not in n}
        rows = torch.full((7, d.hidden), float("nan"))  # Qwen pads its embedding; the padding must not be used
        plain["model.embed_tokens.weight"] = torch.cat([plain["model.embed_tokens.weight"], rows])
        save_file(plain, folder / "model.safetensors")
    return folder


def write_checkpoint(root: Path, d: Dims, tensors: dict[str, torch.Tensor], spread: dict[str, float] | None = None, step: int = 11352) -> Path:
    """A folder as published: settings, ``checkpoint-N/model.pth``, tokenizer; the template beside them."""
    folder = root / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    torch.save(tensors, folder / "model.pth")
    write_tokenizer(folder / "tokenizer" / "tokenizer.json")
    (root / "model_config.json").write_text(json.dumps(model_config(d, spread)))
    (root / "prompt_template.txt").write_bytes(TEMPLATE.encode())
    return root


def write_adapter(root: Path, d: Dims, tensors: dict[str, torch.Tensor], frozen: bool = True) -> Path:
    """What VideoAlign's trainer saves: the adapter without its name, and what was trainable beside it."""
    folder = root / "checkpoint-20"
    folder.mkdir(parents=True)
    save_file({n.replace(".default.", "."): t.clone() for n, t in tensors.items() if ".lora_" in n}, folder / "adapter_model.safetensors")
    trained = {n: t for n, t in tensors.items() if ".lora_" not in n and (not frozen or ".visual." in n or "rm_head" in n)}
    torch.save(trained, folder / "non_lora_state_dict.pth")
    (root / "model_config.json").write_text(json.dumps(model_config(d)))
    (root / "prompt_template.txt").write_bytes(TEMPLATE.encode())
    return root


def write_reward(folder: Path) -> None:
    """Write ``folder/checkpoint``, as published with VideoReward's mean and deviation, and ``folder/base``, the config.json of its base model; 1 MB."""
    sizes = Dims()
    write_checkpoint(folder / "checkpoint", sizes, published_tensors(sizes), VIDEOREWARD_SPREAD)
    write_base(folder / "base", sizes)


def reward_settings(folder: Path) -> dict[str, Any]:
    """Settings of a ``videoalign`` entry that scores with what ``write_reward`` wrote; those of a checkpoint of one's own are taken back."""
    own: dict[str, Any] = dict.fromkeys(("checkpoint", "tokenizer", "template"))
    return own | {"path": str(folder / "checkpoint"), "base": str(folder / "base"), "template_sha256": TEMPLATE_SHA256}


def clip(frames: int = 8, height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    """Moving blocks of colour, uint8 [T, H, W, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (frames, height // 8, width // 8, 3), np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)
