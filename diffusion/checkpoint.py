"""Policies on disk: folders in diffusers' layout.

    model_index.json  transformer/{config.json, diffusion_pytorch_model.safetensors}  scheduler/scheduler_config.json
    text_encoder/{config.json, model.safetensors}  vae/{config.json, diffusion_pytorch_model.safetensors} (none: pixel space)

Read: from a folder or a hub id (`diffusion.source`), one safetensors file or a sharded set with its index (`diffusion.weights`).
Written: one file, or shards of 2 GB. Everything is checked: a missing, unexpected or misshapen tensor is an error, never a silent re-initialisation.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from diffusion.attention import Provider, resolve_provider
from diffusion.codecs import Codec, IdentityCodec
from diffusion.config import ModelConfig
from diffusion.families.base import PackedModel
from diffusion.families.conditioning import TextEncoder
from diffusion.families.frames import FrameEncoder, GivenFrames
from diffusion.families.registry import CODECS, SIGNATURES, TEXT_ENCODERS, Family, Signature, family_of
from diffusion.lora import add_lora, fresh_adapters, merged_weight, trained_weights
from diffusion.processes import ForwardProcess, process_from_scheduler
from diffusion.seeds import generator
from diffusion.source import INDEX, CheckpointError, Source, belongs, has_codec, locate
from diffusion.weights import check_weights, load_weights, place, read_json, tensors_of, write_weights

PARTS = ("scheduler", "text_encoder", "vae")
"""Components that a policy has even where no model_index.json names them."""
REMEDY = "set model.init=true to start from random weights"


@dataclass
class Policy:
    """A policy with everything around it: network, frozen text encoder, latent codec, forward process.

    `frames` encodes the frames that a clip is given, None of pictures, and where others do it. `attention` is the provider in use, with a line
    for the log that says why; `source` says which files it was read from.
    """

    transformer: PackedModel
    text_encoder: TextEncoder
    codec: Codec
    process: ForwardProcess
    attention: Provider
    source: Source
    frames: FrameEncoder | None = None


def _network_config(folder: Path) -> tuple[Family, dict[str, Any]]:
    """Architecture of a policy folder's network and the keys of its config.json."""
    values = read_json(folder / "transformer" / "config.json")
    try:
        return family_of(values.get("_class_name")), values
    except ValueError as error:
        raise CheckpointError(f"{folder}/transformer is {error}") from None


def samples_clips(folder: Path) -> bool:
    """Whether the policy in `folder` makes clips instead of pictures. Raises CheckpointError for an unreadable folder or an unknown network."""
    return _network_config(folder)[0].video


def build_network(config: ModelConfig, device: torch.device | str = "cpu") -> tuple[PackedModel, Provider]:
    """The network of `config.path` on the meta device, in `config.base_dtype` and with its adapter, and its attention provider on
    `device`. `fill_network` gives it values.

    A provider without CPU kernels gives way to `sdpa` on the CPU, where feeders of a GPU run live.

    Raises:
        CheckpointError: a missing or unreadable folder, an unknown architecture, an adapter's targets that name no layer.
    """
    device = torch.device(device)
    folder = locate(config.path, config.revision).folder
    provider = resolve_provider("auto" if device.type == "cpu" else config.attention, device, getattr(torch, config.dtype))
    family, values = _network_config(folder)
    try:
        with torch.device("meta"):
            model = family.build(values, provider.name).to(getattr(torch, config.base_dtype))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}/transformer/config.json: {error}") from None
    if config.given_time != "family":
        model.given_time = None if config.given_time == "free" else config.given_time
    if config.lora.rank:
        try:
            add_lora(model, config.lora, None)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
    return model, provider


