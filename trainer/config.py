"""One strict tree of settings for a run: YAML, then dotted overrides. Importing this brings in neither torch, ray nor redis.

An unknown key is an error that names the nearest real one; settings that cannot work together are refused here, before
anything starts.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from actors.config import DataConfig, EvaluationConfig, PromptConfig, RolloutConfig
from diffusion.config import ModelConfig, SamplerConfig
from replay.config import RedisConfig, ReplayConfig
from services.config import RewardConfig


class ConfigError(Exception):
    """A configuration that cannot be used; the message is one line for the person who wrote it."""


class Strict(BaseModel):
    """Base of every settings class of this room: unknown keys are errors, values do not change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


PRESETS: dict[str, dict[str, Any]] = {
    # DDRL: reward and data term, no reference model (DDRL §1.4; data_beta of the public configs)
    "ddrl": {"policy_weight": 1.0, "kl_weight": 0.0, "data_weight": 0.01},
    # Flow-GRPO on SD3.5 with the OCR reward: reverse KL 0.04, standard deviation over the whole batch
    "flow_grpo": {"policy_weight": 1.0, "kl_weight": 0.04, "data_weight": 0.0, "advantage_scale": "batch"},
    # DanceGRPO: neither
    "dance_grpo": {"policy_weight": 1.0, "kl_weight": 0.0, "data_weight": 0.0},
    # supervised fine-tuning: the data term alone, no rollouts
    "sft": {"policy_weight": 0.0, "kl_weight": 0.0, "data_weight": 1.0},
}


class ObjectiveConfig(Strict):
    """What is minimised: policy_weight x policy loss + kl_weight x reverse KL + data_weight x diffusion loss."""

    preset: Literal["ddrl", "flow_grpo", "dance_grpo", "sft"] = Field("ddrl", description="a named composition; keys given beside it win")
    policy_weight: float = Field(1.0, ge=0, description="weight of the policy loss; 0 = no rollouts at all")
    kl_weight: float = Field(0.0, ge=0, description="weight of the reverse KL to the starting policy; > 0 keeps a reference model")
    data_weight: float = Field(0.01, ge=0, description="weight of the diffusion loss on anchor data (data_beta of the public code)")
    log_prob: Literal["exact", "unscaled", "std_weighted"] = Field(
        "exact", description="scaling of log-probabilities: exact density; unscaled = squared error only (public DDRL code); std_weighted between"
    )
    old_log_prob: Literal["rollout", "learner"] = Field(
        "rollout",
        description="denominator of probability ratios: rollout = the density stored when sampling; learner = recomputed by the learner before its update, "
        "so that ratios start at 1 whatever the sampler's precision",
    )
    clip: float = Field(1e-3, gt=0, description="probability ratios are clipped to 1 ± clip, in units of the chosen log_prob scaling")
    advantage_scale: Literal["group", "batch"] = Field("group", description="whose standard deviation divides the advantage")
    advantage_clip: float = Field(5.0, gt=0, description="bound on |advantage|")
    exponential_advantage: bool = Field(False, description="map A to -exp(-A), the theory's transform (exp_reward of the public code)")
    data_per: Literal["transition", "rollout"] = Field(
        "transition", description="diffusion-loss evaluations: one per trained transition (public code) or one per rollout (data_on_first_only)"
    )
    data_noise: Literal["fresh", "shared"] = Field(
        "fresh", description="fresh = new noise and time for each evaluation; shared = the rollout's own starting noise and time (public code)"
    )

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        if isinstance(values, dict):
            return {**PRESETS.get(str(values.get("preset", "ddrl")), {}), **values}
        return values

    @model_validator(mode="after")
    def _something_to_do(self) -> ObjectiveConfig:
        if self.policy_weight == 0 and self.data_weight == 0:
            raise ValueError("policy_weight and data_weight are both 0: nothing would be learnt")
        if self.policy_weight == 0 and self.kl_weight > 0:
            raise ValueError("kl_weight needs rollouts; set policy_weight > 0")
        return self


class OptimizerConfig(Strict):
    """AdamW and the moving average of the weights."""

    lr: float = Field(1e-4, gt=0, description="learning rate")
    betas: tuple[float, float] = Field((0.9, 0.99), description="Adam's betas")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon")
    weight_decay: float = Field(1e-4, ge=0, description="decoupled weight decay")
    warmup: int = Field(0, ge=0, description="updates of linear warm-up")
    decay: Literal["none", "cosine"] = Field("none", description="cosine = fall to 2 % of lr over the run")
    grad_clip: float = Field(1.0, gt=0, description="largest gradient norm")
    ema: float = Field(0.95, ge=0, lt=1, description="decay of the exponential moving average of the weights; 0 = none")


