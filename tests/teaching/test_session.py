"""TrainSession: the run nobody touches is the trainer's to the last bit;
what is asked happens between two steps and is written down.
"""

import json
import os
import threading

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from fakit import shrink
from fakit.training.probes import LayerProbe, SampleProbe
from fakit.training.session.record import Record
from fakit.training.session.session import TrainSession
from tests.families import VOCAB, batch, tiny, tokenizer
from tests.training.runs import At, logged, make, parts, weights

TEXTS = ["w3 w4 w5 w6", "w40 w41 w7", "w9 w11"]
WORDS = tokenizer(" ".join(f"w{i}" for i in range(1, VOCAB)))
WORDS.pad_token = "[UNK]"
WAIT = 60  # s: no test waits so long unless it fails


def held_out():
    return batch(rows=8, seed=9)


def same(first, second) -> bool:
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def curve(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


class Hold(TrainerCallback):
    """Holds the training thread in a step until the test lets it go: no test depends on who is faster."""

    def __init__(self, step: int):
        self.step, self.reached, self.go = step, threading.Event(), threading.Event()

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.reached.set()
            assert self.go.wait(WAIT)


def held(tmp_path, step: int, **changes) -> tuple[TrainSession, Hold]:
    """A session whose thread stands in a step (0: the first)."""
    hold = Hold(step)
    session = TrainSession(make(tmp_path, callbacks=[hold], **changes)).start()
    assert hold.reached.wait(WAIT)
    return session, hold


def until(session: TrainSession, state: str) -> None:
    for _ in range(WAIT * 100):
        if session.state == state:
            return
        threading.Event().wait(0.01)
    raise AssertionError(f"the session is {session.state}, not {state}")


# -- the same run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["run", "start"])
@pytest.mark.parametrize("changes", [{}, {"logging_steps": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 2}])
def test_a_run_nobody_touches_is_the_trainers_to_the_last_bit(how, changes, tmp_path):
    dropout = {"hidden_dropout_prob": 0.1}
    plain = make(tmp_path, made=parts(**dropout), **changes)
    plain.train()
    watched = make(tmp_path, made=parts(**dropout), **changes)
    session = TrainSession(watched, held_out(), TEXTS, WORDS, look_every=2)
    getattr(session, how)()
    output = session.result(WAIT)

    assert output.global_step == plain.state.global_step == session.progress[0] == session.progress[1]
    assert same(watched, plain)
    assert len(session.curve) == len(curve(plain)) > 1
    for row, entry in zip(session.curve, curve(plain), strict=True):
        assert {name: row[name] for name in entry} == entry  # floats, bit for bit
    assert session.state == "finished" and session.events == []
    assert [text for _, text in session.log] == ["started", "finished"]


def test_the_curve_has_each_term_raw_and_weighted(tmp_path):
    session = TrainSession(make(tmp_path))
    session.run()
    assert len(session.history()) == len(session.history(weighted=True)) == 6
    for row, raw, weighted in zip(session.curve, session.history(), session.history(weighted=True), strict=True):
        assert {"step", "features", "attention", "outputs", "task"} == raw.keys() == weighted.keys()
        assert weighted["features"] == 0.5 * raw["features"] and weighted["outputs"] == 1.5 * raw["outputs"]
        assert row["loss"] == pytest.approx(sum(weighted.values()) - row["step"], rel=1e-3)


# -- weights and temperature ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logging_steps", [1, 5])
def test_a_change_at_step_k_is_that_of_a_callback_at_step_k(logging_steps, tmp_path):
    def change(objective):
        objective.weights.update(features=2.0, task=0.0)
        objective.outputs.temperature = 5.0

    made = parts()
    called = make(tmp_path, made=made, callbacks=[At(3, made[2], change)])
    called.train()

    session, hold = held(tmp_path, 2, logging_steps=logging_steps)  # in the third step
    session.set_weight("features", 2.0)
    session.set_weight("task", 0)
    session.set_temperature(5.0)
    assert session.events == [] and session.objective.weights["features"] == 0.5  # not within a step
    hold.go.set()
    session.result(WAIT)
    assert same(session.trainer, called)
    assert session.events == [
        {"step": 3, "name": "features", "old": 0.5, "new": 2.0},
        {"step": 3, "name": "task", "old": 0.7, "new": 0.0},
        {"step": 3, "name": "temperature", "old": 2.0, "new": 5.0},
    ]
    # the curve has a point at the change, and each point one set of weights
    rows = {row["step"]: row for row in session.curve}
    assert rows[3]["weighted/features"] == 0.5 * rows[3]["features"]
    last = session.curve[-1]
    assert last["step"] > 3 and last["weighted/features"] == 2.0 * last["features"] and "task" not in last


def test_changes_by_other_hands_are_written_down_too(tmp_path):
    made = parts()
    softer = At(2, made[2], lambda objective: objective.weights.update(outputs=3.0))
    session = TrainSession(make(tmp_path, made=made, callbacks=[softer]))
    session.run()
    assert session.events == [{"step": 2, "name": "outputs", "old": 1.5, "new": 3.0}]
    assert [row["weighted/outputs"] / row["outputs"] for row in session.curve] == pytest.approx([1.5] * 2 + [3.0] * 4)


def test_settings_that_no_run_can_have_are_refused_at_once(tmp_path):
    session, hold = held(tmp_path, 0)
    with pytest.raises(ValueError, match="no term 'feature' in this objective"):
        session.set_weight("feature", 1.0)
    with pytest.raises(ValueError, match="finite numbers ≥ 0"):
        session.set_weight("features", -1.0)
    for nothing in (0, float("inf"), "2"):
        with pytest.raises(ValueError, match="finite and above 0"):
            session.set_temperature(nothing)
    for name in ("features", "attention", "outputs"):
        session.set_weight(name, 0)
    with pytest.raises(ValueError, match="with task at 0 every weight is 0"):  # those asked for count already
        session.set_weight("task", 0)
    hold.go.set()
    session.result(WAIT)
    assert session.state == "finished" and dict(session.objective.weights)["task"] == 0.7


def test_before_the_start_a_weight_is_set_at_once(tmp_path):
    session = TrainSession(make(tmp_path))
    session.set_weight("attention", 0.25)
    assert session.objective.weights["attention"] == 0.25
    session.run()
    assert session.events == [{"step": 0, "name": "attention", "old": 2.0, "new": 0.25}]


# -- pause, step, stop ------------------------------------------------------------------------------------------------


def test_pause_step_and_resume_change_nothing_but_the_pace(tmp_path):
    plain = make(tmp_path, logging_steps=6)
    plain.train()
    session, hold = held(tmp_path, 0, logging_steps=6)
    session.pause()
    hold.go.set()
    until(session, "paused")
    assert session.progress == (1, 6)
    assert [row["step"] for row in session.curve] == [1]  # where one looks there is a point
    with pytest.raises(ValueError, match="paused at step 1: resume"):
        session.result()
    session.step(2, wait=True)
    assert session.state == "paused" and session.progress[0] == 3
    session.resume().result()  # no longer paused, even if its thread has not woken yet
    assert session.progress == (6, 6) and same(session.trainer, plain)
    assert [text for _, text in session.log] == ["started", "paused", "paused", "finished"]
    assert sum(row["loss"] for row in session.curve if row["step"] == 1) == pytest.approx(session.curve[0]["loss"])


def test_a_first_step_starts_the_session(tmp_path):
    session = TrainSession(make(tmp_path))
    session.step(wait=True)
    assert session.state == "paused" and session.progress == (1, 6)
    session.stop()
    session.result(WAIT)
    assert session.state == "stopped" and session.progress == (1, 6)


def test_stop_ends_after_the_step_under_way_and_leaves_a_student_to_use(tmp_path):
    session, hold = held(tmp_path, 2, logging_steps=100)
    session.stop()
    hold.go.set()
    output = session.result(WAIT)
    assert session.state == "stopped" and output.global_step == 3
    assert [row["step"] for row in session.curve] == [3]
    student = session.trainer.student
    assert not student.training and torch.isfinite(student(**batch()).logits).all()
    student.save_pretrained(tmp_path / "student")
    again = type(student).from_pretrained(tmp_path / "student")
    assert torch.equal(again(**batch()).logits, student(**batch()).logits)


def test_a_session_runs_once_and_says_what_it_is(tmp_path):
    session = TrainSession(make(tmp_path))
    with pytest.raises(ValueError, match="has not started"):
        session.result()
    with pytest.raises(ValueError, match="the session is ready"):
        session.stop()
    with pytest.raises(ValueError, match="at least 1"):
        session.step(0)
    with pytest.raises(ValueError, match="already under a session"):
        TrainSession(session.trainer)
    session.run()
    with pytest.raises(ValueError, match="this session is finished"):
        session.start()
    with pytest.raises(ValueError, match="the session is finished"):
        session.pause()


def test_a_session_that_is_over_lets_its_trainer_go(tmp_path):
    session = TrainSession(make(tmp_path))
    session.step(2, wait=True)
    session.stop()
    session.result(WAIT)
    session.trainer.train()
    assert session.trainer.state.global_step == 6 and len(session.curve) == 2


def test_waiting_has_an_end(tmp_path):
    session, hold = held(tmp_path, 1)
    with pytest.raises(TimeoutError, match="still running at step 1"):
        session.result(timeout=0.01)
    hold.go.set()
    assert session.result(WAIT).global_step == 6


def test_waiting_for_a_session_that_comes_to_pause_is_refused_and_not_endless(tmp_path):
    session, hold = held(tmp_path, 1)
    session.pause()  # not taken yet: the step is under way
    said = []

    def wait():
        try:
            session.result()
        except ValueError as error:
            said.append(str(error))

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    hold.go.set()
    waiting.join(WAIT)
    assert said == ["the session is paused at step 2: resume() or stop() it first"]
    assert session.resume().result(WAIT).global_step == 6


# -- failures ---------------------------------------------------------------------------------------------------------


class Breaks(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise RuntimeError("the disk is on fire")


@pytest.mark.parametrize("how", ["run", "start"])
def test_a_failure_is_raised_by_result(how, tmp_path):
    session = TrainSession(make(tmp_path, callbacks=[Breaks()]))
    with pytest.raises(RuntimeError, match="the disk is on fire"):
        getattr(session, how)()
        session.result(WAIT)
    assert session.state == "failed" and isinstance(session.error, RuntimeError)
    assert session.log[-1] == (2, "RuntimeError: the disk is on fire")
    assert len(session.curve) == 2
    with pytest.raises(RuntimeError, match="the disk is on fire"):  # again, to whoever asks
        session.result()


def test_a_failure_is_raised_by_a_step_that_waits(tmp_path):
    session = TrainSession(make(tmp_path, callbacks=[Breaks()]))
    with pytest.raises(RuntimeError, match="the disk is on fire"):
        session.step(5, wait=True)


def test_a_nan_is_named_by_term_and_layer(tmp_path):
    session, hold = held(tmp_path, 1)
    with torch.no_grad():
        next(iter(session.objective.projections.values())).weight.fill_(float("nan"))
    hold.go.set()
    with pytest.raises(ValueError, match="the features term is nan at S1←T2"):
        session.result(WAIT)


def test_nothing_is_printed(tmp_path, capfd):
    session = TrainSession(make(tmp_path, disable_tqdm=False), held_out(), TEXTS, WORDS)
    session.start().result(WAIT)
    assert capfd.readouterr() == ("", "")


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_resumed_session_equals_an_unbroken_one(family, tmp_path):
    dropout = {"hidden_dropout_prob": 0.1} if family == "bert" else {"resid_pdrop": 0.1}
    probes = {"held_out": held_out(), "samples": TEXTS, "tokenizer": WORDS, "look_every": 2}

    def session(folder, callbacks=(), **more) -> TrainSession:
        trainer = make(tmp_path / folder, family, callbacks, made=parts(family, **dropout), num_train_epochs=2)
        return TrainSession(trainer, **probes, **more)

    whole = session("whole")
    whole.set_weight("features", 0.1)
    whole.run()

    hold = Hold(3)
    first = session("parted", [hold])
    first.set_weight("features", 0.1)
    first.start()
    assert hold.reached.wait(WAIT)
    first.pause()
    hold.go.set()
    until(first, "paused")
    folder = first.checkpoint()
    assert folder == tmp_path / "parted/checkpoint-4" and (4, "checkpoint in checkpoint-4") in first.log
    first.stop()
    first.result(WAIT)

    torch.randn(100)  # another process would have other random numbers
    second = session("parted", resume_from=folder)
    second.start().result(WAIT)
    assert second.progress == whole.progress == (12, 12)
    assert same(second.trainer, whole.trainer)
    assert second.objective.weights["features"] == 0.1 and second.events == whole.events
    assert [row["loss"] for row in second.curve] == [row["loss"] for row in whole.curve]
    assert second.similarity.keys() == whole.similarity.keys()
    assert all(np.array_equal(second.similarity[step], whole.similarity[step]) for step in whole.similarity)
    assert second.samples == whole.samples
    assert "resumed from checkpoint-4" in [text for _, text in second.log]


def checkpointed(tmp_path):
    """A folder at step 2 of a run whose weights were changed before."""
    session = TrainSession(make(tmp_path, save_strategy="steps", save_steps=2))
    session.set_weight("features", 0.1)
    session.run()
    return tmp_path / "checkpoint-2"


def test_what_is_asked_before_a_resumed_run_starts_comes_after_the_checkpoints_own(tmp_path):
    session = TrainSession(make(tmp_path), resume_from=checkpointed(tmp_path))
    session.set_weight("features", 0.7)
    session.set_temperature(3.5)
    assert session.settings["features"] == 0.7
    session.run()
    assert session.objective.weights["features"] == 0.7 and session.objective.outputs.temperature == 3.5
    assert {"step": 2, "name": "features", "old": 0.1, "new": 0.7} in session.events
    assert [row["weighted/features"] / row["features"] for row in session.curve if row["step"] > 2] == pytest.approx(
        [0.7] * 4
    )


def test_the_curve_before_the_checkpoint_is_there_before_the_start(tmp_path):
    session = TrainSession(make(tmp_path), resume_from=checkpointed(tmp_path))
    assert [row["step"] for row in session.history()] == [1, 2] and session.state == "ready"


@pytest.mark.parametrize("damage", [lambda text: text[: len(text) // 2], lambda text: "[]", lambda text: "{}"])
def test_a_damaged_record_is_refused_before_the_run(damage, tmp_path):
    folder = checkpointed(tmp_path)
    record = folder / "session.json"
    record.write_text(damage(record.read_text()))
    with pytest.raises(ValueError, match=r"session.json is damaged .*delete this file"):
        TrainSession(make(tmp_path), resume_from=folder)
    record.unlink()
    session = TrainSession(make(tmp_path), resume_from=folder)
    session.run()
    assert [row["step"] for row in session.curve] == [3, 4, 5, 6]


def test_a_record_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    record, other = Record(), Record()
    record.note(1, "first")
    record.write(tmp_path)

    write = os.write

    def full(file, content):
        write(file, bytes(content[:10]))
        raise OSError("no space left on device")

    monkeypatch.setattr("fakit.files.os.write", full)
    record.note(2, "second")
    with pytest.raises(OSError, match="no space"):
        record.write(tmp_path)
    other.read(tmp_path)
    assert other.log == [(1, "first")]


def test_the_trainers_own_checkpoints_carry_the_record(tmp_path):
    session = TrainSession(make(tmp_path, save_strategy="steps", save_steps=2))
    session.run()
    record = json.loads((tmp_path / "checkpoint-4/session.json").read_text())
    assert [row["step"] for row in record["curve"]] == [1, 2, 3, 4]


def test_a_checkpoint_that_cannot_be_written_is_told_to_whoever_asked_and_ends_no_run(tmp_path):
    session, hold = held(tmp_path, 1)
    (tmp_path / "checkpoint-2").write_text("a file in the way")
    failed = []

    def ask():
        try:
            session.checkpoint()
        except OSError as error:
            failed.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    while not session._loop.requests:
        threading.Event().wait(0.01)
    hold.go.set()
    asking.join(WAIT)
    session.result(WAIT)
    assert len(failed) == 1 and session.state == "finished" and session.progress == (6, 6)
    assert any(text.startswith("no checkpoint") for _, text in session.log)


def test_a_checkpoint_of_a_run_that_fails_meanwhile_does_not_wait_for_ever(tmp_path):
    hold = Hold(2)
    session = TrainSession(make(tmp_path, callbacks=[hold, Breaks()])).start()
    assert hold.reached.wait(WAIT)
    asked = session.checkpoint(wait=False)
    assert asked is None
    hold.go.set()
    with pytest.raises(RuntimeError, match="on fire"):
        session.result(WAIT)
    assert not (tmp_path / "checkpoint-2").exists() and not session._loop.requests


def test_a_folder_that_is_no_checkpoint_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="is no checkpoint: it has no trainer_state"):
        TrainSession(make(tmp_path), resume_from=tmp_path / "checkpoint-7")


def test_a_checkpoint_after_the_end_holds_the_end(tmp_path):
    session = TrainSession(make(tmp_path))
    with pytest.raises(ValueError, match="nothing to save yet"):
        session.checkpoint()
    session.run()
    folder = session.checkpoint()
    assert folder.name == "checkpoint-6" and (folder / "optimizer.pt").is_file()


# -- looks ------------------------------------------------------------------------------------------------------------


def test_the_looks_come_at_their_steps_and_at_both_ends(tmp_path):
    session = TrainSession(make(tmp_path, max_steps=5), held_out(), TEXTS, WORDS, look_every=2)
    session.run()
    assert list(session.similarity) == list(session.samples) == [0, 2, 4, 5]
    assert {values.shape for values in session.similarity.values()} == {(3, 4)}
    assert not np.array_equal(session.similarity[0], session.similarity[5])


def test_the_similarity_is_cluster_aware_cka_and_that_of_a_watch():
    from fakit import capture
    from fakit.similarity import cka
    from fakit.training.watch import SimilarityWatch

    teacher = tiny("bert")
    copy = shrink(teacher, layers=3)
    found = LayerProbe(teacher, copy, held_out())()
    assert found.shape == (4, 4) and np.allclose(np.diag(found), 1.0)  # a copy resembles itself
    with torch.no_grad():
        trace = capture(teacher, held_out(), range(4))
    owner = torch.arange(len(trace.mask))[:, None].expand_as(trace.mask)[trace.mask]
    one, two = (trace.hidden_states[i][trace.mask] for i in (1, 2))
    assert found[1, 2] == pytest.approx(cka(one, two, clusters=owner), abs=1e-5)
    with pytest.raises(ValueError, match="has 3 sequences; debiased CKA needs at least 4"):
        LayerProbe(teacher, copy, batch(rows=3))

    # one number for one thing: bit for bit, also with padding, in another family, and with a student in training mode
    for teacher, student in ((tiny("gpt2"), tiny("gpt2", seed=1, n_layer=2).train()), (tiny("t5"), tiny("t5", seed=1))):
        given = {name: value for name, value in batch(6, padding=2).items() if name != "labels"}
        if "t5" in type(teacher).__name__.lower():
            given["decoder_input_ids"] = given["input_ids"][:, :5]
        ours, watched = LayerProbe(teacher, student, given)(), SimilarityWatch(teacher, given).measure(student, 0)
        assert np.array_equal(ours, watched[: ours.shape[0], : ours.shape[1]].numpy()) and not np.isnan(ours).any()


def test_samples_of_a_classifier_are_labels_with_probabilities():
    teacher, student, _ = parts()
    student.train()
    state = torch.get_rng_state()
    samples = SampleProbe(teacher, student, TEXTS, WORDS, ["no", "yes"])()
    assert student.training and torch.equal(state, torch.get_rng_state())
    inputs = WORDS(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        chances = student.eval()(**inputs).logits.softmax(-1)
    for row, sample in zip(chances, samples, strict=True):
        assert sample.student == (["no", "yes"][int(row.argmax())], pytest.approx(row.max().item(), abs=1e-6))
        assert sample.agree == (sample.teacher[0] == sample.student[0])
    alone = SampleProbe(None, student, TEXTS, WORDS)()
    assert alone[0].teacher is None and alone[0].agree is None and alone[0].student[0].startswith("LABEL_")


def test_samples_of_a_language_model_are_the_text_that_follows():
    teacher, student, _ = parts("gpt2")
    (sample,) = SampleProbe(teacher, student, TEXTS[:1], WORDS, new_tokens=4)()
    ids = torch.tensor([WORDS(TEXTS[0]).input_ids])
    for _ in range(4):
        with torch.no_grad():
            ids = torch.cat([ids, student(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert sample.student == (WORDS.decode(ids[0, 4:]), None)


def test_probes_say_what_does_not_fit(tmp_path):
    teacher, student, _ = parts()
    with pytest.raises(ValueError, match=r"3 label names for a student of 2 classes \(LABEL_0, LABEL_1\)"):
        SampleProbe(teacher, student, TEXTS, WORDS, ["a", "b", "c"])
    with pytest.raises(ValueError, match="no sample texts"):
        SampleProbe(teacher, student, [], WORDS)
    with pytest.raises(ValueError, match="3 sample texts and no tokenizer"):
        TrainSession(make(tmp_path), samples=TEXTS)
    with pytest.raises(ValueError, match="look_every = 0"):
        TrainSession(make(tmp_path), look_every=0)


# -- news -------------------------------------------------------------------------------------------------------------


def test_news_arrive_once_and_in_order(tmp_path):
    session = TrainSession(make(tmp_path), held_out(), look_every=3)
    session.run()
    news = session.poll()
    assert [item.step for item in news if item.kind == "curve"] == [1, 2, 3, 4, 5, 6]
    assert [item.step for item in news if item.kind == "similarity"] == [0, 3, 6]
    assert news[0] == ("state", 0, "running") and news[-1] == ("state", 6, "finished")
    assert session.poll() == []


def test_a_slow_reader_loses_old_news_and_holds_up_nobody(tmp_path):
    session = TrainSession(make(tmp_path), capacity=3)
    session.start().result(WAIT)
    news = session.poll()
    assert len(news) == 3 and news[-1].value == "finished"
    assert len(session.curve) == 6  # the records are complete
    with pytest.raises(ValueError, match="at least one"):
        Record(0)


def test_listeners_are_called_while_one_waits_and_at_the_end(tmp_path):
    session, hold = held(tmp_path, 1)
    seen = []

    def listener():
        seen.append((session.state, threading.current_thread() is threading.main_thread()))
        hold.go.set()

    session.listeners.append(listener)
    session.result(WAIT)  # the listener lets it go on
    assert seen[0] == ("running", True) and seen[-1] == ("finished", True)


def test_logged_matches_the_curve_of_the_trainer(tmp_path):
    session = TrainSession(make(tmp_path))
    session.run()
    assert [row["outputs"] for row in session.curve] == logged(session.trainer, "outputs")


@pytest.mark.parametrize("ask", [lambda s: s.checkpoint(), lambda s: s.step(2, wait=True), lambda s: s.result()])
def test_the_thread_that_trains_does_not_wait_for_itself(ask, tmp_path):
    session = TrainSession(make(tmp_path))
    session.listeners.append(lambda: ask(session) if session.progress[0] and session.state == "running" else None)
    with pytest.raises(ValueError, match="the thread that trains"):
        session.run()
    assert session.state == "failed"
