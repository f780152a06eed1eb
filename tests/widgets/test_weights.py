"""The loss-weights widget: sliders write into the objective, and the bars are the objective's own numbers."""

import pytest
import torch

from fakit import Features, LayerMap, Objective, Outputs, Task, Trace
from fakit.widgets import loss_weights


@pytest.fixture
def batch():
    """(student trace, teacher trace, labels): two texts of four tokens, three classes."""
    generator = torch.Generator().manual_seed(0)

    def trace(layers):
        return Trace(
            hidden_states={i: torch.randn(2, 4, 8, generator=generator, requires_grad=True) for i in layers},
            logits=torch.randn(2, 3, generator=generator, requires_grad=True),
            mask=torch.tensor([[True] * 4, [True, True, False, False]]),
        )

    return trace([1]), trace([2]), torch.tensor([0, 2])


@pytest.fixture
def objective():
    return Objective(LayerMap([(1, 2)]), Features("mse", weight=0.5), outputs=Outputs(temperature=2.0), task=Task())


def test_it_starts_from_the_objective(objective, batch):
    panel = loss_weights(objective, *batch)
    assert {name: slider.value for name, slider in panel.sliders.items()} == dict(objective.weights)
    assert panel.temperature.value == 2.0
    expected = objective(*batch)
    assert panel.total == pytest.approx(expected.total.item())
    assert panel.terms == pytest.approx({name: value.item() for name, value in expected.terms.items()})


def test_a_slider_writes_the_weight_and_the_total_follows(objective, batch):
    panel = loss_weights(objective, *batch)
    features = panel.terms["features"]
    before = panel.total
    panel.sliders["features"].value = 1.5
    assert objective.weights["features"] == 1.5
    assert panel.total == pytest.approx(before + (1.5 - 0.5) * features)
    bar = panel.figure.plotly.data[0]
    assert dict(zip(bar.y, bar.x, strict=True))["features"] == pytest.approx(1.5 * features)


def test_the_temperature_reaches_the_loss(objective, batch):
    panel = loss_weights(objective, *batch)
    before = panel.terms["outputs"]
    panel.temperature.value = 5.0
    assert objective.outputs.temperature == 5.0
    assert panel.terms["outputs"] == pytest.approx(objective(*batch).terms["outputs"].item())
    assert panel.terms["outputs"] != pytest.approx(before)


def test_a_weight_of_zero_switches_its_term_off(objective, batch):
    panel = loss_weights(objective, *batch)
    panel.sliders["task"].value = 0.0
    assert "task" not in panel.terms
    assert "off (weight 0)" in panel.figure.plotly.data[0].text


def test_all_weights_zero_is_said_and_not_raised(objective, batch):
    panel = loss_weights(objective, *batch)
    for slider in panel.sliders.values():
        slider.value = 0.0
    assert panel.total == 0.0
    assert panel.sentence.startswith("Every weight is 0")


def test_without_labels_the_task_keeps_its_weight(objective, batch):
    panel = loss_weights(objective, *batch[:2])
    assert list(panel.sliders) == ["features", "outputs"]
    panel.sliders["outputs"].value = 0.2
    assert objective.weights["task"] == 1.0


def test_the_axis_does_not_shrink(objective, batch):
    panel = loss_weights(objective, *batch)
    panel.sliders["features"].value = 2.0
    wide = panel.figure.plotly.layout.xaxis.range[1]
    panel.sliders["features"].value = 0.1
    assert panel.figure.plotly.layout.xaxis.range[1] >= 0.95 * wide


def test_the_models_graph_is_not_kept(objective, batch):
    panel = loss_weights(objective, *batch)
    kept = [*panel._traces[0].hidden_states.values(), panel._traces[0].logits]
    assert not any(tensor.requires_grad for tensor in kept)


def test_without_an_output_term_there_is_no_temperature(batch):
    panel = loss_weights(Objective(LayerMap([(1, 2)]), Features()), *batch)
    assert panel.temperature is None and list(panel.sliders) == ["features"]


def test_a_weight_beyond_the_slider_is_named(objective, batch):
    objective.weights["task"] = 3.0
    with pytest.raises(ValueError, match=r"\{'task': 3.0\} are above the sliders' maximum of 2"):
        loss_weights(objective, *batch, maximum=2.0)
    assert loss_weights(objective, *batch).sliders["task"].max == 6.0
