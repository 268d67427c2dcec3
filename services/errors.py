"""Why a whole request cannot be answered: the one exception that scoring, media, jobs and the REST face raise alike.

An item that cannot be scored is a ``ScoreFailure`` instead; see ``contract``. ``rest.problems`` turns a ``ProblemError`` into a
problem document. Pure: no FastAPI here.
"""

from __future__ import annotations


class ProblemError(Exception):
    """Ends a request with a problem document. ``challenge`` becomes ``WWW-Authenticate``."""

    def __init__(self, status: int, code: str, detail: str, retry_after_s: float | None = None, challenge: str | None = None) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail = status, code, detail
        self.retry_after_s, self.challenge = retry_after_s, challenge

    def __reduce__(self) -> tuple[type[ProblemError], tuple[int, str, str, float | None, str | None]]:
        return type(self), (self.status, self.code, self.detail, self.retry_after_s, self.challenge)
