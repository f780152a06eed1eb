"""Balancing while training: the closed forms that it settles at, in a loop by hand and in the trainer."""

import json
import math

import pytest
import torch
from transformers import default_data_collator

from fakit import Attention, Features, LayerMap, Objective, Outputs, Schedule, Task, capture
from fakit.objective.balancing import GradientNorm, Uncertainty
from fakit.objective.earth_mover import EarthMover
from fakit.objective.gradients import term_gradients
from tests.objective.test_objective import labels, trace
from tests.training.runs import data, logged, make, parts, weights

WEIGHTS = {"features": 0.5, "attention": 2.0, "outputs": 1.5, "task": 0.7}


def balanced(balancing, family="bert", **changes):
    """As `parts`, with balancing."""
    teacher, student, plain = parts(family, **changes)
    torch.manual_seed(2)
    terms = {name: type(term)(**(term.describe() | {"weight": WEIGHTS[name]})) for name, term in plain.terms.items()}
    return teacher, student, Objective(LayerMap.uniform(2, 3), **terms, balancing=balancing)


def compared(family, balancing):
    """Student, objective and what it compares on one batch."""
    rows = default_data_collator(data(family == "gpt2")[:4])
    teacher, student, objective = balanced(balancing, family)
    objective.prepare(16, 32)
    theirs, ours = objective.needs("teacher"), objective.needs("student")
    with torch.no_grad():
        teachers = capture(teacher, rows, theirs.hidden_states, theirs.attentions, theirs.capture_logits)
    students = capture(student, rows, ours.hidden_states, ours.attentions, ours.capture_logits)
    return student, objective, (students, teachers, rows["labels"])


def trained(student):
    return [p for p in student.parameters() if p.requires_grad]


def norm(loss, parameters) -> float:
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return sum(g.square().sum() for g in gradients if g is not None).sqrt().item()


# -- uncertainty ------------------------------------------------------------------------------------------------------


def test_at_the_optimum_of_uncertainty_the_variance_is_the_loss():
    objective = Objective(
        LayerMap.uniform(3, 3), Features(weight=0.5), Attention(weight=2.0), Outputs(), Task(), balancing="uncertainty"
    )
    s = objective.balancing.log_variances
    assert s.tolist() == [0.0] * 4
    optimizer = torch.optim.LBFGS([s], max_iter=200, tolerance_grad=1e-9, tolerance_change=1e-12)

    def closure():
        optimizer.zero_grad()
        loss = objective(trace(), trace(seed=1), labels()).total
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    breakdown = objective(trace(), trace(seed=1), labels())
    losses = {name: value.item() for name, value in breakdown.terms.items()}
    assert s.exp().tolist() == pytest.approx(list(losses.values()), rel=1e-3)
    for name, value in breakdown.weighted.items():
        assert value.item() == pytest.approx(objective.weights[name] * (1 + math.log(losses[name])), rel=1e-3)
    assert breakdown.total.item() == pytest.approx(sum(value.item() for value in breakdown.weighted.values()), rel=1e-6)


@pytest.mark.parametrize("family", ["bert", "gpt2"])  # gpt2: outputs and task in one pass over the head
def test_value_and_gradient_are_those_of_the_formula(family):
    student, objective, traces = compared(family, "uncertainty")
    s = objective.balancing.log_variances
    with torch.no_grad():
        s.copy_(torch.tensor([0.3, -0.5, 1.0, 0.2]))
    breakdown = objective(*traces)
    by_hand = sum(
        weight * ((-s[i]).exp() * breakdown.terms[name] + s[i]) for i, (name, weight) in enumerate(WEIGHTS.items())
    )
    assert breakdown.total.item() == pytest.approx(by_hand.item(), rel=1e-6)
    asked = [*trained(student), *objective.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(breakdown.total, asked, retain_graph=True, allow_unused=True),
        torch.autograd.grad(by_hand, asked, allow_unused=True),
        strict=True,
    ):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_a_term_of_weight_0_stays_off_and_is_not_learned():
    objective = Objective(outputs=Outputs(weight=0.0), task=Task(), balancing="uncertainty")
    breakdown = objective(trace(), trace(seed=1), labels())
    breakdown.total.backward()
    assert list(breakdown.terms) == ["task"] and objective.balancing.log_variances.grad[0] == 0
    assert not objective.needs_teacher()


