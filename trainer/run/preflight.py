"""What can be known about a run before anything starts: its files, from the recipe alone.

`check_files` needs no torch as long as prompts and anchor data are drawn, not read, so that `ddrl config` stays quick; `check_policy`
builds the policy. What they refuse is a mistake in the recipe (exit status 2) and costs a run neither its name nor its folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion.source import CheckpointError, is_hub_id, locate
from trainer.config.errors import ConfigError
from trainer.config.run import RunConfig

if TYPE_CHECKING:
    from actors.sources.prepared import PreparedSource
    from diffusion.checkpoint import Skeleton

DRAWN = ("glyph", "glyph_video")
"""Kinds of sources that read no file and have every split."""
TEXTS_READ = 5000
"""Texts that the policy's encoder is tried on at start."""
SCENES_READ = 200
"""Of scenes, which have no end."""


def check_files(config: RunConfig) -> None:
    """Raise ConfigError, naming key and file, when the run would fail for what a file holds or lacks. Of a hub id, what the cache has
    is looked at; `absolute` downloads the rest."""
    folder = _policy_folder(config.model.path, config.model.revision)
    if folder is not None:
        _check_model(folder, config.model.init)
        _check_size(folder, config)
    _check_prompts(config)
    if config.data.kind not in DRAWN:
        _check_data(config, folder)


def check_policy(config: RunConfig) -> None:
    """Build the policy without its weights, whose headers are read, fit the size to it and let its tokenizers read the prompts. Raises ConfigError."""
    from diffusion.checkpoint import check_network, load_signature, open_policy
    from diffusion.families.conditioning import collisions
    from diffusion.processes.flow_time import check_velocity
    from diffusion.ulysses import check_heads

    try:
        policy = open_policy(config.model)
        check_network(policy.transformer, config.model)
        signature = load_signature(policy.source.folder, config.model)
        shape = policy.codec.latent_shape(config.sampler.height, config.sampler.width, config.sampler.frames)
        policy.transformer.tokens(shape)
        for given in config.sampler.given_choices:
            policy.transformer.free_shape(shape, given)
            _check_given(config, policy, given)
    except (CheckpointError, ValueError) as error:  # ValueError: a size that the policy cannot sample
        raise ConfigError(f"model: {error}") from None
    o = config.objective
    flows = [f"{key}=cosmos" for key in ("data_weighting", "data_times") if config.uses_data and getattr(o, key) == "cosmos"]
    flows += [f"awm_weighting={o.awm_weighting}"] * (o.on_samples and o.policy_loss == "awm" and o.awm_weighting != "uniform")
    for key in flows:
        try:
            check_velocity(policy.process, f"objective.{key}")
        except ValueError as error:
            raise ConfigError(str(error)) from None
    for part, count in (("learner", config.learner.sequence_ranks), ("rollout", config.rollout.sequence_ranks)):
        try:
            check_heads(policy.transformer.config.num_attention_heads, count)
        except ValueError as error:
            raise ConfigError(f"{part}.sequence_ranks: {error}") from None
    try:
        same = collisions(signature, _texts(config))
    except ValueError as error:
        raise ConfigError(f"prompts: {error}") from None
    if same:
        raise ConfigError(
            f"prompts: {' and '.join(map(repr, same[0][:2]))} are the same to the text encoder of {config.model.path} ({len(same)} such groups), so no policy "
            "can tell them apart; use an encoder with more bins (docs/own.md), or other texts"
        )


def _check_given(config: RunConfig, policy: Skeleton, given: int) -> None:
    """Examples must have the frames that they are to give. Raises SourceError, a ValueError."""
    from actors.conditioning import first_frames
    from actors.sources.draws import data_source, held_out_examples, prompt_source, training_example

    if not given:
        return
    sources = {prompt_source(config.prompts, config.data), *([data_source(config.data)] if config.uses_data else [])}
    for source in sources:
        for example in (training_example(source, config.seed, 0), *held_out_examples(source, "test", 1)):
            if example.latent is None or policy.transformer.needs_picture:
                first_frames(example, policy.codec.pixel_frames(given), config.sampler.height, config.sampler.width)


def _texts(config: RunConfig) -> list[str]:
    """Texts that the policy is given, at most `TEXTS_READ`: all that are listed, a few of scenes; none of the glyph world's own."""
    from actors.sources.draws import data_source, held_out_examples, listed, prompt_source
    from actors.sources.ocr_scenes import OCRScenesSource

    found: dict[str, None] = {}
    for source in (prompt_source(config.prompts, config.data), data_source(config.data)):
        examples = held_out_examples(source, "test", SCENES_READ) if isinstance(source, OCRScenesSource) else listed(source) or ()
        found |= dict.fromkeys(example.text for example in examples[:TEXTS_READ])
    return list(found)[:TEXTS_READ]


def _policy_folder(path: str, revision: str | None) -> Path | None:
    """The policy's files, None for those of a hub id that are not here yet. Raises ConfigError."""
    try:
        return locate(path, revision, download=False).folder
    except CheckpointError as error:
        if is_hub_id(path):
            return None
        raise ConfigError(f"model.path: {error}") from None


def _check_model(folder: Path, init: bool) -> None:
    for name in ("transformer/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"):
        if not isinstance(_json(folder / name), dict):
            raise ConfigError(f"model.path: {folder / name} is missing or no JSON object; give a folder in diffusers' layout")
    if not init and not list((folder / "transformer").glob("diffusion_pytorch_model*.safetensors")):
        raise ConfigError(f"model.path: {folder / 'transformer'} holds no weights; set model.init=true to start from random ones")