def fill_network(model: PackedModel, config: ModelConfig, device: torch.device | str = "cpu", seed: int = 0) -> None:
    """Give the network of `build_network` its values, on `device`: those of the folder, or with `config.init` drawn from `seed`, and the
    adapter's first ones drawn from `seed`. Where its parameters were sharded meanwhile (FSDP2), each rank reads its own part of them
    alone, and draws the whole.

    Raises:
        CheckpointError: weights that do not fit.
    """
    device, dtype = torch.device(device), getattr(torch, config.base_dtype)
    folder = locate(config.path, config.revision).folder
    adapter = [name for name in model.state_dict() if ".lora_" in name]
    if any(isinstance(p, DTensor) for p in model.parameters()):
        model.to_empty(device=device)
    if config.init:
        drawn = _drawn(folder, model.provider, seed)
        for name in list(drawn):
            place(model, name, drawn.pop(name), dtype, device)
    else:
        mapped = config.map_weights and config.lora.rank > 0
        load_weights(model, folder / "transformer", dtype, device, str(folder), REMEDY, adapter, mapped)
    for name, values in fresh_adapters(model, generator(seed, "lora")):
        place(model, name, values, torch.float32, device)


def _drawn(folder: Path, provider: str, seed: int) -> dict[str, Tensor]:
    """Random weights, on the CPU."""
    family, values = _network_config(folder)
    model = family.build(values, provider)
    model.init_weights(generator(seed, "init"))
    state: dict[str, Tensor] = model.state_dict()
    return state


class StartingWeights:
    """What is trained of the network that `fill_network` fills, as it was before training (`diffusion.engine.incoming.Incoming`): one tensor
    at a time, without the network.

    Args:
        model: a network of `build_network` with this config, for names and shapes.
        config, seed: as of `fill_network`.
    """

    def __init__(self, model: PackedModel, config: ModelConfig, seed: int) -> None:
        self.shapes = {name: tuple(tensor.shape) for name, tensor in trained_weights(model).items()}
        self._model, self._config, self._seed = model, config, seed

    def pieces(self) -> Iterator[tuple[str, tuple[slice, ...], Tensor]]:
        for name, tensor in self._tensors():
            yield name, (), tensor

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        if self._config.lora.rank:
            return fresh_adapters(self._model, generator(self._seed, "lora"))
        folder = locate(self._config.path, self._config.revision).folder
        if self._config.init:
            return iter(_drawn(folder, self._model.provider, self._seed).items())
        return tensors_of(folder / "transformer")


def load_network(config: ModelConfig, device: torch.device | str = "cpu", seed: int = 0) -> tuple[PackedModel, Provider]:
    """`build_network` and `fill_network`. Raises CheckpointError."""
    model, provider = build_network(config, device)
    fill_network(model, config, device, seed)
    return model, provider


def build_codec(folder: Path) -> Codec:
    """Codec of a policy folder without the weights of its `vae/`, on the meta device: enough to ask for sizes.

    Raises:
        CheckpointError: a VAE of another class.
    """
    if not has_codec(folder):
        return IdentityCodec(_network_config(folder)[0].video)
    values = read_json(folder / "vae" / "config.json")
    name = values.get("_class_name")
    try:
        if name not in CODECS:
            raise ValueError(f"a {name}; this build knows {', '.join(CODECS)}")
        with torch.device("meta"):
            return CODECS[name](values)
    except ValueError as error:
        raise CheckpointError(f"{folder}/vae/config.json: {error}") from None


def load_codec(folder: Path, device: torch.device | str = "cpu") -> Codec:
    """Codec of a policy folder: its `vae/` (frozen, fp32 on `device`), or the identity where there is none.

    Raises:
        CheckpointError: a VAE of another class, or weights that do not fit.
    """
    codec = build_codec(folder)
    vae: torch.nn.Module | None = getattr(codec, "vae", None)
    if vae is not None:
        load_weights(vae, folder / "vae", torch.float32, device)
    return codec


def _encoder_class(folder: Path) -> str:
    """Class of a folder's `text_encoder`: ours and diffusers' say `_class_name`, transformers' `architectures`."""
    values = read_json(folder / "text_encoder" / "config.json")
    return str(values.get("_class_name") or next(iter(values.get("architectures") or []), None))


