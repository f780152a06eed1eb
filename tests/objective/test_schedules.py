"""Weights, temperatures and a loss's own parameters by the step: values by hand, and a run that follows them."""

import copy
import doctest
import math
import re

import pytest
import torch
from transformers import TrainerCallback, default_data_collator

from fakit import Attention, Features, LayerMap, Objective, Outputs, Schedule, Task, TeacherCache, shrink
from fakit.experiments import ExperimentConfig
from fakit.losses import outputs
from fakit.objective import schedules
from fakit.objective.gradients import term_gradients
from fakit.training.distiller import Distiller
from fakit.training.session.session import TrainSession
from tests.families import tiny
from tests.objective.own_term import Contrastive
from tests.objective.test_objective import labels, trace
from tests.training.runs import At, data, logged, make, parts, weights

# -- the number of a step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Schedule(1.0, 0.2, start=10, end=30), {0: 1.0, 10: 1.0, 15: 0.8, 20: 0.6, 30: 0.2, 99: 0.2}),
        (Schedule(1.0, 0.1, "cosine", 0, 400), {0: 1.0, 100: 0.55 + 0.45 * math.sqrt(0.5), 200: 0.55, 400: 0.1}),
        (Schedule(0.5, 2.0, "warmup", end=3), {0: 0.5, 1: 1.0, 2: 1.5, 3: 2.0, 4: 2.0}),
        (Schedule(1.0, 0.1, "steps", milestones=(5, 7, 20)), {4: 1.0, 5: 0.7, 6: 0.7, 7: 0.4, 19: 0.4, 20: 0.1}),
        (Schedule(0, 1, "steps", milestones=[5]), {4: 0.0, 5: 1.0, 500: 1.0}),
        (Schedule(3.0, 1.0, "constant"), {0: 3.0, 7: 3.0}),
    ],
    ids=lambda value: value.kind if isinstance(value, Schedule) else "",
)
def test_values_by_hand(schedule, values):
    assert {step: schedule.at(step) for step in values} == pytest.approx(values, rel=1e-12)
    assert schedule.at(0) == schedule.start_value and schedule.highest == max(schedule.at(step) for step in range(999))
    assert schedule.lowest == min(schedule.at(step) for step in range(999))
    assert Schedule.from_dict(schedule.to_dict()) == schedule and hash(schedule) == hash(copy.deepcopy(schedule))


def test_without_an_end_it_ends_with_training():
    schedule = Schedule(0.3, 0.1)
    assert [schedule.at(step, 4) for step in range(5)] == pytest.approx([0.3, 0.25, 0.2, 0.15, 0.1])
    assert schedule.at(4, 4) == 0.1  # to the last bit, as every end
    assert schedule.at(0) == 0.3
    with pytest.raises(ValueError, match=r"until the end of training.*set_step\(step, of=steps\)"):
        schedule.at(1)
    with pytest.raises(ValueError, match="starts at step 6, and training ends at step 6"):
        Schedule(0.3, 0.1, start=6).until(6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            (1.0, 0.1, "cosin"),
            r"Schedule\(1.0, 0.1, 'cosin'\): kind 'cosin' is not known; choose one of linear, cosine",
        ),
        ((math.nan, 1.0), "start_value is nan, expected a finite number of at least 0"),
        ((1.0, math.inf), "end_value is inf"),
        ((1.0, -0.1), "end_value is -0.1"),
        (("1", 0.1), "start_value is '1'"),
        ((True, 0.1), "start_value is True"),
        ((1.0, 0.1, "linear", 5, 5), "it ends at step 5 and starts at 5; give an end after the start"),
        ((1.0, 0.1, "linear", 0, 2.5), r"found 2.5 for a step; steps are whole numbers"),
        ((1.0, 0.1, "linear", -1), "found -1 for a step"),
        ((1.0, 0.1, "linear", 0, 5, (1,)), "milestones are for kind='steps'"),
        ((1.0, 0.1, "steps"), r"found milestones \[\], expected one or more"),
        ((1.0, 0.1, "steps", 0, None, (4, 3)), r"found milestones \[4, 3\], expected one or more, each after the last"),
        ((1.0, 0.1, "steps", 0, 9, (3, 4)), "leave out start and end"),
        ((1.0, 0.1, "warmup", 0, 9), "a warm-up rises"),
        ((0.1, 1.0, "warmup"), "its end is given"),
    ],
)
def test_what_is_no_schedule_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Schedule(*given)


def test_docstring_examples_run():
    assert doctest.testmod(schedules).failed == 0


# -- in an objective --------------------------------------------------------------------------------------------------


