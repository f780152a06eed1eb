"""Round numbers on an axis: one rule for plotly figures, the live picture and the axes that widgets draw themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def linear(low: float, high: float, intervals: int = 6, whole: bool = False) -> list[float]:
    """Numbers from low to high at a distance of 1, 2 or 5 · 10ᵏ, with so many intervals at most; `whole`:
    whole numbers only.
    """
    from matplotlib.ticker import MaxNLocator

    found = MaxNLocator(intervals, steps=[1, 2, 5, 10], integer=whole).tick_values(low, high)
    air = 1e-9 * (high - low)
    return [float(f"{tick:.12g}") for tick in found if low - air <= tick <= high + air]


def logarithmic(low: float, high: float, least: int = 3, most: int = 8) -> list[float]:
    """Numbers from low to high (> 0) for a logarithmic axis: 1, 2 and 5 of each power of ten.

    Where these are more than `most`, powers alone; where fewer than `least`, as between near values, 3 of each power
    too, or the linear ones.
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)

    def between(steps: Sequence[int]) -> list[float]:
        ticks = [float(f"{step}e{power}") for power in powers for step in steps]  # 0.002, not 2 · 0.001
        return [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]

    found = between((1, 2, 5))
    if len(found) > most:
        return thinned(between((1,)), most)
    if len(found) < least:
        found = between((1, 2, 3, 5))
    return found if len(found) >= least else linear(low, high)


def enclosing(low: float, high: float) -> tuple[float, float]:
    """The nearest 1, 2 or 5 · 10ᵏ at or below low and at or above high (> 0), which differ."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 2)
    marks = [float(f"{step}e{power}") for power in powers for step in (1, 2, 5)]
    below = max(mark for mark in marks if mark <= low * (1 + 1e-4))
    return below, min(mark for mark in marks if mark >= high * (1 - 1e-4) and mark > below)


def thinned(values: Sequence[Any], most: int) -> Sequence[Any]:
    """Every second, third … of `values` from the first on, so that at most `most` are left."""
    return values[:: max(1, math.ceil(len(values) / most))]
