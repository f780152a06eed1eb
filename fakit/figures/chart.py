"""The chart of every picture that changes while one looks: axes, ticks and lines as SVG text.

The live picture of a run and the run browser draw with it.
plotly draws a whole figure anew for every change, which flickers, and the matplotlib twin takes part of a second:
this is text of a few kilobytes, made in a millisecond, that a page puts in place of the one before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from fakit.figures.drawing import log_axis
from fakit.figures.theme import GRID, SMALL, TEXT
from fakit.figures.ticks import linear, logarithmic

DASHES = {"solid": "none", "dash": "8 4", "dot": "2 3", "dashdot": "8 3 2 3", "longdash": "13 4"}
SYMBOLS = {  # around 0, 0, about 5 px in radius
    "circle": "M5 0A5 5 0 1 1 -5 0A5 5 0 1 1 5 0Z",
    "diamond": "M0 -6.5L6.5 0L0 6.5L-6.5 0Z",
    "square": "M-4.5 -4.5H4.5V4.5H-4.5Z",
    "triangle-up": "M0 -6L5.8 4.5H-5.8Z",
    "triangle-down": "M0 6L5.8 -4.5H-5.8Z",
    "cross": "M-2 -6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z",
    "x": "M-6 -3.5L-3.5 -6L0 -2.5L3.5 -6L6 -3.5L2.5 0L6 3.5L3.5 6L0 2.5L-3.5 6L-6 3.5L-2.5 0Z",
}


@dataclass(frozen=True)
class Axis:
    """What one axis shows: numbers from `low` to `high`, of which `ticks` are named.

    Attributes:
        low, high: its ends, in the numbers' own unit; above 0 where `log`.
        ticks: the numbers that have a mark; each is written by `%g`.
        log: logarithmic.
        falling: `high` stands where `low` would.
    """

    low: float
    high: float
    ticks: Sequence[float] = ()
    log: bool = False
    falling: bool = False

    @classmethod
    def around(cls, values: Iterable[float], log: bool = False, falling: bool = False) -> Axis:
        """All of `values`, with a little air at both ends."""
        values = [float(value) for value in values] or [0.0]
        if log:
            made = log_axis(values)
            low, high = (10**end for end in made["range"])
            return cls(low, high, logarithmic(low, high), log, falling)
        air = 0.08 * ((max(values) - min(values)) or abs(values[0]) or 1.0)
        low, high = min(values) - air, max(values) + air
        return cls(low, high, linear(low, high), log, falling)

    def __call__(self, value: float) -> float:
        """Where `value` stands: 0 at the beginning of the axis, 1 at its end."""
        scale = math.log if self.log else float
        share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return 1 - share if self.falling else share


@dataclass(frozen=True)
class Chart:
    """Two axes around a plot area: from `left` to `right` and from `top` to `bottom`, in px of the picture."""

    x: Axis
    y: Axis
    left: float
    right: float
    top: float
    bottom: float

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The place of a point, in px; a value beyond the axis stands at its end."""
        across, up = (min(1.0, max(0.0, axis(value))) for axis, value in ((self.x, x), (self.y, y)))
        return self.left + (self.right - self.left) * across, self.bottom - (self.bottom - self.top) * up

    def frame(self, label: str = "") -> str:
        """Grid, ticks, both axes, and what the horizontal one shows."""
        parts = []
        for tick in self.y.ticks:
            _, y = self.at(self.x.low, tick)
            parts.append(f'<path class="grid" d="M{self.left:.1f} {y:.1f}H{self.right:.1f}" stroke="{GRID}"/>')
            parts.append(text(self.left - 8, y + 4, f"{tick:g}", anchor="end"))
        for tick in self.x.ticks:
            x, _ = self.at(tick, self.y.low)
            parts.append(f'<path class="grid" d="M{x:.1f} {self.top:.1f}V{self.bottom:.1f}" stroke="{GRID}"/>')
            parts.append(text(x, self.bottom + 18, f"{tick:g}", anchor="middle"))
        edge = f"M{self.left:.1f} {self.top:.1f}V{self.bottom:.1f}H{self.right:.1f}"
        parts.append(f'<path class="axis" d="{edge}" stroke="{TEXT}" fill="none"/>')
        parts.append(text((self.left + self.right) / 2, self.bottom + 37, label, anchor="middle"))
        return "".join(parts)

    def path(self, points: Iterable[tuple[float, float]]) -> str:
        """The `d` of a line through `points`."""
        return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in (self.at(*point) for point in points))

    def stairs(self, points: Iterable[tuple[float, float]]) -> str:
        """The `d` of a line that goes across first, then up or down, from each of `points` to the next; "" for none."""
        places = [self.at(*point) for point in points]
        return "".join(f"H{x:.1f}V{y:.1f}" if i else f"M{x:.1f} {y:.1f}" for i, (x, y) in enumerate(places))


def text(x: float, y: float, words: str, size: int = SMALL, anchor: str = "start", color: str = TEXT) -> str:
    """One line of text that begins, ends or has its middle at x; y is its base line."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{color}">{escape(words)}</text>'
    )
