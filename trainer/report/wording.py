"""How a number is written for a reader: one spelling for the report and the terminal.

An absent value is an em dash, never a zero. Signs are the typographic minus, units follow a narrow space;
:func:`ascii_text` turns the result into plain ASCII for log files.
"""

import math

ABSENT = "—"
MINUS = "\u2212"
NARROW = "\u202f"


def number(value: object) -> float | None:
    """``value`` as a finite float; None for anything else (absent, NaN, infinity, booleans, text)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def fixed(value: float | None, digits: int = 3) -> str:
    """A plain value: ``0.412``."""
    return ABSENT if value is None else f"{value:.{digits}f}".replace("-", MINUS)


def general(value: float | None, digits: int = 3) -> str:
    """A value of unknown size with ``digits`` significant digits: ``12``, ``0.0123``, ``1.2e-05``."""
    return ABSENT if value is None else f"{value:.{digits}g}".replace("-", MINUS)


def signed(value: float | None, digits: int = 3) -> str:
    """A difference: ``+0.021``; a difference that rounds to zero is written ``±0.000``."""
    if value is None:
        return ABSENT
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0.0:
        return "±" + text
    return ("+" if value > 0 else MINUS) + text


def percent(value: float | None, digits: int = 1) -> str:
    """A relative change (0.012) as signed percent: ``+1.2 %``."""
    return ABSENT if value is None else signed(value * 100, digits) + NARROW + "%"


def interval(bounds: tuple[float, float] | None, digits: int = 3, relative: bool = False) -> str:
    """A confidence interval of a difference: ``+0.28 … +0.34``, in percent if ``relative``."""
    if bounds is None:
        return ABSENT
    low, high = bounds
    if relative:
        return f"{signed(low * 100, digits)} … {percent(high, digits)}"
    return f"{signed(low, digits)} … {signed(high, digits)}"


def count(value: float | None) -> str:
    """A whole number with thousands apart: ``12 800``."""
    return ABSENT if value is None else f"{round(value):,}".replace(",", NARROW).replace("-", MINUS)


def duration(seconds: float | None) -> str:
    """A time span in the two units that matter: ``2.4 s``, ``3 min 20 s``, ``1 h 12 min``, ``2 d 3 h``."""
    if seconds is None:
        return ABSENT
    if seconds < 59.95:
        return f"{seconds:.1f}{NARROW}s" if seconds < 9.95 else f"{seconds:.0f}{NARROW}s"
    whole = round(seconds)
    for unit, size, minor, minor_size in (
        ("d", 86400, "h", 3600),
        ("h", 3600, "min", 60),
        ("min", 60, "s", 1),
    ):
        if whole >= size:
            return f"{whole // size}{NARROW}{unit} {whole % size // minor_size}{NARROW}{minor}"
    return f"{whole}{NARROW}s"


def ascii_text(text: str) -> str:
    """The same line for a log file: ASCII signs and ordinary spaces."""
    for mark, plain in ((MINUS, "-"), (NARROW, " "), ("±", "+-"), (ABSENT, "-"), ("…", "..")):
        text = text.replace(mark, plain)
    return text.encode("ascii", "replace").decode("ascii")
