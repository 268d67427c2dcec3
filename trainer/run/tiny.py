"""`--tiny`: a recipe as it is, with sizes and weights swapped for ones that two cores run in minutes.

    recipe ─► sizes (`trainer.config.tiny`) ─► policy ─► anchor data ─► rewards' models ─► what the command line sets

Weights are random and written here, nothing is downloaded. What is written lies in a cache, each folder named by what it is made of, so
that a run that goes on finds the same files. Invariant: classes, layouts, tokenizer types and kinds are those of the recipe.
"""

from __future__ import annotations

import inspect
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.errors import ConfigError
from trainer.config.load import all_keys, load_config
from trainer.config.run import RunConfig
from trainer.config.tiny import shrunk, value_at
from trainer.run import tiny_anchors
from trainer.run.tiny_cache import cached, libraries


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
            s = self.config.sampler
            size = f"{s.height} x {s.width} pixels" + (f" in {s.frames} frames" if s.frames > 1 else "")
            told = f"random weights draw noise of {size}: rewards say nothing, and where all of a group agree nothing is learnt from it"
            lines.append(f"  ({told})")
        return lines


def tiny_config(recipe: Path, overrides: list[str], folder: Path | None = None, data: bool = True) -> Tiny:
    """Read a recipe, make it tiny, apply overrides, which win.

    Args:
        folder: the run's folder, for its payloads; None = runs/NAME.
        data: make the anchor data, where the recipe has a prepared set, or a folder that is not here; False leaves the key as it is.

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
        low |= {f"fleet.rewards.{name}.{key}": value for key, value in _reward(reward.kind).items()}
    config = _applied(recipe, low, overrides)
    if data and not {"data.path", "data"} & fixed:
        here = Path(str(full.data.path)).is_dir()
        if full.data.kind == "prepared" and not (here and policy is None and _size(config) == _size(full)):
            low["data.path"] = str(tiny_anchors.drawn(config))
        elif full.data.kind == "folder" and not here:
            low["data.path"] = str(tiny_anchors.rendered(config))
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


def _policy(path: str, revision: str | None) -> Path | None:
    """The tiny policy of the kind of `path`; None for one that is small itself. Raises ConfigError."""
    from diffusion.families import registry
    from diffusion.source import CheckpointError, is_hub_id, locate
    from trainer.plan.sizes import class_of, read_parts

    if is_hub_id(path):
        with suppress(CheckpointError):  # not in the cache: a published one is known by its name
            path = str(locate(path, revision, download=False).folder)
    parts, _ = read_parts(path)
    write = registry.TINY.get(class_of(parts.get("text_encoder", {})))
    if write is None:
        return None
    try:
        made_of = [parts["transformer"], parts.get("vae"), sorted(parts), Path(inspect.getfile(write)).read_text(), libraries()]
        return cached("policy", made_of, lambda folder: write(folder, parts))
    except ValueError as error:
        raise ConfigError(f"--tiny: model.path: {path}: {error}") from None


def _reward(kind: str) -> dict[str, Any]:
    """Settings of a reward's kind that name a tiny model; none of kinds that need no model, or whose files have to be there."""
    if kind in ("clipscore", "pickscore"):
        from services.scorers.clip import tiny as towers

        path = cached("clip", [Path(towers.__file__).read_text(), libraries()], towers.write_clip)
        return {"path": str(path), "processor": None}
    if kind == "videoalign":
        from services.scorers.videoalign import tiny as judge

        return judge.reward_settings(cached("videoalign", [Path(judge.__file__).read_text(), libraries()], judge.write_reward))
    return {}
