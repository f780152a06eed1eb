"""Gradients by term: equal to what backward gives, under any weights; what is measured is left as it was."""

import math

import pytest
import torch
from torch import nn

from fakit import Features, LayerMap, Objective, Task, capture
from fakit.objective.gradients import (
    HEAD,
    TermGradients,
    balanced_weights,
    gradients_by_temperature,
    parameters_by_part,
    term_gradients,
)
from tests.families import tiny
from tests.training.runs import data, parts

TERMS = ("features", "attention", "outputs", "task")


def some(rows: int = 4, start: int = 0, causal: bool = False) -> dict:
    return {k: torch.stack([row[k] for row in data(causal)[start : start + rows]]) for k in data()[0]}


def breakdown(objective, teacher, student, batch):
    ours, theirs = objective.needs("student"), objective.needs("teacher")
    return objective(
        capture(student, batch, ours.hidden_states, ours.attentions),
        capture(teacher, batch, theirs.hidden_states, theirs.attentions),
        batch["labels"],
    )


def ready(family: str = "bert", **options):
    teacher, student, objective = parts(family, **options)
    objective.prepare(student.config.hidden_size, teacher.config.hidden_size)
    return objective, teacher.eval(), student.eval()


def backward(loss, student) -> dict:
    """The gradient of a loss by part, flat."""
    student.zero_grad()
    loss.backward()
    zero = {p: torch.zeros_like(p) for p in student.parameters()}
    found = {
        part: torch.cat([(zero[p] if p.grad is None else p.grad).flatten() for p in parameters])
        for part, parameters in parameters_by_part(student).items()
    }
    student.zero_grad()
    return found


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_norms_and_cosines_are_those_of_one_backward_a_term(family):
    objective, teacher, student = ready(family)
    rows = some(causal=family != "bert")
    measured = term_gradients(objective, teacher, student, rows)
    assert measured.terms == TERMS
    by_term = {}
    for name in TERMS:
        loss = breakdown(objective, teacher, student, rows).terms[name]
        assert measured.losses[name] == pytest.approx(loss.item())
        by_term[name] = backward(loss, student)
    for part in measured.parts:
        norms = {name: by_term[name][part].norm().item() for name in TERMS}
        assert measured.norms(part=part) == pytest.approx(norms, rel=1e-4, abs=1e-7)
    flat = torch.stack([torch.cat(list(by_term[name].values())) for name in TERMS]).double()
    flat = nn.functional.normalize(flat)
    torch.testing.assert_close(measured.cosines(), flat @ flat.T, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "weights",
    [dict(zip(TERMS, (0.5, 2.0, 1.5, 0.7), strict=True)), dict(zip(TERMS, (3.0, 0.01, 0.0, 1.0), strict=True))],
)
def test_the_gradient_of_the_total_needs_no_new_pass(weights):
    objective, teacher, student = ready()
    measured = term_gradients(objective, teacher, student, some())
    objective.weights.update(weights)
    found = breakdown(objective, teacher, student, some())
    assert measured.total(weights) == pytest.approx(found.total.item(), rel=1e-5)
    by_part = backward(found.total, student)
    for part, gradient in by_part.items():
        assert measured.total_norm(weights, part) == pytest.approx(gradient.norm().item(), rel=1e-4)
    everything = torch.cat(list(by_part.values()))
    assert measured.total_norm(weights) == pytest.approx(everything.norm().item(), rel=1e-4)


def test_several_batches_are_their_mean():
    objective, teacher, student = ready()
    batches = [some(), some(start=4), some(start=8)]
    measured = term_gradients(objective, teacher, student, iter(batches))
    losses = [breakdown(objective, teacher, student, rows).terms["features"] for rows in batches]
    loss = sum(losses) / 3
    assert measured.losses["features"] == pytest.approx(loss.item())
    norm = torch.cat(list(backward(loss, student).values())).norm().item()
    assert measured.norms()["features"] == pytest.approx(norm, rel=1e-4)
    assert measured.per_layer["features"].keys() == objective.pairs("features").keys()


