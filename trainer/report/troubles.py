"""What went wrong in a run without ending it, one sentence each: warnings of updates, failed scores, missing evaluations. Pure."""

from collections.abc import Mapping

from trainer.report.record import RunRecord
from trainer.report.wording import count, number


def dead_words(run: RunRecord) -> str:
    """How many groups failed every attempt, and why the first did; empty for none."""
    told = (run.summary or {}).get("dead_groups")
    amount, reason = 0.0, ""
    if isinstance(told, Mapping):
        amount, reason = number(told.get("count")) or 0.0, str(told.get("first_reason") or "")
    if run.updates:
        amount = max(amount, run.updates[-1].groups.get("dead", 0.0))
    return dead_group_words(amount, reason) if amount else ""


def dead_group_words(amount: float, reason: str) -> str:
    """`3; the first: scoring: no text`"""
    return count(amount) + (f"; the first: {reason}" if reason else "")


def troubles(run: RunRecord) -> list[str]:
    """In the order a reader should know them."""
    found = [f"Sign of reward hacking at update {point.step}, {point.split} prompts: {text}" for point in run.evals for text in point.warnings]
    found += [f"{text} (update {step}{f' and {more} more' if more else ''})" for text, (step, more) in warnings(run).items()]
    failed: dict[str, float] = {}
    for update in run.updates:
        for reward, amount in update.failed.items():
            failed[reward] = failed.get(reward, 0.0) + amount
    found += [f"{count(amount)} rollouts have no score of {reward}." for reward, amount in failed.items()]
    for point in run.evals:
        for reward, amount in point.failed.items():
            reason = point.first_failure.get(reward.partition(".")[0], "")
            where = f"{point.split} evaluation at update {point.step}, {point.weights} weights"
            found.append(f"{where}: {count(amount)} samples have no score of {reward}" + (f"; the first: {reason}" if reason else "."))
    return found + _unmade(run.summary or {})


def summary_troubles(summary: Mapping[str, object]) -> list[str]:
    """What a summary tells of, for the last lines of a terminal: dead groups, failed scores, evaluations missing or not paired."""
    found = []
    told = summary.get("dead_groups")
    if isinstance(told, Mapping) and number(told.get("count")):
        found.append(f"Dead groups: {dead_group_words(number(told.get('count')) or 0.0, str(told.get('first_reason') or ''))}")
    failed = summary.get("failed_scores")
    for reward, entry in failed.items() if isinstance(failed, Mapping) else ():
        counts = ", ".join(f"{amount:g} {label.replace('_', ' ')}" for label, amount in entry.items() if label != "first_reason")
        reason = f"; the first: {entry['first_reason']}" if entry.get("first_reason") else ""
        found.append(f"Held-out samples without a score of {reward}: {counts} training{reason}")
    return found + _unmade(summary)


def _unmade(summary: Mapping[str, object]) -> list[str]:
    missing = summary.get("missing")
    found = [f"Evaluation {name} passed its deadline and is missing." for name in missing] if isinstance(missing, list) else []
    unpaired = summary.get("unpaired")
    found += [f"Before and after are not paired for {name}: {why}." for name, why in unpaired.items()] if isinstance(unpaired, Mapping) else []
    return found


def warnings(run: RunRecord) -> dict[str, tuple[int, int]]:
    """Each warning of the updates: the first update that has it, and how many more have."""
    seen: dict[str, tuple[int, int]] = {}
    for update in run.updates:
        for text in update.warnings:
            step, more = seen.get(text, (update.step, -1))
            seen[text] = (step, more + 1)
    return seen
