"""`--tiny`: a recipe as it is, with sizes and weights swapped for ones that two cores run in minutes.

    recipe ─► sizes (`trainer.config.tiny`) ─► policy ─► anchor data ─► rewards' models ─► what the command line sets

Weights are random and written here, nothing is downloaded. What is written lies in a cache, each folder named by what it is made of, so
that a run that goes on finds the same files. Invariant: classes, layouts, tokenizer types and kinds are those of the recipe.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config.errors import ConfigError
from trainer.config.load import all_keys, load_config
from trainer.config.run import RunConfig
from trainer.config.tiny import shrunk, value_at

if TYPE_CHECKING:
    from actors.sources.example import Example

ANCHORS = {"train": 16, "dev": 4, "test": 8}
"""Prompts of each split that anchor data is drawn for, one sample each."""
TOWERS = ("clipscore", "pickscore")
"""Kinds of rewards that get a tiny model."""


@dataclass(frozen=True)
class Tiny:
    """A recipe made tiny.

    Attributes:
        config: its settings.
        changes: what differs from the recipe: dotted key, value before, value now.
    """

    config: RunConfig
    changes: tuple[tuple[str, Any, Any], ...]

    def table(self) -> list[str]:
        """The changes in lines of text, with what a tiny run cannot show."""
        wide = max((len(key) for key, _, _ in self.changes), default=0)
        lines = ["tiny: sizes and weights are swapped, all else is the recipe's"]
        lines += [f"  {key:<{wide}}  {_shown(before)} → {_shown(now)}" for key, before, now in self.changes]
        if any(key == "model.path" for key, _, _ in self.changes):
            height, width = self.config.sampler.height, self.config.sampler.width
            told = f"random weights draw noise of {height} x {width} pixels: rewards say nothing, and where all of a group agree nothing is learnt from it"
            lines.append(f"  ({told})")
        return lines


def tiny_config(recipe: Path, overrides: list[str], folder: Path | None = None, data: bool = True) -> Tiny:
    """Read a recipe, make it tiny, apply overrides, which win.

    Args:
        folder: the run's folder, for its payloads; None = runs/NAME.
        data: draw the anchor data, where the recipe has a prepared set; False leaves the key as it is.

    Raises:
        ConfigError: the recipe, or what it names, cannot be read.
    """
    full, fixed = load_config(recipe, overrides), {item.partition("=")[0] for item in overrides}
    low: dict[str, Any] = shrunk(full, fixed)
    if "name" not in fixed:
        low["name"] = f"{full.name}-tiny"
    policy = None if {"model.path", "model"} & fixed else _policy(full.model.path, full.model.revision)
    if policy is not None:
        low |= {"model.path": str(policy), "model.revision": None, "model.init": False}
    if full.replay.payloads != "redis":
        low["replay.payloads"] = str((folder or Path("runs") / low.get("name", full.name)).resolve() / "payloads")
    for name, reward in full.fleet.rewards.items():
        if reward.kind in TOWERS:
            low |= {f"fleet.rewards.{name}.path": str(_tower()), f"fleet.rewards.{name}.processor": None}
    config = _applied(recipe, low, overrides)
    fits = policy is None and _size(config) == _size(full) and Path(str(full.data.path)).is_dir()
    if data and full.data.kind == "prepared" and not fits and not {"data.path", "data"} & fixed:
        low["data.path"] = str(_anchors(config))
        config = _applied(recipe, low, overrides)
    found = [(key, _plain(value_at(full, key)), _plain(value_at(config, key))) for key in sorted(low, key=_place)]
    return Tiny(config, tuple(change for change in found if change[1] != change[2] and change[2] == low[change[0]]))


def _place(key: str) -> int:
    """Keys in the order of the tree, those of single rewards last."""
    return all_keys().index(key) if key in all_keys() else len(all_keys())


def _size(config: RunConfig) -> tuple[int, int, int, float]:
    return config.sampler.height, config.sampler.width, config.sampler.frames, config.sampler.fps


def _applied(recipe: Path, low: dict[str, Any], overrides: list[str]) -> RunConfig:
    return load_config(recipe, [f"{key}={json.dumps(value)}" for key, value in low.items()] + overrides)


def _plain(value: Any) -> Any:
    """A setting as YAML has it."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    return str(value) if isinstance(value, Path) else value


def _shown(value: Any) -> str:
    """A value in few words: paths by their end, lists as YAML writes them."""
    text = json.dumps(value) if not isinstance(value, str) else value
    return f"…/{Path(text).name}" if text.startswith("/") and len(text) > 40 else text


