"""The loss laboratory: what it shows is what the objective and backward say; nothing is applied unasked;
failures show and raise.
"""

import math
import threading

import pytest
import torch

from fakit import Objective, Task, capture
from fakit.objective.gradients import balanced_weights, term_gradients
from fakit.widgets import loss_laboratory
from fakit.widgets.panel import WIDGET
from tests.training.runs import data, parts

TERMS = ["features", "attention", "outputs", "task"]


def some(rows: int = 4, start: int = 0) -> dict:
    return {k: torch.stack([row[k] for row in data()[start : start + rows]]) for k in data()[0]}


@pytest.fixture
def models():
    """objective, teacher, student; widths and heads differ."""
    teacher, student, objective = parts()
    return objective.prepare(student.config.hidden_size, teacher.config.hidden_size), teacher, student


@pytest.fixture
def lab(models):
    return loss_laboratory(*models, [some(), some(start=4)], temperatures=[1.0, 4.0])


def expected(models, rows) -> dict[str, float]:
    objective, teacher, student = models
    traces = [
        capture(model, rows, range(3 if model is student else 4), range(1, 3 if model is student else 4))
        for model in (student, teacher)
    ]
    return {name: value.item() for name, value in objective(*traces, rows["labels"]).terms.items()}


def bars(lab, panel: int = 0) -> dict[str, float]:
    bar = lab.figure.plotly.data[panel]
    return dict(zip(bar.y, bar.x, strict=True))


def test_it_starts_from_the_objective_and_shows_the_mean_of_the_batches(models, lab):
    objective = models[0]
    assert lab.weights == dict(objective.weights) and list(lab.sliders) == TERMS
    assert lab.temperature.value == 2.0 and [tau for _, tau in lab.temperature.options] == [1.0, 2.0, 4.0]
    both = [expected(models, rows) for rows in (some(), some(start=4))]
    mean = {name: (both[0][name] + both[1][name]) / 2 for name in TERMS}
    assert {row["term"]: row["loss"] for row in lab.rows()} == pytest.approx(mean, rel=1e-5)
    assert lab.total == pytest.approx(sum(objective.weights[name] * mean[name] for name in TERMS), rel=1e-5)
    assert sum(row["share"] for row in lab.rows()) == pytest.approx(1.0)


def test_a_slider_scales_loss_and_pull_and_leaves_the_objective_alone(models, lab):
    before, (loss, pull) = lab.total, (bars(lab, panel)["features"] for panel in (0, 1))
    cosines = lab.figure.plotly.data[-1].z
    lab.sliders["features"].value = 1.0  # from 0.5
    assert bars(lab)["features"] == pytest.approx(2 * loss) and bars(lab, 1)["features"] == pytest.approx(2 * pull)
    assert lab.total == pytest.approx(before + loss)
    assert (lab.figure.plotly.data[-1].z == cosines).all()
    assert models[0].weights["features"] == 0.5 and "Not applied" in lab.sentence
    lab.apply.click()
    assert models[0].weights["features"] == 1.0 and "The objective holds these weights" in lab.sentence


def test_no_slider_runs_a_model(models, lab):
    ran = []
    for model in models[1:]:
        model.register_forward_pre_hook(lambda *_: ran.append(1))
    lab.sliders["task"].value = 0.1
    lab.temperature.value = 4.0
    lab.part.value = 1
    lab.balance.click()
    assert not ran
    lab.again.click()
    assert len(ran) == 4  # two models, two batches


def test_the_temperature_is_measured_and_not_interpolated(models, lab):
    objective = models[0]
    lab.temperature.value = 4.0
    assert objective.outputs.temperature == 2.0 and "at τ = 4" in lab.sentence
    lab.apply.click()
    assert objective.outputs.temperature == 4.0
    measured = term_gradients(*models, [some(), some(start=4)])
    assert lab.gradients.losses == pytest.approx(measured.losses)
    torch.testing.assert_close(lab.gradients.gram, measured.gram, rtol=1e-5, atol=1e-10)


def test_balance_gives_equal_pulls_and_shows_its_numbers(lab):
    before = lab.weights
    asked = balanced_weights(lab.gradients, before)
    lab.balance.click()
    assert lab.weights == pytest.approx(asked)
    pulls = [row["pull"] for row in lab.rows()]
    assert pulls == pytest.approx([pulls[-1]] * 4) and lab.weights["task"] == before["task"]
    assert all(slider.max >= slider.value for slider in lab.sliders.values())
    norms = lab.gradients.norms()
    line = (
        f"w_features = {before['task']:.3g} · {norms['task']:.4g} / {norms['features']:.4g} = {asked['features']:.4g}"
    )
    assert line in lab._formula.value and "Chen et al. 2018" in lab._formula.value
    lab.balance.click()  # a second press finds nothing to do
    assert lab.weights == pytest.approx(asked)


def test_what_balance_says_can_be_found_by_hand(lab):
    wanted = lab.balanced()
    for name, slider in lab.sliders.items():
        assert slider.min == 0 and slider.step == 0.05 and slider.max >= max(5, wanted[name])
        slider.value = round(wanted[name] / slider.step) * slider.step  # as a hand sets it
    pulls = {row["term"]: row["pull"] for row in lab.rows()}
    norms = lab.gradients.norms()
    for name, pull in pulls.items():
        assert abs(pull - pulls["task"]) <= 0.05 * (norms[name] + norms["task"]) / 2 + 1e-9


