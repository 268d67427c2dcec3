"""The tree of a run's settings, and what must fit together in it. Settings that cannot work together are refused here,
before anything starts."""

from __future__ import annotations

from pydantic import Field, model_validator

from actors.config import DataConfig, EncoderConfig, EvaluationConfig, PromptConfig, RolloutConfig, WeightsConfig
from diffusion.config import ModelConfig, SamplerConfig, Strict
from replay.config import RedisConfig, ReplayConfig
from services.config import FleetConfig, fleet_of
from services.terms import Term
from trainer.config.hacking import HackingConfig
from trainer.config.learner import LearnerConfig, OptimizerConfig
from trainer.config.objective import ObjectiveConfig
from trainer.config.rewards import RewardTerm


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
    stop_deadline_s: float = Field(
        20.0, gt=0, description="seconds that a run may take after SIGINT or SIGTERM to finish its update and checkpoint (Kubernetes kills 30 s after SIGTERM)"
    )
    model: ModelConfig = Field(default_factory=lambda: ModelConfig(), description="the policy")
    sampler: SamplerConfig = Field(default_factory=lambda: SamplerConfig(), description="rollout sampling")
    rollout: RolloutConfig = Field(default_factory=lambda: RolloutConfig(), description="rollout generators")
    prompts: PromptConfig = Field(default_factory=lambda: PromptConfig(), description="prompt source")
    encoder: EncoderConfig = Field(default_factory=lambda: EncoderConfig(), description="where prompts are encoded")
    data: DataConfig = Field(default_factory=lambda: DataConfig(), description="anchor data")
    objective: ObjectiveConfig = Field(default_factory=lambda: ObjectiveConfig(), description="the loss")
    optimizer: OptimizerConfig = Field(default_factory=lambda: OptimizerConfig(), description="optimiser and EMA")
    learner: LearnerConfig = Field(default_factory=lambda: LearnerConfig(), description="learner group")
    rewards: dict[str, RewardTerm] = Field(
        default_factory=lambda: {"ocr": RewardTerm()},
        description="what is trained on and shown in evaluations: reward, reward.sub_score or reward.a+b, each with weight and clip; {} = none (SFT only)",
    )
    held_out_rewards: tuple[str, ...] = Field((), description="scored in evaluations and never trained on; named like those above")
    fleet: FleetConfig = Field(default_factory=lambda: FleetConfig(), description="where rewards are scored, and what kind each is (as in rewards.yaml)")
    replay: ReplayConfig = Field(default_factory=lambda: ReplayConfig(), description="replay buffer")
    redis: RedisConfig = Field(default_factory=lambda: RedisConfig(), description="Redis server of the replay buffer")
    weights: WeightsConfig = Field(default_factory=lambda: WeightsConfig(), description="how weights are published")
    evaluation: EvaluationConfig = Field(default_factory=lambda: EvaluationConfig(), description="held-out numbers")
    hacking: HackingConfig = Field(default_factory=lambda: HackingConfig(), description="signs of reward hacking in them")
    ray: RayConfig = Field(default_factory=lambda: RayConfig(), description="Ray cluster")

    @property
    def uses_policy(self) -> bool:
        return self.objective.policy_weight > 0

    @property
    def uses_data(self) -> bool:
        return self.objective.data_weight > 0

    @property
    def feeds_data(self) -> bool:
        """Whether anchor batches are made apart; with `data.pairing: own` each group brings its own datum."""
        return self.uses_data and self.data.pairing == "free"

    @property
    def data_share(self) -> float:
        """What the mean of an update's diffusion losses is multiplied by: `data_weight`; evaluated at the first of K trained steps alone, over K."""
        return self.objective.data_weight / (self.sampler.trained_count if self.objective.data_per == "first" else 1)

    @property
    def data_rows(self) -> int:
        """Anchor samples per update: as configured, else one per rollout."""
        return self.data.batch_size or self.rollout.groups_per_step * self.rollout.group_size

    @property
    def reward_names(self) -> list[str]:
        """Rewards that the run asks for, each once, trained ones first."""
        return list(dict.fromkeys(Term.parse(name).reward for name in (*self.rewards, *self.held_out_rewards)))

    @model_validator(mode="after")
    def _rewards_exist(self) -> RunConfig:
        twice = sorted({*self.rewards} & {*self.held_out_rewards})
        if twice:
            raise ValueError(f"held_out_rewards names {twice[0]!r}, which is trained on; a held-out reward is one that training never sees")
        if self.uses_policy and not self.rewards:
            raise ValueError("rewards is empty, and rollouts are trained on rewards: name one, such as {ocr: {weight: 1.0}}, or use objective.preset=sft")
        if self.reward_names and self.fleet.url is None:
            fleet_of(self.fleet, self.reward_names)
        return self

    @model_validator(mode="after")
    def _own_data_exists(self) -> RunConfig:
        if self.data.pairing == "free":
            return self
        if not self.uses_policy:
            raise ValueError("data.pairing=own pairs anchor data with rollouts, and there are none; use free")
        if self.prompts.kind != "data":
            raise ValueError(f"data.pairing=own needs prompts with pictures, but prompts.kind={self.prompts.kind} draws them elsewhere; use prompts.kind=data")
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        rollouts = self.rollout.groups_per_step * self.rollout.group_size
        if self.uses_policy and self.uses_data and self.data_rows != rollouts:
            raise ValueError(
                f"data.batch_size={self.data_rows} must equal the rollouts per update ({rollouts} = groups_per_step x group_size) "
                "when rollouts are trained; leave it null"
            )
        members = self.rollout.groups_per_step * self.rollout.enough_members  # those that are there when rewards fail
        rows = min([members] * self.uses_policy + [self.data_rows] * self.uses_data)
        if self.learner.data_ranks > rows:
            groups = f" / sequence_ranks={self.learner.sequence_ranks}" if self.learner.sequence_ranks > 1 else ""
            raise ValueError(
                f"learner.ranks={self.learner.ranks}{groups} exceeds the {rows} rollouts or anchor samples of an update: some rank would have nothing to do"
            )
        self._check_updates_of_a_claim()
        densities = self.objective.old_log_prob == "rollout" and not self.objective.on_samples
        if self.model.lora.merge and self.model.lora.rank and densities:
            raise ValueError(
                "model.lora.merge=true rounds otherwise than the adapter that is trained, and log-probabilities of such rollouts would not match; "
                "set objective.old_log_prob=learner, or model.lora.merge=false"
            )
        if self.weights.dtype == "bfloat16" and self.uses_policy and densities:
            raise ValueError(
                "weights.dtype=bfloat16 rounds the weights that rollouts are sampled with, and log-probabilities of such rollouts would not match; "
                "set objective.old_log_prob=learner, or weights.dtype=float32"
            )
        if self.uses_policy and self.rollout.group_size == 1:
            o = self.objective
            if o.advantage_baseline == "group" and (o.advantage_scale == "batch" or o.advantage_std == "biased"):
                raise ValueError(
                    "rollout.group_size=1 leaves every advantage at 0 with objective.advantage_scale=batch or advantage_std=biased; use group and unbiased, "
                    "with which the advantage is the reward itself, or larger groups"
                )
            if self.replay.drop_zero_variance:
                raise ValueError("replay.drop_zero_variance=true drops every group of rollout.group_size=1; set it to false")
        if self.uses_policy and self.sampler.noise_on == "none" and not self.objective.on_samples:
            raise ValueError("sampler.noise_on=none leaves no step with a density, which objective.policy_loss=ratio needs; use all or trained, or nft or awm")
        if self.objective.on_samples and self.sampler.guidance != 1:
            raise ValueError(
                f"objective.policy_loss={self.objective.policy_loss} fits the network itself to what was sampled; set sampler.guidance=1, "
                f"not {self.sampler.guidance:g}"
            )
        if self.objective.data_noise == "shared" and not self.uses_policy:
            raise ValueError("objective.data_noise=shared needs rollouts; use fresh")
        if self.objective.data_per == "first" and not self.uses_policy:
            raise ValueError("objective.data_per=first evaluates at a rollout's first trained step, and there are no rollouts; use rollout")
        if self.redis.url == "embedded" and self.ray.address is not None:
            raise ValueError("redis.url=embedded listens on this machine only; with ray.address give a redis://host:port/ that every node can reach")
        return self

    def _check_updates_of_a_claim(self) -> None:
        count, groups = self.learner.updates_per_claim, self.rollout.groups_per_step
        if count == 1:
            return
        if not self.uses_policy:
            raise ValueError(f"learner.updates_per_claim={count} cuts the groups of a step, and there are no rollouts; set data.batch_size instead")
        if self.objective.policy_loss == "awm":
            raise ValueError(f"objective.policy_loss=awm takes its ratio to the policy of the same update; set learner.updates_per_claim=1, not {count}")
        least = groups // count * self.rollout.enough_members
        if self.learner.data_ranks > least:
            raise ValueError(
                f"learner.updates_per_claim={count} of rollout.groups_per_step={groups} leave {least} rollouts to an update, fewer than the "
                f"{self.learner.data_ranks} ranks that share them; raise groups_per_step"
            )