def made(**changes) -> Objective:
    terms = {
        "features": Features(weight=Schedule(1.0, 0.5, end=10)),
        "outputs": Outputs("taid", temperature=Schedule(4.0, 2.0, "cosine", end=20), t=Schedule(0.4, 1.0, end=10)),
        "task": Task(),
    }
    return Objective(LayerMap.uniform(3, 3), **(terms | changes))


def test_numbers_are_those_of_the_step_and_a_number_replaces_its_schedule():
    objective = made()
    objective.set_step(5)
    assert objective.weights["features"] == objective.features.weight == 0.75
    assert objective.temperature == 4.0 - 2.0 * (1 - math.cos(math.pi / 4)) / 2
    assert objective.outputs.parameters == {"t": pytest.approx(0.7)}
    assert list(objective.schedules) == ["features.weight", "outputs.temperature", "outputs.t"]

    objective.weights["features"] = 0.3
    objective.temperature = 3
    objective.set_step(6)
    assert (objective.weights["features"], objective.temperature) == (0.3, 3)
    assert list(objective.schedules) == ["outputs.t"]

    objective.weights["task"] = Schedule(2.0, 0.0, end=12)  # it is the number of the step at once
    objective.outputs.temperature = Schedule(8.0, 2.0, end=12)
    assert (objective.weights["task"], objective.temperature) == (1.0, 5.0)
    objective.set_step(12)
    assert (objective.weights["task"], objective.temperature) == (0.0, 2.0) and not objective.active("task")
    assert copy.deepcopy(objective).weights["task"] == 0.0


def test_what_a_weight_or_a_temperature_cannot_be_is_refused():
    with pytest.raises(ValueError, match="a temperature is finite and above 0"):
        Outputs(temperature=Schedule(2.0, 0.0))
    objective = made()
    with pytest.raises(ValueError, match="a temperature is finite and above 0"):
        objective.temperature = Schedule(0.0, 2.0)
    with pytest.raises(ValueError, match="goes from the student's logits"):  # the loss's own range, at both ends
        Outputs("taid", t=Schedule(0.4, 1.5))
    with pytest.raises(ValueError, match="0 < beta < 1"):
        Outputs("jsd", beta=Schedule(0.5, 0.0))
    for step in (-1, 0.5, True):
        with pytest.raises(ValueError, match="a step is the number of optimizer steps done"):
            objective.set_step(step)


def test_a_loop_that_says_no_step_is_refused_before_any_work():
    objective = made()
    sides = trace(), trace(seed=1), labels()
    with pytest.raises(ValueError, match=r"features.weight, outputs.temperature, outputs.t: .*objective.set_step"):
        objective(*sides)
    with torch.no_grad():  # nothing is trained on: a look before the first step
        assert objective(*sides).terms
    endless = made(task=Task(weight=Schedule(1.0, 0.0)))
    with pytest.raises(ValueError, match=r"task.weight: .*until the end of training"):
        endless.set_step(0)
    assert not endless.stepped
    endless.set_step(2, of=4)
    assert endless.weights["task"] == 0.5
    objective.set_step(0)
    with pytest.raises(ValueError, match="until the end of training"):
        objective.weights["task"] = Schedule(1.0, 0.0)
    assert objective.weights["task"] == 1.0


def test_a_number_of_an_own_term_may_change_too():
    def last(scale):
        return Objective(terms={"own": Contrastive(2, 3, scale=scale)})

    objective = last(Schedule(2.0, 4.0, end=2))
    for step, scale in enumerate([2.0, 3.0, 4.0]):
        objective.set_step(step)
        expected = last(scale)(trace(), trace(seed=1)).total.item()
        assert objective(trace(), trace(seed=1)).total.item() == expected


def test_a_scheduled_parameter_is_the_losses_own_at_that_number():
    objective = Objective(outputs=Outputs("taid", temperature=2.0, t=Schedule(0.4, 1.0, end=4)))
    student, teacher = trace(causal=False), trace(seed=1, causal=False)
    for step, t in enumerate([0.4, 0.55, 0.7, 0.85, 1.0]):
        objective.set_step(step)
        expected = outputs.taid(student.logits, teacher.logits, student.mask, temperature=2.0, t=t)
        assert objective(student, teacher).total.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("family", ["bert", "gpt2"])  # gpt2: outputs and task in one pass over the head
