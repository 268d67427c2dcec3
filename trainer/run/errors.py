"""What a person is told when a run cannot start or go on: the part that failed, and why, in one line."""

from __future__ import annotations


class RunFailed(Exception):
    """A run that could not start or finish. `part` names what failed; the message says why and what to do."""

    def __init__(self, part: str, why: str) -> None:
        super().__init__(f"{part}: {one_line(why)}")
        self.part = part


def one_line(text: object, limit: int = 500) -> str:
    """First `limit` characters of `text` on a single line."""
    return " ".join(str(text).split())[:limit]


def root_cause(error: BaseException) -> BaseException:
    """The exception at the bottom: unwraps Ray's task errors, Ray Train's worker failures and `from` chains."""
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        failures = getattr(error, "worker_failures", None)
        # every surviving rank fails too, inside a collective; the first to blame is the one that did not
        inner = _most_telling(list(failures.values())) if failures else None
        inner = inner or getattr(error, "cause", None) or getattr(error, "_base_exc", None) or getattr(error, "controller_failure", None) or error.__cause__
        if not isinstance(inner, BaseException):
            break
        error = inner
    return error


def _most_telling(failures: list[BaseException]) -> BaseException | None:
    collateral = ("gloo", "Connection closed by peer", "NCCL")
    own = [f for f in failures if not any(word in str(f) for word in collateral)]
    return next(iter(own or failures), None)


def describe(error: BaseException) -> str:
    """One line about an exception: its root cause, with the class where the message alone says little."""
    cause = root_cause(error)
    text = one_line(cause)
    ours = type(cause).__module__.split(".")[0] in {"replay", "services", "diffusion", "trainer", "actors"}
    return text if ours and len(text) > 20 else f"{type(cause).__name__}: {text}"
