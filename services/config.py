"""Settings of a reward fleet: the rewards by name, how each is deployed, where the service listens. Pydantic only.

One class for all that start or call a fleet: ``rewards.yaml`` of ``ddrl serve`` (``fleet.file`` reads it) and the branch ``fleet:``
of a run's recipe. A run names its rewards elsewhere and ``fleet_of`` picks them; with ``url`` it starts none and asks that service.

Worked example: ``fleet_of(FleetConfig(), ["ocr"])`` has the reward ``{kind: ocr}``; with ``rewards: {sign: {kind: ocr, upscale: 4}}``
``fleet_of(config, ["sign", "jpeg"])`` has ``sign`` as written and ``jpeg`` with its defaults.

Invariant: ``FleetConfig.model_validate(config.model_dump(mode="json")) == config``, scorers of one's own included. Validating loads no
scorer, but a ``module:Class`` is imported to learn its settings.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, SerializeAsAny, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from services.contract import StrictModel
from services.jobs.config import JobsConfig
from services.limits import LimitsConfig
from services.scorers.registry import BUILT_IN, UnknownKind, parse_reward, settings_class
from services.scorers.settings import RewardSettings

NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")
RESERVED = ("ingress",)  # the Serve deployment in front of the rewards
UNKNOWN_KEY = "unknown_key"  # type of the error of an entry's unknown key; its context names the nearest
Settings = TypeVar("Settings", bound=StrictModel)


class FleetConfigError(ValueError):
    """A fleet that cannot be used as it is written; the message is one line for the person who wrote it."""


def _entry(value: Any) -> RewardSettings:
    """One entry of ``rewards:`` as its kind's own settings; errors keep the entry's keys."""
    if isinstance(value, RewardSettings):
        return value
    if not isinstance(value, dict):
        raise ValueError("must be a mapping such as {kind: ocr}")
    try:
        return parse_reward(value)
    except UnknownKind as error:
        kind = InitErrorDetails(type=PydanticCustomError("unknown_kind", "{why}", {"why": str(error)}), loc=("kind",), input=None)
        raise ValidationError.from_exception_data("reward", [kind]) from None
    except ValidationError as error:
        raise ValidationError.from_exception_data("reward", [_with_nearest(each, settings_class(value["kind"])) for each in error.errors()]) from None


def _with_nearest(error: Any, model: type[BaseModel]) -> InitErrorDetails:
    """The error again; an unknown key with the nearest one that there is, which only this class knows."""
    if error["type"] == "extra_forbidden":
        near = nearest(str(error["loc"][-1]), model, error["loc"][:-1])
        hint = f"; did you mean '{near}'?" if near else ""
        return InitErrorDetails(
            type=PydanticCustomError(UNKNOWN_KEY, "unknown key{hint}", {"hint": hint, "near": near}), loc=error["loc"], input=error["input"]
        )
    same = PydanticCustomError(error["type"], "{why}", {"why": error["msg"].removeprefix("Value error, ")})
    return InitErrorDetails(type=same, loc=error["loc"], input=error["input"])


def nearest(key: str, model: type[BaseModel], loc: tuple[int | str, ...]) -> str | None:
    """The key most like ``key`` among those that may stand at ``loc`` of ``model``."""
    for part in loc:
        field = model.model_fields.get(str(part))
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return None
        model = inner
    return next(iter(difflib.get_close_matches(key, list(model.model_fields), n=1, cutoff=0.6)), None)


class IngressConfig(StrictModel):
    """The REST processes in front of the rewards."""

    replicas: int = Field(default=1, ge=1, le=256, description="Ingress processes; each decodes media on threads of its own.")
    cpus: float = Field(default=0.1, ge=0, le=1024, description="Ray CPUs reserved per ingress process.")
    max_ongoing: int = Field(default=128, ge=1, le=65_536, description="Requests that one ingress process works on at a time.")
    max_queued: int = Field(default=256, ge=1, description="Requests that may wait for an ingress process; more are refused (503).")


class FleetConfig(StrictModel):
    """A reward fleet."""

    rewards: dict[str, Annotated[SerializeAsAny[RewardSettings], BeforeValidator(_entry)]] = Field(
        default_factory=dict,
        description="Rewards by the name they are asked for: {kind: …} and the settings of that kind; kind may be left out where it is the name.",
    )
    url: str | None = Field(
        default=None,
        pattern=r"^https?://[^@/]+",
        description="Base URL of a running reward service, without /v1; null: a run starts a fleet of its own.",
    )
    api_key_env: str | None = Field(default=None, description="Environment variable that holds the bearer key for url, if it needs one.")
    timeout_s: float = Field(
        default=60.0, gt=0, le=3600, description="Deadline of one scoring call of a run, all its rewards and repeats together, in seconds."
    )
    host: str = Field(default="127.0.0.1", min_length=1, description="Address to listen on; anything but loopback needs keys.")
    port: int | None = Field(default=None, ge=0, le=65_535, description="Port; 0 takes a free one; null: 8000 for `ddrl serve`, a free one otherwise.")
    hosts: list[str] = Field(default_factory=list, description="Further names by which callers without keys may know this service; loopback names always work.")
    keys_file: Path | None = Field(default=None, description="File of bearer keys; without it only this machine may call.")
    redis_url: str | None = Field(
        default=None,
        pattern=r"^(embedded|rediss?://.+|unix://.+)$",
        description="Redis of jobs and repeated requests: redis://[:password@]host:port/db; 'embedded' starts a private one; null: no jobs.",
    )
    jobs: JobsConfig = Field(default_factory=JobsConfig, description="Jobs; they need redis_url.")
    limits: LimitsConfig = Field(default_factory=LimitsConfig, description="What one request may ask for.")
    ingress: IngressConfig = Field(default_factory=IngressConfig, description="The REST processes.")
    decoder: str | None = Field(default=None, pattern=r"^[\w.]+:[\w.]+$", description="'module:callable' from latents to frames; null: latents are refused.")
    start_timeout_s: float = Field(default=300.0, gt=0, le=86_400, description="How long the fleet may take until every reward is ready.")
    drain_s: float = Field(default=20.0, ge=0, le=3600, description="How long a stopping service finishes what it has accepted.")

    @field_validator("rewards", mode="before")
    @classmethod
    def _kinds(cls, rewards: Any) -> Any:
        """An entry called like a kind is of that kind unless it says otherwise."""
        if not isinstance(rewards, dict):
            return rewards
        return {name: {"kind": name, **entry} if name in BUILT_IN and isinstance(entry, dict) else entry for name, entry in rewards.items()}

    @field_validator("rewards")
    @classmethod
    def _names(cls, rewards: dict[str, RewardSettings]) -> dict[str, RewardSettings]:
        for name in rewards:
            if not NAME.fullmatch(name):
                raise ValueError(f"a reward cannot be called {name!r}: lower case letters, digits, - and _, at most 63, a letter first")
            if name in RESERVED:
                raise ValueError(f"a reward cannot be called {name!r}")
        return rewards

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for name, reward in self.rewards.items():
            if reward.batch_wait_s >= reward.timeout_s:
                raise ValueError(f"rewards.{name}: a batch may wait {reward.batch_wait_s:g} s but a request only {reward.timeout_s:g} s")
        if self.jobs.lease_s >= self.jobs.ttl_s:
            raise ValueError(f"jobs.lease_s ({self.jobs.lease_s:g}) must be below jobs.ttl_s ({self.jobs.ttl_s:g})")
        if self.api_key_env is not None and self.url is None:
            raise ValueError(f"api_key_env ({self.api_key_env}) is the key for url, which is not set")
        return self

    def needs(self, http: bool = True) -> dict[Literal["CPU", "GPU"], float]:
        """Ray resources that must be free for the fleet to start: every reward at its smallest, and with ``http`` the ingress."""
        rewards = self.rewards.values()
        return {
            "CPU": http * self.ingress.replicas * self.ingress.cpus + sum(r.replicas.min * r.cpus for r in rewards),
            "GPU": sum(r.replicas.min * r.gpus for r in rewards),
        }

    def room(self) -> float:
        """Ray CPUs for every reward at its largest, and the ingress."""
        return self.ingress.replicas * self.ingress.cpus + sum(r.replicas.max * r.cpus for r in self.rewards.values())

    def located(self, folder: Path) -> FleetConfig:
        """The same fleet with its paths absolute, relative ones from ``folder``: scorers and ingress run in other folders."""
        return _located(self, folder).model_copy(update={"rewards": {name: _located(reward, folder) for name, reward in self.rewards.items()}})


def _located(model: Settings, folder: Path) -> Settings:
    paths = {key: (folder / value).absolute() for key in type(model).model_fields if isinstance(value := getattr(model, key), Path)}
    return model.model_copy(update=paths)


def fleet_of(config: FleetConfig, names: Sequence[str]) -> FleetConfig:
    """``config`` with exactly the rewards ``names``: the entry of that name, or ``{kind: name}``. Raises ``FleetConfigError``.

    With ``url`` the service there decides what names mean, and those without an entry are left out.
    """
    picked = {name: config.rewards[name] if name in config.rewards else _default(name) for name in names if config.url is None or name in config.rewards}
    try:
        return FleetConfig.model_validate({**dict(config), "rewards": picked})
    except ValidationError as error:
        raise FleetConfigError("fleet." + one_line(error, FleetConfig)) from None


def _default(name: str) -> RewardSettings:
    if name not in BUILT_IN:
        near = next(iter(difflib.get_close_matches(name, list(BUILT_IN), n=1, cutoff=0.6)), None)
        hint = f"; did you mean '{near}'?" if near else ""
        raise FleetConfigError(f"unknown reward '{name}'{hint} Name a kind ({', '.join(BUILT_IN)}), or describe it: fleet.rewards.{name}: {{kind: …}}")
    try:
        return parse_reward({"kind": name})
    except ValidationError as error:
        missing = ", ".join(str(each["loc"][-1]) for each in error.errors())
        raise FleetConfigError(f"the reward '{name}' needs settings: fleet.rewards.{name}: {{kind: {name}, …}} with {missing}") from None


def one_line(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """The first mistake in words, by its dotted key; an unknown key names the nearest one."""
    first = error.errors(include_url=False)[0]
    loc = first["loc"]
    key = prefix + ".".join(map(str, loc))
    if first["type"] in ("extra_forbidden", UNKNOWN_KEY):
        near = first["ctx"]["near"] if first["type"] == UNKNOWN_KEY else nearest(str(loc[-1]), model, loc[:-1])
        return f"unknown key '{key}'" + (f"; did you mean '{prefix}{'.'.join(map(str, (*loc[:-1], near)))}'?" if near else "")
    message = str(first["msg"]).removeprefix("Value error, ")
    given = f" (got {first['input']!r})" if loc and first["input"] is not None and not isinstance(first["input"], dict | BaseModel) else ""
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{key.rstrip('.')}: {message}{given}{more}" if key else message + more
