"""Drawing one small chart as inline SVG that follows the page's colours.

matplotlib draws with stand-in colours; :func:`_inline` replaces each by a CSS variable, so that one drawing
serves light and dark pages. Text stays text (the page's font, readable by search and screen readers), element
ids get a prefix so that many drawings share a page, and nothing in the result points outside it.

Scales follow one rule (:class:`Scale`), so that panels can be compared: a share runs from 0 to 1, a change is
in percent around zero with a common least range, an amount starts at zero, anything else is fitted.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from html import escape
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from trainer.report.wording import MINUS

SERIES_COLOURS = 6
_SERIES = [f"#0a0b{index:02x}" for index in range(SERIES_COLOURS)]
_TINTS = [f"#0a0c{index:02x}" for index in range(SERIES_COLOURS)]
_INK, _MUTED, _GRID, _PAPER, _STOP = "#0a0a01", "#0a0a02", "#0a0a03", "#0a0a04", "#0a0a05"
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _GRID: "--grid", _PAPER: "--card", _STOP: "--stop"} | {
    colour: f"--{letter}{index}" for letter, palette in (("s", _SERIES), ("t", _TINTS))
    for index, colour in enumerate(palette)
}  # fmt: skip
_DASHES = ("solid", (0, (6, 2)), (0, (2, 1.6)))
_KINDS = {"dashed": (0, (5, 2)), "dotted": (0, (1, 1.5))}
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ddrl",
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "font.size": 9.5,
    "path.simplify": True,
    "path.simplify_threshold": 0.3,
}
LEAST_CHANGE = 12.0  # percent; keeps the +10 % line in view and small wobbles small

Style = Literal["line", "thin", "pale", "dashed", "dotted", "neutral"]


class Scale(Enum):
    """What the y axis of a panel means."""

    SHARE = "share"
    CHANGE = "change"
    AMOUNT = "amount"
    FITTED = "fitted"


@dataclass(frozen=True)
class Line:
    """One curve. ``band`` is a half-width around y (a 95 % interval), ``colour`` an index of the palette."""

    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    style: Style = "line"
    markers: bool = False
    band: Sequence[float] | None = None


@dataclass(frozen=True)
class Cross:
    """A point with 95 % intervals in x and y, labelled."""

    x: float
    y: float
    x_interval: tuple[float, float] | None
    y_interval: tuple[float, float] | None
    colour: int


def line_chart(
    ident: str,
    alt: str,
    lines: Sequence[Line],
    scale: Scale,
    *,
    stop: float | None = None,
    tall: bool = False,
    small: bool = False,
    x_label: str = "update",
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
) -> str:
    """Curves over updates. ``stop`` draws the stop line at that y, ``y_range`` overrides the scale."""
    with matplotlib.rc_context(_SETTINGS):
        figure, axes = _axes((2.35, 1.75) if small else (4.7, 3.1 if tall else 2.5))
        for line in lines:
            _draw(axes, line)
        axes.set_ylim(*(y_range or limits(scale, [value for line in lines for value in _extent(line)], stop)))
        if x_range is not None:
            _set_x_range(axes, x_range)
        if scale is Scale.CHANGE:
            axes.axhline(0, color=_MUTED, linewidth=0.8, zorder=1)
        if stop is not None:
            axes.axhline(stop, color=_STOP, linewidth=1.4, linestyle=(0, (5, 3)), zorder=2)
            axes.annotate(
                f"stop line +{stop:g} %", (0, stop), xycoords=("axes fraction", "data"), xytext=(4, 4),
                textcoords="offset points", color=_STOP, va="bottom", fontsize=9,
            )  # fmt: skip
        _finish(axes, scale, x_label, ticks=3 if small else 5)
        return _inline(figure, ident, alt)


def stacked_chart(ident: str, alt: str, x: Sequence[float], layers: Sequence[Sequence[float]]) -> str:
    """Amounts on top of each other, first layer lowest, in tints that no run has as its colour."""
    with matplotlib.rc_context(_SETTINGS):
        figure, axes = _axes((4.7, 2.3))
        colours = [_TINTS[index % SERIES_COLOURS] for index in range(len(layers))]
        if len(x) == 1:
            base = 0.0
            for layer, colour in zip(layers, colours, strict=True):
                axes.bar(list(x), list(layer), bottom=base, color=colour, width=0.5)
                base += layer[0]
        else:
            axes.stackplot(list(x), *[list(layer) for layer in layers], colors=colours, linewidth=0)
        axes.set_ylim(bottom=0)
        axes.margins(x=0)
        _finish(axes, Scale.AMOUNT, "update", ticks=4)
        return _inline(figure, ident, alt)


def cross_chart(ident: str, alt: str, crosses: Sequence[Cross], stop: float, x_label: str, y_label: str) -> str:
    """Points with intervals: x a change in percent with the stop line, y a difference with its zero line."""
    with matplotlib.rc_context(_SETTINGS):
        figure, axes = _axes((4.7, 3.1))
        xs, ys = [0.0], [0.0]
        for cross in crosses:
            colour = _SERIES[cross.colour % SERIES_COLOURS]
            if cross.x_interval is not None:
                axes.plot(cross.x_interval, (cross.y, cross.y), color=colour, linewidth=2, solid_capstyle="butt")
            if cross.y_interval is not None:
                axes.plot((cross.x, cross.x), cross.y_interval, color=colour, linewidth=2, solid_capstyle="butt")
            axes.plot([cross.x], [cross.y], "o", color=colour, markersize=7, markeredgewidth=0, zorder=4)
            xs += [cross.x, *(cross.x_interval or ())]
            ys += [cross.y, *(cross.y_interval or ())]
        axes.set_xlim(min(-2.0, min(xs) * 1.08), max(LEAST_CHANGE, max(xs) * 1.08))
        low, high = min(ys), max(ys)
        room = 0.12 * (high - low or 1.0)
        axes.set_ylim(low - room if low < 0 else 0, high + room)
        axes.axvline(0, color=_MUTED, linewidth=0.8, zorder=1)
        axes.axhline(0, color=_MUTED, linewidth=0.8, zorder=1)
        axes.axvline(stop, color=_STOP, linewidth=1.4, linestyle=(0, (5, 3)), zorder=2)
        axes.annotate(
            f"stop line +{stop:g} %",
            (stop, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-4, -4),
            textcoords="offset points",
            color=_STOP,
            va="top",
            ha="right",
            fontsize=9,
        )
        _finish(axes, Scale.FITTED, x_label, ticks=5)
        axes.xaxis.set_major_formatter(FuncFormatter(_change_tick))
        axes.set_ylabel(y_label, color=_MUTED, fontsize=9)
        return _inline(figure, ident, alt)


def limits(scale: Scale, values: Sequence[float], stop: float | None = None) -> tuple[float, float]:
    """The y limits of a scale for these values (changes and ``stop`` in percent)."""
    known = [*values, *([stop] if stop is not None else [])]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    if scale is Scale.SHARE and low >= 0 and high <= 1:
        return 0.0, 1.02
    if scale is Scale.CHANGE:
        return min(-LEAST_CHANGE, low * 1.08), max(LEAST_CHANGE, high * 1.08)
    if scale is Scale.AMOUNT and low >= 0:
        return 0.0, high * 1.08 or 1.0
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def _extent(line: Line) -> list[float]:
    if line.band is None:
        return list(line.y)
    return [value + sign * half for value, half in zip(line.y, line.band, strict=True) for sign in (-1, 1)]


def _axes(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    return figure, axes


def _draw(axes: Axes, line: Line) -> None:
    colour = _MUTED if line.style == "neutral" else _SERIES[line.colour % SERIES_COLOURS]
    width = {"line": 2.0, "dashed": 2.0, "dotted": 1.6, "thin": 1.3, "neutral": 1.5, "pale": 0.8}[line.style]
    alpha = {"pale": 0.35, "thin": 0.6}.get(line.style, 1.0)
    dash = _KINDS.get(line.style, _DASHES[line.colour // SERIES_COLOURS % len(_DASHES)])
    if line.band is not None:
        lower = [value - half for value, half in zip(line.y, line.band, strict=True)]
        upper = [value + half for value, half in zip(line.y, line.band, strict=True)]
        axes.fill_between(list(line.x), lower, upper, color=colour, alpha=0.16, linewidth=0, zorder=1.5)
    axes.plot(
        list(line.x), list(line.y), color=colour, linewidth=width, alpha=alpha, linestyle=dash,
        marker="o" if line.markers or len(line.x) == 1 else None, markersize=4.4, markeredgecolor=_PAPER,
        markeredgewidth=0.8, solid_joinstyle="round", zorder=3 if line.style in ("line", "dashed", "dotted") else 2.5,
    )  # fmt: skip


def _set_x_range(axes: Axes, x_range: tuple[float, float]) -> None:
    low, high = x_range
    room = 0.02 * (high - low) or 0.5
    axes.set_xlim(low - room, high + room)


def _finish(axes: Axes, scale: Scale, x_label: str, ticks: int) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, length=0, pad=4)
    axes.set_xlabel(x_label, color=_MUTED, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(_change_tick if scale is Scale.CHANGE else _plain_tick))


def _plain_tick(value: float, _: int | None = None) -> str:
    return f"{0.0 if abs(value) < 1e-12 else value:.4g}".replace("-", MINUS)


def _change_tick(value: float, _: int | None = None) -> str:
    sign = "" if abs(value) < 1e-9 else "+" if value > 0 else MINUS
    return f"{sign}{abs(value):.4g} %"


def _inline(figure: Figure, ident: str, alt: str) -> str:
    """The figure as an ``<svg>`` element that scales, is named by ``alt`` and has CSS colours."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure)
    figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    opening, rest = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', opening)
    head = f'<svg {box.group(0) if box else ""} role="img" aria-label="{escape(alt, quote=True)}"'
    rest = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", rest, flags=re.DOTALL)
    rest = re.sub(r'<g id="[^"]*"', "<g", rest)
    rest = re.sub(r'\bid="', f'id="{ident}-', rest)
    rest = rest.replace('href="#', f'href="#{ident}-').replace("url(#", f"url(#{ident}-")
    rest = re.sub(r"font-family: [^;]*; ", "", rest)
    rest = re.sub(r' transform="rotate\(-0 [^"]*"', "", rest)
    for stand_in, variable in _VARIABLES.items():
        rest = rest.replace(stand_in, f"var({variable})")
    return head + ">" + re.sub(r"\n\s*", "\n", rest).strip()
