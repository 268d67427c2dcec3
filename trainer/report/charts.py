"""What each figure of the report shows: run records in, titled panels with alternative text out.

Colour means the run and line style means the kind of number, in every panel: solid with dots for evaluations of the
raw weights (long dashes with dots where the reward is never trained on), small dots for EMA weights, a thin line for
numbers of the training rollouts. The x range is the same in all panels, and held-out quantities that have no natural
scale are shown as change from the start. Runs share a panel only where the evaluation set and the reward's revision
are the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from trainer.report.curves import Curve, columns, describe, moving_mean, readings, window_of
from trainer.report.figures import Cross, Line, Scale, Style, cross_chart, line_chart, stacked_chart
from trainer.report.outcome import STOP_RISE, Compared, relative_change
from trainer.report.record import ROLLOUT_STAGES, SCENE_STATISTICS, EvalPoint, RunRecord
from trainer.report.wording import fixed, general, percent

LEAST_SCENE = 25.0  # percent; the scene panels' least range
_STOP_PERCENT = STOP_RISE * 100


@dataclass(frozen=True)
class Key:
    """One legend entry: ``colour`` is a palette index (None: neutral), ``mark`` a line style or ``block``."""

    label: str
    colour: int | None
    mark: Style | str = "line"


@dataclass(frozen=True)
class Panel:
    """A figure with its caption; ``svg`` is safe markup made by ``figures``."""

    title: str
    svg: str
    keys: list[Key] = field(default_factory=list)
    note: str = ""


@dataclass(frozen=True)
class Named:
    """A run under the name and palette colour it has in this report."""

    name: str
    colour: int
    run: RunRecord


class Charts:
    """Makes the panels of one report; figure ids count up so that every drawing has its own.

    Args:
        runs: the runs, in the order of their colours.
    """

    def __init__(self, runs: Sequence[Named]) -> None:
        self.runs = list(runs)
        self._count = 0
        steps = [update.step for named in self.runs for update in named.run.updates]
        steps += [point.step for named in self.runs for point in named.run.evals]
        self._x_range = (0.0, float(max(steps))) if steps else None

    def held_out(self) -> list[Panel]:
        """Each reward by name, trained ones first, beside held-out diffusion loss and diversity."""
        return [*self._rewards(), *self._change("Held-out diffusion loss", "diffusion_loss", stop=_STOP_PERCENT), *self._change("Diversity", "diversity")]

    def sub_scores(self) -> list[Panel]:
        """Every sub-score of the evaluations by name, small, each on its own scale."""
        panels = []
        names = dict.fromkeys(name for named in self.runs for point in self._points(named.run, "raw") for name in point.sub_scores)
        for name in names:
            for suffix, runs in self._alike(name):
                lines, words = [], []
                for named in runs:
                    curve = [(p.step, p.sub_scores[name]) for p in self._points(named.run, "raw") if name in p.sub_scores]
                    if curve:
                        lines.append(_line(curve, named.colour, "line", True))
                        words.append(describe(named.name, curve, fixed))
                if lines:
                    title = name + suffix
                    alt = f"{title} by update. {' '.join(words)}"
                    panels.append(Panel(title, line_chart(self._ident(), alt, lines, Scale.SHARE, small=True, x_range=self._x_range)))
        return panels

    def scene(self) -> list[Panel]:
        """Change of the four scene statistics of held-out samples, all on one scale."""
        found: list[tuple[str, list[Line], str]] = []
        for statistic in SCENE_STATISTICS:

            def read(point: EvalPoint, key: str = statistic) -> float | None:
                return point.scene.get(key)

            lines, words = self._change_lines(read, self.runs, ema=False)
            if lines:
                found.append((statistic.replace("_", " ").capitalize(), lines, words))
        if not found:
            return []
        values = [value for _, lines, _ in found for line in lines for value in line.y]
        y_range = (min(-LEAST_SCENE, min(values) * 1.1), max(LEAST_SCENE, max(values) * 1.1))
        return [
            Panel(
                title,
                line_chart(
                    self._ident(),
                    f"{title}, change from the start. {words}",
                    lines,
                    Scale.CHANGE,
                    small=True,
                    x_range=self._x_range,
                    y_range=y_range,
                ),
            )
            for title, lines, words in found
        ]

    def optimisation(self) -> list[Panel]:
        """Policy and data loss, gradient norm, ratio deviation; a number that no run has gives no panel."""
        wanted = (
            ("Policy loss", "policy_loss", Scale.FITTED),
            ("Data loss", "data_loss", Scale.FITTED),
            ("Gradient norm", "grad_norm", Scale.AMOUNT),
            ("Ratio deviation", "ratio_deviation", Scale.AMOUNT),
        )
        panels = [self._update_panel(title, key, scale) for title, key, scale in wanted]
        return [panel for panel in panels if panel is not None]

    def staleness(self) -> Panel | None:
        """Mean staleness of the groups of each update, in policy versions."""
        return self._update_panel(
            "Staleness",
            "staleness_mean",
            Scale.AMOUNT,
            note="Policy versions between sampling and use, mean over the update's groups.",
        )

    def stages(self, named: Named) -> list[Panel]:
        """Seconds per update, stacked: the learner's stages, and the rollout stages that run beside it."""
        stages = list(dict.fromkeys(stage for update in named.run.updates for stage in update.seconds))
        learner = [stage for stage in stages if stage not in ROLLOUT_STAGES]
        rollout = [stage for stage in stages if stage in ROLLOUT_STAGES]
        suffix = f": {named.name}" if len(self.runs) > 1 else ""
        return [self._stack(f"Seconds per update, {who}{suffix}", named.run, chosen) for who, chosen in (("learner", learner), ("rollouts", rollout)) if chosen]

    def trade(self, rows: Sequence[Compared], reward: str | None) -> Panel | None:
        """Gain of one reward against diffusion-loss rise, one cross per run; None where no reward is the same in all runs."""
        crosses, keys, words = [], [], []
        for colour, row in enumerate(rows):
            gain = row.gains.get(reward) if reward is not None else None
            if gain is None or gain.change is None or row.rise is None:
                continue
            x_interval = row.rise_ci95 and (row.rise_ci95[0] * 100, row.rise_ci95[1] * 100)
            crosses.append(Cross(row.rise * 100, gain.change, x_interval, gain.ci95, colour))
            keys.append(Key(row.name, colour, "dot"))
            words.append(f"{row.name}: gain {fixed(gain.change)} at a loss rise of {percent(row.rise)}.")
        if not crosses:
            return None
        alt = f"Gain of {reward} against rise of held-out diffusion loss, with 95 % intervals. " + " ".join(words)
        svg = cross_chart(self._ident(), alt, crosses, _STOP_PERCENT, "rise of held-out diffusion loss", f"gain of {reward}")
        note = "Higher is more reward; further right is further from the data. Bars are 95\u202f% intervals."
        return Panel(f"What the gain of {reward} cost", svg, keys, note)

    def _ident(self) -> str:
        self._count += 1
        return f"f{self._count}"

    def _points(self, run: RunRecord, weights: str) -> list[EvalPoint]:
        split = run.curve_split()
        return [] if split is None else run.points(split, weights)

    def run_keys(self) -> list[Key]:
        """The runs by colour; none for a single run, whose colour needs no key."""
        return [Key(named.name, named.colour) for named in self.runs] if len(self.runs) > 1 else []

    def _kind_keys(self, ema: bool, training: bool, trained: bool = True) -> list[Key]:
        alone = len(self.runs) == 1
        marks = "dots" if trained else "dashdots"
        words = "evaluation prompts" if trained else "evaluation prompts, never trained on"
        keys = [Key(words, 0 if alone else None, marks)] if alone or training or not trained else []
        keys += [Key("EMA weights", 0 if alone else None, "dotted")] if ema else []
        keys += [Key("training rollouts", None, "neutral" if alone else "thin")] if training else []
        return keys

    def _alike(self, name: str | None = None) -> list[tuple[str, list[Named]]]:
        """The runs that may share a panel (of this reward or sub-score), and what tells the panels apart if there are several."""
        groups: dict[tuple[str | None, str | None], list[Named]] = {}
        for named in self.runs:
            points = [point for point in self._points(named.run, "raw") if name is None or name in point.rewards or name in point.sub_scores]
            if points:
                groups.setdefault((points[-1].set_digest, points[-1].revision(name) if name else None), []).append(named)
            elif name is not None and named.run.reward_curve(name):
                groups.setdefault((None, None), []).append(named)
        many = len(groups) > 1
        return [(f" of {', '.join(named.name for named in runs)}" if many else "", runs) for runs in groups.values()]

    def _rewards(self) -> list[Panel]:
        names = dict.fromkeys(name for named in self.runs for name in named.run.rewards())
        trained = {name: any(named.run.is_trained(name) for named in self.runs if name in named.run.rewards()) for name in names}
        ordered = sorted(names, key=lambda name: not trained[name])
        return [self._reward(name, trained[name], suffix, runs) for name in ordered for suffix, runs in self._alike(name)]

    def _reward(self, name: str, trained: bool, suffix: str, runs: Sequence[Named]) -> Panel:
        lines, words, window, ema_drawn, training_drawn = [], [], 1, False, False
        alone = len(self.runs) == 1
        for named in runs:
            training = named.run.reward_curve(name)
            if training:
                window = window_of(len(training))
                smooth = moving_mean(training, window)
                lines.append(_line(smooth, named.colour, "neutral" if alone else "thin"))
                words.append(describe(f"{named.name}, training", smooth, fixed))
                training_drawn = True
            raw = [point for point in self._points(named.run, "raw") if name in point.rewards]
            if raw:
                errors = [1.959964 * point.errors.get(name, 0.0) for point in raw]
                curve = [(point.step, point.rewards[name]) for point in raw]
                style: Style = "line" if named.run.is_trained(name) else "dashed"
                lines.append(Line(*columns(curve), named.colour, style, True, errors if any(errors) else None))
                words.append(describe(f"{named.name}, evaluations", curve, fixed))
            ema = [(p.step, p.rewards[name]) for p in self._points(named.run, "ema") if name in p.rewards]
            if ema and alone:
                lines.append(_line(ema, named.colour, "dotted"))
                words.append(describe(f"{named.name}, EMA weights", ema, fixed))
                ema_drawn = True
        notes = ["Trained on." if trained else "Held out: scored in evaluations only."]
        notes += ["Band: 95\u202f% interval of each mean."] if any(line.band is not None for line in lines) else []
        notes += [f"Training line: mean of {window} updates."] if window > 1 else []
        title = name + suffix
        return Panel(title, self._lines(title, lines, words, Scale.SHARE, tall=True),
                     self.run_keys() + self._kind_keys(ema_drawn, training_drawn, trained), " ".join(notes))  # fmt: skip

    def _change(self, title: str, key: str, stop: float | None = None) -> list[Panel]:
        panels = []
        for suffix, runs in self._alike():
            lines, words = self._change_lines(lambda point: point.values.get(key), runs, ema=len(self.runs) == 1)
            if not lines:
                continue
            starts = [self._start(named.run, key) for named in runs]
            note = "Change from the start"
            note += f", which was {starts[0]}." if len(starts) == 1 and starts[0] else "."
            ema = any(line.style == "dotted" for line in lines)
            svg = self._lines(f"{title}{suffix}, change from the start", lines, [words], Scale.CHANGE, stop=stop, tall=True)
            panels.append(Panel(title + suffix, svg, self.run_keys() + self._kind_keys(ema, False), note))
        return panels

    def _start(self, run: RunRecord, key: str) -> str:
        raw = [point.values[key] for point in self._points(run, "raw") if key in point.values]
        return general(raw[0], 4) if raw else ""

    def _change_lines(self, read: Callable[[EvalPoint], float | None], runs: Sequence[Named], ema: bool) -> tuple[list[Line], str]:
        lines, words = [], []
        for named in runs:
            raw = readings(self._points(named.run, "raw"), read)
            if not raw:
                continue
            for weights, found in (("raw", raw), ("ema", readings(self._points(named.run, "ema"), read))):
                if not found or (weights == "ema" and not ema):
                    continue
                changes = [(step, relative_change(raw[0][1], value)) for step, value in found]
                curve = [(step, change * 100) for step, change in changes if change is not None]
                if curve:
                    lines.append(_line(curve, named.colour, "line" if weights == "raw" else "dotted", weights == "raw"))
                    label = named.name if weights == "raw" else f"{named.name}, EMA weights"
                    words.append(describe(label, curve, lambda value: percent(value / 100)))
        return lines, " ".join(words)

    def _update_panel(self, title: str, key: str, scale: Scale, note: str = "") -> Panel | None:
        lines, words, window = [], [], 1
        for named in self.runs:
            curve = named.run.curve(key)
            if not curve:
                continue
            window = max(window, window_of(len(curve)))
            smooth = moving_mean(curve, window_of(len(curve)))
            if window > 1 and len(self.runs) == 1:
                lines.append(_line(curve, named.colour, "pale"))
            lines.append(_line(smooth, named.colour, "line"))
            words.append(describe(named.name, smooth, general))
        if not lines:
            return None
        if window > 1:
            note = f"{note} Bold line: mean of {window} updates.".strip()
        return Panel(title, self._lines(title, lines, words, scale), self.run_keys(), note)

    def _lines(self, title: str, lines: Sequence[Line], words: Sequence[str], scale: Scale, *,
               stop: float | None = None, tall: bool = False) -> str:  # fmt: skip
        return line_chart(
            self._ident(),
            f"{title} by update. {' '.join(words)}",
            lines,
            scale,
            stop=stop,
            tall=tall,
            x_range=self._x_range,
        )

    def _stack(self, title: str, run: RunRecord, stages: Sequence[str]) -> Panel:
        steps = [update.step for update in run.updates]
        layers = [[update.seconds.get(stage, 0.0) for update in run.updates] for stage in stages]
        means = {stage: sum(layer) / len(layer) for stage, layer in zip(stages, layers, strict=True)}
        alt = f"{title}, stacked. Means: " + ", ".join(f"{stage} {general(mean)} s" for stage, mean in means.items())
        keys = [Key(f"{stage} {general(means[stage])} s", place, "block") for place, stage in enumerate(stages)]
        window = window_of(len(steps))
        smooth = [[value for _, value in moving_mean(list(zip(steps, layer, strict=True)), window)] for layer in layers]
        note = "Numbers in the key: mean over all updates."
        note += f" Drawn: mean of {window} updates." if window > 1 else ""
        return Panel(title, stacked_chart(self._ident(), alt, steps, smooth), keys, note)


def _line(curve: Curve, colour: int, style: Style, markers: bool = False) -> Line:
    return Line(*columns(curve), colour, style, markers)
