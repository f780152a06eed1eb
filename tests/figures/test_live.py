"""The picture of a run while it trains: points, labels, ticks, changes and the matrix are where the numbers say."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from fakit.figures.live import HEIGHT, POINTS, _apart, _end, training_now

TERMS = ["features", "task"]


def rows(steps):
    return [{"step": k, "features": 2.0 / k, "task": 0.5} for k in range(1, steps + 1)]


def path(svg: str, name: str) -> list[tuple[float, float]]:
    (found,) = re.findall(rf'd="M([^"]*)" data-line="{name}"', svg)
    return [tuple(map(float, point.split())) for point in found.split("L")]


def test_lines_follow_the_numbers_on_a_logarithmic_axis():
    svg, sentence = training_now(rows(4), TERMS, {}, steps=8)
    xs, ys = zip(*path(svg, "features"), strict=True)
    assert np.allclose(np.diff(xs), xs[1] - xs[0], atol=0.2)  # steps of one length
    assert (ys[1] - ys[0]) == pytest.approx(ys[3] - ys[1], abs=0.3) and ys[1] > ys[
        0
    ]  # 2 → 1 → 0.5: equal on a log axis
    assert len({y for _, y in path(svg, "task")}) == 1
    assert sentence == "Step 4 of 8: features 2 → 0.5, task 0.5 → 0.5."
    ET.fromstring(svg)


def test_a_term_that_was_off_for_a_while_and_a_loss_of_zero_are_left_out():
    history = [{"step": 1, "features": 1.0}, {"step": 2}, {"step": 3, "features": 0.0}, {"step": 4, "features": 0.5}]
    svg, _ = training_now(history, TERMS, {}, steps=4)
    assert len(path(svg, "features")) == 2 and 'data-line="task"' not in svg


def test_a_long_run_is_thinned_and_keeps_its_last_point():
    svg, sentence = training_now(rows(5000), TERMS, {}, steps=5000)
    assert POINTS / 2 < len(path(svg, "features")) <= POINTS
    assert "Step 5000 of 5000" in sentence and len(svg) < 20_000


def test_changes_are_lines_with_their_old_and_new_values():
    turned = [
        ("task", 1, 0.5),
        ("task", 0.5, 0.3),
        ("features", 1, 2),
        ("features", 2, 1),
    ]  # in two goes; and back again
    events = [
        *({"step": 2, "name": n, "old": old, "new": new} for n, old, new in turned),
        {"step": 2, "name": "temperature", "old": 2, "new": 4},
    ]
    svg, sentence = training_now(rows(4), TERMS, {}, events=events, steps=4)
    heights = [float(y) for y in re.findall(r'y="([\d.]+)"[^>]*>(?:task 1 → 0.3|temperature 2 → 4)<', svg)]
    assert len(heights) == 2 and heights[1] - heights[0] >= 14  # one below the other
    assert "changed: task 1 → 0.3 at step 2, temperature 2 → 4 at step 2" in sentence


def test_the_matrix_is_the_last_one_and_frames_the_mapped_pairs():
    first, last = np.full((2, 3), 0.1), np.array([[0.9, 0.2, np.nan], [0.3, 0.4, 0.5]])
    svg, sentence = training_now(rows(2), TERMS, {0: first, 2: last}, pairs=[(1, 2)], steps=2)
    assert "CKA at step 2" in svg and "S1 and T2: CKA 0.500" in svg and "S0 and T2: CKA nan" in svg
    assert svg.count('stroke="#D55E00" stroke-width="2.5"') == 1
    assert "CKA S1·T2 0.10 → 0.50" in sentence
    assert all(f">{label}<" in svg for label in (".90", ".50", "–", "S1", "T2"))


def test_nothing_yet_is_said():
    svg, sentence = training_now([], TERMS, {}, steps=5)
    assert "no step yet" in svg and sentence == "0 of 5 steps done."


def test_labels_keep_apart_and_inside():
    placed = _apart({"a": 100.0, "b": 101.0, "c": 290.0, "d": 291.0, "e": 292.0}, 60, 292)
    heights = sorted(placed.values())
    assert min(np.diff(heights)) >= 15 and heights[-1] <= 292 and placed["a"] == 100.0
    assert list(placed) == ["a", "b", "c", "d", "e"]


def test_names_are_escaped():
    svg, _ = training_now([{"step": 1, "a<b": 1.0}], ["a<b"], {}, steps=1)
    ET.fromstring(svg)
    assert f'height="{HEIGHT}"' in svg


@pytest.mark.parametrize(
    ("steps", "last", "end"),
    [(80, 0, 20), (8, 3, 8), (80, 11, 50), (80, 48, 80), (100_000, 260, 1000), (0, 30, 100), (5, 7, 7)],
)
def test_the_axis_ends_well_ahead_of_the_last_step(steps, last, end):
    assert _end(steps, last) == end
