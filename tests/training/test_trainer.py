"""DistillationTrainer against a hand-written loop; accumulation, precision, evaluation, logs."""

import copy

import datasets
import pytest
import torch
from torch.nn import functional as F
from transformers import TrainerCallback, default_data_collator

from fakit import DistillationTrainer, LayerMap, capture
from fakit.training.distiller import Distiller
from tests.training.runs import At, arguments, data, logged, make, parts, weights

# -- the loop ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_hand_written_loop_gives_the_trainers_losses_and_weights(family, tmp_path):
    trainer = make(tmp_path, family)
    trainer.train()

    teacher, student, objective = parts(family)
    objective.prepare(16, 32)
    for projection, same in zip(objective.parameters(), parts(family)[2].prepare(16, 32).parameters(), strict=True):
        assert torch.equal(projection, same)
    optimizer = torch.optim.AdamW([*student.parameters(), *objective.parameters()], lr=3e-3, weight_decay=0.0)
    losses = []
    for rows in torch.utils.data.DataLoader(data(family == "gpt2"), batch_size=4, collate_fn=default_data_collator):
        with torch.no_grad():
            theirs = capture(teacher, rows, [2, 3], [2, 3])
        ours = capture(student, rows, [1, 2], [1, 2])
        loss = objective(ours, theirs, rows["labels"]).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    assert len(losses) == 6 and losses[-1] < losses[0]
    assert logged(trainer) == pytest.approx(losses, rel=1e-4)
    expected = dict(Distiller(teacher, student, objective).named_parameters())
    assert weights(trainer).keys() == expected.keys()
    for name, p in weights(trainer).items():
        assert torch.allclose(p, expected[name], atol=1e-5), name


def test_the_logged_terms_add_up_to_the_loss(tmp_path):
    trainer = make(tmp_path)
    trainer.train()
    for entry in trainer.state.log_history[:-1]:
        total = 0.5 * entry["features"] + 2 * entry["attention"] + 1.5 * entry["outputs"] + 0.7 * entry["task"]
        assert entry["loss"] == pytest.approx(total, rel=1e-3)
        for name in ("features", "attention"):
            pairs = [entry[f"{name}/S1_T2"], entry[f"{name}/S2_T3"]]
            assert entry[name] == pytest.approx(sum(pairs) / 2, rel=1e-5)


def test_logs_are_means_over_the_steps_that_had_the_term(tmp_path):
    every = make(tmp_path)
    every.train()
    made = parts()
    third = make(tmp_path, made=made, logging_steps=3)
    third.train()
    for name in ("loss", "features", "attention/S2_T3", "task"):
        means = [sum(logged(every, name)[i : i + 3]) / 3 for i in (0, 3)]
        assert logged(third, name) == pytest.approx(means, rel=1e-3)

    def off(objective):
        objective.weights["outputs"] = 0

    made = parts()
    switched = make(tmp_path, made=made, logging_steps=6, callbacks=[At(2, made[2], off)])
    switched.train()
    assert logged(switched, "outputs") == pytest.approx([sum(logged(every, "outputs")[:2]) / 2], rel=1e-3)


def test_weight_0_costs_no_teacher_forward_pass(tmp_path):
    made = teacher, _, objective = parts()
    calls = []
    teacher.register_forward_pre_hook(lambda *_: calls.append(1))

    def task_alone(objective):
        objective.weights.update(features=0, attention=0, outputs=0)

    trainer = make(tmp_path, made=made, callbacks=[At(2, objective, task_alone)])
    trainer.train()
    assert len(calls) == 2 and len(logged(trainer)) == 6
    assert "features" not in trainer.state.log_history[3] and "task" in trainer.state.log_history[3]


