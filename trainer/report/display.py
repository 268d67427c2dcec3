"""What ``ddrl train`` shows while it runs: a live panel on a terminal, one plain line per event elsewhere.

Lifecycle: ``with Display(...) as display`` → ``stage(text)`` while the run starts → ``event(line)`` with
each line of the run's files → ``finish(summary)``.
A run that goes on first tells what it knows (``resume``). The panel is drawn from a :class:`Progress` that only
events change, so what is shown never depends on when the terminal is redrawn.

Invariant: standard output belongs to the display. On a terminal, ``print`` calls and log records of other
threads (Ray forwards its workers' output that way) are put above the panel as whole lines; the log handlers
that were bound to the terminal are pointed at the panel and restored at the end. Without a terminal there
are no control codes.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Self, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from trainer.report.outcome import VERDICTS, Measure, measures, rise_verdict
from trainer.report.progress import TREND_UPDATES, Progress, eval_line, part_line, scores_of, sparkline, stage_words, update_line
from trainer.report.record import GROUP_STATES
from trainer.report.troubles import summary_troubles
from trainer.report.wording import (
    ABSENT,
    ascii_text,
    count,
    duration,
    fixed,
    general,
    number,
    percent,
    signed,
)

_TONES = {"good": "green", "warn": "yellow", "bad": "bold red", "none": "dim"}


class Display:
    """Progress of one training run on ``console``. All methods may be called from any thread.

    Args:
        total: updates the run will have made at its end.
        name: the run's name; ``title`` is shown beside it (objective, seed).
        console: where to show; standard output by default. Live only if it is a terminal.
        least_gap_s: without a terminal, update lines are at least this far apart; the last one always shows.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        total: int,
        name: str,
        *,
        title: str = "",
        console: Console | None = None,
        least_gap_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console if console is not None else Console()
        self.live = self.console.is_terminal and not self.console.is_dumb_terminal
        self.progress = Progress(total)
        self._name, self._title = name, title
        self._least_gap_s, self._clock = least_gap_s, clock
        self._lock = threading.RLock()
        self._began = clock()
        self._stage: tuple[str, float] | None = None
        self._spinner = Spinner("dots", style="cyan")
        self._last_line: float | None = None
        self._resumed_at = 0
        self._skipped = 0
        self._parts: set[str] = set()  # how generators and learner compute, each said once
        self._live: Live | None = None
        self._handlers: list[tuple[logging.StreamHandler[TextIO], TextIO]] = []

    def __enter__(self) -> Self:
        self._began = self._clock()
        if self.live:
            before = (sys.stdout, sys.stderr)
            self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=4,
                              redirect_stderr=sys.stderr.isatty())  # fmt: skip
            self._live.start()
            self._take_over_logging(before)
        else:
            self._write(f"ddrl {self._name}" + (f"  {self._title}" if self._title else ""))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end_stage(finished=kind is None)
        self._stop()

    def stage(self, text: str) -> None:
        """Name what is going on now; ends the stage before it."""
        self._end_stage(finished=True)
        with self._lock:
            self._stage = (text, self._clock())
            self._spinner.update(text=Text(text))
            if not self.live:
                self._write(f"{duration(self._clock() - self._began):>8}  {text} …")

    def resume(self, step: int, past: Iterable[Mapping[str, object]]) -> None:
        """The run goes on after update ``step``; what it wrote before is known and not shown again."""
        with self._lock:
            self._resumed_at = self.progress.step = step
            for line in past:
                if line.get("kind") == "evaluation" and (number(line.get("step")) or 0) <= step:
                    self.progress.add(line, self._clock())
        self.stage(f"Resuming at update {step} of {max(step, self.progress.total)}")

    def event(self, line: Mapping[str, object]) -> None:
        """Show one line of the run's files. Lines of unknown kind are passed over, and so are updates from before a resume."""
        if line.get("kind") == "update":
            if (number(line.get("step")) or 0) <= self._resumed_at:
                return
            self._end_stage(finished=True)
        with self._lock:
            now = self._clock()
            known = len(self.progress.warnings)
            self.progress.add(line, now)
            part = part_line(line)
            fresh = bool(part) and part not in self._parts
            self._parts.add(part)
            if fresh and not self.live:
                self._write(part)
            if not self.live:
                self._plain(line, now)
                for text, step in list(self.progress.warnings.items())[known:]:
                    self._write(f"warning at update {step}: {text}")
        if fresh and self.live:
            self.console.print(Text(part, style="dim"), soft_wrap=True)  # outside the lock, see _end_stage

    def finish(self, summary: Mapping[str, object]) -> None:
        """End the panel and print the before/after table."""
        self._end_stage(finished=True)
        self._stop()
        self.console.print(summary_table(summary))
        for text in [*(f"warning at update {step}: {text}" for text, step in self.progress.warnings.items()), *summary_troubles(summary)]:
            self.console.print(Text(text, style="yellow"), soft_wrap=True)

    def _end_stage(self, finished: bool) -> None:
        """Leave the stage. Prints outside the lock: the panel's refresh takes the two locks the other way."""
        with self._lock:
            stage, self._stage = self._stage, None
        if stage is not None and self._live is not None:
            text, since = stage
            mark, style = ("✓", "green") if finished else ("✗", "red")
            self.console.print(Text.assemble((mark, style), f" {text}  ", (duration(self._clock() - since), "dim")))

    def _stop(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()
        for handler, stream in self._handlers:
            handler.setStream(stream)
        self._handlers.clear()

    def _take_over_logging(self, before: tuple[TextIO, TextIO]) -> None:
        """Move handlers, which keep the stream they were given, to what redirects ``before`` now."""
        loggers = [
            logging.getLogger(),
            *(logging.getLogger(name) for name in list(logging.root.manager.loggerDict)),
        ]
        for handler in {handler for logger in loggers for handler in logger.handlers}:
            for old, new in zip(before, (sys.stdout, sys.stderr), strict=True):
                if isinstance(handler, logging.StreamHandler) and handler.stream is old and new is not old:
                    handler.setStream(new)
                    self._handlers.append((handler, old))
                    break

    def _render(self) -> RenderableType:
        with self._lock:
            return self._panel()

    def _panel(self) -> RenderableType:
        elapsed = duration(self._clock() - self._began)
        heading = Table.grid(expand=True)
        heading.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        heading.add_column(justify="right", no_wrap=True)
        heading.add_row(Text.assemble((self._name, "bold"), "  ", (self._title, "dim")), Text(elapsed, style="dim"))
        parts: list[RenderableType] = [Rule(style="dim"), heading]
        if self.progress.step:
            parts.append(_bar(self.progress))
        if self.progress.step or self.progress.held_out:
            parts.append(_rows(self.progress))
        if self._stage is not None:
            parts.append(self._spinner)
        return Group(*parts)

    def _plain(self, line: Mapping[str, object], now: float) -> None:
        kind = line.get("kind")
        if kind == "evaluation":
            self._write(eval_line(line, self.progress))
            return
        if kind != "update":
            return
        due = self._last_line is None or now - self._last_line >= self._least_gap_s
        if due or self.progress.step >= self.progress.total:
            self._write(update_line(self.progress, self._skipped))
            self._last_line, self._skipped = now, 0
        else:
            self._skipped += 1

    def _write(self, text: str) -> None:
        self.console.file.write(ascii_text(text) + "\n")
        self.console.file.flush()


def summary_table(summary: Mapping[str, object]) -> Table:
    """The before/after table of a ``summary.json``; values it lacks are dashes."""
    prompts = number(summary.get("prompts"))
    where = f"{count(prompts)} held-out prompts" if prompts is not None else "held-out prompts"
    table = Table(
        box=SIMPLE_HEAD,
        title=f"Before and after training, {where}, raw weights",
        title_justify="left",
        title_style="bold",
        caption=VERDICTS,
        caption_justify="left",
        pad_edge=False,
    )
    table.add_column("measure")
    for column in ("before", "after", "change", "std. error"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict")
    for row in measures(summary):
        table.add_row(
            row.title,
            fixed(row.before, row.digits),
            fixed(row.after, row.digits),
            _change(row),
            _error(row),
            Text(row.verdict or ABSENT, style=_TONES[row.tone]),
        )
    return table


def _bar(progress: Progress) -> Table:
    done = min(progress.step / progress.total, 1.0) if progress.total else 1.0
    grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
    for _ in range(2):
        grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    for _ in range(2):
        grid.add_column(no_wrap=True, justify="right")
    grid.add_row(
        Text("update".ljust(len("staleness")), style="dim"), f"{progress.step}/{progress.total}",
        ProgressBar(total=1.0, completed=done, complete_style="cyan", finished_style="green"), f"{done:.0%}",
        Text.assemble(("ETA ", "dim"), duration(progress.seconds_left())),
    )  # fmt: skip
    return grid


def _rows(progress: Progress) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    update = progress.update
    for name in progress.rewards:
        grid.add_row(name, _reward_words(progress, name))
    if progress.held_out:
        grid.add_row("held-out", _held_out_words(progress))
    seconds = stage_words(update)
    if seconds:
        grid.add_row("seconds", seconds)
    if number(update.get("staleness_mean")) is not None:
        most = general(number(update.get("staleness_max")), 2)
        grid.add_row("staleness", f"mean {general(number(update.get('staleness_mean')), 2)}, most {most}")
    groups = update.get("groups")
    if isinstance(groups, Mapping) and groups:
        grid.add_row("groups", _group_words(groups))
    for text, step in list(progress.warnings.items())[-2:]:
        grid.add_row("warning", Text(f"{text} (update {step})", style="yellow"))
    return grid


def _reward_words(progress: Progress, name: str) -> Text:
    values = list(progress.rewards[name])
    words = Text.assemble((fixed(values[-1]), "bold"), "  ", (sparkline(values), "cyan"))
    trend = progress.trend(name)
    if trend is not None:
        arrow, style = ("▲", "green") if trend > 0 else ("▼", "yellow")
        words.append(f"  {arrow} {signed(trend)}", style=style)
        words.append(f" over {TREND_UPDATES} updates", style="dim")
    return words


def _held_out_words(progress: Progress) -> Text:
    line, words = progress.held_out, Text()
    words.append(f"{line.get('split')}, update {line.get('step')}   ", style="dim")
    moved = line is not progress.first_eval.get(str(line.get("split")))
    for name, mean in scores_of(line).items():
        words.append(f"{name} ")
        words.append(fixed(mean), style="bold")
        words.append(f" ({signed(progress.held_out_gain(name))})   " if moved else "   ")
    if moved:
        rise = progress.held_out_change("diffusion_loss")
        words.append("diffusion loss ")
        words.append(percent(rise), style=_TONES[rise_verdict(rise)[1]])
        words.append(f"   diversity {percent(progress.held_out_change('diversity'))}")
    return words


def _group_words(groups: Mapping[object, object]) -> Text:
    words = Text()
    for state in GROUP_STATES:
        amount = number(groups.get(state))
        if amount is None:
            continue
        alarm = state in ("evicted", "dead") and amount > 0
        words.append(f"{state} ", style="dim")
        words.append(f"{count(amount)}   ", style="bold red" if alarm else "")
    return words


def _change(row: Measure) -> str:
    return percent(row.change) if row.relative else signed(row.change)


def _error(row: Measure) -> str:
    if row.stderr is None:
        return ABSENT
    return f"{row.stderr * 100:.1f}\u202f%" if row.relative else fixed(row.stderr, 4)
