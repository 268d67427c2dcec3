"""A whole fleet in one file, ``rewards.yaml``: the rewards by name, how each is deployed, where the service listens.

``read_fleet(path)`` gives a ``FleetConfig`` or one clear line about what is wrong with the file; an unknown key names the
nearest one. Pydantic and YAML only: reading a file loads no scorer (but a scorer of one's own, ``module:Class``, is imported
to learn its settings).
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, Field, SerializeAsAny, ValidationError, field_validator, model_validator

from services.config import RewardConfig
from services.contract import StrictModel
from services.jobs.config import JobsConfig
from services.limits import LimitsConfig
from services.scorers.registry import UnknownKind, parse_reward
from services.scorers.settings import RewardSettings

NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")
Settings = TypeVar("Settings", bound=StrictModel)
RESERVED = ("ingress",)  # the Serve deployment in front of the rewards


class FleetFileError(ValueError):
    """A ``rewards.yaml`` that cannot be used; the message is one line for the person who wrote it."""


class IngressConfig(StrictModel):
    """The REST processes in front of the rewards."""

    replicas: int = Field(default=1, ge=1, le=256, description="Ingress processes; each decodes media on threads of its own.")
    cpus: float = Field(default=0.1, ge=0, le=1024, description="Ray CPUs reserved per ingress process.")
    max_ongoing: int = Field(default=128, ge=1, le=65_536, description="Requests that one ingress process works on at a time.")
    max_queued: int = Field(default=256, ge=1, description="Requests that may wait for an ingress process; more are refused (503).")


class FleetConfig(StrictModel):
    """``rewards.yaml``."""

    rewards: dict[str, SerializeAsAny[RewardSettings]] = Field(min_length=1, description="Rewards by the name they are asked for.")
    host: str = Field(default="127.0.0.1", min_length=1, description="Address to listen on; anything but loopback needs keys.")
    port: int = Field(default=8000, ge=0, le=65_535, description="Port; 0 takes a free one.")
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
    start_timeout_s: float = Field(default=120.0, gt=0, le=86_400, description="How long the fleet may take until every reward is ready.")
    drain_s: float = Field(default=30.0, ge=0, le=3600, description="How long a stopping service finishes what it has accepted.")

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
        return self

    @property
    def longest_timeout_s(self) -> float:
        """The largest deadline of a request at any reward."""
        return max(reward.timeout_s for reward in self.rewards.values())

    def needs(self) -> dict[Literal["CPU", "GPU"], float]:
        """Ray resources that must be free for the fleet to start: every reward at its smallest, and the ingress."""
        rewards = self.rewards.values()
        return {
            "CPU": self.ingress.replicas * self.ingress.cpus + sum(r.replicas.min * r.cpus for r in rewards),
            "GPU": sum(r.replicas.min * r.gpus for r in rewards),
        }

    def room(self) -> float:
        """Ray CPUs for every reward at its largest, and the ingress."""
        return self.ingress.replicas * self.ingress.cpus + sum(r.replicas.max * r.cpus for r in self.rewards.values())


class _UniqueKeys(yaml.SafeLoader):
    """YAML takes the last of two equal keys without a word; this loader refuses."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping, each key once."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' stands twice", key_node.start_mark)
            seen.add(key if isinstance(key, str) else repr(key))
        return super().construct_mapping(node, deep)


def read_fleet(path: Path) -> FleetConfig:
    """Read a ``rewards.yaml``; relative paths in it start from its folder. Raises ``FleetFileError``."""
    try:
        tree = yaml.load(path.read_text(), _UniqueKeys)  # a SafeLoader
    except OSError as error:
        raise FleetFileError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise FleetFileError(f"{path} is not a text file") from None
    except yaml.YAMLError as error:
        raise FleetFileError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    try:
        return parse_fleet(tree, path.parent)
    except FleetFileError as error:
        raise FleetFileError(f"{path}: {error}") from None


def parse_fleet(tree: Any, folder: Path | None = None) -> FleetConfig:
    """A fleet from a tree of plain values, such as YAML gives or ``FleetConfig.model_dump`` made. Raises ``FleetFileError``."""
    if not isinstance(tree, dict) or not isinstance(tree.get("rewards"), dict):
        raise FleetFileError("a fleet is a mapping with 'rewards:', a mapping of names to settings such as {ocr: {kind: ocr}}")
    rewards = {name: _entry(str(name), entry, folder) for name, entry in tree["rewards"].items()}
    try:
        config = FleetConfig.model_validate({**tree, "rewards": rewards})
    except ValidationError as error:
        raise FleetFileError(_one_line(error, FleetConfig, "")) from None
    return _located(config, folder)


def one_reward(config: RewardConfig) -> FleetConfig:
    """The fleet that a run starts for itself: one reward, no keys, no jobs, on loopback."""
    own = config.ocr.model_dump(exclude_unset=True)
    entry = {
        "kind": config.model,
        "replicas": config.replicas,
        "cpus": config.replica_cpus,
        "batch_items": config.max_batch_items,
        "batch_wait_s": config.batch_wait_s,
        "timeout_s": config.timeout_s,
        "max_queued": config.max_queued_requests,
        **own,
    }
    port = 0 if config.port == "auto" else config.port
    return parse_fleet({"rewards": {config.model: entry}, "port": port, "limits": config.limits.model_dump(), "start_timeout_s": config.start_timeout_s})


def _entry(name: str, entry: Any, folder: Path | None) -> RewardSettings:
    if not isinstance(entry, dict):
        raise FleetFileError(f"rewards.{name} must be a mapping such as {{kind: ocr}}")
    try:
        return _located(parse_reward(entry), folder)
    except UnknownKind as error:
        raise FleetFileError(f"rewards.{name}.kind: {error}") from None
    except ValidationError as error:
        from services.scorers.registry import settings_class

        raise FleetFileError(_one_line(error, settings_class(entry["kind"]), f"rewards.{name}.")) from None


def _located(model: Settings, folder: Path | None) -> Settings:
    """The same settings with their paths absolute: scorers and ingress run in other folders than the file."""
    if folder is None:
        return model
    paths = {key: (folder / value).absolute() for key in type(model).model_fields if isinstance(value := getattr(model, key), Path)}
    return model.model_copy(update=paths)


def _one_line(error: ValidationError, model: type[BaseModel], prefix: str) -> str:
    first = error.errors(include_url=False)[0]
    key = prefix + ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(first["loc"][-1]), _keys_at(model, first["loc"][:-1]), n=1, cutoff=0.6)
        return f"unknown key '{key}'" + (f"; did you mean '{prefix}{'.'.join(map(str, (*first['loc'][:-1], near[0])))}'?" if near else "")
    message = str(first["msg"]).removeprefix("Value error, ")
    given = f" (got {first['input']!r})" if first["loc"] and not isinstance(first["input"], dict | BaseModel) else ""
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{key.rstrip('.')}: {message}{given}{more}" if key else message + more


def _keys_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The keys that may stand where ``loc`` points."""
    for part in loc:
        field = model.model_fields.get(str(part))
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        model = inner
    return list(model.model_fields)
