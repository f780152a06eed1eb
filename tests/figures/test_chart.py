"""The chart of live pictures: a number stands where its axis says."""

import re
from xml.etree import ElementTree

import pytest

from fakit.figures.chart import Axis, Chart, text

BOX = {"left": 50, "right": 250, "top": 20, "bottom": 120}
POSITIVE = [[0.5], [1e-6, 1e6], [3.0, 3.0], [1.0, 2.0, 500.0], [99.0, 101.0]]


def test_places_on_a_linear_a_logarithmic_and_a_falling_axis():
    assert [Axis(2, 6)(value) for value in (2, 3, 6)] == [0, 0.25, 1]
    assert [Axis(1, 100, log=True)(value) for value in (1, 10, 100)] == pytest.approx([0, 0.5, 1])
    assert [Axis(2, 6, falling=True)(value) for value in (2, 3, 6)] == [1, 0.75, 0]


def test_points_are_px_of_the_picture_and_none_leaves_the_plot():
    chart = Chart(Axis(0, 10), Axis(0, 1), **BOX)
    assert chart.at(0, 0) == (50, 120) and chart.at(10, 1) == (250, 20) and chart.at(5, 0.5) == (150, 70)
    assert chart.at(-3, 7) == (50, 20)
    assert chart.path([(0, 0), (5, 0.5)]) == "M50.0 120.0L150.0 70.0"
    assert chart.stairs([(0, 0), (5, 0.5), (10, 1)]) == "M50.0 120.0H150.0V70.0H250.0V20.0" and chart.stairs([]) == ""


@pytest.mark.parametrize("values", [*POSITIVE, [0.0], [-7.0], [-1e6, 1e-9], [0.0, 0.0]])
@pytest.mark.parametrize("falling", [False, True])
def test_all_values_and_ticks_are_inside(values, falling):
    axis = Axis.around(values, falling=falling)
    assert axis.low < min(values) and max(values) < axis.high
    assert all(0 <= axis(number) <= 1 for number in (*values, *axis.ticks))


@pytest.mark.parametrize("values", POSITIVE)
def test_all_values_and_ticks_are_inside_a_logarithmic_axis(values):
    axis = Axis.around(values, log=True)
    assert axis.low < min(values) and max(values) < axis.high and len(axis.ticks) >= 2
    assert all(-1e-6 <= axis(number) <= 1 + 1e-6 for number in (*values, *axis.ticks))


def test_nothing_to_show_is_an_axis_still():
    assert Axis.around([])(0.0) == 0.5


def test_the_frame_has_a_grid_line_and_a_number_a_tick():
    chart = Chart(Axis(0, 10, [0, 5, 10]), Axis(0.1, 1, [0.1, 0.2, 0.5, 1], log=True), **BOX)
    frame = ElementTree.fromstring(f"<svg>{chart.frame('step <s>')}</svg>")
    assert [mark.text for mark in frame.iter("text")] == ["0.1", "0.2", "0.5", "1", "0", "5", "10", "step <s>"]
    lines = [line.get("d") for line in frame.iter("path") if line.get("class") == "grid"]
    heights = [float(re.search(r"M\S+ (\S+)H", line)[1]) for line in lines[:4]]
    assert heights == pytest.approx([120, 120 - 30.103, 120 - 69.897, 20], abs=0.06)
    assert lines[4:] == [f"M{x}.0 20.0V120.0" for x in (50, 150, 250)]


def test_words_are_escaped():
    assert ">a &lt; b<" in text(0, 0, "a < b")
