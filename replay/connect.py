"""Connections to Redis that ride out a short restart, and errors that never show the password."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import redis
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import AuthenticationError, BusyLoadingError, ConnectionError, RedisError, TimeoutError
from redis.retry import Retry

from replay.addresses import without_password
from replay.cluster import RunClient
from replay.errors import ReplayError, Unreachable

# 12 retries with pauses 0.05 → 1 s: about 8 s, enough for a server restart with a log of a few hundred MB.
RETRIES = 12
SOCKET_TIMEOUT_S = 30.0


def connect(url: str, timeout: float = 10.0) -> RunClient:
    """A client whose server has answered. Safe to build in every process; clients are not shared by pickling.

    Raises `Unreachable` within about `timeout` seconds when the server does not answer or refuses the
    password. Later commands are retried on connection errors (every ledger operation is idempotent). On a Redis
    Cluster, `url` may name any node.
    """
    try:
        client: RunClient = RunClient.from_url(  # type: ignore[assignment]
            url,
            protocol=2,
            socket_connect_timeout=min(timeout, 5.0),
            socket_timeout=SOCKET_TIMEOUT_S,
            health_check_interval=30,
            retry=Retry(ExponentialWithJitterBackoff(cap=1.0, base=0.05), RETRIES, (ConnectionError, TimeoutError)),
        )
    except ValueError:  # its words, and the URL, may show a password that stands where it should not
        raise ReplayError(
            "redis.url is not usable: it looks like redis://:password@host:6379/0 (or rediss://…, unix://…), special characters percent-encoded"
        ) from None
    probe = redis.Redis.from_url(url, protocol=2, socket_connect_timeout=min(timeout, 5.0), socket_timeout=timeout, retry=None)
    deadline = time.monotonic() + timeout
    try:
        while True:
            try:
                probe.ping()
                client.find_nodes()
                return client
            except AuthenticationError:
                raise Unreachable(f"Redis at {without_password(url)} refuses the password in redis.url") from None
            except (ConnectionError, TimeoutError, BusyLoadingError) as error:
                if time.monotonic() + 0.2 >= deadline:
                    raise Unreachable(f"cannot reach Redis at {without_password(url)}: {_reason(error)}; start one or set redis.url=embedded") from None
                time.sleep(0.2)
            except RedisError as error:
                raise Unreachable(f"Redis at {without_password(url)} does not serve us: {_reason(error)}") from None
    finally:
        probe.close()


@contextmanager
def surfaced(client: redis.Redis) -> Iterator[None]:
    """Turns redis-py's exceptions into ours, with the address and without the password."""
    try:
        yield
    except (ConnectionError, TimeoutError) as error:
        where = client.connection_pool.connection_kwargs
        address = where.get("path") or f"{where.get('host', '?')}:{where.get('port', '?')}"
        raise Unreachable(f"lost Redis at {address}: {_reason(error)}") from None
    except RedisError as error:
        raise ReplayError(f"Redis refused a ledger command: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