def test_a_term_that_is_off_is_measured_and_everything_is_left_as_it_was():
    objective, teacher, student = ready()
    objective.weights["attention"] = 0.0
    before = dict(objective.weights)
    student.train()
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():  # as in a callback of evaluation
        measured = term_gradients(objective, teacher, student, some())
    assert measured.norms()["attention"] > 0
    assert dict(objective.weights) == before and objective.outputs.temperature == 2.0
    assert student.training and all(p.grad is None for p in student.parameters())
    assert not measured.gram.requires_grad


def test_weights_and_temperature_come_back_after_an_error():
    objective, teacher, student = ready()
    objective.outputs.temperature = 3.0
    with torch.no_grad():
        next(student.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match="features term is nan at S1"):
        gradients_by_temperature(objective, teacher, student, some(), [1.0, 5.0])
    assert objective.weights["features"] == 0.5 and objective.outputs.temperature == 3.0


def test_each_temperature_is_what_the_objective_says_at_it():
    objective, teacher, student = ready()
    by_tau = gradients_by_temperature(objective, teacher, student, some(), [1.0, 2.0, 5.0])
    assert list(by_tau) == [1.0, 2.0, 5.0] and objective.outputs.temperature == 2.0
    for tau, found in by_tau.items():
        objective.outputs.temperature = tau
        expected = term_gradients(objective, teacher, student, some())
        assert found.losses == pytest.approx(expected.losses) and found.temperature == expected.temperature == tau
        torch.testing.assert_close(found.gram, expected.gram, rtol=1e-5, atol=1e-10)


def test_a_layer_below_which_a_term_ends_has_no_gradient_and_no_cosine():
    objective, teacher, student = ready(layer_map=LayerMap([(1, 2)]))
    measured = term_gradients(objective, teacher, student, some())
    at_top = measured.norms(part=2)
    assert at_top["features"] == at_top["attention"] == 0 and at_top["outputs"] > 0
    cosines = measured.cosines(part=2)
    assert cosines[0].isnan().all() and cosines[2, 3].abs() <= 1


def test_frozen_parameters_are_no_part():
    objective, teacher, student = ready()
    words = student.get_input_embeddings().weight.requires_grad_(False)
    assert not any(p is words for p in parameters_by_part(student)[0])
    for parameter in student.base_model.embeddings.parameters():
        parameter.requires_grad_(False)
    assert term_gradients(objective, teacher, student, some()).parts == (1, 2, HEAD)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "gpt2", "llama", "bart", "t5", "albert"])
def test_every_parameter_stands_in_one_part(family):
    model = tiny(family)
    by_part = parameters_by_part(model)
    ids = [id(p) for part in by_part.values() for p in part]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    assert id(model.get_input_embeddings().weight) in {id(p) for p in by_part[0]}
    output = model.get_output_embeddings()
    if output is not None and output.weight is not model.get_input_embeddings().weight:
        assert id(output.weight) in {id(p) for p in by_part[HEAD]}


def test_an_output_head_of_its_own_is_head_whatever_it_is_called():
    model = tiny("gpt-neox")  # calls it embed_out
    assert id(model.get_output_embeddings().weight) in {id(p) for p in parameters_by_part(model)[HEAD]}


# -- balance ----------------------------------------------------------------------------------------------------------


def made(norms: dict[str, float], cosine: float = 0.0) -> TermGradients:
    """Gradients of the given norms in one part, with one cosine between any two."""
    lengths = torch.tensor(list(norms.values()), dtype=torch.float64)
    cosines = torch.full((len(norms), len(norms)), cosine, dtype=torch.float64).fill_diagonal_(1.0)
    return TermGradients(dict.fromkeys(norms, 1.0), {}, (0,), (cosines * lengths[:, None] * lengths)[None])


def test_literal_numbers():
    two = made({"features": 3.0, "task": 4.0}, cosine=-1.0)
    assert two.norms() == pytest.approx({"features": 3.0, "task": 4.0})
    assert two.cosines()[0, 1] == pytest.approx(-1.0)
    assert two.cosine(*two.terms) == pytest.approx(-1.0) and two.cosine(*two.terms, part=0) == pytest.approx(-1.0)
    with pytest.raises(ValueError, match="no gradient of attention was measured"):
        two.cosine(two.terms[0], "attention")
    assert two.total_norm() == pytest.approx(1.0)  # 4 − 3
    assert two.total_norm({"features": 4.0, "task": 3.0}) == pytest.approx(0.0, abs=1e-6)
    assert made({"features": 3.0, "task": 4.0}).total_norm() == pytest.approx(5.0)
    assert str(two) == "features 1 (gradient 3), task 1 (gradient 4)"
    assert two._repr_markdown_().startswith("| term | loss | gradient | S0 |")


