"""Gathering: a recipe, and whether the files, GPUs and services that it names are there. Nothing is started or downloaded."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from diffusion.source import CheckpointError, is_hub_id, locate
from trainer.config.errors import ConfigError
from trainer.config.run import RunConfig
from trainer.doctor.facts import GPU, PlanFacts, Recipe, Service
from trainer.doctor.gpus import as_planned
from trainer.doctor.hub import access

DEADLINE_S = 5.0
"""For one service to answer."""
WITH_TRANSFORMERS = ("clipscore", "pickscore", "hpsv2", "aesthetic", "imagereward", "videoalign")


def gather_recipe(path: Path, config: RunConfig, gpus: Sequence[GPU], online: bool = False, deadline_s: float = DEADLINE_S) -> Recipe:
    """Facts about a recipe that is valid, on a machine with `gpus`. A service has `deadline_s` to answer. `online`: ask the hub too."""
    from trainer.run.preflight import check_files

    files_error = plan_error = ""
    absent = uncached(config)
    plan: PlanFacts | None = None
    try:
        check_files(config)
    except ConfigError as error:
        files_error = str(error)
    try:
        plan = planned(config, gpus)
    except ConfigError as error:
        plan_error = str(error)
    return Recipe(
        path=str(path),
        name=config.name,
        files_error=files_error,
        object_store=0 if config.ray.address else config.ray.object_store_mb << 20,
        lacking=lacking(config),
        hub=absent,
        access=access(absent) if online and absent else None,
        plan=plan,
        plan_error=plan_error,
        services=(*redis_of(config, deadline_s), *rewards_of(config, deadline_s)),
    )


def planned(config: RunConfig, gpus: Sequence[GPU]) -> PlanFacts:
    """`ddrl plan` on these GPUs; a cluster that is joined is another machine, of which nothing is known here. Raises ConfigError."""
    from trainer.plan.assumptions import Assumptions
    from trainer.plan.planner import make_plan

    if config.ray.address is not None:
        return PlanFacts(where="")
    kind = as_planned(gpus)
    found = make_plan(config, kind, len(gpus), Assumptions())
    return PlanFacts(
        where=f"{len(gpus)} x {kind.name}" if gpus else "a machine without GPUs",
        errors=tuple(f.message for f in found.findings if f.level == "error"),
        nearest=f"{found.nearest.name} ({' '.join(found.nearest.keys)})" if found.nearest else "",
        disk=sum(part.bytes for part in found.storage.disk),
        hosts=sum(process.total * process.count for process in found.hosts),
    )


def lacking(config: RunConfig) -> dict[str, str]:
    """Modules that the recipe needs and that are not installed, with the extra that brings each."""
    needed = {}
    if config.wandb_project is not None:
        needed["wandb"] = "wandb"
    if any((config.fleet.rewards[name].kind if name in config.fleet.rewards else name) in WITH_TRANSFORMERS for name in config.reward_names):
        needed["transformers"] = "models"
    return {module: extra for module, extra in needed.items() if importlib.util.find_spec(module) is None}


def uncached(config: RunConfig) -> str:
    """The policy's hub id where the cache does not hold it."""
    if not is_hub_id(config.model.path):
        return ""
    try:
        locate(config.model.path, config.model.revision, download=False)
    except CheckpointError:
        return config.model.path
    return ""


def redis_of(config: RunConfig, deadline_s: float) -> list[Service]:
    """The ledger's server, where the recipe names one: whether it answers and is fit for this run."""
    from replay.addresses import without_password
    from replay.connect import connect
    from replay.errors import ReplayError
    from replay.limits import examine
    from trainer.plan.storage import buffer_settings

    if config.redis.url == "embedded":
        return []
    where = without_password(config.redis.url)
    try:
        client = connect(config.redis.url, min(deadline_s, config.redis.connect_timeout_s))
        try:
            version = examine(client, buffer_settings(config), config.replay.payloads)
        finally:
            client.close()
    except ReplayError as error:
        return [Service("redis.url", where, error=str(error))]
    return [Service("redis.url", where, f"redis-server {version}" if version else "answers")]


def rewards_of(config: RunConfig, deadline_s: float) -> list[Service]:
    """Reward services that the recipe names: what they offer, and whether that is what is asked for."""
    if config.fleet.url is not None:
        return [_offers("fleet.url", config.fleet.url, config.reward_names, config.fleet.api_key_env, deadline_s)]
    entries = {name: config.fleet.rewards[name] for name in config.reward_names if name in config.fleet.rewards}
    remote = {name: entry.model_dump() for name, entry in entries.items() if entry.kind == "http"}
    return [_offers(f"fleet.rewards.{name}.url", e["url"], [e["model"]], e["api_key_env"], deadline_s) for name, e in remote.items()]


def _offers(what: str, url: str, names: Sequence[str], api_key_env: str | None, deadline_s: float) -> Service:
    from services.client.base import RewardUnavailable
    from services.client.rest import RestRewardClient
    from services.client.wire import Keys

    setting = what.removesuffix("url") + "api_key_env"
    key = os.environ.get(api_key_env) if api_key_env else None
    if api_key_env and not key:
        return Service(what, url, error=f"{setting} names {api_key_env}, which is not set")
    client = RestRewardClient(url, api_key=key, connect_s=deadline_s, keys=Keys(what, setting, "fleet.timeout_s"))
    try:
        offered = client.models(deadline_s)
    except RewardUnavailable as error:
        return Service(what, url, error=str(error))
    finally:
        client.close()
    absent = [name for name in names if name not in offered]
    if absent:
        return Service(what, url, error=f"it has no reward {', '.join(absent)}; it has {', '.join(offered) or 'none'}")
    return Service(what, url, f"offers {', '.join(names)}")
