"""Judging: what a recipe's own first groups and updates show. Pure functions of facts."""

from __future__ import annotations

from statistics import fmean

from trainer.doctor.facts import Trial
from trainer.doctor.finding import Finding, Level

FLAT = 1e-9
MANY = 0.5
"""Share of groups without a spread, or of members at the top, above which it is said."""
MISSING = 0.1
UNEQUAL = 30.0
"""How many times one term's gradient may be the other's before it is said."""
SURELY_WORSE = 3.0
"""Standard errors by which the reward must fall to be said to."""
BROKEN = 0.3
"""Rise of the diffusion loss in a few updates that nothing but too high a learning rate makes."""
REMEDY = {
    "start": "the same would end a run",
    "reward": "mend the reward before anything is trained on it",
    "sampling and scoring": "the same would end a run",
    "log-probability": "sampler and learner must be of one build, with one scheduler (model.path), sampler.kernel and sampler.steps",
    "gradients": "the same would end a run",
    "updates": "lower optimizer.lr",
}


def judge(facts: Trial) -> list[Finding]:
    """All that is said of a trial."""
    if facts.skipped:
        return [Finding("trial", "ok", f"not made: {facts.skipped}")]
    told = []
    if facts.scorers:
        told.append(Finding("trial: reward", "ok", f"{', '.join(facts.scorers)}: self-test passed"))
    if facts.spreads:
        told.append(spread(facts))
        if facts.missing > 0:
            level: Level = "warning" if facts.missing > MISSING else "ok"
            told.append(Finding("trial: scores", level, f"{facts.missing:.0%} of the scores are missing", "`ddrl score` shows the reward's own reason"))
    if facts.deviation is not None and facts.limit is not None:
        told.append(densities(facts.deviation, facts.limit))
    if facts.policy_gradient is not None:
        told.append(gradients(facts))
    if facts.rewards:
        told.append(updates(facts))
    if facts.error:
        told.append(Finding(f"trial: {facts.stage}", "problem", facts.error, REMEDY.get(facts.stage, "the same would end a run")))
    return told


def spread(facts: Trial) -> Finding:
    """Do rewards vary inside groups, so that there is something to learn from?"""
    flat = sum(s < FLAT for s in facts.spreads)
    groups, name = len(facts.spreads), "trial: reward spread"
    found = f"inside groups of the starting policy {fmean(facts.spreads):.3g} around {fmean(facts.means):.3g}, none in {flat} of {groups} groups"
    if flat == groups:
        return Finding(
            name, "problem", f"no reward varies inside any of {groups} groups: every advantage is 0, and nothing would be learnt",
            "check the reward (is it constant?) with `ddrl score`, or use prompts that the policy sometimes does well and sometimes badly",
        )  # fmt: skip
    if facts.top is not None and facts.top > MANY:
        return Finding(name, "warning", f"{found}; {facts.top:.0%} of the members are at the top already", "harder prompts, or a stricter reward")
    if flat > MANY * groups:
        return Finding(name, "warning", found, "larger groups (rollout.group_size), a finer reward, or replay.drop_zero_variance=true")
    return Finding(name, "ok", found)


def densities(deviation: float, limit: float) -> Finding:
    """Does the learner find what the sampler stored?"""
    found = f"|ratio - 1| of replayed transitions is up to {deviation:.1e}, a tenth of the clip is {limit:.1e}"
    if deviation > limit:
        return Finding("trial: log-probability", "problem", found, "objective.old_log_prob=learner, or model.dtype=float32, or raise objective.clip")
    return Finding("trial: log-probability", "ok", found)


def gradients(facts: Trial) -> Finding:
    """Does either term drown the other?"""
    policy, data, name = facts.policy_gradient or 0.0, facts.data_gradient, "trial: gradients"
    if policy == 0:
        return Finding(name, "problem", "the policy loss has no gradient", "see the reward's spread above; model.lora.targets may name nothing")
    if data is None:
        return Finding(name, "ok", f"policy term {policy:.2g}; no data term")
    along = "" if facts.cosine is None else f", cosine {facts.cosine:+.2f}"
    found = f"policy term {policy:.2g}, data term {data:.2g}{along}"
    if data > UNEQUAL * policy:
        return Finding(name, "warning", f"{found}: the data term drowns the reward", "lower objective.data_weight")
    if policy > UNEQUAL * data:
        return Finding(name, "warning", f"{found}: the data term holds nothing", "raise objective.data_weight")
    return Finding(name, "ok", found)


def updates(facts: Trial) -> Finding:
    """Does the recipe's own step break the policy?"""
    name, half = "trial: updates", max(1, len(facts.rewards) // 2)
    first, last = fmean(facts.rewards[:half]), fmean(facts.rewards[-half:])
    error = (facts.reward_error or 0.0) * (2 / half) ** 0.5
    found = f"reward of one prompt {first:.3g} -> {last:.3g} (± {error:.2g}) in {len(facts.rewards)} updates"
    rise = None
    if facts.loss_before and facts.loss_after is not None:
        rise = facts.loss_after / facts.loss_before - 1
        found += f", diffusion loss {rise:+.1%}"
    if (rise is not None and rise > BROKEN) or last < first - SURELY_WORSE * error:
        return Finding(name, "problem", f"{found}: the policy breaks", "optimizer.lr is too high: try a tenth of it, or a hundredth")
    return Finding(name, "ok", found)