def test_balance_gives_every_term_the_pull_of_the_task():
    gradients = made({"features": 0.5, "attention": 2.0, "task": 4.0})
    weights = balanced_weights(gradients, {"features": 1.0, "attention": 1.0, "task": 0.5})
    assert weights == pytest.approx({"features": 4.0, "attention": 1.0, "task": 0.5})
    assert list(gradients.norms(weights).values()) == pytest.approx([2.0] * 3)


def test_balance_of_a_real_student():
    objective, teacher, student = ready()
    measured = term_gradients(objective, teacher, student, some())
    norms = measured.norms(balanced_weights(measured, objective.weights))
    assert list(norms.values()) == pytest.approx([norms["task"]] * 4)


def test_what_is_off_stays_off_and_another_reference_may_be_named():
    gradients = made({"features": 0.5, "attention": 2.0, "task": 4.0})
    weights = {"features": 1.0, "attention": 3.0, "task": 0.0}
    assert balanced_weights(gradients, weights) == pytest.approx({"features": 1.0, "attention": 0.25, "task": 0.0})
    held = balanced_weights(gradients, weights, reference="attention")
    assert held == pytest.approx({"features": 12.0, "attention": 3.0, "task": 0.0})


def test_what_cannot_be_balanced_is_named():
    gradients = made({"features": 0.0, "task": 4.0})
    with pytest.raises(ValueError, match=r"features has no gradient at the student"):
        balanced_weights(gradients)
    with pytest.raises(ValueError, match="every weight is 0"):
        balanced_weights(gradients, {"features": 0, "task": 0})
    assert balanced_weights(gradients, {"features": 0, "task": 1.0}) == {"features": 0, "task": 1.0}


# -- errors -----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_measured_is_said():
    objective, teacher, student = ready()
    unlabeled = {k: v for k, v in some().items() if k != "labels"}
    assert term_gradients(objective, teacher, student, unlabeled).terms == TERMS[:3]
    with pytest.raises(ValueError, match=r"no gradient of \['task'\].*and no labels"):
        term_gradients(objective, teacher, student, unlabeled, terms=["task"])
    with pytest.raises(ValueError, match="needs labels"):
        term_gradients(Objective(task=Task()), None, student, unlabeled)
    with pytest.raises(ValueError, match="at least one batch"):
        term_gradients(objective, teacher, student, [])
    with pytest.raises(ValueError, match="compare with a teacher, and none was given"):
        term_gradients(objective, None, student, some())
    with pytest.raises(ValueError, match="no weight for"):
        made({"features": 1.0}).norms({"task": 1.0})
    with pytest.raises(ValueError, match="no part 7"):
        made({"features": 1.0}).norms(part=7)
    with pytest.raises(ValueError, match="this objective has none"):
        gradients_by_temperature(Objective(task=Task()), None, student, some(), [1.0])
    with pytest.raises(ValueError, match="above 0"):
        gradients_by_temperature(objective, teacher, student, some(), [0.0])
    with pytest.raises(ValueError, match=r"no parameter of .* is trainable"):
        term_gradients(objective, teacher, student.requires_grad_(False), some())


def test_a_gradient_that_is_not_finite_is_named():
    class Root(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.detach().sum() * 0 + 1.0

        @staticmethod
        def backward(ctx, gradient):
            return torch.full((4, 7, 16), math.nan)

    _, _, student = ready()
    objective = Objective(LayerMap([(1, 1)]), Features(lambda ours, theirs, mask: Root.apply(ours)))
    same_width = tiny("bert", hidden_size=16, num_attention_heads=4).eval()
    with pytest.raises(ValueError, match="gradient of the features term is not finite at S0, S1"):
        term_gradients(objective, same_width, student, some())


def test_without_a_teacher_the_task_alone_is_measured():
    _, _, student = ready()
    measured = term_gradients(Objective(task=Task(weight=0.3)), None, student, some())
    assert measured.terms == ("task",) and measured.norms()["task"] > 0 and measured.temperature is None
