"""What is minimised, and the named compositions (presets) of it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from diffusion.config import Strict

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


COMPOSED = frozenset(key for preset in PRESETS.values() for key in preset)
"""What presets set."""


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
    advantages: Literal["each", "sum"] = Field(
        "each",
        description="several rewards: each = normalised one by one, then averaged by weight (public DDRL code); sum = their weighted sum is normalised",
    )
    failed_reward: Literal["leave_out", "fill_mean"] = Field(
        "leave_out", description="a member without a score: leave_out of its group, or fill_mean = give it the mean of the group's others (public DDRL code)"
    )
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