def test_gradient_accumulation_is_the_larger_batch(tmp_path):
    def run(**changes):
        trainer = make(tmp_path, train=data(padding=0), **changes)
        trainer.train()
        return trainer

    whole = run(per_device_train_batch_size=8)
    parted = run(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert logged(parted) == pytest.approx(logged(whole), rel=1e-3)
    # Adam would hide a gradient of the wrong size, SGD does not
    whole = run(per_device_train_batch_size=8, optim="sgd", max_steps=1)
    parted = run(per_device_train_batch_size=4, gradient_accumulation_steps=2, optim="sgd", max_steps=1)
    start = weights(make(tmp_path))
    for name, p in weights(whole).items():
        assert torch.allclose(weights(parted)[name], p, atol=1e-7), name
    assert any((p - start[name]).abs().max() > 1e-4 for name, p in weights(whole).items())


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_padding_does_not_change_the_loss(family):
    teacher, student, objective = parts(family)
    objective.prepare(16, 32)
    distiller = Distiller(teacher, student, objective)
    rows = default_data_collator(data(family == "gpt2")[:4])
    more = {name: F.pad(rows[name], (0, 5), value=0) for name in ("input_ids", "attention_mask")}
    more["labels"] = F.pad(rows["labels"], (0, 5), value=-100) if family == "gpt2" else rows["labels"]
    more["input_ids"][:, -5:] = 9  # whatever stands there
    plain, padded = (distiller(**inputs)["loss"].item() for inputs in (rows, more))
    assert padded == pytest.approx(plain, rel=1e-5)


def test_unlabeled_rows_are_trained_on(tmp_path):
    rows = data()
    for row in rows[::2]:
        row["labels"] = torch.tensor(-100)
    trainer = make(tmp_path, train=rows)
    trainer.train()
    assert len(logged(trainer)) == 6 and all(torch.isfinite(torch.tensor(logged(trainer))))
    _, student, _ = parts()
    first = default_data_collator(rows[:4])
    logits = capture(student, first).logits
    assert logged(trainer, "task")[0] == pytest.approx(
        F.cross_entropy(logits[1::2], first["labels"][1::2]).item(), rel=1e-4
    )


# -- what is trained, what is saved ------------------------------------------------------------------------------------


def test_student_and_projections_are_trained_and_the_teacher_is_not(tmp_path):
    made = parts()
    teacher = made[0].train()
    before = copy.deepcopy(teacher.state_dict())
    trainer = make(tmp_path, made=made)
    start = weights(trainer)
    assert {name.split(".")[0] for name in start} == {"student", "objective"}
    assert {n for n in start if n.startswith("objective")} == {
        f"objective.projections.S{s}_T{s + 1}.weight" for s in (1, 2)
    }
    trainer.train()
    assert all(not torch.equal(p, start[name]) for name, p in weights(trainer).items())
    assert all(torch.equal(p, before[name]) for name, p in teacher.state_dict().items())
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


# -- the Trainer's own doings
# -------------------------------------------------------------------------------------------


def test_evaluation_is_the_tasks_loss_and_the_students_logits(tmp_path):
    def accuracy(predicted):
        return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}

    rows = data(rows=10)
    teacher, student, objective = parts()
    trainer = DistillationTrainer(
        teacher,
        student,
        objective,
        args=arguments(tmp_path),
        eval_dataset=rows,
        data_collator=default_data_collator,
        compute_metrics=accuracy,
    )
    teacher.register_forward_pre_hook(lambda *_: 1 / 0)  # evaluating does not ask the teacher
    inputs = default_data_collator(rows)
    logits = student.eval()(inputs["input_ids"], inputs["attention_mask"]).logits.detach()
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(F.cross_entropy(logits, inputs["labels"]).item(), rel=1e-5)
    assert found["eval_accuracy"] == pytest.approx((logits.argmax(-1) == inputs["labels"]).float().mean().item())
    unlabeled = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in rows]
    predicted = trainer.predict(unlabeled)
    assert torch.allclose(torch.tensor(predicted.predictions), logits, atol=1e-6) and predicted.label_ids is None