def cache_folder() -> Path:
    """Where tiny weights and data are kept: `$XDG_CACHE_HOME/ddrl/tiny`, `~/.cache/ddrl/tiny` without it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddrl" / "tiny"


def _cached(name: str, made_of: object, write: Callable[[Path], object]) -> Path:
    """The folder `name-DIGEST` of the cache, written if it is not there; it appears whole. Raises ConfigError where it cannot be written."""
    folder = cache_folder() / f"{name}-{hashlib.blake2b(json.dumps(made_of).encode(), digest_size=6).hexdigest()}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
        _quiet()
        try:
            write(partial)
            if not folder.is_dir():  # another process may have been quicker
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise ConfigError(f"--tiny writes to {folder.parent}, and cannot: {error.strerror or error}; set XDG_CACHE_HOME to a folder of yours") from None
    return folder


def _quiet() -> None:
    """What transformers and xformers tell of parts that no tiny weights need is not said."""
    import logging

    logging.getLogger("xformers").setLevel(logging.ERROR)
    from transformers.utils import logging as told

    quiet: Any = told
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()


def _libraries() -> list[str]:
    """What writes the weights, with versions. Raises ConfigError."""
    try:
        return [f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers")]
    except PackageNotFoundError as error:
        raise ConfigError(f"--tiny needs {error.name} to write such weights: pip install 'ddrl[models]'") from None


def _policy(path: str, revision: str | None) -> Path | None:
    """The tiny policy of the kind of `path`; None for one that is small itself. Raises ConfigError."""
    from diffusion.families import registry
    from diffusion.families.sd3 import tiny
    from diffusion.source import CheckpointError, is_hub_id, locate
    from trainer.plan.sizes import class_of, read_parts

    if is_hub_id(path):
        with suppress(CheckpointError):  # not in the cache: a published one is known by its name
            path = str(locate(path, revision, download=False).folder)
    parts, _ = read_parts(path)
    write = registry.TINY.get(class_of(parts.get("text_encoder", {})))
    if write is None:
        return None
    network = {key: parts["transformer"].get(key) for key in ("_class_name", "qk_norm", "dual_attention_layers")}
    try:
        return _cached("policy", [network, sorted(parts), Path(tiny.__file__).read_text(), _libraries()], lambda folder: write(folder, parts))
    except ValueError as error:
        raise ConfigError(f"--tiny: model.path: {path}: {error}") from None


def _tower() -> Path:
    """A tiny CLIP folder."""
    from services.scorers.clip import tiny

    return _cached("clip", [Path(tiny.__file__).read_text(), _libraries()], tiny.write_clip)


def _anchors(config: RunConfig) -> Path:
    """A prepared set of a few samples of the tiny policy, as `ddrl presample` draws them. Raises ConfigError."""
    from actors.preparing.presampling import Presampling, PresamplingFailed, presample
    from diffusion.checkpoint import load_policy
    from diffusion.digests import codec_digest, network_digest
    from diffusion.engine.engine import StepFailed
    from diffusion.engine.request import SamplingFailed
    from diffusion.source import CheckpointError, locate

    examples, s = _examples(config), config.sampler
    clips = [s.frames, s.fps] if s.frames > 1 else []
    drawn = [
        s.height,
        s.width,
        s.eval_steps,
        s.guidance,
        s.negative_prompt,
        config.model.model_dump(mode="json", exclude={"path", "revision"}),
        _libraries(),
        *clips,
    ]

    def draw(folder: Path) -> None:
        job = Presampling(folder, config.model, s, examples, 1, len(examples), s.eval_steps, s.guidance)
        presample(job, load_policy(config.model, seed=config.seed))

    try:
        policy = locate(config.model.path, config.model.revision).folder
        made_of = [network_digest(policy), codec_digest(policy), [(example.id, example.text) for example in examples], drawn]
        return _cached("anchors", made_of, draw)
    except (CheckpointError, ValueError, SamplingFailed, StepFailed, PresamplingFailed) as error:
        raise ConfigError(f"--tiny: the anchor data cannot be drawn: {error}") from None


def _examples(config: RunConfig) -> list[Example]:
    """Some of the recipe's prompts of every split; of scenes where its prompts are the captions of a set that is not here. Raises ConfigError."""
    from actors.sources.draws import held_out_examples, prompt_source
    from actors.sources.example import SourceError
    from actors.sources.ocr_scenes import OCRScenesSource

    try:
        source = OCRScenesSource() if config.prompts.kind == "data" and not Path(str(config.data.path)).is_dir() else prompt_source(config.prompts, config.data)
        return [example for split, n in ANCHORS.items() for example in held_out_examples(source, split, n)]
    except SourceError as error:
        raise ConfigError(f"--tiny: prompts: {error}") from None
