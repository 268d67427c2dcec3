"""What a policy is made of, from its config.json files alone: parameters, bytes, tokens, latents. No weights are read.

The network is built on the meta device by the code that trains it, adapters included, so names and counts are the learner's own.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion.config import LoRAConfig, ModelConfig
from trainer.config.errors import ConfigError
from trainer.config.run import RunConfig
from trainer.plan.assumptions import Assumptions
from trainer.plan.published import GLYPH, PUBLISHED, Parts, published

if TYPE_CHECKING:
    from diffusion.families.base import PackedModel
    from diffusion.families.registry import Family

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "image_encoder")
"""Parts that read what a policy is given."""
UMT5_TOKENS = 512
"""Tokens that the diffusers pipeline of Wan pads a prompt to."""
REASON_CLASS, REASON_TOKENS = "Qwen2_5_VLForConditionalGeneration", 512
"""Text encoder of Cosmos-Predict2.5."""


@dataclass(frozen=True)
class Component:
    """A part of the policy: trainable and frozen parameters, and the values of its buffers."""

    name: str
    parameters: int
    trained: int = 0
    buffers: int = 0

    @property
    def values(self) -> int:
        """What a file of it holds."""
        return self.parameters + self.buffers


@dataclass(frozen=True)
class Sizes:
    """A recipe's policy in numbers.

    Attributes:
        network: the network on the meta device, with adapters where the recipe trains one.
        transformer, vae, encoders: its parts; the VAE is None in pixel space.
        shape: latent of one sample.
        prompt: tokens and channels of an encoded prompt, and channels of its pooled vector.
        vae_config: keys of the VAE's config.json, {} without one.
        encoder_class: class of the first text encoder, by which a build knows how to encode; "" without one.
        family: the network's.
        origin: where the configuration was read.
    """

    network: PackedModel
    transformer: Component
    vae: Component | None
    encoders: tuple[Component, ...]
    shape: tuple[int, ...]
    prompt: tuple[int, int, int]
    vae_config: dict[str, Any]
    encoder_class: str
    family: Family
    origin: str

    @property
    def adapted(self) -> bool:
        return self.transformer.trained < self.transformer.parameters

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        """Parameters of each block."""
        return tuple(sum(p.numel() for p in block.parameters()) for block in self.network.blocks)

    @cached_property
    def root(self) -> int:
        """Parameters outside of the blocks."""
        return self.transformer.parameters - sum(self.blocks)

    @cached_property
    def published_values(self) -> int:
        """Values of a version of the weights: what is trained; with the buffers where all of it is."""
        return self.transformer.trained if self.adapted else self.transformer.values

    @cached_property
    def adapted_weights(self) -> int:
        """Values of the weights that adapters stand beside."""
        state = dict(self.network.named_parameters())
        return sum(state[name.replace("lora_A.", "")].numel() for name in state if name.endswith("lora_A.weight"))

    @property
    def latent_values(self) -> int:
        total = 1
        for n in self.shape:
            total *= n
        return total

    @property
    def prompt_values(self) -> int:
        """Values of one encoded prompt."""
        tokens, channels, pooled = self.prompt
        return tokens * channels + pooled

    @cached_property
    def tokens(self) -> int:
        """Tokens that one sample takes of the engine's budget, without guidance."""
        return self.network.packed_tokens(self.shape, self.prompt[0])

    @cached_property
    def frozen(self) -> int:
        """Parameters of everything but the network."""
        return sum(e.parameters for e in self.encoders) + (self.vae.parameters if self.vae else 0)


def read_parts(path: str) -> tuple[Parts, str]:
    """Configuration of a policy folder, or of a published policy, and where it is from. Raises ConfigError."""
    folder = Path(path)
    known = published(path) or (published(folder.name) if folder.name in GLYPH and not folder.is_dir() else None)
    if not folder.is_dir():
        if known is None:
            raise ConfigError(f"model.path: {path} is neither a folder nor a published policy that is known here ({', '.join((*PUBLISHED, *GLYPH))})")
        return known, f"built-in configuration of {path}"
    parts: Parts = {}
    for name in ("transformer", "vae", *ENCODERS):
        file = folder / name / "config.json"
        if file.exists():
            try:
                parts[name] = json.loads(file.read_text())
            except (OSError, ValueError) as error:
                raise ConfigError(f"model.path: {file} cannot be read as JSON: {error}") from None
    if "transformer" not in parts:
        raise ConfigError(f"model.path: {folder}/transformer/config.json does not exist; give a folder in diffusers' layout")
    return parts, f"config.json files of {path}"


