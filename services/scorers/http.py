"""A reward that another service computes, behind the same contract as ours: batches go out over REST, scores come back.

Lifecycle: ask the service what the reward is and score one blank item → score for ever. Invariants: numbers come from the
revision that was found at the start, any other is a failure; a request that the service refuses is cut in two until only
the items it means are refused; everything ends before the deadline of the requests that wait for it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from services.client.base import RewardError, RewardUnavailable
from services.client.rest import RestRewardClient
from services.client.retry import Backoff
from services.client.wire import Keys
from services.contract import FrameSpec, ItemScore, ScoreFailure
from services.media.base import Media
from services.scorers.base import Scorer, ScorerUnfit
from services.scorers.settings import HttpReward

logger = logging.getLogger(__name__)

REMOTE_UNAVAILABLE = "remote_unavailable"
REMOTE_REFUSED = "remote_refused"
REVISION_CHANGED = "revision_changed"
MARGIN = 0.9  # of the deadline is the other service's; the rest is for the way back
# What a service may say about a request because of one of its items.
_PERHAPS_ONE_ITEM = (400, 413, 415, 422)


class HttpScorer(Scorer):
    """A remote reward."""

    name = "http"

    def __init__(self, config: HttpReward) -> None:
        self._config = config
        key = None if config.api_key_env is None else os.environ.get(config.api_key_env)
        if config.api_key_env is not None and not key:
            raise RewardError(f"api_key_env names {config.api_key_env}, which is not set")
        self._client = RestRewardClient(config.url, api_key=key, check_timeout_s=config.timeout_s, keys=Keys("url", "api_key_env", "timeout_s"))
        try:
            self._info = self._client.check([config.model])[config.model]
        except RewardUnavailable as error:
            raise ScorerUnfit(str(error)) from error
        self.media = tuple(self._info.media)
        self.reward, self.sub_scores, self.needs_prompt = self._info.reward, tuple(self._info.sub_scores), self._info.needs_prompt

    @property
    def revision(self) -> str:
        return f"http-1;{self._info.revision}"

    @property
    def preprocessing(self) -> str:
        return self._info.preprocessing

    @property
    def frame_spec(self) -> FrameSpec:
        return self._info.frame_spec

    def score(self, prompts: Sequence[str], media: Sequence[Media]) -> list[ItemScore | ScoreFailure]:
        """See ``Scorer.score``. Failures: ``remote_unavailable``, ``remote_refused``, ``revision_changed``, and the service's own."""
        return self._ask(prompts, media, Backoff(self._config.timeout_s * MARGIN)) if media else []

    def self_test(self) -> None:
        """One blank item gets a score."""
        try:
            found = self._client.check([self._config.model])[self._config.model]
        except RewardUnavailable as error:
            raise ScorerUnfit(str(error)) from error
        if found.revision != self._info.revision:
            raise ScorerUnfit(f"{self._config.url} changed from revision {self._info.revision} to {found.revision}")

    def _ask(self, prompts: Sequence[str], media: Sequence[Media], clock: Backoff) -> list[ItemScore | ScoreFailure]:
        model = self._config.model
        try:
            answer = self._client.score_many([model], prompts, media, max(0.001, clock.remaining()))
        except RewardUnavailable as error:
            if error.status in _PERHAPS_ONE_ITEM and len(media) > 1:
                half = len(media) // 2
                return self._ask(prompts[:half], media[:half], clock) + self._ask(prompts[half:], media[half:], clock)
            logger.warning("the remote reward failed: %s", error)
            return [_failure(error)] * len(media)
        if answer.revisions[model] != self._info.revision:
            logger.error("%s changed from revision %s to %s; restart this reward", self._config.url, self._info.revision, answer.revisions[model])
            return [ScoreFailure(REVISION_CHANGED, "the remote reward is another revision than the one announced")] * len(media)
        return answer.results[model]


def _failure(error: RewardUnavailable) -> ScoreFailure:
    """Callers learn the status; where the other service is stays in the log."""
    if error.status is not None and 400 <= error.status < 500 and error.status not in (408, 409, 429):
        return ScoreFailure(REMOTE_REFUSED, f"the remote reward refused the request (HTTP {error.status})")
    what = "did not answer in time" if error.status is None else f"failed (HTTP {error.status})"
    return ScoreFailure(REMOTE_UNAVAILABLE, f"the remote reward {what}", retryable=True)
