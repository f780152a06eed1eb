"""The temperature explorer: what it draws is softmax(logits / τ), and its slider moves it."""

import math

import numpy as np
import pytest
import torch

from fakit.widgets import temperature_explorer

LABELS = ["positive", "neutral", "negative"]
TEACHER, STUDENT = [[2.0, 0.5, -1.0], [0.0, 0.0, 3.0]], [[1.0, 0.5, -1.0], [0.0, 1.0, 1.5]]


def bars(explorer) -> list[np.ndarray]:
    return [np.asarray(trace.y, float) for trace in explorer.figure.plotly.data]


def softmax(logits, temperature):
    powers = np.exp(np.asarray(logits) / temperature)
    return powers / powers.sum()


def test_one_and_tau_side_by_side_for_both_models():
    explorer = temperature_explorer(torch.tensor(TEACHER), LABELS, torch.tensor(STUDENT), temperature=4.0)
    expected = [softmax(logits[0], t) for t in (1, 4) for logits in (TEACHER, STUDENT)]
    for found, wanted in zip(bars(explorer), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-7)


def test_moving_the_slider_draws_anew():
    explorer = temperature_explorer(TEACHER[0], LABELS)
    explorer.slider.value = 16.0
    np.testing.assert_allclose(bars(explorer)[1], softmax(TEACHER[0], 16), atol=1e-12)
    assert explorer.temperature == 16.0
    assert explorer.sentence.startswith("At τ = 16.00 the teacher gives ‘positive’")


def test_at_one_there_is_one_panel():
    explorer = temperature_explorer(TEACHER[0], LABELS, temperature=1.0)
    assert len(bars(explorer)) == 1


def test_the_chooser_changes_the_input():
    explorer = temperature_explorer(TEACHER, LABELS, texts=["a", "b"], temperature=1.0)
    assert explorer.children[0] is explorer.chooser
    explorer.chooser.value = 2
    assert explorer.figure.plotly.layout.title.text == "Outputs for ‘b’"
    np.testing.assert_allclose(bars(explorer)[0], softmax(TEACHER[1], 1), atol=1e-12)


def test_one_input_needs_no_chooser():
    explorer = temperature_explorer(TEACHER[0], LABELS)
    assert explorer.chooser not in explorer.children


def test_the_entropy_is_that_of_the_softened_distribution():
    explorer = temperature_explorer([0.0, 0.0, 0.0], LABELS)
    assert f"entropy {math.log(3):.2f} of at most {math.log(3):.2f} nats" in explorer.sentence


def test_the_slider_is_logarithmic_and_meets_the_round_values():
    slider = temperature_explorer(TEACHER[0], LABELS).slider
    assert (slider.base**slider.min, slider.base**slider.max) == pytest.approx((0.25, 20))
    reached = {round(slider.base ** (slider.min + k * slider.step), 6) for k in range(26)}
    assert {0.25, 0.5, 1, 2, 4, 8, 16} <= reached


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 2.0], LABELS), r"teacher's logits have shape \(2,\); 3 labels need"),
        ((TEACHER, LABELS, STUDENT[:1]), "teacher logits are of 2 inputs, student logits of 1"),
        (([1.0, math.nan, 0.0], LABELS), "hold NaN"),
        ((TEACHER, LABELS, None, ["one"]), "1 texts for the logits of 2 inputs"),
        ((TEACHER, LABELS, None, None, 40.0), "outside the slider's 0.25 to 20"),
    ],
)
def test_what_does_not_fit_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        temperature_explorer(*arguments)
