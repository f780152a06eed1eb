"""The explorer: a control for each argument, and the figure that the function gives for their values."""

import pytest
from ipywidgets import FloatSlider, IntSlider

from fakit.figures import loss_bars
from fakit.widgets import explorer


def drawn(term="features", weight=1.0, loss=2.0):
    return loss_bars({term: loss}, {term: weight})


def test_controls_start_at_the_defaults_and_are_labeled():
    found = explorer(drawn, {"weight": "weight α"}, term=["task", "features"], weight=(0.0, 4.0, 0.5))
    assert found.values == {"term": "features", "weight": 1.0}
    assert [control.description for control in found.controls.values()] == ["term", "weight α"]
    slider = found.controls["weight"]
    assert (slider.min, slider.max, slider.step, slider.continuous_update) == (0.0, 4.0, 0.5, False)
    assert list(found.children[:2]) == list(found.controls.values())


def test_moving_a_control_draws_anew_once():
    calls = []

    def counted(weight=1.0):
        calls.append(weight)
        return drawn(weight=weight)

    found = explorer(counted, weight=(0.0, 4.0, 0.5))
    found.controls["weight"].value = 2.5
    assert calls == [1.0, 2.5]
    assert found.sentence == found.figure.summary == drawn(weight=2.5).summary


def test_whole_numbers_stay_whole():
    seen = []

    def counted(place=2, weight=1.0):
        seen.append(place)
        return drawn(weight=weight)

    found = explorer(counted, place=(1, 4, 1), weight=(0, 4, 1))
    assert isinstance(found.controls["place"], IntSlider) and isinstance(found.controls["weight"], FloatSlider)
    found.controls["place"].value = 3
    assert seen == [2, 3] and all(type(place) is int for place in seen)


def test_a_choice_changes_the_figure():
    found = explorer(drawn, term=["task", "features"])
    found.controls["term"].value = "task"
    assert found.figure.summary.startswith("Total loss 2: task")


@pytest.mark.parametrize(
    ("controls", "message"),
    [
        ({}, "moves something"),
        ({"height": (0.0, 1.0, 0.1)}, "draw takes term, weight, loss; there is no height"),
        ({"term": ["task", "outputs"]}, "of which its default is one"),
        ({"term": ["features"]}, "two values or more"),
        ({"weight": (2.0, 4.0, 0.5)}, "goes from 2 to 4, and its default in draw is 1.0"),
        ({"term": (0.0, 1.0, 0.1)}, "its default in draw is 'features'"),
        ({"weight": (4.0, 0.0, 0.5)}, r"wants \(lowest, highest, step\)"),
        ({"weight": (0.0, 4.0)}, r"wants \(lowest, highest, step\)"),
        ({"weight": (0.0, 4.0, 0.0)}, r"wants \(lowest, highest, step\)"),
    ],
)
def test_what_cannot_be_moved_is_refused(controls, message):
    with pytest.raises(ValueError, match=message):
        explorer(drawn, **controls)
