"""Numbers and names as people read them, the same in the terminal and on pages."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["bytes_text", "count_text", "decibel_text", "printable", "rate_text", "seconds_text"]


def printable(text: str) -> str:
    """``text`` on one line, control characters escaped: names and messages may carry anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def count_text(value: int) -> str:
    """A count, e.g. ``33.8 M``."""
    return _scaled(value, 1000.0, ("", " k", " M", " G", " T"))


def bytes_text(value: int) -> str:
    """Bytes in powers of a thousand, e.g. ``316 kB``."""
    return _scaled(value, 1000.0, (" B", " kB", " MB", " GB", " TB"))


def _scaled(value: int, step: float, units: Sequence[str]) -> str:
    amount, unit = float(value), 0
    while amount >= step and unit + 1 < len(units):
        amount, unit = amount / step, unit + 1
    return (
        f"{value}{units[0]}"
        if unit == 0
        else f"{amount:.3g}{units[unit]}"
        if amount < 999.5
        else f"{amount:.0f}{units[unit]}"
    )


def seconds_text(value: float) -> str:
    """A duration from seconds, e.g. ``592 us``."""
    if value >= 1.0:
        return f"{value:.3g} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"


def rate_text(value: float) -> str:
    """Samples a second, e.g. ``10790``: four digits, and no fewer than there are before the point."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def decibel_text(value: float) -> str:
    """An SQNR in dB; an infinite one belongs to equal outputs."""
    return "equal" if value == math.inf else f"{value:.1f} dB"
