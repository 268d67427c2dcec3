"""What is minimised."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from diffusion.config import Strict
from trainer.config.presets import PRESETS, PresetName


class ObjectiveConfig(Strict):
    """What is minimised: policy_weight x policy loss + kl_weight x reverse KL + data_weight x diffusion loss."""

    preset: PresetName = Field(
        "ddrl", description="a published composition of the keys below (docs/algorithms.md says which code, of which date); keys given beside it win"
    )
    policy_weight: float = Field(1.0, ge=0, description="weight of the policy loss; 0 = no rollouts at all")
    policy_loss: Literal["ratio", "nft", "awm"] = Field(
        "ratio",
        description="ratio = clipped probability ratios of the rollouts' own steps; on finished rollouts, noised anew, and without densities: nft = rewarded "
        "ones attract and the others repel the velocity (DiffusionNFT), awm = their diffusion loss weighted by the advantage (Advantage Weighted Matching)",
    )
    policy_times: Literal["steps", "stratified"] = Field(
        "steps",
        description="policy_loss=nft or awm: times that a finished rollout is noised to: those of its trained steps, or as many in equal parts of the "
        "policy's own law of times",
    )
    nft_beta: float = Field(1.0, gt=0, description="policy_loss=nft: how far from the old velocity the two implicit policies lie")
    awm_weighting: Literal["uniform", "t", "t2", "power"] = Field(
        "uniform", description="policy_loss=awm: the matching loss m of time t: m, m t, m t², or (m + 1e-10)^awm_power t / awm_power"
    )
    awm_power: float = Field(0.25, gt=0, le=1, description="awm_weighting=power: its exponent (ghuber_power of the public code)")
    old_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="an old policy trails the trained one, old = d old + (1 - d) new after update n with d = min(old_decay, old_decay_rate (n - "
        "old_decay_start)): nft samples rollouts from it and starts its velocities from it; 0 = the policy before the update",
    )
    old_decay_rate: float = Field(0.001, ge=0, description="growth of its decay an update")
    old_decay_start: int = Field(0, ge=0, description="updates before its decay grows")
    old_kl_weight: float = Field(0.0, ge=0, description="policy_loss=nft or awm: weight of (v - v_old)² beside kl_weight, which weighs (v - v_ref)²")
    kl_weight: float = Field(0.0, ge=0, description="weight of the reverse KL to the starting policy; > 0 keeps a reference model")
    kl_scale: Literal["step", "rate", "unscaled"] = Field(
        "step",
        description="what (mu - mu_ref)² is divided by: step = 2 std², the KL of the two steps (Flow-GRPO until June 2025); rate = 2 std² / (t - t'), the "
        "noise of a unit of time (Flow-GRPO since July 2025); unscaled = 1 (public DDRL code)",
    )
    data_weight: float = Field(0.01, ge=0, description="weight of the diffusion loss on anchor data (data_beta of the public code)")
    log_prob: Literal["exact", "unscaled", "std_weighted"] = Field(
        "exact", description="scaling of log-probabilities: exact density; unscaled = squared error only (public DDRL code); std_weighted between"
    )
    old_log_prob: Literal["rollout", "learner"] = Field(
        "rollout",
        description="denominator of probability ratios: rollout = the density stored when sampling; learner = recomputed by the learner before its update, "
        "so that ratios start at 1 whatever the sampler's precision",
    )
    center_ratio: bool = Field(
        False,
        description="add |mu - mu_old|² / (2 std²) to log-ratios before they are scaled, whose mean over rollouts is then 0 (GRPO-Guard); "
        "needs old_log_prob=learner",
    )
    clip: float = Field(1e-3, gt=0, description="probability ratios are clipped to 1 ± clip, in units of the chosen log_prob scaling")
    advantages: Literal["each", "added", "sum"] = Field(
        "each",
        description="several rewards: each = normalised one by one, then averaged by weight (public DDRL code); added = the same, added up by weight (MixGRPO; "
        "DanceGRPO while no ratio is clipped); sum = their weighted sum is normalised (Flow-GRPO)",
    )
    failed_reward: Literal["leave_out", "fill_mean"] = Field(
        "leave_out", description="a member without a score: leave_out of its group, or fill_mean = give it the mean of the group's others (public DDRL code)"
    )
    advantage_scale: Literal["group", "batch"] = Field("group", description="whose standard deviation divides the advantage")
    advantage_baseline: Literal["group", "prompt"] = Field(
        "group",
        description="whose mean is taken off, and with advantage_scale=group whose standard deviation divides: each group's own, or that of all "
        "groups of the update with the same prompt (Flow-GRPO)",
    )
    advantage_std: Literal["unbiased", "biased"] = Field("unbiased", description="standard deviation of n rewards: over n - 1, or over n (Flow-GRPO)")
    advantage_epsilon: float = Field(1e-4, gt=0, description="added to the standard deviation (DanceGRPO: 1e-8)")
    advantage_clip: float = Field(5.0, gt=0, description="bound on |advantage|")
    advantage_max: float | None = Field(
        None, gt=0, description="bounded advantages are scaled so that this is their bound (AWM: 1); null = advantage_clip stays it"
    )
    exponential_advantage: bool = Field(False, description="map A to -exp(-A), the theory's transform (exp_reward of the public code)")
    data_per: Literal["transition", "rollout", "first"] = Field(
        "transition",
        description="diffusion-loss evaluations: one per trained transition (public code); one per rollout; or first = one per rollout at its "
        "first trained step, with weight 1 / trained steps (data_on_first_only of the public code)",
    )
    data_weighting: Literal["uniform", "cosmos"] = Field(
        "uniform", description="weight of the velocity's squared error over the flow's time t: 1, or t² + (1 - t)² (public DDRL code)"
    )
    data_times: Literal["policy", "cosmos"] = Field(
        "policy",
        description="times of fresh evaluations: the policy's own law; or that of the public DDRL code, sigma log-normal around 19.6 (ln 4 + ln 24 / 2, 1.2), "
        "5 % of it log-uniform from 200 to 100,000",
    )
    data_noise: Literal["fresh", "shared"] = Field(
        "fresh", description="fresh = new noise and time for each evaluation; shared = the rollout's own starting noise and time (public code)"
    )

    @property
    def on_samples(self) -> bool:
        """Whether the policy loss is one of finished rollouts, noised anew, and not of their steps."""
        return self.policy_weight > 0 and self.policy_loss != "ratio"

    @property
    def keeps_old(self) -> bool:
        """Whether a policy is kept that trails the trained one."""
        return self.on_samples and self.old_decay > 0

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        if isinstance(values, dict):
            preset = PRESETS.get(str(values.get("preset", "ddrl")))
            return {**(preset.objective if preset else {}), **values}
        return values

    @model_validator(mode="after")
    def _something_to_do(self) -> ObjectiveConfig:
        if self.policy_weight == 0 and self.data_weight == 0:
            raise ValueError("policy_weight and data_weight are both 0: nothing would be learnt")
        if self.policy_weight == 0 and self.kl_weight > 0:
            raise ValueError("kl_weight needs rollouts; set policy_weight > 0")
        if self.policy_loss == "ratio":
            trailing = [key for key in ("old_decay", "old_kl_weight") if getattr(self, key) > 0]
            if trailing:
                raise ValueError(f"{trailing[0]} belongs to policy_loss=nft or awm; policy_loss=ratio has the rollout's own density (old_log_prob)")
        elif self.kl_weight > 0 and self.kl_scale != "unscaled":
            raise ValueError(f"kl_scale={self.kl_scale} divides by the noise of a step, and policy_loss={self.policy_loss} knows none; set kl_scale=unscaled")
        elif self.old_kl_weight > 0 and self.old_decay == 0:
            raise ValueError(f"old_kl_weight={self.old_kl_weight:g} needs an old policy that is not the one before the update; set old_decay")
        if self.center_ratio and (self.policy_loss != "ratio" or self.old_log_prob != "learner"):
            raise ValueError("center_ratio centres ratios of steps on the policy before the update: it needs policy_loss=ratio and old_log_prob=learner")
        if self.policy_loss == "awm" and self.old_decay > 0 and self.old_kl_weight == 0:
            raise ValueError("policy_loss=awm uses its old policy for old_kl_weight alone, which is 0; set old_decay=0")
        return self