class LearnerConfig(Strict):
    """The FSDP learner group."""

    ranks: int = Field(2, ge=1, description="learner processes (FSDP2 shards)")
    shard_blocks: bool = Field(
        True, description="shard every transformer block on its own; false = the whole model as one unit (small models: fewer collectives)"
    )
    micro_batch: int = Field(160, ge=1, description="samples in one forward pass of a rank")
    threads: int = Field(1, ge=1, description="torch threads of one rank")
    gpus: float = Field(0.0, ge=0, description="GPUs of one rank; 0 = CPU and gloo")
    max_failures: int = Field(3, ge=0, description="worker-group restarts before the run gives up")
    collective_timeout_s: float = Field(120.0, gt=0, description="deadline of a collective among ranks")
    max_skipped: int = Field(20, ge=0, description="updates skipped in a row for non-finite gradients before the run gives up")


class RayConfig(Strict):
    """Which Ray cluster."""

    address: str | None = Field(None, description="cluster to join (auto, host:port); null = start a local one")
    cpus: int = Field(16, ge=1, description="logical CPUs of a local cluster (more than the machine's cores: actors mostly wait)")
    object_store_mb: int = Field(256, ge=80, description="object store of a local cluster")


class RunConfig(Strict):
    """A run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run and of its folder")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of everything random")
    updates: int = Field(100, ge=1, description="optimiser updates")
    checkpoint_every: int = Field(20, ge=1, description="updates between checkpoints")
    wandb_project: str | None = Field(None, description="Weights & Biases project to log to as well (needs the extra: pip install 'ddrl[wandb]'); null = none")
    max_dead_groups: int = Field(8, ge=0, description="groups that failed every attempt before the run gives up")
    model: ModelConfig = Field(default_factory=lambda: ModelConfig(), description="the policy")
    sampler: SamplerConfig = Field(default_factory=lambda: SamplerConfig(), description="rollout sampling")
    rollout: RolloutConfig = Field(default_factory=lambda: RolloutConfig(), description="rollout generators")
    prompts: PromptConfig = Field(default_factory=lambda: PromptConfig(), description="prompt source")
    data: DataConfig = Field(default_factory=lambda: DataConfig(), description="anchor data")
    objective: ObjectiveConfig = Field(default_factory=lambda: ObjectiveConfig(), description="the loss")
    optimizer: OptimizerConfig = Field(default_factory=lambda: OptimizerConfig(), description="optimiser and EMA")
    learner: LearnerConfig = Field(default_factory=lambda: LearnerConfig(), description="learner group")
    reward: RewardConfig = Field(default_factory=lambda: RewardConfig(), description="reward fleet")
    replay: ReplayConfig = Field(default_factory=lambda: ReplayConfig(), description="replay buffer")
    redis: RedisConfig = Field(default_factory=lambda: RedisConfig(), description="Redis server of the replay buffer")
    evaluation: EvaluationConfig = Field(default_factory=lambda: EvaluationConfig(), description="held-out numbers")
    ray: RayConfig = Field(default_factory=lambda: RayConfig(), description="Ray cluster")

    @property
    def uses_policy(self) -> bool:
        return self.objective.policy_weight > 0

    @property
    def uses_data(self) -> bool:
        return self.objective.data_weight > 0

    @property
    def data_rows(self) -> int:
        """Anchor samples per update: as configured, else one per rollout."""
        return self.data.batch_size or self.rollout.groups_per_step * self.rollout.group_size

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        rollouts = self.rollout.groups_per_step * self.rollout.group_size
        if self.uses_policy and self.uses_data and self.data_rows != rollouts:
            raise ValueError(
                f"data.batch_size={self.data_rows} must equal the rollouts per update ({rollouts} = groups_per_step x group_size) "
                "when rollouts are trained; leave it null"
            )
        rows = min([self.rollout.groups_per_step] * self.uses_policy + [self.data_rows] * self.uses_data)
        if self.learner.ranks > rows:
            raise ValueError(f"learner.ranks={self.learner.ranks} exceeds the {rows} groups or anchor samples of an update: some rank would have nothing to do")
        if self.model.lora.merge and self.model.lora.rank and self.objective.old_log_prob == "rollout":
            raise ValueError(
                "model.lora.merge=true rounds otherwise than the adapter that is trained, and log-probabilities of such rollouts would not match; "
                "set objective.old_log_prob=learner, or model.lora.merge=false"
            )
        if self.objective.data_noise == "shared" and not self.uses_policy:
            raise ValueError("objective.data_noise=shared needs rollouts; use fresh")
        if self.redis.url == "embedded" and self.ray.address is not None:
            raise ValueError("redis.url=embedded listens on this machine only; with ray.address give a redis://host:port/ that every node can reach")
        return self


def _field_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, info in model.model_fields.items():
        names.append(prefix + name)
        nested = [info.annotation, *get_args(info.annotation)]
        for kind in nested:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                names.extend(_field_names(kind, f"{prefix}{name}."))
    return names


def all_keys() -> list[str]:
    """Every dotted key of the tree, in order."""
    return _field_names(RunConfig)


def nearest_key(key: str) -> str | None:
    """The real key most like `key`, if any is close."""
    close = difflib.get_close_matches(key, all_keys(), n=1, cutoff=0.6)
    return close[0] if close else None


def _unknown(key: str) -> ConfigError:
    near = nearest_key(key)
    return ConfigError(f"unknown key '{key}'" + (f"; did you mean '{near}'?" if near else "; `ddrl config RECIPE` lists all keys"))


def apply_overrides(tree: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Apply `a.b=value` settings (values are YAML) to a copy of `tree`. Raises ConfigError."""
    result: dict[str, Any] = yaml.safe_load(yaml.safe_dump(tree)) if tree else {}
    known = set(all_keys())
    for item in overrides:
        key, separator, text = item.partition("=")
        if not separator or not key:
            raise ConfigError(f"override '{item}' is not of the form key=value")
        if key not in known:
            raise _unknown(key)
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"override '{item}': the value is not YAML") from None
        node = result
        *parents, leaf = key.split(".")
        for parent in parents:
            child = node.setdefault(parent, {})
            if not isinstance(child, dict):
                raise ConfigError(f"override '{item}': '{parent}' is not a section in this recipe")
            node = child
        node[leaf] = value
    return result


