"""Ticks are few, round and inside, on linear and on logarithmic axes, however wide the range."""

import math

import numpy as np
import pytest

from fakit.figures.ticks import enclosing, linear, logarithmic, thinned


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (69.1, 79.5), (-3e-5, 2e-5), (6.0, 14.3), (0.93, 0.97), (1e6, 9e6)]
)
def test_linear_ticks_are_a_few_round_numbers_inside(low, high):
    ticks = np.array(linear(low, high))
    assert 3 <= len(ticks) <= 7 and low <= ticks[0] and ticks[-1] <= high
    step = float(np.diff(ticks).mean())
    assert np.allclose(np.diff(ticks), step) and f"{step:.0e}"[0] in "125"


def test_whole_numbers_stay_whole():
    assert linear(0, 8, 3, whole=True) == [0, 5]
    assert linear(0, 2, whole=True) == [0, 1, 2]
    assert linear(0, 300, 5, whole=True) == [0, 100, 200, 300]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.09, 11, [0.1, 0.2, 0.5, 1, 2, 5, 10]),
        (1e-3, 1e3, [1e-3, 1e-2, 0.1, 1, 10, 100, 1e3]),
        (0.2, 0.5, [0.2, 0.3, 0.5]),
        (0.31, 0.35, [0.31, 0.32, 0.33, 0.34, 0.35]),
        (8.5, 13.4, [9, 10, 11, 12, 13]),
    ],
)
def test_logarithmic_ticks(low, high, expected):
    assert logarithmic(low, high) == expected


@pytest.mark.parametrize("seed", range(20))
def test_logarithmic_ticks_are_three_to_eight_and_inside(seed):
    draw = np.random.default_rng(seed)
    low = 10.0 ** draw.uniform(-9, 6)
    high = low * 10.0 ** draw.choice([draw.uniform(0.05, 1), draw.uniform(1, 18)])
    ticks = logarithmic(low, high)
    assert 3 <= len(ticks) <= 8 and ticks == sorted(set(ticks)), ticks
    assert low * 0.999 <= ticks[0] and ticks[-1] <= high * 1.001


@pytest.mark.parametrize("values", [(0.5, 0.5), (1.0, 1.0), (2e-4, 3.0), (1e-9, 1e6), (0.031, 0.033)])
def test_enclosing_marks_are_the_nearest_of_1_2_5(values):
    low, high = enclosing(*values)
    assert low <= values[0] * 1.001 and high >= values[1] * 0.999 and low < high
    assert all(f"{mark:.0e}"[0] in "125" and math.isclose(mark, float(f"{mark:.0e}")) for mark in (low, high))
    assert values[0] / low <= 2.5001 and high / values[1] <= 2.5001


@pytest.mark.parametrize(("count", "most"), [(1, 3), (3, 3), (4, 3), (100, 7)])
def test_thinned_keeps_the_first_and_few(count, most):
    kept = thinned(list(range(count)), most)
    assert kept[0] == 0 and len(kept) <= most and len(set(np.diff(kept).tolist())) <= 1
