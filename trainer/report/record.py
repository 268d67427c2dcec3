"""What a run folder says, as values: :class:`RunRecord` and its parts. ``reading.load_run`` makes them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from trainer.config.composition import composition
from trainer.config.objective import ObjectiveConfig
from trainer.report.state import RunState

SCENE_STATISTICS = ("brightness", "contrast", "colourfulness", "edge_density")
GROUP_STATES = ("leased", "ready", "claimed", "settled", "evicted", "dead")
ROLLOUT_STAGES = frozenset({"sample", "score", "encode", "decode", "commit"})  # run beside the learner


@dataclass(frozen=True)
class Update:
    """One learner update. Absent numbers are absent keys, so SFT runs simply have fewer of them. ``rewards`` holds the
    mean score of each trained reward, ``failed`` how many members have none."""

    step: int
    values: dict[str, float]
    seconds: dict[str, float]
    groups: dict[str, float]
    rewards: dict[str, float] = field(default_factory=dict)
    failed: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class EvalPoint:
    """One held-out evaluation. ``weights`` is ``raw`` or ``ema``; rewards are in the scorer's units, ``errors`` are the standard
    errors of their means. ``set_digest`` says on what it was made, ``failed`` which samples have no score and why, ``warnings``
    are signs of reward hacking."""

    step: int
    split: str
    weights: str
    values: dict[str, float]
    scene: dict[str, float]
    rewards: dict[str, float] = field(default_factory=dict)
    sub_scores: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    set_digest: str | None = None
    revisions: dict[str, str] = field(default_factory=dict)
    failed: dict[str, float] = field(default_factory=dict)
    first_failure: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def revision(self, reward: str) -> str | None:
        """The revision of the reward that a name (``scene.sharpness``) belongs to."""
        return self.revisions.get(reward.partition(".")[0])


@dataclass(frozen=True)
class Grid:
    """A sample grid on fixed prompts and fixed noise; ``width`` and ``height`` in pixels. ``clip``: where its samples play, of clips."""

    label: str
    step: int | None
    path: Path
    width: int
    height: int
    clip: Path | None = None


@dataclass(frozen=True)
class RunRecord:
    """Everything the report shows about one run."""

    folder: Path
    name: str
    config: dict[str, object] = field(default_factory=dict)
    config_text: str = ""
    updates: list[Update] = field(default_factory=list)
    evals: list[EvalPoint] = field(default_factory=list)
    summary: dict[str, object] | None = None
    before: Grid | None = None
    after: Grid | None = None
    between: list[Grid] = field(default_factory=list)
    restarts: int = 0
    state: RunState = field(default_factory=lambda: RunState("ended"))
    problems: list[str] = field(default_factory=list)

    @property
    def objective(self) -> str | None:
        """The composition in force, from the config's resolved ``objective``; else what the summary says."""
        chosen = self.config.get("objective")
        if isinstance(chosen, Mapping):
            try:
                return composition(ObjectiveConfig.model_validate(dict(chosen)))
            except ValidationError:  # a key that another version of ddrl had
                chosen = chosen.get("preset")
        if chosen is None and self.summary is not None:
            chosen = self.summary.get("objective")
        return chosen if isinstance(chosen, str) else None

    @property
    def seed(self) -> int | None:
        """The run's seed, from the config, else from the summary."""
        value = self.config.get("seed")
        if value is None and self.summary is not None:
            value = self.summary.get("seed")
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def curve(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of one number of the updates, in step order."""
        return [(update.step, update.values[key]) for update in self.updates if key in update.values]

    def rewards(self) -> list[str]:
        """Names of all rewards, trained ones first, in the order of the evaluations."""
        names = [name for update in self.updates[-1:] for name in update.rewards]
        names += [name for point in self.evals for name in point.rewards]
        return sorted(dict.fromkeys(names), key=lambda name: not self.is_trained(name))

    def is_trained(self, reward: str) -> bool:
        """Whether a reward is trained on, or only scored in evaluations."""
        held_out = self.config.get("held_out_rewards")
        return reward not in held_out if isinstance(held_out, list | tuple) else True

    def reward_curve(self, reward: str) -> list[tuple[int, float]]:
        """(step, mean score of the update's rollouts) of one trained reward."""
        return [(update.step, update.rewards[reward]) for update in self.updates if reward in update.rewards]

    def points(self, split: str, weights: str) -> list[EvalPoint]:
        """The evaluations of one split and one kind of weights, in step order."""
        return [point for point in self.evals if (point.split, point.weights) == (split, weights)]

    def curve_split(self) -> str | None:
        """The split whose evaluations make the curves: the one evaluated most often; ``dev`` wins a tie."""
        splits = sorted({point.split for point in self.evals})
        return max(splits, key=lambda split: len(self.points(split, "raw")), default=None)