# -- gradient norms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_gradient_norms_come_out_at_the_ratio_of_the_weights(family):
    student, objective, traces = compared(family, "gradient_norm")
    objective.balancing.watch(student)
    objective.set_step(0)
    breakdown = objective(*traces)
    effective = {name: (breakdown.weighted[name] / breakdown.terms[name]).item() for name in WEIGHTS}
    assert sum(effective.values()) == pytest.approx(sum(WEIGHTS.values()), rel=1e-5)
    pulls = {name: norm(breakdown.weighted[name], trained(student)) for name in WEIGHTS}
    ratio = pulls["task"] / WEIGHTS["task"]
    assert pulls == pytest.approx({name: ratio * weight for name, weight in WEIGHTS.items()}, rel=1e-4)
    assert max(effective.values()) / min(effective.values()) > 20  # they were far from it
    # and the total is the sum, also where outputs and task had one pass
    expected = torch.autograd.grad(
        sum(effective[name] * breakdown.terms[name] for name in WEIGHTS), trained(student), retain_graph=True
    )
    found = torch.autograd.grad(breakdown.total, trained(student))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_norms_are_a_running_mean_measured_every_few_steps_and_when_a_term_rises():
    student, objective, traces = compared("bert", GradientNorm(every=3, momentum=0.75))
    objective.balancing.watch(student)
    objective.weights["attention"] = Schedule(0.0, 2.0, "steps", milestones=(2,))
    raw = {}
    for step in range(7):
        objective.set_step(step)
        with torch.no_grad():  # another student from step to step
            for p in trained(student)[:3]:
                p.mul_(1.05)
        students = capture(student, default_data_collator(data()[:4]), [1, 2], [1, 2])
        breakdown = objective(students, *traces[1:])
        objective(students, *traces[1:])  # another micro-batch: nothing is measured twice in a step
        raw[step] = [norm(value, trained(student)) for value in breakdown.terms.values()]
        measured = objective.balancing.norms.tolist()
        if step < 2:
            assert math.isnan(measured[1]) and [measured[0], *measured[2:]] == pytest.approx(raw[0], rel=1e-4)
        elif step == 2:  # attention is there, and all are measured
            assert measured[1] == pytest.approx(raw[2][1], rel=1e-4)
            assert measured[0] == pytest.approx(0.75 * raw[0][0] + 0.25 * raw[2][0], rel=1e-4)
    third, sixth = raw[3], raw[6]
    expected = 0.75 * (0.75 * raw[2][1] + 0.25 * third[1]) + 0.25 * sixth[1]
    assert objective.balancing.norms[1].item() == pytest.approx(expected, rel=1e-4)


def test_a_term_without_gradient_keeps_its_weight_and_none_at_all_is_refused():
    student, objective, traces = compared("bert", "gradient_norm")
    objective.balancing.watch(student)
    objective.set_step(0)
    unlabeled = torch.full_like(traces[2], -100)
    breakdown = objective(*traces[:2], unlabeled)
    assert objective.balancing.norms[3] == 0 and objective.balancing.factors(WEIGHTS)["task"] == 1
    assert all(factor > 0 for factor in objective.balancing.factors(WEIGHTS).values())
    assert torch.isfinite(breakdown.total)

    other, _, _ = compared("bert", None)
    lost = compared("bert", "gradient_norm")[1]
    lost.set_step(0)
    with pytest.raises(ValueError, match=r"call objective.balancing.watch\(student\) before the first step"):
        lost(*traces)
    lost.balancing.watch(other)
    with pytest.raises(ValueError, match="none of the terms depends on the student that is watched"):
        lost(*traces)


def test_a_measurement_moves_nothing_that_a_term_keeps_from_batch_to_batch():
    """Earth mover's masses move with every batch: once, however often it is looked at."""
    found = []
    for balancing in (None, GradientNorm(every=1)):
        torch.manual_seed(0)
        terms = {"movers": EarthMover(layer_map=LayerMap.every(2, 3))}
        objective = Objective(task=Task(), terms=terms, balancing=balancing).prepare(8, 8)
        weight = torch.nn.Linear(8, 8)
        if balancing is not None:
            balancing.watch(weight)
        objective.set_step(0)
        ours = trace(layers=2)
        ours.hidden_states = {i: weight(h.float()) for i, h in ours.hidden_states.items()}
        objective(ours, trace(seed=1), labels())
        found.append(objective.terms["movers"].masses)
    assert found[0] == found[1] and len(set(found[0]["student"].values())) > 1
    assert objective.projections.training


def test_measuring_raw_gradients_is_not_balanced():
    teacher, student, objective = balanced("gradient_norm")
    plain = parts()[2].prepare(16, 32)
    objective.prepare(16, 32).projections.load_state_dict(plain.projections.state_dict())
    batch = default_data_collator(data()[:4])
    ours, theirs = (term_gradients(o, teacher, student, batch) for o in (objective, plain))
    assert ours.losses == theirs.losses and torch.equal(ours.gram, theirs.gram)
    assert isinstance(objective.balancing, GradientNorm) and objective.balancing.norms.isnan().all()