def sizes_of(config: RunConfig, assumptions: Assumptions) -> Sizes:
    """The numbers of `config`'s policy. Raises ConfigError for a policy, targets or a size that do not work."""
    from diffusion.ulysses import check_heads

    parts, origin = read_parts(config.model.path)
    network, family = _network(json.dumps(parts["transformer"], sort_keys=True), config.model.lora, origin)
    transformer = Component(
        "transformer",
        sum(p.numel() for p in network.parameters()),
        sum(p.numel() for p in network.parameters() if p.requires_grad),
        sum(b.numel() for b in network.buffers()),
    )
    vae, vae_config = _vae(parts)
    encoders = tuple(Component(name, encoder_parameters(parts[name])) for name in ENCODERS if name in parts)
    shape = _latent(config, vae_config, network.latent_channels, family.video)
    try:
        network.tokens(shape)
    except ValueError as error:
        raise ConfigError(f"sampler.height, sampler.width: {error}") from None
    for part, count in (("learner", config.learner.sequence_ranks), ("rollout", config.rollout.sequence_ranks)):
        try:
            check_heads(network.config.num_attention_heads, count)
        except ValueError as error:
            raise ConfigError(f"{part}.sequence_ranks: {error}") from None
    values = parts["transformer"]
    channels = prompt_channels(values, config.model)
    tokens: int = assumptions.prompt_tokens or sum(
        prompt_tokens(parts[name], config.model.t5_tokens) for name in ("text_encoder", "text_encoder_3") if name in parts
    )
    prompt = (tokens, channels, int(values.get("pooled_projection_dim", 0)))
    return Sizes(network, transformer, vae, encoders, shape, prompt, vae_config, class_of(parts.get(ENCODERS[0], {})), family, origin)


def class_of(values: dict[str, Any]) -> str:
    """Class of a part: diffusers writes it under `_class_name`, transformers under `architectures`."""
    return str(values.get("_class_name") or next(iter(values.get("architectures", ())), ""))


@cache
def _network(values: str, lora: LoRAConfig, origin: str) -> tuple[PackedModel, Family]:
    """The network of a config.json on the meta device, and its family. Raises ConfigError."""
    import torch

    from diffusion.families.registry import family_of
    from diffusion.lora import add_lora

    keys = json.loads(values)
    try:
        family = family_of(keys.get("_class_name"))
    except ValueError as error:
        raise ConfigError(f"{origin}: the network is {error}") from None
    try:
        with torch.device("meta"):
            network = family.build(keys, "sdpa")
        if lora.rank:
            add_lora(network, lora, None)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{origin}: {error}") from None
    return network, family


def _vae(parts: Parts) -> tuple[Component | None, dict[str, Any]]:
    if "vae" not in parts:
        return None, {}
    return _vae_component(json.dumps(parts["vae"], sort_keys=True)), parts["vae"]


@cache
def _vae_component(values: str) -> Component:
    return Component("vae", sum(p.numel() for p in build_vae(json.loads(values)).parameters()))


def build_vae(values: dict[str, Any]) -> Any:
    """A diffusers autoencoder on the meta device. Raises ConfigError for a class that is none."""
    import torch

    logging.getLogger("xformers").setLevel(logging.ERROR)  # where it has no kernels for this machine, it says so at length
    import diffusers

    name = values.get("_class_name")
    if name not in ("AutoencoderKL", "AutoencoderKLWan"):
        raise ConfigError(f"the VAE is a {name}; the planner knows AutoencoderKL and AutoencoderKLWan")
    with torch.device("meta"):
        return getattr(diffusers, name).from_config(values).eval().requires_grad_(False)


