"""Scoring inside the cluster: numpy arrays straight through the Serve handle, no image encoding, no HTTP.

A batch is cut into chunks that go out together, so several replicas share it. A chunk whose replica dies, or
that meets a full queue, is sent again; scoring has no side effects, so a repeat is harmless. All of it ends
at the deadline.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.client.base import UNAVAILABLE, Batch, RewardUnavailable, as_media, probe
from services.client.retry import Backoff
from services.contract import ItemScore, ModelInfo, ScoreFailure
from services.media.base import Media
from services.media.frames import reduced

APP_NAME = "rewards"


@dataclass(frozen=True)
class ScoreChunk:
    """Part of a request that travels to a replica: as many prompts as images or clips."""

    prompts: list[str]
    media: list[Media]

    def __len__(self) -> int:
        return len(self.prompts)


def replica_loss_errors() -> tuple[type[BaseException], ...]:
    """What a Serve call raises when the process that ran it, or its answer, is gone."""
    from ray import exceptions
    from ray.serve.exceptions import ReplicaUnavailableError

    return (
        exceptions.RayActorError,  # ActorDiedError and ActorUnavailableError are its children
        exceptions.WorkerCrashedError,
        exceptions.NodeDiedError,
        exceptions.ObjectLostError,
        ReplicaUnavailableError,
    )


@dataclass(frozen=True)
class _Call:
    """One call of a deployment's method."""

    reward: str
    method: str
    arguments: tuple[Any, ...] = ()


class HandleRewardClient:
    """Client for processes of the same Ray cluster. Call it from threads, not from a running event loop.

    ``limits_s``: seconds after which a reward is given up although the call's own deadline leaves more.
    """

    def __init__(self, app: str = APP_NAME, limits_s: Mapping[str, float] | None = None, chunk_items: int = 16, check_timeout_s: float = 30.0) -> None:
        self._app, self._limits_s = app, dict(limits_s or {})
        self._chunk_items, self._check_timeout_s = chunk_items, check_timeout_s
        self._handles: dict[str, Any] = {}
        self._infos: dict[str, ModelInfo] = {}

    def info(self, names: Sequence[str]) -> dict[str, ModelInfo]:
        """See ``RewardClient.info``."""
        answers, failed = self._run([_Call(name, "info") for name in names], self._check_timeout_s)
        if failed:
            raise next(iter(failed.values()))
        self._infos.update(zip(names, answers, strict=True))
        return {name: self._infos[name] for name in names}

    def check(self, names: Sequence[str]) -> dict[str, ModelInfo]:
        """See ``RewardClient.check``."""
        infos = self.info(names)
        for name, info in infos.items():
            result = self.score(name, *probe(info), self._check_timeout_s)[0]
            if isinstance(result, ScoreFailure):
                raise RewardUnavailable(self._where(name), f"the test item failed: {result.message}", "See the replica's log.")
        return infos

    def score(self, model: str, prompts: Sequence[str], media: Batch, timeout_s: float, fps: float | None = None) -> list[ItemScore | ScoreFailure]:
        """See ``RewardClient.score``."""
        return self.score_all([model], prompts, media, timeout_s, fps)[model]

    def score_all(
        self, names: Sequence[str], prompts: Sequence[str], media: Batch, timeout_s: float, fps: float | None = None
    ) -> dict[str, list[ItemScore | ScoreFailure]]:
        """See ``RewardClient.score_all``. Of a clip each reward gets only the frames that it looks at."""
        items, size = as_media(prompts, media, fps), self._chunk_items
        if any(item.is_video and not item.selected for item in items) and any(name not in self._infos for name in names):
            infos, _ = self._run([_Call(name, "info") for name in names], timeout_s)
            self._infos.update({name: info for name, info in zip(names, infos, strict=True) if info is not None})
        calls = []
        for name in names:
            seen = reduced(items, [self._infos[name].frame_spec]) if name in self._infos else items
            chunks = [ScoreChunk(list(prompts[s : s + size]), seen[s : s + size]) for s in range(0, len(items), size)]
            calls += [_Call(name, "score", (chunk,)) for chunk in chunks]
        answers, failed = self._run(calls, timeout_s)
        if failed and len(failed) == len(set(names)):
            raise next(iter(failed.values()))
        results: dict[str, list[ItemScore | ScoreFailure]] = {name: [] for name in names}
        for call, answer in zip(calls, answers, strict=True):
            results[call.reward] += answer or []
        return {name: [ScoreFailure(UNAVAILABLE, str(failed[name]), retryable=True)] * len(items) if name in failed else results[name] for name in names}

    def close(self) -> None:
        """Drop the handles; the fleet goes on."""
        self._handles.clear()

    def _where(self, reward: str) -> str:
        return f"serve://{self._app}/{reward}"

    def _run(self, calls: Sequence[_Call], timeout_s: float) -> tuple[list[Any], dict[str, RewardUnavailable]]:
        """All ``calls`` at once, until each has answered or its reward has failed: answers in order (None where there is none), failures."""
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

        lost = replica_loss_errors()
        limits = {call.reward: min(timeout_s, self._limits_s.get(call.reward, timeout_s)) for call in calls}
        backoffs = {reward: Backoff(limit) for reward, limit in limits.items()}
        answers: dict[int, Any] = {}
        failed: dict[str, RewardUnavailable] = {}
        trouble = dict.fromkeys(limits, "slow or not running")
        while True:
            sent = {}
            for i, call in enumerate(calls):
                if i not in answers and call.reward not in failed:
                    try:
                        sent[i] = getattr(self._handle(call.reward), call.method).remote(*call.arguments)
                    except (RayServeException, KeyError) as error:  # no such application, no such deployment of it
                        failed[call.reward] = RewardUnavailable(self._where(call.reward), str(error), "Start the fleet first.")
            for i, response in sent.items():
                reward = calls[i].reward
                try:
                    answers[i] = response.result(timeout_s=backoffs[reward].remaining())
                except lost as error:
                    trouble[reward] = f"the replica died ({type(error).__name__})"
                except BackPressureError as error:
                    trouble[reward] = str(error)
                except TimeoutError:
                    response.cancel()
                except DeploymentUnavailableError as error:
                    failed[reward] = RewardUnavailable(self._where(reward), error.message, "See the replica's log.")
            waits = []
            for reward in dict.fromkeys(call.reward for i, call in enumerate(calls) if i not in answers and call.reward not in failed):
                wait = backoffs[reward].next_wait()
                if wait is None:
                    failed[reward] = self._unanswered(reward, calls, answers, limits[reward], trouble[reward])
                else:
                    waits.append(wait)
            if not waits:
                return [answers.get(i) for i in range(len(calls))], failed
            time.sleep(min(waits))

    def _unanswered(self, reward: str, calls: Sequence[_Call], answers: Mapping[int, Any], limit_s: float, trouble: str) -> RewardUnavailable:
        mine = [i for i, call in enumerate(calls) if call.reward == reward]
        return RewardUnavailable(
            self._where(reward),
            f"{sum(i not in answers for i in mine)} of {len(mine)} requests unanswered after {limit_s:g} s ({trouble})",
            f"Check `serve status`; if it is only slow, raise fleet.rewards.{reward}.timeout_s and fleet.timeout_s, or fleet.rewards.{reward}.replicas.",
        )

    def _handle(self, reward: str) -> Any:
        from ray import serve

        if reward not in self._handles:
            self._handles[reward] = serve.get_deployment_handle(reward, app_name=self._app)
        return self._handles[reward]
