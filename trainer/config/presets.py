"""Named compositions of an objective, each a dated version of public code. docs/algorithms.md has a section for each.

A preset fills in keys; a key given beside it wins. It holds what makes the formula: not learning rates, sizes of groups or numbers of steps,
which are a recipe's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

PresetName = Literal[
    "ddrl", "ddrl_cosmos", "flow_grpo", "flow_grpo_2025_06", "flow_grpo_fast", "flow_cps", "grpo_guard", "dance_grpo", "mix_grpo", "diffusion_nft", "awm", "sft"
]


@dataclass(frozen=True)
class Preset:
    """A composition.

    Attributes:
        source: whose it is: repository, commit and its date.
        objective: keys of the section `objective`.
    """

    source: str
    objective: Mapping[str, Any]


_FLOW_GRPO: dict[str, Any] = {
    "policy_weight": 1.0,
    "data_weight": 0.0,
    "clip": 1e-4,
    "advantages": "sum",
    "advantage_scale": "batch",
    "advantage_baseline": "prompt",
    "advantage_std": "biased",
}

_DANCE_GRPO: dict[str, Any] = {
    "policy_weight": 1.0,
    "kl_weight": 0.0,
    "data_weight": 0.0,
    "clip": 1e-4,
    "advantages": "added",
    "advantage_epsilon": 1e-8,
}

_SAMPLES: dict[str, Any] = {
    "policy_weight": 1.0,
    "data_weight": 0.0,
    "kl_scale": "unscaled",
    "advantages": "sum",
    "advantage_scale": "batch",
    "advantage_baseline": "prompt",
    "advantage_std": "biased",
}

PRESETS: dict[str, Preset] = {
    "ddrl": Preset("arXiv 2512.04332, §3, with data_beta of the public recipes", {"policy_weight": 1.0, "kl_weight": 0.0, "data_weight": 0.01}),
    "ddrl_cosmos": Preset(
        "nvidia-cosmos/cosmos-rl 89f2e5b5 (2026-07-31)",
        {
            "policy_weight": 1.0,
            "kl_weight": 0.0,
            "kl_scale": "unscaled",
            "data_weight": 0.01,
            "data_per": "transition",
            "data_noise": "shared",
            "data_times": "cosmos",
            "data_weighting": "cosmos",
            "log_prob": "unscaled",
            "clip": 1e-4,
            "advantages": "each",
            "failed_reward": "fill_mean",
        },
    ),
    "flow_grpo": Preset("yifan123/flow_grpo ac4c86e (2025-07-18), general_ocr_sd3", {**_FLOW_GRPO, "kl_weight": 0.04, "kl_scale": "rate"}),
    "flow_grpo_2025_06": Preset("yifan123/flow_grpo f37646f (2025-06-16), general_ocr_sd3", {**_FLOW_GRPO, "kl_weight": 0.004, "kl_scale": "step"}),
    "flow_grpo_fast": Preset("yifan123/flow_grpo a482878 (2025-08-19), pickscore_sd3_fast", {**_FLOW_GRPO, "clip": 1e-5, "kl_weight": 0.0}),
    "flow_cps": Preset(
        "IamCreateAI/FlowCPS b402c7a (2025-09-11), general_ocr_sd3", {**_FLOW_GRPO, "log_prob": "unscaled", "kl_weight": 0.04, "kl_scale": "step"}
    ),
    "grpo_guard": Preset(
        "X-GenGroup/Flow-Factory a0b2bc5 (2026-05-02), trainer grpo-guard",
        {
            **_FLOW_GRPO,
            "kl_weight": 0.0,
            "kl_scale": "unscaled",
            "log_prob": "std_weighted",
            "center_ratio": True,
            "old_log_prob": "learner",
            "advantage_scale": "group",
            "advantage_epsilon": 1e-6,
        },
    ),
    "dance_grpo": Preset("XueZeyue/DanceGRPO 15cc71d (2025-10-16), finetune_flux_grpo.sh", _DANCE_GRPO),
    "mix_grpo": Preset("Tencent-Hunyuan/MixGRPO e5cdd6a (2025-08-08), finetune_flux_grpo_MixGRPO.sh", _DANCE_GRPO),
    "diffusion_nft": Preset(
        "NVlabs/DiffusionNFT 24af555 (2025-09-22), config/nft.py",
        {
            **_SAMPLES,
            "policy_loss": "nft",
            "nft_beta": 1.0,
            "kl_weight": 1e-4,
            "old_decay": 0.5,
            "old_decay_rate": 0.001,
        },
    ),
    "awm": Preset(
        "scxue/advantage_weighted_matching be51372 (2026-03-27), geneval_sd3_no_cfg",
        {
            **_SAMPLES,
            "policy_loss": "awm",
            "awm_weighting": "power",
            "awm_power": 0.25,
            "advantage_max": 1.0,
            "kl_weight": 1e-3,
            "old_decay": 0.3,
            "old_decay_rate": 0.001,
            "old_kl_weight": 1.0,
        },
    ),
    "sft": Preset("the data term alone, no rollouts", {"policy_weight": 0.0, "kl_weight": 0.0, "data_weight": 1.0}),
}
"""Compositions by name."""

COMPOSED = frozenset(key for preset in PRESETS.values() for key in preset.objective)
"""What presets set."""
