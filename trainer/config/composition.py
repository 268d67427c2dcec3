"""What an objective really minimises, in words: a preset's name alone says nothing once keys stand beside it."""

from __future__ import annotations

from trainer.config.objective import ObjectiveConfig
from trainer.config.presets import PRESETS


def composition(objective: ObjectiveConfig) -> str:
    """`ddrl (policy 1, KL 0, data 0.02; the preset has data_weight 0.01)`: the weights in force, and what the preset would set otherwise."""
    plain = ObjectiveConfig(preset=objective.preset)
    weights = f"policy {objective.policy_weight:g}, KL {objective.kl_weight:g}, data {objective.data_weight:g}"
    changed = [f"{key} {_shown(getattr(plain, key))}" for key in sorted(PRESETS[objective.preset].objective) if getattr(plain, key) != getattr(objective, key)]
    return f"{objective.preset} ({weights}" + (f"; the preset has {', '.join(changed)}" if changed else "") + ")"


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
