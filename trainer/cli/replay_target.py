"""Which ledger a person means: a Redis URL (and a run's name), or a run folder.

A run folder with an embedded server is used in one of two ways. While a driver has the folder, its server is joined and
nothing is started or stopped. Otherwise the folder is taken as a driver would take it, the server is started on its
append-only file for the look, and stopped again; a driver that comes meanwhile is told that the folder is in use.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.errors import ConfigError
from trainer.config.load import load_config
from trainer.config.run import RunConfig

# Long enough for one slow answer, short enough that a person does not wonder.
CONNECT_TIMEOUT_S = 5.0


class TargetError(Exception):
    """It is not clear which ledger is meant, or it cannot be reached; the message says what to do."""


@dataclass(frozen=True)
class Ledger:
    """A ledger that exists: `client` is connected, `driven` says that a driver has the run folder."""

    client: Any
    run: str
    driven: bool


@contextmanager
def ledger(folder: Path | None, url: str | None, run: str | None) -> Iterator[Ledger]:
    """The ledger meant by a run folder, or by `url` and, if the server holds several, `run`.

    A URL given beside a folder wins: for a server whose password is not in the folder. Raises TargetError,
    ReplayError.
    """
    if folder is None:
        if url is None:
            raise TargetError("which ledger? Give a run folder, or --url (and --run)")
        with _joined(url, run) as found:
            yield found
        return
    config = _config(folder)
    if url is not None or config.redis.url != "embedded":
        address = url or config.redis.url
        if "***" in address:
            raise TargetError(f"the password of {address} is not kept in the run folder: give the whole address as --url, or in DDRL_REDIS_URL")
        with _joined(address, run or config.name) as found:
            yield found
        return
    with _embedded(folder) as (address, driven), _joined(address, run or config.name, driven) as found:
        yield found


def _config(folder: Path) -> RunConfig:
    if not (folder / "config.yaml").is_file():
        raise TargetError(f"{folder} is not a run folder: it has no config.yaml")
    try:
        return load_config(folder / "config.yaml")
    except ConfigError as error:
        raise TargetError(f"{folder}: {error}") from None


@contextmanager
def _joined(url: str, run: str | None, driven: bool = False) -> Iterator[Ledger]:
    from replay.connect import connect, public_url
    from replay.errors import ReplayError
    from replay.inspection import find_runs

    try:
        where = public_url(url)
    except ValueError:  # whose message would show what stands where the port should be
        raise TargetError("the Redis URL cannot be read; it looks like redis://:password@host:6379/0, special characters percent-encoded") from None
    client = connect(url, CONNECT_TIMEOUT_S)
    try:
        if run is None:
            try:
                runs = find_runs(client)
            except ReplayError as error:
                raise TargetError(f"{error} with --run") from None
            if not runs:
                raise TargetError(f"{where} holds no ledger")
            if len(runs) > 1:
                raise TargetError(f"{where} holds {len(runs)} runs: choose one with --run: {', '.join(runs)}")
            run = runs[0]
        yield Ledger(client, run, driven)
    finally:
        client.close()


@contextmanager
def _embedded(folder: Path) -> Iterator[tuple[str, bool]]:
    """(URL of the folder's own server, whether a driver has the folder)."""
    from replay.embedded import EmbeddedRedis

    home = folder / "redis"
    if not home.is_dir():
        raise TargetError(f"{folder} has no ledger yet: its run has not started Redis")
    try:
        lock = (folder / "lock").open("a")
    except OSError as error:
        raise TargetError(f"{folder} cannot be taken for the look: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield _address(home), True
            return
        with EmbeddedRedis.start(home.resolve()) as server:
            yield server.url, False


def _address(home: Path) -> str:
    """URL of a running embedded server, from the configuration it was started with."""
    try:
        lines = (home / "redis.conf").read_text().splitlines()
    except OSError as error:
        raise TargetError(f"a driver has the run folder and its Redis is not up ({error.strerror}): try again in a moment") from None
    options = dict(line.split(" ", 1) for line in lines if " " in line)
    if not {"port", "requirepass"} <= options.keys():
        raise TargetError("a driver is just starting the run's Redis: try again in a moment")
    return f"redis://:{options['requirepass']}@127.0.0.1:{options['port']}/0"
