"""Scoring inside the cluster: numpy arrays straight through the Serve handle, no image encoding, no HTTP.

A batch is cut into chunks that go out together, so several replicas share it. A chunk whose replica dies, or
that meets a full queue, is sent again; scoring has no side effects, so a repeat is harmless. All of it ends
at the deadline.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from services.client.base import Batch, RewardUnavailable, as_media, probe
from services.client.retry import Backoff
from services.contract import ItemScore, ModelInfo, ScoreFailure
from services.media.base import Media

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


class HandleRewardClient:
    """Client for processes of the same Ray cluster. Call it from threads, not from a running event loop."""

    def __init__(self, app: str = APP_NAME, model: str = "ocr", chunk_items: int = 16, check_timeout_s: float = 30.0) -> None:
        self._app, self._model = app, model
        self._chunk_items, self._check_timeout_s = chunk_items, check_timeout_s
        self._handles: dict[str, Any] = {}

    def score(self, model: str, prompts: Sequence[str], media: Batch, timeout_s: float, fps: float | None = None) -> list[ItemScore | ScoreFailure]:
        """See ``RewardClient.score``."""
        items = as_media(prompts, media, fps)
        size = self._chunk_items
        chunks = [ScoreChunk(list(prompts[s : s + size]), items[s : s + size]) for s in range(0, len(items), size)]
        done = self._call(model, "score", [(chunk,) for chunk in chunks], timeout_s)
        return [result for part in done for result in part]

    def check(self) -> ModelInfo:
        """See ``RewardClient.check``."""
        info: ModelInfo = self._call(self._model, "info", [()], self._check_timeout_s)[0]
        result = self.score(self._model, *probe(info), self._check_timeout_s)[0]
        if isinstance(result, ScoreFailure):
            raise RewardUnavailable(self._where(self._model), f"the test item failed: {result.message}", "See the replica's log.")
        return info

    def close(self) -> None:
        """Drop the handles; the fleet goes on."""
        self._handles.clear()

    def _where(self, model: str) -> str:
        return f"serve://{self._app}/{model}"

    def _call(self, model: str, method: str, calls: Sequence[tuple[Any, ...]], timeout_s: float) -> list[Any]:
        """Run ``method`` once per element of ``calls``, all at once, until every one has answered."""
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

        lost = replica_loss_errors()
        backoff = Backoff(timeout_s)
        answers: dict[int, Any] = {}
        trouble = "slow or not running"
        while True:
            try:
                remote = getattr(self._handle(model), method)
            except RayServeException as error:
                raise RewardUnavailable(self._where(model), str(error), "Start the fleet first.") from error
            sent = {i: remote.remote(*args) for i, args in enumerate(calls) if i not in answers}
            for i, response in sent.items():
                try:
                    answers[i] = response.result(timeout_s=backoff.remaining())
                except lost as error:
                    trouble = f"the replica died ({type(error).__name__})"
                except BackPressureError as error:
                    trouble = str(error)
                except TimeoutError:
                    response.cancel()
                except DeploymentUnavailableError as error:
                    raise RewardUnavailable(self._where(model), error.message, "See the replica's log.") from error
            if len(answers) == len(calls):
                return [answers[i] for i in range(len(calls))]
            wait = backoff.next_wait()
            if wait is None:
                raise RewardUnavailable(
                    self._where(model),
                    f"{len(calls) - len(answers)} of {len(calls)} requests unanswered after {timeout_s:g} s ({trouble})",
                    "Check `serve status`; if it is only slow, raise reward.timeout_s or reward.replicas.",
                )
            time.sleep(wait)

    def _handle(self, model: str) -> Any:
        from ray import serve

        if model not in self._handles:
            self._handles[model] = serve.get_deployment_handle(model, app_name=self._app)
        return self._handles[model]