def test_at_a_step_the_gradient_is_that_of_the_constant_weights(family):
    teacher = tiny(family)
    torch.manual_seed(1)
    student = shrink(teacher, 2)
    inputs = default_data_collator(data(family == "gpt2")[:4])
    layer_map = LayerMap.uniform(2, 3)
    changing = Objective(
        layer_map,
        Features(weight=Schedule(2.0, 1.0, end=10)),
        Attention(weight=Schedule(0.0, 4.0, "cosine", end=10)),
        Outputs("taid", temperature=Schedule(4.0, 2.0, end=10), weight=Schedule(1.0, 3.0, end=10), t=Schedule(0.2, 1)),
        Task(Schedule(0.0, 1.0, "steps", milestones=(5,))),
    )
    constant = Objective(
        layer_map, Features(weight=1.5), Attention(weight=2.0), Outputs("taid", 3.0, 2.0, t=0.6), Task(1.0)
    )

    def gradient(objective):
        distiller = Distiller(teacher, student, objective).train()
        loss = distiller(**inputs)["loss"]
        return loss.item(), torch.autograd.grad(loss, [p for p in student.parameters() if p.requires_grad])

    changing.set_step(5, of=10)
    (loss, found), (expected, theirs) = gradient(changing), gradient(constant)
    assert loss == pytest.approx(expected, rel=1e-6)
    for ours, same in zip(found, theirs, strict=True):
        torch.testing.assert_close(ours, same, rtol=1e-5, atol=1e-8)


def test_measuring_gradients_leaves_schedules_and_temperatures_as_they_are():
    teacher, student, objective = parts()
    objective.weights["features"] = Schedule(0.0, 1.0)
    objective.temperature = Schedule(4.0, 2.0)
    before = objective.settings
    measured = term_gradients(objective.prepare(16, 32), teacher, student, default_data_collator(data()[:4]))
    assert measured.losses["features"] > 0 and measured.temperature == 4.0
    assert objective.settings == before and not objective.stepped

    two = Objective(outputs=Outputs(temperature=2.0), terms={"sharp": Outputs(temperature=1.0)})
    term_gradients(two, teacher, student, default_data_collator(data()[:4]))
    assert (two.outputs.temperature, two.terms["sharp"].temperature) == (2.0, 1.0)


# -- in training ------------------------------------------------------------------------------------------------------


class Look(TrainerCallback):
    """Numbers of every step, as its forward pass has them."""

    def __init__(self, objective):
        self.objective, self.seen = objective, []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append({**self.objective.weights, "temperature": self.objective.temperature})


def rising(**changes):
    """Of the 6 steps of an epoch, features from the fourth on, outputs and attention from the second on."""
    made = parts(**changes)
    made[2].weights.update(
        features=Schedule(0.0, 0.9, start=2, end=5),
        attention=Schedule(0.0, 2.0, "steps", milestones=(1,)),
        outputs=Schedule(0.0, 1.5, "steps", milestones=(1,)),
        task=Schedule(1.0, 0.4),
    )
    made[2].temperature = Schedule(6.0, 3.0)
    return made


def test_a_term_costs_nothing_until_it_rises(tmp_path):
    made = teacher, student, objective = rising()
    asked, calls = [], []
    teacher.register_forward_pre_hook(lambda *_: calls.append(len(asked)))
    student.register_forward_pre_hook(lambda *_: asked.append(objective.needs("student")))
    look = Look(objective)
    trainer = make(tmp_path, made=made, callbacks=[look])
    trainer.train()
    assert len(asked) == 6 and calls == [1, 2, 3, 4, 5]  # before the student: no teacher in the first step
    assert [bool(needs.hidden_states) for needs in asked] == [False] * 3 + [True] * 3
    assert [bool(needs.attentions) for needs in asked] == [False] + [True] * 5
    assert ["features" in entry for entry in trainer.state.log_history[:-1]] == [False] * 3 + [True] * 3
    assert set(objective.projections) == {"S1_T2", "S2_T3"}  # ready, and trained, when it does
    steps = [trainer.optimizer.state[p]["step"].item() for p in objective.projections.parameters()]
    assert steps == [3, 3]
    assert [row["features"] for row in look.seen] == pytest.approx([0, 0, 0, 0.3, 0.6, 0.9])
    assert [row["temperature"] for row in look.seen] == pytest.approx([6.0, 5.5, 5.0, 4.5, 4.0, 3.5])


