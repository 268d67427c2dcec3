"""The model card of an exported policy: README.md as the Hugging Face hub shows it, made of what the run has left behind.

The header is huggingface_hub's `ModelCardData`; numbers are those of the run's test evaluations of exactly the exported weights, before
training beside them. What was not evaluated is said to be missing; no number is made up for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from diffusion.lora import WEIGHTS as LORA_WEIGHTS
from diffusion.source import INDEX, is_hub_id
from trainer.config.composition import composition
from trainer.config.run import RunConfig
from trainer.report.summary import changes, evaluation

OWN = "ddrl"
"""The library that model_index.json names for components which diffusers does not have."""


def model_card(run: Path, policy: Path, config: RunConfig, step: int, weights: str) -> ModelCard:
    """The card of `policy`.

    Args:
        run: the run's folder.
        policy: folder of the policy, an export of the run.
        step, weights: which it is: updates, and raw or ema.
    """
    data = header(config, (policy / LORA_WEIGHTS).exists())
    parts = [
        f"# {config.name}",
        _what(config, step, weights),
        "## Before and after\n\n" + figures(evaluation(run, 0), evaluation(run, step, weights), config),
        "## How to open it\n\n" + _opening(policy, config.model.path),
        "## Recipe\n\n" + _recipe(config),
        "## Licence\n\n" + _licence(config.model.path),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def header(config: RunConfig, adapter: bool) -> ModelCardData:
    """The card's YAML. A starting policy that is a folder of somebody's has no id that the hub knows, so it is not named here."""
    base = config.model.path
    known: dict[str, Any] = {"base_model": base, "base_model_relation": "adapter" if adapter else "finetune", "license_link": f"https://huggingface.co/{base}"}
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=[*(["lora"] if adapter else []), "text-to-image", "reinforcement-learning", "ddrl", config.objective.preset],
        license="other",
        license_name="that-of-the-base-model",
        **(known if is_hub_id(base) else {}),
    )


def figures(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, config: RunConfig) -> str:
    """The table of held-out numbers as Markdown, with paired changes where both evaluations are there and of the same set."""
    if before is None or after is None:
        return f"The run holds no test evaluation {'of these weights' if after is None else 'from before training'}."
    found = changes(before, after)
    lines = ["| measure | before | after | change | std. error |", "|---|---|---|---|---|"]
    for name in before["per_prompt"]["rewards"]:
        change, trained = found["rewards"].get(name, {}), "trained" if name in config.rewards else "held out"
        cells = _number(before["rewards"].get(name)), _number(after["rewards"].get(name)), _signed(change.get("gain")), _number(change.get("stderr"))
        lines.append(f"| {name} ({trained}) | {' | '.join(cells)} |")
    for key, title, change in (("diffusion_loss", "Diffusion loss", "diffusion_loss_rise"), ("diversity", "Diversity", "diversity_change")):
        cells = _number(before[key]), _number(after[key]), _percent(found.get(change), "+"), _percent(found.get(f"{change}_stderr"))
        lines.append(f"| {title} | {' | '.join(cells)} |")
    told = [f"{before['prompts']} held-out test prompts, no guidance; standard errors are of paired differences."]
    told += [f"Scored by {name}: `{revision}`." for name, revision in after.get("revisions", {}).items()]
    told += [f"Not compared ({name}): {why}." for name, why in found["unpaired"].items()]
    missing = {name: record["failed"][name] for record in (before, after) for name in record.get("failed", {})}
    told += [f"{name}: no mean, because {count} prompts have no score." for name, count in missing.items()]
    return "\n".join(lines) + "\n\n" + "\n".join(told)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.4f}"


def _percent(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{100 * value:{sign}.2f} %"


def _what(config: RunConfig, step: int, weights: str) -> str:
    o, names = config.objective, ", ".join(config.rewards) or "none"
    held = f", held out: {', '.join(config.held_out_rewards)}" if config.held_out_rewards else ""
    return (
        f"`{_base(config.model.path)}` after {step} updates of reinforcement learning with [ddrl](https://arxiv.org/abs/2512.04332), "
        f"{'moving average of the weights' if weights == 'ema' else 'raw weights'}.\n\n"
        f"- objective: {composition(o)}\n- rewards: {names}{held}\n- prompts: {_source(config.prompts.kind, config.prompts.path)}\n"
        f"- anchor data: {_source(config.data.kind, config.data.path)}"
    )


def _base(path: str) -> str:
    """The starting policy without this machine's folders."""
    return path if is_hub_id(path) else Path(path).name


def _source(kind: str, path: str | None) -> str:
    return kind if path is None else f"{kind} `{Path(path).name}`"


def _opening(policy: Path, base: str) -> str:
    index = json.loads((policy / INDEX).read_text())
    whole = not any(isinstance(part, list) and part[0] == OWN for part in index.values())
    if whole:
        name = index["_class_name"]
        code = f'from diffusers import {name}\n\npipeline = {name}.from_pretrained("FOLDER")\n'
    else:
        name = index["transformer"][1]
        code = f'from diffusers import {name}\n\nnetwork = {name}.from_pretrained("FOLDER", subfolder="transformer")\n'
    told = f"```python\n{code}```" + ("" if whole else "\n\nIts text encoder is ddrl's: `ddrl sample FOLDER --prompts prompts.txt` draws with it.")
    if whole and (policy / LORA_WEIGHTS).exists():
        start = base if is_hub_id(base) else "BASE"
        told += (
            f"\n\nor the adapter alone, on what training started from (needs `peft`):\n\n```python\nfrom diffusers import {name}\n\n"
            f'pipeline = {name}.from_pretrained("{start}")\npipeline.load_lora_weights("FOLDER", weight_name="{LORA_WEIGHTS}")\n```'
        )
    return told


def _recipe(config: RunConfig) -> str:
    s, r, o = config.sampler, config.rollout, config.optimizer
    lora = config.model.lora
    targets = lora.targets if isinstance(lora.targets, str) else ", ".join(lora.targets)
    rows = {
        "size": f"{s.height} x {s.width}",
        "sampler": f"{s.kernel}, noise {s.noise_level:g}, {s.steps} steps, guidance {s.guidance:g}",
        "trained steps": s.trained_steps if isinstance(s.trained_steps, int) else ", ".join(map(str, s.trained_steps)),
        "rollouts an update": f"{r.groups_per_step} groups of {r.group_size}",
        "optimiser": f"AdamW, learning rate {o.lr:g}, betas {o.betas[0]:g}, {o.betas[1]:g}, weight decay {o.weight_decay:g}",
        "adapter": f"rank {lora.rank}, alpha {lora.alpha:g}, {targets}" if lora.rank else "none",
        "type": config.model.dtype,
        "seed": config.seed,
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"| | |\n|---|---|\n{table}\n\nThe whole recipe, all evaluations and the loss curve: `provenance.json`."


def _licence(base: str) -> str:
    return f"The weights are made from `{_base(base)}` and stand under its licence; check its terms before you publish them. ddrl itself is Apache-2.0."