def load_text_encoder(folder: Path, config: ModelConfig, device: torch.device | str = "cpu") -> TextEncoder:
    """The text encoders of a policy folder. Raises CheckpointError for some that do not fit."""
    try:
        readers = {**TEXT_ENCODERS, **_network_config(folder)[0].text_encoders}
        return readers[_encoder_class(folder)](folder, config, torch.device(device))
    except Exception as error:  # safetensors raises its own class for every kind of damage
        raise CheckpointError(f"text encoder of {folder} (text_encoder/config.json, model.safetensors) cannot be used: {error}") from None


def load_signature(folder: Path, config: ModelConfig) -> Signature:
    """`TextEncoder.signature` of a policy folder's text encoders, without their weights. Raises CheckpointError."""
    try:
        readers = {**SIGNATURES, **_network_config(folder)[0].signatures}
        return readers[_encoder_class(folder)](folder, config)
    except Exception as error:  # tokenizers raise classes of their own
        raise CheckpointError(f"tokenizers of {folder} cannot be used: {error}") from None


def load_frame_encoder(folder: Path, config: ModelConfig, codec: Codec, picture: bool, device: torch.device | str = "cpu") -> FrameEncoder | None:
    """What makes conditioning of the frames that a clip is given; None for a policy of pictures.

    Args:
        codec: the policy's, with its weights.
        picture: whether the network needs a picture (`PackedModel.needs_picture`).
    Raises:
        CheckpointError: a missing or unusable encoder of pictures.
    """
    if not codec.video:
        return None
    read = _network_config(folder)[0].picture
    if not picture or read is None:
        return GivenFrames(codec)
    try:
        return read(folder, codec, config, torch.device(device))
    except Exception as error:  # safetensors raises its own class for every kind of damage
        raise CheckpointError(f"the encoder of pictures of {folder} (image_encoder, image_processor) cannot be used: {error}") from None


def check_network(model: PackedModel, config: ModelConfig) -> None:
    """Whether `fill_network` will find what it needs in the folder, from the headers of its files. Raises CheckpointError."""
    if not config.init:
        folder = locate(config.path, config.revision).folder
        check_weights(model, folder / "transformer", str(folder), REMEDY, [name for name in model.state_dict() if ".lora_" in name])


@dataclass
class Skeleton:
    """A policy whose files were checked but for its weights, of which none were read: `transformer` and `codec` are on the meta device.
    `fill_network`, `load_codec` and `load_text_encoder` make a policy of it, or what of one is needed."""

    transformer: PackedModel
    codec: Codec
    process: ForwardProcess
    attention: Provider
    source: Source


def open_policy(config: ModelConfig, device: torch.device | str = "cpu") -> Skeleton:
    """The policy of `config.path` without weights, for `device`.

    Raises:
        CheckpointError: what `build_network` and `build_codec` raise, components that do not fit each other or are not there, and parts
            this build does not have: other text encoders.
    """
    source = locate(config.path, config.revision)
    folder = source.folder
    encoder_class, (family, _) = _encoder_class(folder), _network_config(folder)
    if encoder_class not in {**TEXT_ENCODERS, **family.text_encoders}:
        raise CheckpointError(f"{folder}/text_encoder is a {encoder_class}; this build knows {', '.join({**TEXT_ENCODERS, **family.text_encoders})}")
    model, provider = build_network(config.model_copy(update={"path": str(folder), "revision": None}), device)
    codec = build_codec(folder)
    if codec.video != family.video:
        kinds = ("pictures", "clips")
        raise CheckpointError(f"{folder}: the network takes {kinds[family.video]}, its codec makes {kinds[codec.video]}")
    if codec.channels != model.latent_channels:
        raise CheckpointError(f"{folder}: the network takes latents of {model.latent_channels} channels, its codec makes {codec.channels}")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    try:
        process = process_from_scheduler(scheduler, config.grid)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}/scheduler/scheduler_config.json: {error}") from None
    if "transformer_2" in _components(folder):  # what is not needed here is needed by an export
        raise CheckpointError(f"{folder} has two networks that share a trajectory (transformer, transformer_2: Wan 2.2 A14B); this build knows policies of one")
    return Skeleton(model, codec, process, provider, source)


