"""Which scorers this fleet can start: ``kind`` of a rewards entry → settings class and scorer class.

A kind is a name of ``BUILT_IN`` or ``module:Class`` of somebody's own ``Scorer`` subclass, whose settings class is its
attribute ``Settings`` (plain ``RewardSettings`` unless it has one). Both are imported at use: a process pays only for the
engine it runs, and reading a configuration imports no engine. The names come from the operator's file, never from a
request.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from services.scorers.base import Scorer
    from services.scorers.settings import RewardSettings


@dataclass(frozen=True)
class Kind:
    """Where a built-in kind lives, as ``module:Class``."""

    settings: str
    scorer: str


BUILT_IN = {
    "ocr": Kind("services.scorers.settings:OcrReward", "services.scorers.ocr:OcrScorer"),
    "jpeg": Kind("services.scorers.settings:JpegReward", "services.scorers.jpeg:JpegScorer"),
    "scene": Kind("services.scorers.settings:SceneReward", "services.scorers.scene:SceneScorer"),
    "motion": Kind("services.scorers.settings:MotionReward", "services.scorers.motion:MotionScorer"),
    "clipscore": Kind("services.scorers.settings:ClipScoreReward", "services.scorers.clip.scorers:ClipScorer"),
    "pickscore": Kind("services.scorers.settings:PickScoreReward", "services.scorers.clip.scorers:PickScorer"),
    "hpsv2": Kind("services.scorers.settings:Hpsv2Reward", "services.scorers.clip.scorers:Hpsv2Scorer"),
    "aesthetic": Kind("services.scorers.settings:AestheticReward", "services.scorers.clip.aesthetic:AestheticScorer"),
    "imagereward": Kind("services.scorers.settings:ImageRewardReward", "services.scorers.clip.imagereward:ImageRewardScorer"),
    "http": Kind("services.scorers.settings:HttpReward", "services.scorers.http:HttpScorer"),
    "videoalign": Kind("services.scorers.videoalign.config:VideoAlignConfig", "services.scorers.videoalign.scorer:VideoAlignScorer"),
}


class UnknownKind(ValueError):
    """No scorer goes by this kind, or what it names is not one."""


def parse_reward(entry: Mapping[str, Any]) -> RewardSettings:
    """Settings from one entry of ``rewards:``.

    Raises ``UnknownKind``, or pydantic's ``ValidationError`` for fields that the kind does not have or allow.
    """
    kind = entry.get("kind")
    if not isinstance(kind, str):
        raise UnknownKind(f"a reward needs a kind: one of {', '.join(BUILT_IN)}, or module:Class of your own")
    return settings_class(kind).model_validate(dict(entry))


def settings_class(kind: str) -> type[RewardSettings]:
    """The settings class of ``kind``. Raises ``UnknownKind``."""
    from services.scorers.settings import RewardSettings

    found = _load(BUILT_IN[kind].settings) if kind in BUILT_IN else getattr(_own(kind), "Settings", RewardSettings)
    if not (isinstance(found, type) and issubclass(found, RewardSettings)):
        raise UnknownKind(f"the Settings of {kind!r} must inherit services.scorers.settings.RewardSettings")
    return found


def scorer_class(kind: str) -> type[Scorer]:
    """The scorer class of ``kind``; imports its engine. Raises ``UnknownKind``, ``ModuleNotFoundError`` with advice."""
    if kind not in BUILT_IN:
        own: type[Scorer] = _own(kind)
        return own
    try:
        found: type[Scorer] = _load(BUILT_IN[kind].scorer)
    except ModuleNotFoundError as error:
        if error.name not in ("transformers", "tokenizers"):
            raise
        raise ModuleNotFoundError(f"the reward {kind!r} needs {error.name}: pip install 'ddrl[models]'", name=error.name) from error
    return found


def build_scorer(settings: RewardSettings) -> Scorer:
    """Load the scorer of ``settings``: its class, called with them."""
    make: Any = scorer_class(settings.kind)
    scorer: Scorer = make(settings)
    return scorer


def _own(kind: str) -> Any:
    """A user's scorer class."""
    from services.scorers.base import Scorer

    if ":" not in kind:
        raise UnknownKind(f"unknown kind {kind!r}: one of {', '.join(BUILT_IN)}, or module:Class of your own")
    try:
        found = _load(kind)
    except (ImportError, AttributeError) as error:
        raise UnknownKind(f"kind {kind!r} cannot be loaded: {error}; is its folder on PYTHONPATH?") from error
    if not (isinstance(found, type) and issubclass(found, Scorer)):
        raise UnknownKind(f"kind {kind!r} is not a subclass of services.scorers.base.Scorer")
    return found


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