def test_reset_goes_back_to_what_the_objective_holds(models, lab):
    lab.balance.click()
    lab.temperature.value = 1.0
    lab.reset.click()
    assert lab.weights == dict(models[0].weights) and lab.temperature.value == 2.0
    assert lab._formula.value == "" and "The objective holds these weights" in lab.sentence


def test_several_sliders_moved_by_a_button_are_drawn_once(lab):
    drawn = []
    draw = lab.draw
    lab.draw = lambda: drawn.append(1) or draw()
    lab.balance.click()
    assert len(drawn) == 1


def test_the_part_chooses_the_cosines(lab):
    assert [value for _, value in lab.part.options] == ["all", 0, 1, 2, "head"]
    lab.part.value = 2
    heat = next(trace for trace in lab.figure.plotly.data if trace.type == "heatmap")
    torch.testing.assert_close(torch.tensor(heat.z), lab.gradients.cosines(2), equal_nan=True)
    assert "in S2" in lab.figure.summary


def test_the_table_holds_every_number_by_layer_pair(lab):
    row = lab.rows()[0]
    for number in (
        f"{row['loss']:.4g}",
        f"{row['norm']:.4g}",
        *(f"S{s}←T{t} {v:.3g}" for (s, t), v in row["pairs"].items()),
    ):
        assert number in lab._table.value
    assert len(row["pairs"]) == 2 and '<th scope="row"' in lab._table.value


def test_every_weight_zero_is_said_and_not_raised(lab):
    for slider in lab.sliders.values():
        slider.value = 0.0
    assert lab.total == 0.0 and lab.sentence.startswith("Every weight is 0")
    lab.balance.click()
    assert "every weight is 0" in lab._formula.value


def test_dropout_is_off_while_measuring_and_modes_come_back(models):
    _, _, student = models
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    student.train()
    student.base_model.embeddings.eval()
    modes = {name: module.training for name, module in student.named_modules()}
    once, twice = (loss_laboratory(*models, some(), temperatures=[1.0]) for _ in range(2))
    assert once.gradients.losses == twice.gradients.losses
    assert {name: module.training for name, module in student.named_modules()} == modes


def test_a_nan_is_named_by_the_constructor(models):
    with torch.no_grad():
        models[2].base_model.encoder.layer[1].output.dense.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="the features term is nan at S2"):
        loss_laboratory(*models, some(), temperatures=[1.0])


def test_a_nan_found_by_measuring_again_is_shown_and_raised(models, lab):
    student = models[2]
    before = lab.gradients
    whole = student.base_model.encoder.layer[1].output.dense.weight.detach().clone()
    with torch.no_grad():
        student.base_model.encoder.layer[1].output.dense.weight.fill_(math.nan)
    lab.again.click()  # raises nothing: it is a callback
    assert 'role="alert"' in lab._alert.value and "the features term is nan at S2←T3" in lab._alert.value
    assert lab.gradients is before
    with pytest.raises(ValueError, match="the features term is nan at S2"):
        lab.result()
    with torch.no_grad():
        student.base_model.encoder.layer[1].output.dense.weight.copy_(whole)
    lab.again.click()
    assert lab._alert.value == "" and lab.result().losses == pytest.approx(before.losses)


def test_measuring_again_follows_the_student(models, lab):
    with torch.no_grad():
        for parameter in models[2].base_model.encoder.layer[0].parameters():
            parameter.mul_(0.5)
    before = lab.total
    lab.again.click()
    assert lab.total != pytest.approx(before)


def test_it_may_be_driven_from_another_thread(lab):
    thread = threading.Thread(target=lambda: setattr(lab.sliders["task"], "value", 1.5))
    thread.start()
    thread.join()
    assert bars(lab)["task"] == pytest.approx(1.5 * lab.gradients.losses["task"])


def test_without_outputs_there_is_no_temperature_and_without_labels_no_task(models):
    objective, teacher, student = models
    alone = loss_laboratory(Objective(task=Task()), None, student, some())
    assert alone.temperature is None and list(alone.sliders) == ["task"] and "no two terms" in alone.figure.summary
    unlabeled = {k: v for k, v in some().items() if k != "labels"}
    lab = loss_laboratory(objective, teacher, student, unlabeled, temperatures=[1.0])
    assert list(lab.sliders) == TERMS[:3]
    lab.balance.click()
    assert "w_i = w_features" in lab._formula.value
    lab.apply.click()
    assert objective.weights["task"] == 0.7


def test_every_control_is_labeled_and_the_page_without_a_kernel_has_a_picture(lab):
    assert all(
        not slider.continuous_update and slider.description for slider in [*lab.sliders.values(), lab.temperature]
    )
    assert [button.description for button in (lab.balance, lab.reset, lab.apply, lab.again)] == [
        "balance",
        "reset",
        "apply",
        "measure again",
    ]
    bundle = lab._repr_mimebundle_()
    assert set(bundle) == {WIDGET, "image/svg+xml", "text/plain"} and bundle["text/plain"] == lab.figure.summary