def test_the_log_holds_weights_and_temperature_of_the_step_and_weighted_means(tmp_path):
    every = make(tmp_path, made=rising())
    every.train()
    assert logged(every, "weight/task") == pytest.approx([1.0 - 0.1 * step for step in range(6)])
    assert logged(every, "temperature") == pytest.approx([6.0, 5.5, 5.0, 4.5, 4.0, 3.5])
    assert "weighted/features" not in every.state.log_history[0]
    for entry in every.state.log_history[:-1]:
        names = [name for name in ("features", "attention", "outputs", "task") if name in entry]
        assert entry["loss"] == pytest.approx(sum(entry[f"weighted/{name}"] for name in names), rel=1e-4)
        assert entry["weighted/task"] == pytest.approx(entry["weight/task"] * entry["task"], rel=1e-5)
    third = make(tmp_path, made=rising(), logging_steps=3)  # the mean of what was weighted, not a product of means
    third.train()
    expected = [sum(logged(every, "weighted/task")[i : i + 3]) / 3 for i in (0, 3)]
    assert logged(third, "weighted/task") == pytest.approx(expected, rel=1e-5)
    assert logged(third, "weight/task") == pytest.approx([0.8, 0.5])


def test_all_micro_batches_of_a_step_have_its_weight(tmp_path):
    def run(**changes):
        made = rising()
        trainer = make(tmp_path, made=made, train=data(padding=0), optim="sgd", **changes)
        trainer.train()
        return trainer

    whole = run(per_device_train_batch_size=8)
    parted = run(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert whole.state.global_step == parted.state.global_step == 3
    assert logged(parted) == pytest.approx(logged(whole), rel=1e-3)
    assert logged(parted, "weight/task") == pytest.approx([1.0, 0.8, 0.6])
    for name, p in weights(whole).items():
        assert torch.allclose(weights(parted)[name], p, atol=1e-6), name


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_resumed_run_continues_schedules_to_the_last_bit(by_hand, tmp_path):
    """The checkpoint lies before features rise: their projections have no optimizer state yet."""

    def run(folder, resume=None):
        made = rising(hidden_dropout_prob=0.1)
        changes = {"task": 0.25, "features": Schedule(0.0, 3.0, start=3)}
        hand = At(2, made[2], lambda objective: objective.weights.update(changes))
        trainer = make(
            folder,
            made=made,
            callbacks=[hand] if by_hand else [],
            lr_scheduler_type="linear",
            max_grad_norm=1.0,
            train_sampling_strategy="random",
            save_strategy="steps",
            save_steps=2,
        )
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return trainer

    straight = run(tmp_path / "straight")
    resumed = run(tmp_path / "resumed", tmp_path / "straight/checkpoint-2")
    for name, p in weights(straight).items():
        assert torch.equal(weights(resumed)[name], p), name
    assert resumed.state.log_history[2:-1] == straight.state.log_history[2:-1]
    assert resumed.objective.settings == straight.objective.settings
    assert resumed.objective.weights["task"] == (0.25 if by_hand else pytest.approx(0.5))


def test_another_schedule_is_another_run(tmp_path):
    made = rising()
    make(tmp_path, made=made, save_strategy="steps", save_steps=2).train()
    other = rising()
    other[2].weights["features"] = Schedule(0.0, 0.8, start=2, end=5)
    with pytest.raises(ValueError, match=r"objective.weights.features.to: 0.9 in the checkpoint, 0.8 here"):
        make(tmp_path, made=other).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_cache_holds_what_rises_later_and_one_that_does_not_is_refused_at_once(tmp_path):
    rows = data()
    live = make(tmp_path / "live", made=rising(), train=rows)
    live.train()
    made = rising()
    cache = TeacherCache.build(tmp_path / "cache", made[0], rows, made[2], dtype="float32")
    cached = make(tmp_path / "cached", made=made, train=rows, extra={"teacher_cache": cache})
    cached.train()
    assert logged(cached) == pytest.approx(logged(live), rel=1e-5)

    outputs_alone = Objective(outputs=Outputs())
    cache = TeacherCache.build(tmp_path / "outputs", made[0], rows, outputs_alone, dtype="float32")
    with pytest.raises(ValueError, match=r"hidden state of teacher layer 2 \(features term\)"):
        make(tmp_path / "no", made=rising(), train=rows, extra={"teacher_cache": cache})


def test_a_run_that_would_come_to_nothing_is_refused_before_its_first_step(tmp_path):
    teacher, student, _ = parts()
    for weights_, step in (
        ({"outputs": Schedule(1.0, 0.0, end=4)}, 4),
        ({"outputs": Schedule(0.0, 1.0)}, 0),
        ({"outputs": Schedule(1.0, 0.0, end=2), "task": Schedule(0.0, 1.0, start=3)}, 2),
    ):
        terms = {"outputs": Outputs(weight=weights_["outputs"]), "task": Task(weights_.get("task", 0.0))}
        trainer = make(tmp_path, made=(teacher, student, Objective(**terms)))
        with pytest.raises(ValueError, match=f"when {step} of 6 steps are done, every weight is 0"):
            trainer.train()
        assert trainer.state.global_step == 0
    late = Objective(outputs=Outputs(weight=Schedule(1.0, 0.5, start=6)))
    with pytest.raises(ValueError, match="starts at step 6, and training ends at step 6"):
        make(tmp_path, made=(teacher, student, late)).train()


# -- under a session --------------------------------------------------------------------------------------------------


def test_a_hand_replaces_a_schedule_and_the_record_says_so(tmp_path):
    plain = make(tmp_path, made=rising())
    plain.train()
    session = TrainSession(make(tmp_path, made=rising()))
    assert session.schedules["task"] == Schedule(1.0, 0.4) and session.settings["task"] == 1.0
    session.step(3, wait=True)
    assert session.events == []  # what moves by itself is no change
    assert session.settings["task"] == pytest.approx(0.7)  # of the next step
    session.set_weight("task", 0.1)
    session.set_temperature(Schedule(5.0, 1.0))
    assert "task" not in session.schedules and session.schedules["temperature"] == Schedule(5.0, 1.0)
    session.resume().result(60)
    assert [(event["step"], event["name"]) for event in session.events] == [(3, "task"), (3, "temperature")]
    assert session.events[0]["new"] == 0.1 and session.events[0]["old"] == pytest.approx(0.8)
    assert "task 0.8 (linear 1 → 0.4 from step 0 to the end) → 0.1" in [text for _, text in session.log]
    rows = {row["step"]: row for row in session.curve}
    assert rows[2]["weighted/task"] == pytest.approx(0.9 * rows[2]["task"], rel=1e-5)
    assert rows[6]["weighted/task"] == pytest.approx(0.1 * rows[6]["task"], rel=1e-5)
    assert rows[6]["temperature"] == pytest.approx(5.0 - 4.0 * 5 / 6)
    assert [rows[step]["loss"] for step in (1, 2, 3)] == logged(plain)[:3]


def test_a_hand_may_not_leave_a_run_with_nothing_to_learn_from_later(tmp_path):
    teacher, student, _ = parts()
    objective = Objective(outputs=Outputs(weight=Schedule(1.0, 0.0, end=4)), task=Task())
    session = TrainSession(make(tmp_path, made=(teacher, student, objective)))
    session.step(wait=True)
    with pytest.raises(ValueError, match="with task at 0 every weight is 0 when 4 steps are done"):
        session.set_weight("task", 0)
    session.stop()


# -- shares of training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_a_share_of_training_is_the_step_next_to_it(steps):
    half = Schedule(1.0, 0.0, "steps", milestones=(0.5,))
    turn = math.floor(steps / 2 + 0.5)
    assert half.until(steps) == turn
    assert [half.at(step, steps) for step in range(steps)] == [1.0] * turn + [0.0] * (steps - turn)


def test_shares_and_steps_give_one_course():
    shares, whole = Schedule(0.2, 1.0, "cosine", start=0.25, end=0.75), Schedule(0.2, 1.0, "cosine", start=10, end=30)
    assert [shares.at(step, 40) for step in range(41)] == [whole.at(step, 40) for step in range(41)]
    assert shares.at(0) == 0.2  # before the first step there is nothing to know
    assert Schedule.from_dict(shares.to_dict()) == shares


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: Schedule(0.0, 1.0, start=1.5), "shares of training between 0 and 1"),
        (lambda: Schedule(0.0, 1.0, end=1.0), "shares of training between 0 and 1"),
        (lambda: Schedule(0.0, 1.0, start=0.6, end=0.5), "an end after the start"),
        (lambda: Schedule(0.0, 1.0, "steps", milestones=(0.5, 3)), "steps alone, or shares alone"),
        (lambda: Schedule(0.0, 1.0, "steps", milestones=(0.5, 0.51)).until(10), "fall on the steps [5, 5] of 10"),
        (lambda: Schedule(0.0, 1.0, start=5, end=0.5).at(6, 8), "it starts at 5 and ends at 4"),
        (lambda: Schedule(0.0, 1.0, end=0.5).at(6), "how many steps that has was not said"),
    ],
)
def test_shares_that_say_nothing_are_refused(made, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        made()


def test_a_file_may_say_shares():
    weight = {"from": 1.0, "to": 0.0, "kind": "steps", "milestones": [0.5]}
    config = ExperimentConfig(features={"weight": weight})
    assert ExperimentConfig.from_dict(config.to_dict()) == config
    assert config.to_dict()["features"]["weight"] == weight
    with pytest.raises(ValueError, match="milestones"):
        ExperimentConfig(features={"weight": {**weight, "milestones": [1.5]}})
