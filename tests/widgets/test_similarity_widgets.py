"""Estimator switch and rogue scrubber: what they show is what was measured, and a click changes it."""

import numpy as np
import pytest
import torch

from fakit.similarity import SimilarityMatrix, scrub_rogue
from fakit.widgets import estimator_switch, rogue_scrubber


def matrix(values, null=0.3, **changes):
    values = np.asarray(values, float)
    full = np.full(values.shape, null)
    how = {"permutations": 50, "bootstrap": 50} | changes
    return SimilarityMatrix(
        values,
        full,
        values - 0.1,
        values + 0.1,
        "debiased",
        40,
        40,
        range(values.shape[0]),
        range(values.shape[1]),
        **how,
    )


RESULTS = {
    "debiased": matrix([[0.9, 0.2, 0.1], [0.1, 0.8, 0.4]]),
    "biased": matrix(
        [[0.95, 0.7, 0.6], [0.6, 0.91, 0.8]], 0.65, bootstrap=0, warnings=("Pooled tokens are not rows.",)
    ),
}


def test_a_button_shows_its_matrix_null_and_interval():
    switch = estimator_switch(RESULTS, [(0, 0), (1, 1)])
    assert list(switch.buttons.options) == ["debiased", "biased"] and switch.result is RESULTS["debiased"]
    heatmap = switch.figure.plotly.data[0]
    np.testing.assert_array_equal(heatmap.z, RESULTS["debiased"].values)
    assert "95 % interval 0.800 to 1.000" in heatmap.hovertext[0][0] and "inside the null" in heatmap.hovertext[0][1]
    assert (
        switch.sentence
        == "debiased, n = 40: mean CKA of the mapped pairs 0.85; 3 of 6 cells within what chance reaches."
    )

    switch.buttons.value = "biased"
    heatmap = switch.figure.plotly.data[0]
    np.testing.assert_array_equal(heatmap.z, RESULTS["biased"].values)
    assert "interval" not in heatmap.hovertext[0][0]  # it has none
    assert switch.figure.plotly.layout.title.text == "CKA: biased"
    assert switch.sentence == (
        "biased, n = 40: mean CKA of the mapped pairs 0.93, +0.08 beside ‘debiased’; 2 of 6 cells within what chance "
        "reaches. Pooled tokens are not rows."
    )


def test_without_a_map_the_mean_is_over_all_pairs():
    assert "mean CKA of all pairs 0.42" in estimator_switch(RESULTS).sentence


def test_a_page_without_a_kernel_has_picture_and_sentence():
    for panel in (estimator_switch(RESULTS), scrubber()):
        bundle = panel._repr_mimebundle_()
        assert bundle["image/svg+xml"].startswith("<?xml") or "<svg" in bundle["image/svg+xml"]
        assert bundle["text/plain"] == panel.figure.summary
        (shown,) = panel._picture.outputs
        assert "image/svg+xml" not in shown["data"]
        assert 'aria-live="polite"' in panel._sentence.value


def test_every_control_has_a_label_and_no_drop_down():
    switch, scrub = estimator_switch(RESULTS), scrubber()
    for control in (switch.buttons, scrub.buttons, scrub.slider):
        assert control.description
        assert type(control).__name__ in ("ToggleButtons", "IntSlider")
    assert scrub.slider.continuous_update is False  # a drag is one callback


def test_switch_refuses():
    with pytest.raises(ValueError, match="two or more matrices"):
        estimator_switch({"one": RESULTS["debiased"]})
    with pytest.raises(ValueError, match="two or more matrices of the same layers"):
        estimator_switch({**RESULTS, "other": matrix(np.ones((2, 2)))})
    with pytest.raises(ValueError, match=r"pair \(student 0, teacher 9\) is not in this matrix"):
        estimator_switch(RESULTS, [(0, 9)])


def scrubber():
    x, y = torch.randn(2, 32, 4, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[..., 5] *= 30
    y[..., 2] = x[..., 5]
    mask = torch.ones(32, 4, dtype=torch.bool)
    return rogue_scrubber(scrub_rogue([x, x + y[..., :12]], [y], mask, [(0, 0), (1, 0)], largest=4))


def test_the_slider_takes_dimensions_out_and_back():
    panel = scrubber()
    found = panel.scrub
    assert panel.slider.max == 4 and panel.slider.value == 0
    assert panel.values["S0 and T0"] > 0.9 and "Move the slider" in panel.sentence
    panel.slider.value = 1
    assert panel.values == pytest.approx(
        {"S0 and T0": found.cka["drop"][1, 0].item(), "S1 and T0": found.cka["drop"][1, 1].item()}
    )
    assert abs(panel.values["S0 and T0"]) < 0.2
    assert [shape.x0 for shape in panel.figure.plotly.layout.shapes] == [1, 1]
    assert (
        panel.sentence.startswith("1 of each layer: in S0 dimension 5 carry") or "dimension 2 carry" in panel.sentence
    )
    panel.slider.value = 0
    assert panel.values["S0 and T0"] > 0.9


def test_dropping_and_scaling_are_two_lines():
    panel = scrubber()
    panel.slider.value = 2
    dropped = panel.values
    panel.buttons.value = "z-score"
    assert panel.values != dropped
    assert list(panel.figure.plotly.data[0].y) == panel.scrub.cka["z-score"][:, 0].tolist()
    assert "z-scored" in panel.figure.plotly.layout.xaxis.title.text
