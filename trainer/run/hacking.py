"""Signs of reward hacking in a held-out evaluation, against that of the starting policy. Pure.

Both are made on the same prompts, noise and loss points, so what is compared is paired (`trainer.report.summary`). Rewards are not looked at: that
they rise is what a hacked policy and a good one have in common.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.config.hacking import HackingConfig
from trainer.report.summary import changes, unpaired

Record = Mapping[str, Any]


def signs(config: HackingConfig, before: Record, now: Record) -> list[str]:
    """Signs in words, each with its number and the limit that it passed; none of evaluations that may not be paired.

    Args:
        before, now: evaluations with their per-prompt numbers, as `eval/*.json` hold them.
    """
    if config.stop == "off" or unpaired(before, now):
        return []
    found, change = list[str](), changes(before, now)
    rise, fall = change.get("diffusion_loss_rise"), -change.get("diversity_change", 0.0)
    if rise is not None and config.loss_rise is not None and rise > config.loss_rise:
        error = change["diffusion_loss_rise_stderr"]
        found.append(f"held-out diffusion loss {rise:+.1%} (standard error {error:.1%}) since the start, limit hacking.loss_rise={config.loss_rise:g}")
    if config.diversity_fall is not None and fall > config.diversity_fall:
        error = change["diversity_change_stderr"]
        found.append(f"diversity {-fall:+.1%} (standard error {error:.1%}) since the start, limit hacking.diversity_fall={config.diversity_fall:g}")
    if config.scene_z is not None:
        far = {name: z for name, z in scene_z(before, now).items() if abs(z) > config.scene_z}
        if far:
            told = ", ".join(f"{name.replace('_', ' ')} {z:+.1f}" for name, z in sorted(far.items(), key=lambda item: -abs(item[1])))
            found.append(f"{told} standard deviations of the starting policy's pictures away, limit hacking.scene_z={config.scene_z:g}")
    return found


def scene_z(before: Record, now: Record) -> dict[str, float]:
    """By scene statistic: how far its mean moved, in standard deviations of the pictures before. A statistic in which those do not differ has none."""
    spread = before.get("scene_std", {})
    return {name: (now["scene"][name] - mean) / spread[name] for name, mean in before["scene"].items() if spread.get(name, 0.0) > 0 and name in now["scene"]}
