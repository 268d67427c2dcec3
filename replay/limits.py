"""A run's limits in its ledger: the server is checked, the limits are written; later anyone reads them back.

The scripts in `lua/` know nothing but what `write` puts into the hash `meta`. A driver that resumes writes them
again, with other values if its configuration has changed; the counters beside them stay as they are.
"""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import redis
from redis.exceptions import ResponseError

from replay.errors import ImpossibleSettings, NotInitialised, ReplayError
from replay.payloads import IN_REDIS
from replay.policy import GIVE_BACK_PAUSE_S, PART_BYTES, BufferSettings, check_server

logger = logging.getLogger(__name__)

T = TypeVar("T")


def write(client: redis.Redis, run: str, meta: str, settings: BufferSettings, place: str) -> None:
    """Check settings and server, then write the limits to the hash `meta`. Idempotent.

    `place`: where payloads are ('redis' or a folder). Raises `ImpossibleSettings` or `UnsuitableServer`.
    """
    settings.check()
    found: Any = client.hmget(meta, "server_version", "payloads", "bytes", "closed", "dead", "deaths", "widest_slots", "widest_retained", "widest_bytes")
    recorded, before, held, closed, dead, deaths, *widest = (value.decode() if value else "" for value in found)
    if closed:
        raise ReplayError(f"the ledger of run {run!r} is half deleted: finish with `forget`, or choose another name")
    if held not in ("", "0") and before and (before == IN_REDIS) != (place == IN_REDIS):
        raise ImpossibleSettings(f"replay.payloads is {place}, but this run's unsettled payloads are in {before}: set it back, or start a new run")
    version = examine(client, settings, place, recorded or None)
    limits: dict[Any, Any] = {
        "slots": settings.slots,
        "retained": settings.retained_groups,
        "data_retained": settings.retained_data,
        "max_bytes": settings.max_bytes,
        "lease_ms": int(settings.lease_s * 1000),
        "pause_ms": int(GIVE_BACK_PAUSE_S * 1000),
        "max_attempts": settings.max_attempts,
        "G": settings.groups_per_step,
        "D": settings.data_per_step,
        "S": settings.max_staleness,
        "W": settings.window,
        "K": settings.checkpoint_interval,
        "data_depth": settings.data_depth,
        "remake": int(settings.remake_cut_off),
        "drop_limit": settings.drop_limit,
        "part_bytes": settings.part_bytes,
        "payloads": place,
    }
    # The audit allows what any configuration of this run has allowed: narrower limits take effect as groups end.
    for name, now, former in zip(("slots", "retained", "bytes"), (settings.slots, settings.retained_groups, settings.max_bytes), widest, strict=True):
        limits[f"widest_{name}"] = max(now, int(former or 0))
    if version:
        limits["server_version"] = version
    if not deaths:  # a new ledger, or one that has not counted them: at least those that are dead now
        limits["deaths"] = dead or 0
    client.hset(meta, mapping=limits)


def examine(client: redis.Redis, settings: BufferSettings, place: str, recorded: str | None = None) -> str:
    """The server's version, '' where it hides it. Writes nothing. Raises `UnsuitableServer`; `recorded`: see `check_server`."""
    info = _permitted(client.info, "INFO", "version, memory and cluster mode")
    version = str(info["redis_version"]) if info else ""
    check_server(version, _options(client), int((info or {}).get("total_system_memory", 0)), settings, place == IN_REDIS, recorded)
    return version


def read(client: redis.Redis, run: str, meta: str) -> tuple[BufferSettings, str]:
    """(settings, where payloads are) as the last `write` left them. Raises `NotInitialised`."""
    found: Any = client.hgetall(meta)
    fields = {key.decode(): value.decode() for key, value in found.items()}
    if "payloads" not in fields:
        raise NotInitialised(f"no ledger of run {run!r} on this server")

    def number(name: str) -> int:
        return int(fields[name])

    drop_limit = number("drop_limit")
    settings = BufferSettings(
        groups_per_step=number("G"),
        data_per_step=number("D"),
        max_staleness=number("S"),
        window=number("W"),
        lease_s=number("lease_ms") / 1000,
        max_attempts=number("max_attempts"),
        max_bytes=number("max_bytes"),
        data_depth=number("data_depth"),
        checkpoint_interval=number("K"),
        remake_cut_off=number("remake") == 1,
        drop_zero_variance=drop_limit > 0,
        max_drops_per_step=drop_limit or None,
        part_bytes=int(fields.get("part_bytes", PART_BYTES)),  # not in a ledger of before
    )
    return settings, fields["payloads"]


def _options(client: redis.Redis) -> dict[str, str]:
    def ask() -> dict[str, str]:
        options: dict[str, str] = {}
        for name in ("maxmemory", "maxmemory-policy", "appendonly"):
            found: Any = client.config_get(name)
            options.update({str(key): str(value) for key, value in found.items()})
        return options

    return _permitted(ask, "CONFIG GET", "maxmemory, maxmemory-policy and appendonly") or {}


def _permitted(ask: Callable[[], T], command: str, unchecked: str) -> T | None:
    """The answer, or None where the server does not let this user ask (ACLs, managed services)."""
    try:
        return ask()
    except ResponseError as error:
        logger.warning("Redis refuses %s (%s): its %s stay unchecked", command, error, unchecked)
        return None