def load_policy(config: ModelConfig, device: torch.device | str = "cpu", seed: int = 0, encoder: TextEncoder | None = None) -> Policy:
    """The policy of `config.path`: `open_policy` with all its weights on `device`.

    Args:
        encoder: encodes its prompts; None = its own text encoders, loaded.

    Raises:
        CheckpointError: what `open_policy`, `fill_network`, `load_codec` and `load_text_encoder` raise.
    """
    found = open_policy(config, device)
    folder = found.source.folder
    fill_network(found.transformer, config.model_copy(update={"path": str(folder), "revision": None}), device, seed)
    codec = load_codec(folder, device)
    frames = load_frame_encoder(folder, config, codec, found.transformer.needs_picture, device) if encoder is None else None
    return Policy(found.transformer, encoder or load_text_encoder(folder, config, device), codec, found.process, found.attention, found.source, frames)


def _components(folder: Path) -> set[str]:
    """Folders of a policy's components: those that its model_index.json names, and `PARTS`.

    Raises:
        CheckpointError: one that is named is not there, so that no pipeline could be opened here or from an export.
    """
    index = read_json(folder / INDEX) if (folder / INDEX).exists() else {}
    named = {name for name, value in index.items() if isinstance(value, list) and value[:1] != [None]}
    absent = sorted(name for name in named if not (folder / name).is_dir())
    if absent:
        raise CheckpointError(f"{folder / INDEX} names {', '.join(absent)}, and there is no such folder; download the folder again")
    return named | {name for name in PARTS if (folder / name).is_dir()}


def _place(path: Path, target: Path, earlier: Path | None) -> None:
    """Put a frozen file in its place: as a link to an earlier export's where one can be made, else as a copy."""
    target.parent.mkdir(exist_ok=True)
    if earlier is not None and path.suffix == ".safetensors":
        with suppress(OSError):  # the export is gone, or the file system has no links
            os.link(earlier, target)
            return
    shutil.copyfile(path, target)  # its own mode: the hub's cache has others


def merged_policy(folder: Path, adapter: Mapping[str, Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """The network of a policy folder with an adapter merged, in `config.base_dtype`, one tensor at a time: what `merged_state` makes of the
    whole state of a model that `fill_network` filled from that folder. Raises CheckpointError."""
    dtype = getattr(torch, config.base_dtype)
    for name, tensor in tensors_of(folder / "transformer"):
        yield name, merged_weight(name, tensor.to(dtype if tensor.is_floating_point() else tensor.dtype), adapter, config.lora)


def save_policy(
    folder: Path,
    source: Path,
    state: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    extra: Mapping[str, bytes] | None = None,
    earlier: Path | None = None,
) -> None:
    """Write the network's tensors as a policy folder, which opens as whatever `source` opens as; visible only when complete (rename).

    Args:
        source: the policy that training started from. What training never changes (`diffusion.source.belongs`) is copied from it.
        extra: other files, by name.
        earlier: an export of the same source, written by this function, whose frozen weights are linked instead of copied again.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "transformer").mkdir(parents=True)
    frozen = [source / INDEX, source / "transformer" / "config.json"]
    frozen += [path for name in sorted(_components(source) - {"transformer"}) for path in sorted((source / name).iterdir())]
    for path in frozen:
        name = path.relative_to(source)
        if path.exists() and belongs(name.as_posix()):
            _place(path, partial / name, earlier / name if earlier is not None else None)
    write_weights(partial / "transformer", state.items() if isinstance(state, Mapping) else state)
    for extra_name, content in (extra or {}).items():
        (partial / extra_name).write_bytes(content)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