def test_columns_that_the_student_does_not_take_are_dropped(tmp_path):
    rows = datasets.Dataset.from_list(
        [
            {**{name: value.tolist() for name, value in row.items()}, "text": "words", "token_type_ids": [1] * 7}
            for row in data(rows=8)
        ]
    )
    trainer = make(tmp_path, train=rows)
    seen = next(iter(trainer.get_train_dataloader()))
    assert sorted(seen) == ["attention_mask", "input_ids", "labels", "token_type_ids"]
    trainer.train()
    assert len(logged(trainer)) == 2


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_gradient_checkpointing_gives_the_same_losses_and_weights(family, tmp_path):
    plain, checkpointed = make(tmp_path, family), make(tmp_path, family, activation_checkpointing=True)
    for trainer in (plain, checkpointed):
        trainer.train()
    assert checkpointed.student.is_activation_checkpointing and not plain.student.is_activation_checkpointing
    assert logged(checkpointed) == pytest.approx(logged(plain), rel=1e-4)
    for name, p in weights(plain).items():
        assert torch.allclose(weights(checkpointed)[name], p, atol=1e-5), name


def test_bf16_autocast_runs_near_float32(tmp_path):
    plain, mixed = make(tmp_path), make(tmp_path, bf16=True)
    for trainer in (plain, mixed):
        trainer.train()
    assert logged(mixed) == pytest.approx(logged(plain), rel=0.1) and logged(mixed) != logged(plain)
    assert all(p.dtype == torch.float32 for p in mixed.model.parameters())


def test_a_random_map_is_drawn_anew_each_epoch(tmp_path):
    drawn = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            drawn.append(objective.layer_map)

    layer_map = LayerMap.random(2, 3, seed=1)
    made = parts(layer_map=layer_map)
    objective = made[2]
    trainer = make(tmp_path, made=made, callbacks=[Look()], num_train_epochs=5, per_device_train_batch_size=8)
    trainer.train()
    assert drawn == [layer_map.for_epoch(epoch) for epoch in range(5) for _ in range(3)]
    assert len(set(drawn)) > 1
    for entry, used in zip(trainer.state.log_history, drawn, strict=False):
        assert [f"features/S{s}_T{t}" for s, t in used] == [n for n in entry if n.startswith("features/")]


def test_tensorboard_shows_every_term_and_pair(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = make(tmp_path, report_to="tensorboard")
    trainer.train()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    expected = {"features", "attention", "outputs", "task", "loss", "features/S1_T2", "attention/S2_T3"}
    assert {f"train/{name}" for name in expected} <= set(events.Tags()["scalars"])
    for name in expected:
        values = [event.value for event in events.Scalars(f"train/{name}")]
        assert values == pytest.approx(logged(trainer, name), rel=1e-5)


def test_a_student_that_shares_weights_with_its_teacher_is_refused(tmp_path):
    teacher, student, objective = parts()
    student.bert.embeddings = teacher.bert.embeddings
    with pytest.raises(ValueError, match=r"share \d+ parameters \(bert.embeddings.*shrink\(teacher"):
        make(tmp_path, made=(teacher, student, objective))
    with pytest.raises(ValueError, match="share"):
        make(tmp_path, made=(teacher, teacher, objective))
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_a_teacher_put_in_train_mode_answers_in_eval_mode(tmp_path):
    losses = []
    for disturb in (False, True):
        trainer = make(tmp_path, made=parts(hidden_dropout_prob=0.3))
        if disturb:
            trainer.teacher.train()
        trainer.train()
        losses.append(logged(trainer))
    assert losses[0] == losses[1] and not trainer.teacher.training


def test_options_that_would_do_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0\.5"):
        make(tmp_path, label_smoothing_factor=0.5)
    with pytest.raises(ValueError, match="train_dataset has no rows"):
        make(tmp_path, train=[])


def test_neftune_reaches_the_students_embeddings(tmp_path):
    plain, noisy = make(tmp_path), make(tmp_path, neftune_noise_alpha=5.0)
    plain.train(), noisy.train()
    assert logged(plain) != logged(noisy)
    assert not noisy.student.get_input_embeddings()._forward_hooks
