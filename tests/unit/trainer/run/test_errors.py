"""Who is to blame, in one line."""

from __future__ import annotations

from trainer.config.errors import ConfigError
from trainer.run.errors import RunFailed, describe, one_line, root_cause


class TaskError(Exception):
    """Like Ray's: carries the remote exception in `cause`."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__("ray::Actor.run() (pid=1)\nTraceback …")
        self.cause = cause


class WorkerGroupError(Exception):
    """Like Ray Train's: one exception per rank that failed."""

    def __init__(self, worker_failures: dict[int, BaseException]) -> None:
        super().__init__("Training failed due to worker errors:\n…")
        self.worker_failures = worker_failures


class WithTraceback(Exception):
    """Like Ray Train's UserExceptionWithTraceback."""

    def __init__(self, error: BaseException) -> None:
        super().__init__("…")
        self._base_exc = error


class ControllerError(Exception):
    """Like Ray Train's: the controller itself failed."""

    def __init__(self, controller_failure: BaseException) -> None:
        super().__init__("Training failed due to controller error:\n…")
        self.controller_failure = controller_failure


COLLATERAL = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:40712")
CULPRIT = ValueError("a trained transition has std 0")


def chained(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


def test_the_root_of_what_ray_wraps() -> None:
    assert root_cause(CULPRIT) is CULPRIT
    assert root_cause(TaskError(TaskError(CULPRIT))) is CULPRIT
    assert root_cause(WithTraceback(CULPRIT)) is CULPRIT
    assert root_cause(chained(RuntimeError("outer"), chained(OSError("middle"), CULPRIT))) is CULPRIT
    assert root_cause(WorkerGroupError({1: TaskError(WithTraceback(CULPRIT))})) is CULPRIT


def test_the_controllers_own_failure_is_unwrapped() -> None:
    assert root_cause(ControllerError(CULPRIT)) is CULPRIT


def test_the_rank_that_failed_by_itself_is_blamed() -> None:
    assert root_cause(WorkerGroupError({0: COLLATERAL, 1: CULPRIT})) is CULPRIT
    assert root_cause(WorkerGroupError({0: CULPRIT, 1: COLLATERAL})) is CULPRIT
    assert root_cause(WorkerGroupError({0: COLLATERAL})) is COLLATERAL
    assert root_cause(WorkerGroupError({})).__class__ is WorkerGroupError


def test_a_shape_error_is_no_collective() -> None:
    """`broadcast` also stands in the messages of ordinary mistakes."""
    shapes = ValueError("operands could not be broadcast together with shapes (2,) (3,)")
    assert root_cause(WorkerGroupError({0: COLLATERAL, 1: shapes})) is shapes


def test_a_circle_of_causes_ends() -> None:
    a, b = ValueError("a"), ValueError("b")
    a.__cause__, b.__cause__ = b, a
    assert root_cause(a) in (a, b)


def test_messages_are_one_line_of_bounded_length() -> None:
    assert one_line("a\n  b\tc") == "a b c"
    assert len(one_line("x" * 10_000)) == 500
    error = RunFailed("Redis", "did not\nstart")
    assert (str(error), error.part) == ("Redis: did not start", "Redis")


def test_a_foreign_exception_is_described_with_its_class() -> None:
    assert describe(KeyError("x")) == "KeyError: 'x'"
    assert describe(TaskError(CULPRIT)) == "ValueError: a trained transition has std 0"
    assert describe(ConfigError("unknown key 'updtes'; did you mean 'updates'?")) == "unknown key 'updtes'; did you mean 'updates'?"
    assert describe(ConfigError("short")) == "ConfigError: short"