def _check_size(folder: Path, config: RunConfig) -> None:
    """Pictures must fit the patches and the position table, where the network's configuration names them."""
    network, codec = _json(folder / "transformer" / "config.json"), _json(folder / "vae" / "config.json")
    scale = 2 ** (len(codec["block_out_channels"]) - 1) if isinstance(codec, dict) and "block_out_channels" in codec else 1
    patch, table = network.get("patch_size"), network.get("pos_embed_max_size")
    if not isinstance(patch, int):
        return
    height, width = config.sampler.height, config.sampler.width
    if height % (scale * patch) or width % (scale * patch):
        raise ConfigError(f"sampler: {height}x{width} pixels are no multiple of {scale * patch}, the side of a patch of {folder}")
    rows, columns = height // (scale * patch), width // (scale * patch)
    if isinstance(table, int) and max(rows, columns) > table:
        raise ConfigError(f"sampler: {rows}x{columns} patches exceed pos_embed_max_size={table} of {folder}; sample a smaller size")


def _check_prompts(config: RunConfig) -> None:
    from actors.sources.draws import held_out_prompts, prompt_source, training_example

    try:
        source = prompt_source(config.prompts, config.data)
        if config.uses_policy:
            training_example(source, config.seed, 0)
        held_out_prompts(source, "test", config.evaluation.test_prompts)
        if config.evaluation.every:
            held_out_prompts(source, "dev", config.evaluation.dev_prompts)
    except ValueError as error:
        raise ConfigError(f"prompts: {error}") from None


def _check_data(config: RunConfig, folder: Path | None) -> None:
    from actors.sources.draws import data_source, held_out_rows, pixels_of, training_rows
    from actors.sources.prepared import PreparedSource
    from diffusion.checkpoint import samples_clips

    size = config.sampler.height, config.sampler.width
    clips = samples_clips(folder) if folder is not None else config.sampler.frames > 1
    frames = config.sampler.frames if clips else None
    try:
        source = data_source(config.data)
        if isinstance(source, PreparedSource) and folder is not None:
            _check_prepared(source, folder, config)
        rows = training_rows(source, 0.0, config.seed, 0, 1) if config.uses_data else []
        for split in ["test"] + ["dev"] * (config.evaluation.every > 0):
            rows += held_out_rows(source, split, 1)
        for _, example in rows:
            _ = example.latent.load() if example.latent else pixels_of([example], *size, frames)
    except ValueError as error:
        raise ConfigError(f"data: {error}") from None
    if config.data.kind == "prepared":
        return
    root = Path(str(config.data.path))
    names = [json.loads(line)["file_name"] for line in (root / "metadata.jsonl").read_text().splitlines() if line.strip()]
    absent = [name for name in names if not (root / name).is_file()]
    if absent:
        raise ConfigError(f"data: {len(absent)} of {len(names)} pictures of {root / 'metadata.jsonl'} do not exist; the first: {absent[0]}")


def _check_prepared(source: PreparedSource, folder: Path, config: RunConfig) -> None:
    """A prepared set must be of the codec of the policy in `folder` and of the run's size, and whole. Raises ValueError, ConfigError."""
    from actors.prepared import shard_file
    from diffusion.checkpoint import samples_clips
    from diffusion.digests import codec_digest

    there, model, size = source.manifest, config.model.path, (config.sampler.height, config.sampler.width)
    try:
        codec = codec_digest(folder)
    except (CheckpointError, OSError, ValueError) as error:
        raise ConfigError(f"model.path: the codec of {model} cannot be read: {error}") from None
    if there.codec != codec:
        raise ValueError(
            f"the latents of {source.folder} were made by another codec ({there.codec}, of {there.model}) than the one of {model} ({codec}), "
            f"which would read them as other pictures; prepare the data with --model {model}"
        )
    if (there.height, there.width) != size:
        raise ValueError(
            f"{source.folder} was prepared at {there.height}x{there.width} pixels and the run samples {size[0]}x{size[1]}; "
            "set sampler.height and sampler.width, or prepare the data at that --size"
        )
    clips = (config.sampler.frames, config.sampler.fps) if samples_clips(folder) else (None, None)
    if (there.frames, there.fps) != clips:
        wanted = "pictures" if clips == (None, None) else f"clips of {clips[0]} frames at {clips[1]:g} a second"
        raise ValueError(
            f"{source.folder} was prepared as {there.kind} and the run samples {wanted}; "
            "set sampler.frames and sampler.fps, or prepare the data with those --frames and --fps"
        )
    absent = [number for number in range(there.shards) if not shard_file(source.folder, number).is_file()]
    if absent:
        raise ValueError(f"{len(absent)} of {there.shards} shards of {source.folder} are gone, the first: {shard_file(source.folder, absent[0]).name}")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def absolute(config: RunConfig) -> RunConfig:
    """Paths of the configuration made absolute, because actors and ranks run in other folders; a hub id is downloaded, and stays one,
    with the commit found as its revision. Raises ConfigError."""

    def path(value: str | None) -> str | None:
        return str(Path(value).resolve()) if value else value

    model = config.model
    if is_hub_id(model.path):
        try:
            update = {"revision": locate(model.path, model.revision).revision}
        except CheckpointError as error:
            raise ConfigError(f"model: {error}") from None
    else:
        update = {"path": path(model.path)}
    return config.model_copy(
        update={
            "model": model.model_copy(update=update),
            "prompts": config.prompts.model_copy(update={"path": path(config.prompts.path)}),
            "data": config.data.model_copy(update={"path": path(config.data.path)}),
            "weights": config.weights.model_copy(update={"path": path(config.weights.path)}),
            "replay": config.replay if config.replay.payloads == "redis" else config.replay.model_copy(update={"payloads": path(config.replay.payloads)}),
        }
    )