def _latent(config: RunConfig, vae: dict[str, Any], channels: int, video: bool) -> tuple[int, ...]:
    """Latent of one sample. Raises ConfigError for a size that is no multiple of the VAE's factor."""
    space = 2 ** (len(vae["block_out_channels"]) - 1) if "block_out_channels" in vae else vae.get("scale_factor_spatial", 8 if vae else 1)
    height, width = config.sampler.height, config.sampler.width
    if height % space or width % space:
        raise ConfigError(f"sampler: {height}x{width} pixels are no multiple of {space}, by which this policy's VAE shrinks pictures")
    size = (height // space, width // space)
    if not video:
        return (channels, *size)
    frames = config.sampler.frames
    return (channels, 1 + (frames - 1) // int(vae.get("scale_factor_temporal", 4)) if vae else frames, *size)


def prompt_tokens(values: dict[str, Any], t5: int) -> int:
    """Tokens that an encoder of this configuration gives a prompt, padding included; `t5` of SD3's T5."""
    if "max_tokens" in values:  # the glyph encoder
        return int(values["max_tokens"])
    known = {"T5EncoderModel": t5, "UMT5EncoderModel": UMT5_TOKENS, REASON_CLASS: REASON_TOKENS}
    return next((known[name] for name in values.get("architectures", ()) if name in known), values.get("max_position_embeddings", 0))


def prompt_channels(values: dict[str, Any], model: ModelConfig) -> int:
    """Channels of a prompt's embeddings as they are kept, of a network of this configuration."""
    if values.get("use_crossattn_projection"):  # Cosmos
        from diffusion.families.cosmos.text import frozen_projection

        return int(values["text_embed_dim"] if frozen_projection(model) else values["crossattn_proj_in_channels"])
    return int(values.get("joint_attention_dim") or values.get("text_dim") or values.get("text_embed_dim") or 4096)


def _language_parameters(c: dict[str, Any]) -> int:
    """Of a Qwen2.5 decoder without its head: grouped queries, biases on q, k and v, a gated feed-forward."""
    h, kv, ff = c["hidden_size"], c["hidden_size"] // c["num_attention_heads"] * c["num_key_value_heads"], c["intermediate_size"]
    layer = 2 * h * h + h + 2 * (h * kv + kv) + 3 * h * ff + 2 * h
    return int(c["vocab_size"] * h + c["num_hidden_layers"] * layer + h)


def encoder_parameters(values: dict[str, Any]) -> int:
    """Parameters of a CLIP text model with projection, of a CLIP vision model, of a T5 encoder, or of the language model of Qwen2.5-VL, which is
    all that is read of it; 0 for the glyph encoder, whose tables are 1 MB."""
    if class_of(values) == REASON_CLASS:
        return _language_parameters(values.get("text_config", values))
    if "d_model" in values:
        d, inner, ff, layers = values["d_model"], values["num_heads"] * values["d_kv"], values["d_ff"], values["num_layers"]
        gated = 3 if str(values.get("feed_forward_proj", "relu")).startswith("gated") else 2
        tables = layers if "UMT5EncoderModel" in values.get("architectures", ()) else 1  # of relative positions
        positions = tables * values.get("relative_attention_num_buckets", 32) * values["num_heads"]
        return int(values["vocab_size"] * d + layers * (4 * d * inner + gated * d * ff + 2 * d) + positions + d)
    if "hidden_size" in values:
        h, ff = values["hidden_size"], values["intermediate_size"]
        layer = 4 * (h * h + h) + 2 * h * ff + ff + h + 4 * h
        if "patch_size" in values:
            positions = (values["image_size"] // values["patch_size"]) ** 2 + 1
            return int(values["num_hidden_layers"] * layer + (3 * values["patch_size"] ** 2 + positions + 1) * h + 4 * h)
        tables = (values["vocab_size"] + values["max_position_embeddings"]) * h
        return int(tables + values["num_hidden_layers"] * layer + 2 * h + h * values.get("projection_dim", 0))
    return 0
