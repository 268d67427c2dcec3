"""A REST client's calls without its sockets: each is a generator of requests, and ``rest`` and ``aio`` send them.

Lifecycle of a call: the generator yields a list of ``Ask`` → the client sends them (one after the other, or side by side), repeating
what repeating can help, under the call's one deadline → it sends the answers in → the next list, or the result. Invariant: what is
asked and how answers are read stands here once.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import httpx

from services.client import wire
from services.client.base import UNAVAILABLE, Batch, as_media, probe
from services.client.wire import Keys, MultiScores, Part, Settings
from services.contract import ItemScore, ModelInfo, ScoreFailure
from services.media.base import Media
from services.media.frames import reduced
from services.rest.schemas import Combine, MultiScoreResponse, ScoreOptions

T = TypeVar("T")
# Codes by which the service says that a reward failed as a whole, whatever the item.
_WHOLE = ("queue_full", "overloaded", "scorer_unavailable", "deadline_exceeded")


@dataclass(frozen=True)
class Ask:
    """One request."""

    verb: str
    path: str
    part: Part | None = None


Steps = Generator[list[Ask], list[httpx.Response], T]


class Session:
    """What a client knows of the service at ``url``."""

    def __init__(self, url: str, settings: Settings, keys: Keys) -> None:
        self.url, self.settings, self.keys = url.rstrip("/"), settings, keys
        self._models: dict[str, ModelInfo] = {}

    def models(self) -> Steps[dict[str, ModelInfo]]:
        """What the service offers, by name."""
        (answer,) = yield [Ask("GET", "/v1/models")]
        self._models = wire.read_models(self.url, answer, self.keys)
        return self._models

    def info(self, names: Sequence[str]) -> Steps[dict[str, ModelInfo]]:
        """See ``RewardClient.info``."""
        found = yield from self.models()
        return {name: wire.named(self.url, found, name) for name in names}

    def check(self, names: Sequence[str]) -> Steps[dict[str, ModelInfo]]:
        """See ``RewardClient.check``."""
        infos = yield from self.info(names)
        for name, info in infos.items():
            (result,) = yield from self.one(name, *probe(info))
            if isinstance(result, ScoreFailure):
                raise wire.unavailable(self.url, f"the test item of {name} failed ({result.code}): {result.message}", 200, self.keys)
        return infos

    def one(self, name: str, prompts: Sequence[str], media: Batch, fps: float | None = None) -> Steps[list[ItemScore | ScoreFailure]]:
        """One reward, in the form that the smallest service understands (field ``model``)."""
        items = yield from self._reduced([name], as_media(prompts, media, fps))
        parts = wire.parts(ScoreOptions(model=name), prompts, items, self.settings)
        answers = yield [Ask("POST", "/v1/score", part) for part in parts]
        return [r for part, answer in zip(parts, answers, strict=True) for r in wire.read_scores(self.url, answer, part.count, self.keys)]

    def many(
        self, rewards: Sequence[str], prompts: Sequence[str], media: Batch, fps: float | None = None, combine: Combine | None = None
    ) -> Steps[MultiScores]:
        """Several rewards at once, and with ``combine`` one total per item."""
        items = yield from self._reduced(rewards, as_media(prompts, media, fps))
        parts = wire.parts(wire.options_for(rewards, combine), prompts, items, self.settings)
        answers = yield [Ask("POST", "/v1/score", part) for part in parts]
        read = [wire.read_multi(self.url, answer, part.count, self.keys) for part, answer in zip(parts, answers, strict=True)]
        return wire.joined(read) if read else MultiScores({name: [] for name in rewards}, None if combine is None else [])

    def all(self, names: Sequence[str], prompts: Sequence[str], media: Batch, fps: float | None = None) -> Steps[dict[str, list[ItemScore | ScoreFailure]]]:
        """See ``RewardClient.score_all``."""
        if len(names) == 1:
            return {names[0]: (yield from self.one(names[0], prompts, media, fps))}
        found = yield from self.many(names, prompts, media, fps)
        results = {name: [_whole(name, result) for result in found.results[name]] for name in names}
        if prompts and all(isinstance(r, ScoreFailure) and r.code == UNAVAILABLE for each in results.values() for r in each):
            first = next(r for each in results.values() for r in each if isinstance(r, ScoreFailure))
            raise wire.unavailable(self.url, first.message, 503, self.keys)
        return results

    def files(self, rewards: Sequence[str], prompts: Sequence[str], files: Sequence[tuple[str, bytes]]) -> Steps[MultiScoreResponse]:
        """Files, (name, bytes) each, as they are; one prompt per file."""
        (answer,) = yield [Ask("POST", "/v1/score", wire.file_part(rewards, prompts, files))]
        return wire.read_answer(self.url, answer, self.keys)

    def _reduced(self, rewards: Sequence[str], items: list[Media]) -> Steps[list[Media]]:
        """Of clips only the frames that the rewards look at, where they agree on them."""
        if not any(item.is_video and not item.selected for item in items):
            return items
        if any(name not in self._models for name in rewards):
            yield from self.models()
        return reduced(items, [wire.named(self.url, self._models, name).frame_spec for name in rewards])


def _whole(name: str, result: ItemScore | ScoreFailure) -> ItemScore | ScoreFailure:
    if isinstance(result, ScoreFailure) and result.code in _WHOLE:
        return ScoreFailure(UNAVAILABLE, f"{name} gave no scores ({result.code}: {result.message})", retryable=True)
    return result