# -- in training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("balancing", ["uncertainty", "gradient_norm"])
def test_a_resumed_run_is_balanced_to_the_last_bit(balancing, tmp_path):
    made_of = {"uncertainty": lambda: Uncertainty(0.05), "gradient_norm": lambda: GradientNorm(every=4)}[balancing]

    def run(folder, resume=None, **changes):
        made = balanced(made_of(), hidden_dropout_prob=0.1)
        made[2].weights["features"] = Schedule(0.0, 0.5, "steps", milestones=(3,))
        settings = {"lr_scheduler_type": "linear", "weight_decay": 0.1, "save_strategy": "steps", "save_steps": 2}
        trainer = make(folder, made=made, **(settings | changes))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    straight = run(tmp_path / "straight")
    resumed = run(tmp_path / "resumed", str(tmp_path / "straight/checkpoint-2"))
    state = straight.objective.balancing.state_dict()
    assert list(state) == [{"uncertainty": "log_variances", "gradient_norm": "norms"}[balancing]]
    assert torch.equal(*(t.objective.balancing.state_dict()[next(iter(state))] for t in (straight, resumed)))
    for name, p in weights(straight).items():
        assert torch.equal(weights(resumed)[name], p), name
    assert resumed.state.log_history[2:-1] == straight.state.log_history[2:-1]
    for entry in straight.state.log_history[:-1]:
        names = [name for name in WEIGHTS if name in entry]
        assert entry["loss"] == pytest.approx(sum(entry[f"weighted/{name}"] for name in names), rel=1e-4)
    assert logged(straight, "weight/task")[-1] != pytest.approx(0.7, rel=1e-2)  # the one that is in force

    straight.save_model(str(tmp_path / "exported"))
    exported = json.loads((tmp_path / "exported/config.json").read_text())
    assert "balancing" not in json.dumps(exported) and sorted(p.name for p in (tmp_path / "exported").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    with pytest.raises(ValueError, match=r"objective.balancing"):
        make(tmp_path, made=parts(hidden_dropout_prob=0.1)).train(
            resume_from_checkpoint=str(tmp_path / "straight/checkpoint-2")
        )


def test_uncertainties_have_a_learning_rate_of_their_own_and_no_decay(tmp_path):
    trainer = make(tmp_path, made=balanced(Uncertainty(0.05)), weight_decay=0.1, lr_scheduler_type="linear")
    trainer.train()
    own = trainer.optimizer.param_groups[-1]
    assert [p.shape for p in own["params"]] == [(4,)] and (own["initial_lr"], own["weight_decay"]) == (0.05, 0.0)
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(weights(trainer))
    # Adam's steps are as long as the learning rate, which falls from 1 to 1/6 of it
    s = trainer.objective.balancing.log_variances
    assert (s.abs() <= 1.01 * 0.05 * 21 / 6).all() and s.abs().max() > 0.15
    losses = [logged(trainer, name)[0] for name in WEIGHTS]
    assert [value > 0 for value in s.tolist()] == [loss > 1 for loss in losses]


def test_checkpointed_activations_and_micro_batches_are_balanced_alike(tmp_path):
    def run(**changes):
        trainer = make(tmp_path, made=balanced(GradientNorm(every=2)), train=data(padding=0), optim="sgd", **changes)
        trainer.train()
        return trainer

    plain, checkpointed = run(), run(activation_checkpointing=True)
    assert logged(checkpointed) == pytest.approx(logged(plain), rel=1e-4)
    assert logged(checkpointed, "weight/task") == pytest.approx(logged(plain, "weight/task"), rel=1e-4)
    parted = run(gradient_accumulation_steps=2)
    assert len(set(logged(parted, "weight/task")[:2])) == 1  # of step 1 as of step 0: one measurement in two steps


def test_what_cannot_be_balanced_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match=r"balancing='grad_norm'\) is not known; choose one of 'uncertainty'"):
        Objective(task=Task(), balancing="grad_norm")
    for wrong in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match="a learning rate is finite and above 0"):
            Uncertainty(wrong)
    with pytest.raises(ValueError, match="a whole number of steps"):
        GradientNorm(every=0)
    with pytest.raises(ValueError, match="0 ≤ momentum < 1"):
        GradientNorm(momentum=1.0)
    with pytest.raises(ValueError, match="balancing: by the optimizer step"):
        student, objective, traces = compared("bert", "gradient_norm")
        objective.balancing.watch(student)
        objective(*traces)
    with pytest.raises(ValueError, match="torch_compile and balancing by gradient norms"):
        made = balanced("gradient_norm")
        make(tmp_path, made=made, torch_compile=True)
