"""Curves as plain lists: a :data:`Curve` holds (step, value) pairs in step order. Pure helpers."""

from collections.abc import Callable, Sequence

from trainer.report.record import EvalPoint

Curve = list[tuple[int, float]]


def readings(points: Sequence[EvalPoint], read: Callable[[EvalPoint], float | None]) -> Curve:
    """One number of each evaluation that has it."""
    found = [(point.step, read(point)) for point in points]
    return [(step, value) for step, value in found if value is not None]


def columns(curve: Curve) -> tuple[list[float], list[float]]:
    """The steps and the values."""
    return [float(step) for step, _ in curve], [value for _, value in curve]


def window_of(updates: int) -> int:
    """Over how many updates a curve of this many is averaged: one fortieth, at least one."""
    return max(1, updates // 40)


def moving_mean(curve: Curve, window: int) -> Curve:
    """Mean of the last ``window`` values at each step; the first values have fewer behind them."""
    smooth: Curve = []
    for place, (step, _) in enumerate(curve):
        behind = [value for _, value in curve[max(0, place - window + 1) : place + 1]]
        smooth.append((step, sum(behind) / len(behind)))
    return smooth


def describe(label: str, curve: Curve, spell: Callable[[float], str]) -> str:
    """A curve in words, for alternative text."""
    (first_step, first), (last_step, last) = curve[0], curve[-1]
    values = [value for _, value in curve]
    return f"{label}: {spell(first)} at update {first_step}, {spell(last)} at update {last_step}, lowest {spell(min(values))}, highest {spell(max(values))}."