def _one_line(error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    parts = [str(part) for part in first["loc"]]
    while first["type"] != "extra_forbidden" and parts and ".".join(parts) not in all_keys():
        parts.pop()  # places inside a value, and the validator's names of a union's branches
    key = ".".join(parts)
    if first["type"] == "extra_forbidden":
        return _unknown(key)
    message = str(first["msg"]).removeprefix("Value error, ")
    given = f" (got {first['input']!r})" if key and not isinstance(first["input"], dict) else ""
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return ConfigError(f"{key}: {message}{given}{more}" if key else message + more)


def parse_config(tree: dict[str, Any]) -> RunConfig:
    """Validate a tree. Raises ConfigError with one clear line."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise _one_line(error) from None


def load_config(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a recipe and apply overrides. Raises ConfigError."""
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"recipe {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"recipe {path} is not a text file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"recipe {path} must be a mapping of settings")
    return parse_config(apply_overrides(tree, overrides or []))


def _dump(model: BaseModel, indent: int) -> list[str]:
    lines = []
    for name, info in type(model).model_fields.items():
        value = getattr(model, name)
        pad = "  " * indent
        if isinstance(value, BaseModel):
            lines.extend(["", f"{pad}# {info.description}", f"{pad}{name}:", *_dump(value, indent + 1)])
        else:
            shown = _without_password(model.model_dump(mode="json")[name])
            plain = yaml.safe_dump(shown, default_flow_style=True, width=10_000).strip().removesuffix("\n...").strip()
            lines.append(f"{pad}{name}: {plain}  # {info.description}")
    return lines


def render_config(config: RunConfig) -> str:
    """The resolved tree as YAML with a comment for each key; reads back to the same configuration, but for a password in
    `redis.url`, which is never shown or stored."""
    return "\n".join(_dump(config, 0)).lstrip("\n") + "\n"


def _without_password(value: Any) -> Any:
    """A URL without its password, in the authority or in the query; anything else as it is."""
    if not isinstance(value, str):
        return value
    return re.sub(r"([?&]password=)[^&\s]+", r"\1***", re.sub(r"(://[^:/@\s]*:)\S+@", r"\1***@", value))
