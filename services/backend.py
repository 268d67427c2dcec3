"""What the ingress knows of the scorers behind it: names, health, and a call that scores.

``services.fleet.start`` implements it over Serve handles; tests and benchmarks may run scorers in process.
"""

from __future__ import annotations

from typing import Protocol

from services.contract import ItemScore, ModelHealth, ModelInfo, ScoreFailure
from services.media.base import Media


class ScoreBackend(Protocol):
    """The scorers of a fleet. Every method raises ``ProblemError`` when the fleet cannot answer."""

    async def models(self) -> list[ModelInfo]:
        """All reward models; one that has not come up yet is left out, and ``health`` knows of it."""
        ...

    async def score(self, model: str, prompts: list[str], media: list[Media], deadline_s: float) -> list[ItemScore | ScoreFailure]:
        """One result per item within ``deadline_s`` seconds from now.

        Raises ``ProblemError`` 404 ``model_not_found``, 503 ``queue_full`` or ``scorer_unavailable`` with ``Retry-After``,
        504 ``deadline_exceeded``. Cancelling the call gives the work up.
        """
        ...

    async def health(self) -> list[ModelHealth]:
        """The state of every model."""
        ...
