import json
import math
import shutil
import tempfile

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from fakit.experiments.baselines import evaluate_baselines
from fakit.experiments.build import (
    build_arguments,
    build_objective,
    build_task,
    build_training_rows,
    prepare,
)
from fakit.experiments.config import ARMS
from fakit.experiments.flops import step_flops
from fakit.experiments.result import RunResult
from fakit.experiments.run import run_experiment
from fakit.experiments.store import RunStore
from fakit.experiments.students import make_student
from fakit.training.trainer import DistillationTrainer


def _parts(config):
    prepared = prepare(config)
    return prepared, prepared.task, prepared.teacher, prepared.tokenizer


def test_a_run_from_configuration_to_store(config, tmp_path):
    config = config.replace(out=str(tmp_path / "student"), **{"training.eval_every": 3})
    store = RunStore.open(tmp_path / "runs")
    result = run_experiment(config, store, progress=False)

    assert (result.arm, result.seed, result.metric, result.steps) == ("all", 0, "accuracy", 6)
    assert (result.labeled, result.unlabeled) == (30, 150)
    assert run_experiment(config.replace(out=None, **{"training.labeled_fraction": 1.0}), progress=False).unlabeled == 0
    assert result.score == result.test["accuracy"]
    assert result.score * 60 == pytest.approx(round(result.score * 60))  # a share of the 60 test texts
    assert result.validation["accuracy"] * 40 == pytest.approx(round(result.validation["accuracy"] * 40))
    assert 0 <= result.test["agreement"] <= 1 and "agreement" not in result.validation

    # what the store gives back is what the run returned
    again = RunResult.from_store(store, config.run_id)
    assert again == RunResult(**{**vars(result), "history": again.history})
    logged = {entry["step"]: entry for entry in again.history}
    assert sorted(logged) == [2, 3, 4, 6]
    assert {"loss", "features", "attention", "outputs", "task"} <= logged[2].keys()
    assert "eval_loss" in logged[3] and {"loss", "eval_loss"} <= logged[6].keys()
    assert store.runs()["config.training.steps"].tolist() == [6]
    json.dumps(result.record(), allow_nan=False)

    # the exported student is a plain transformers model and gives the same answers
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    batch = tokenizer(["the cat purrs here", "one barks"], return_tensors="pt", padding=True)
    with torch.no_grad():
        torch.testing.assert_close(exported(**batch).logits, result.student.eval()(**batch).logits, rtol=0, atol=1e-6)
    assert type(config).from_yaml(tmp_path / "student" / "experiment.yaml") == config
    assert "test accuracy" in str(result) and "| accuracy |" in result._repr_markdown_()

    # and the card beside it can be read by a hub, and says what the run says
    card = ModelCard.load(tmp_path / "student" / "README.md")
    assert card.data.library_name == "transformers" and card.data.base_model == config.teacher.id
    scores = {found.metric_type: found.metric_value for found in card.data.eval_results}
    assert scores == {name: round(value, 4) for name, value in result.test.items()}
    assert f"| accuracy | {result.validation['accuracy']:.4f} | {result.test['accuracy']:.4f} |" in card.text
    assert "6 optimizer steps of 8 texts" in card.text and "AutoModelForSequenceClassification" in card.text


def test_a_record_of_a_newer_fakit_is_read_without_what_is_not_known_here(config, tmp_path):
    result = run_experiment(config, progress=False)
    store = RunStore.open(tmp_path)
    store.append_steps(config.run_id, result.history)
    lost = {"teacher": {**result.teacher, "nll": None}, "student": "a path", "history": [], "tomorrow": {"found": 1}}
    store.append_run({**result.record(), **lost})
    again = RunResult.from_store(store, config.run_id)
    assert again.test == result.test and again.history == result.history and again.student is None
    assert math.isnan(again.teacher["nll"]) and again.teacher["accuracy"] == result.teacher["accuracy"]


def test_a_recorded_run_is_not_run_again(config, tmp_path):
    first = run_experiment(config, tmp_path, progress=False)
    with pytest.raises(ValueError, match=rf"{config.run_id} is recorded in .* already\. resume=True"):
        run_experiment(config, tmp_path, progress=False)
    again = run_experiment(config, tmp_path, resume=True, progress=False)
    assert (again.finished, again.score, again.student) == (first.finished, first.score, None)
    assert len(RunStore(tmp_path)) == 1


class _Stop(TrainerCallback):
    """Break off as a power cut would: in the middle of a run, after a checkpoint."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


def test_a_broken_run_goes_on_from_its_checkpoint_to_the_same_student(config, tmp_path):
    whole = run_experiment(config.replace(out=str(tmp_path / "a"), **{"training.save_every": 2}), progress=False)
    broken = config.replace(out=str(tmp_path / "b"), **{"training.save_every": 2})
    with pytest.raises(KeyboardInterrupt):
        run_experiment(broken, callbacks=[_Stop()], progress=False)
    assert not (tmp_path / "b" / "config.json").exists()
    resumed = run_experiment(broken, resume=True, progress=False)
    assert resumed.test == whole.test
    for (name, ours), theirs in zip(
        resumed.student.state_dict().items(), whole.student.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=name)
    assert [entry["step"] for entry in resumed.history] == [entry["step"] for entry in whole.history]


def test_runs_from_a_shared_cache_are_those_of_the_live_teacher(config, tmp_path):
    live = run_experiment(config, progress=False)
    cached = run_experiment(
        config, tmp_path / "runs", progress=False, teacher_cache=tmp_path / "c", cache_dtype="float32"
    )
    for ours, theirs in zip(cached.history, live.history, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert cached.test == pytest.approx(live.test, rel=1e-4)
    assert (cached.teacher_cache, live.teacher_cache, cached.flops) == ("float32", None, None)
    assert RunStore(tmp_path / "runs").record(config.run_id)["teacher_cache"] == "float32"

    built = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "c").glob("*.safetensors")}
    other = config.replace(**{"training.learning_rate": 5e-4})
    run_experiment(other, progress=False, teacher_cache=tmp_path / "c", cache_dtype="float32")
    assert built == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "c").glob("*.safetensors")}
    with pytest.raises(ValueError, match="content"):  # another precision is another cache
        run_experiment(other, progress=False, teacher_cache=tmp_path / "c")


def test_a_cache_is_refused_where_nothing_looks_at_a_teacher(config, tmp_path):
    with pytest.raises(ValueError, match="'none' has no term that looks at a teacher"):
        run_experiment(config.with_arm("none"), progress=False, teacher_cache=tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_the_same_seed_gives_the_same_run_and_another_gives_another(config):
    first, again, other = (run_experiment(c, progress=False) for c in (config, config, config.replace(seed=1)))
    assert first.test == again.test
    assert first.history == again.history
    assert first.history[0]["loss"] != other.history[0]["loss"]


def test_arms_of_one_seed_are_paired(config):
    """The same first weights and the same labeled texts in the same order."""
    students, labeled = {}, {}
    for arm in ("none", "all"):
        of_arm = config.replace(seed=3).with_arm(arm).replace(**{"student.init": "random"})
        prepared, task, _, tokenizer = _parts(of_arm)
        torch.manual_seed(of_arm.seed)
        students[arm] = make_student(of_arm, prepared).model
        rows = build_training_rows(of_arm, task, tokenizer)
        labeled[arm] = [row for row in rows.dataset()["input_ids"] if row in rows.rows[: rows.labeled]["input_ids"]]
        pool = 0 if arm == "none" else 150
        assert (rows.labeled, len(rows.rows)) == (30, 30 + pool)
        labels = torch.tensor(rows.dataset()["labels"]).view(6, 8)
        assert (labels != -100).sum(dim=1).tolist() == [8 if arm == "none" else 4] * 6
    for ours, theirs in zip(students["none"].parameters(), students["all"].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_flops_of_a_step_by_hand(config):
    """A multiply-add is 2; backward is twice the forward, for weights and for inputs."""
    config = config.with_arm("none").replace(**{"training.accumulation": 3})
    prepared, task, teacher, tokenizer = _parts(config)
    student = make_student(config, prepared).model
    rows = build_training_rows(config, task, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            teacher,
            student,
            build_objective(config, student, teacher),
            args=build_arguments(config, folder),
            train_dataset=rows.dataset(),
            data_collator=task.collator(tokenizer),
        )
        measured = step_flops(trainer, rows, batches=1)
    B, T, d, f, layers = 8, max(len(row["input_ids"]) for row in rows.typical_batches(1)[0]), 16, 32, 2
    block = 2 * B * T * (4 * d * d + 2 * d * f) + 2 * 2 * B * T * T * d
    head = 2 * B * (d * d + d * 3)
    assert measured == 3 * 3 * (layers * block + head)


def test_counting_flops_includes_the_teacher_and_leaves_the_run_alone(config, monkeypatch):
    none, everything = (run_experiment(config.with_arm(arm), progress=False) for arm in ("none", "all"))
    assert everything.flops == everything.flops_per_step * 6
    # the students of both do the same products; the teacher adds a forward of twice the layers, about 2/3 of a step
    assert 1 + 0.8 * 2 / 3 < everything.flops_per_step / none.flops_per_step < 1 + 1.3 * 2 / 3
    monkeypatch.setattr("fakit.experiments.run.step_flops", lambda trainer, rows: None)
    uncounted = run_experiment(config, progress=False)
    assert uncounted.flops is None
    assert uncounted.history == everything.history and uncounted.test == everything.test


def test_terms_that_gather_and_move_by_themselves_run_as_if_nothing_was_counted(config, monkeypatch):
    """Statistics of the teacher are there before the first step is measured, and measuring moves no masses."""
    mover = {"kind": "earth_mover", "layer_map": "every", "weight": 0.5}
    features = {"loss": "mse", "standardize": "phi_s", "standardize_batches": 2, "weight": 1.0}
    config = config.replace(features=features, terms={"mover": mover})
    counted = run_experiment(config, progress=False)
    assert counted.flops > 0
    monkeypatch.setattr("fakit.experiments.run.step_flops", lambda trainer, rows: None)
    alone = run_experiment(config, progress=False)
    assert counted.history == alone.history and counted.test == alone.test


def test_a_schedule_is_recorded_as_written_and_in_every_logged_step_and_its_flops_are_counted(config, tmp_path):
    """6 steps: the first four on labels alone, the last two as the arm "all"."""
    step = {"from": 0.0, "to": 1.0, "kind": "steps", "milestones": [4]}
    late = config.replace(**{f"{term}.weight": step for term in ARMS["all"]})
    late = late.replace(**{"outputs.temperature": {"from": 4.0, "to": 1.0}, "training.log_every": 1})
    store = RunStore.open(tmp_path / "runs")
    result = run_experiment(late, store, progress=False)
    assert store.record(late.run_id)["config"]["features"]["weight"] == step
    history = RunResult.from_store(store, late.run_id).history
    assert [row["weight/features"] for row in history] == [0, 0, 0, 0, 1, 1]
    assert [row["temperature"] for row in history] == pytest.approx([4.0, 3.5, 3.0, 2.5, 2.0, 1.5])
    assert ["features" in row for row in history] == [False] * 4 + [True] * 2
    never, always = (
        run_experiment(config.replace(**{f"{term}.weight": weight for term in ARMS["all"]}), progress=False)
        for weight in (step | {"milestones": [100]}, 1.0)
    )
    assert result.flops == pytest.approx(4 * never.flops_per_step + 2 * always.flops_per_step, rel=1e-9)
    assert always.flops_per_step > 1.3 * never.flops_per_step and result.flops == 6 * result.flops_per_step


def test_a_causal_task_reports_the_error_rate_and_the_copy_baseline(config, world):
    config = config.replace(
        task={"name": str(world / "pairs.jsonl"), "options": {"validation": 4, "test": 6, "pool": 30}},
        teacher={"id": str(world / "causal")},
        student={"layers": 1},
        **{"training.max_length": 128, "training.steps": 2},
    )
    result = run_experiment(config, progress=False)
    assert (result.metric, result.higher_is_better) == ("cer", False)
    assert {"cer", "cer_copy", "perplexity", "agreement"} <= result.test.keys()
    baselines = {record["arm"]: record for record in evaluate_baselines(config)}
    assert set(baselines) == {"teacher", "untrained", "copy"}
    # every t was written f: the copy's error rate is the share of t among the characters
    targets = [row for row in build_task(config).test["target"]]
    assert baselines["copy"]["score"] == pytest.approx(sum(t.count("t") for t in targets) / sum(map(len, targets)))
    assert baselines["copy"]["score"] == result.test["cer_copy"]


def test_baselines_of_a_classification(config):
    baselines = {record["arm"]: record for record in evaluate_baselines(config)}
    assert set(baselines) == {"teacher", "untrained"}
    _, task, teacher, tokenizer = _parts(config)
    rows = [tokenizer(text, return_tensors="pt") for text in task.test["text"]]
    with torch.no_grad():
        right = [
            teacher(**row).logits.argmax().item() == label for row, label in zip(rows, task.test["label"], strict=True)
        ]
    assert baselines["teacher"]["score"] == pytest.approx(sum(right) / len(right))
    assert baselines["teacher"]["parameters"] == sum(p.numel() for p in teacher.parameters())
    assert all(record["kind"] == "baseline" for record in baselines.values())


def test_the_objective_is_the_configured_one(config):
    config = config.replace(
        layer_map=[[1, 3], [2, 4]],
        features={"loss": "cosine", "weight": 0.25},
        attention=None,
        outputs={"loss": "jsd", "temperature": 3.0, "weight": 2.0},
        student={"layers": 2, "hidden_size": 8},
    )
    prepared, _, teacher, _ = _parts(config)
    student = make_student(config, prepared).model
    objective = build_objective(config, student, teacher)
    assert objective.layer_map.pairs == [(1, 3), (2, 4)]
    assert dict(objective.weights) == {"features": 0.25, "outputs": 2.0, "task": 1.0}
    assert (objective.features.loss, objective.outputs.loss, objective.outputs.temperature) == ("cosine", "jsd", 3.0)
    assert {name: tuple(p.shape) for name, p in objective.projections.named_parameters()} == {
        "S1_T3.weight": (16, 8),
        "S2_T4.weight": (16, 8),
    }
    pairs = {
        "uniform": [(1, 2), (2, 4)],
        "last": [(1, 3), (2, 4)],
        "first": [(1, 1), (2, 2)],
        "reverse": [(1, 4), (2, 2)],
        "all_to_one": [(1, 4), (2, 4)],
        "none": [],
    }
    for name, expected in pairs.items():
        assert build_objective(config.replace(layer_map=name), student, teacher).layer_map.pairs == expected


def test_a_saved_model_may_be_the_student(config, tmp_path):
    first = run_experiment(config.replace(out=str(tmp_path)), progress=False)
    saved = config.replace(student={"path": str(tmp_path)})
    student = make_student(saved, prepare(saved)).model
    for ours, theirs in zip(student.parameters(), first.student.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": {"id": "embedded"}}, r"'embedded' was asked for the task .*teachers are embedded for reviews"),
        ({"layer_map": [[1, 5]]}, r"5"),
        ({"student": {"layers": 5}}, r"5 layers asked of a teacher of 4"),
        ({"task": {"name": "revews"}}, r"no task 'revews'"),
        ({"device": "cuda:7"}, r"device: 'cuda:7' was asked and torch sees no GPU"),
        ({"student": {"layers": 2, "heads": 1, "hidden_size": 8}}, r"heads"),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_any_step(config, changes, message, tmp_path):
    if "cuda" in str(changes) and torch.cuda.is_available():
        changes = {"device": "cuda:99"}
    with pytest.raises(ValueError, match=message):
        run_experiment(config.replace(**changes), tmp_path / "runs", callbacks=[_Never()], progress=False)
    assert len(RunStore.open(tmp_path / "runs")) == 0


class _Never(TrainerCallback):
    def on_train_begin(self, *_, **__):
        pytest.fail("training began")


def test_a_teacher_of_other_classes_is_refused(config, world, tmp_path):
    rows = [{"text": f"the {word} {word} {n}", "label": word} for n in range(60) for word in "ab"]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"has 3 outputs, the task .* has 2 \(a, b"):
        run_experiment(config.replace(task={"name": str(tmp_path / "two.jsonl")}), progress=False)


def test_a_student_that_tokenizes_otherwise_is_refused(config, world, tmp_path):
    shutil.copytree(world / "teacher", tmp_path / "student")
    vocabulary = json.loads((tmp_path / "student/tokenizer.json").read_text())
    words = vocabulary["model"]["vocab"]
    names = list(words)
    words[names[6]], words[names[7]] = words[names[7]], words[names[6]]
    (tmp_path / "student/tokenizer.json").write_text(json.dumps(vocabulary))
    other = config.replace(student={"path": str(tmp_path / "student")}, layer_map=[[4, 4]])
    with pytest.raises(ValueError, match=r"tokeni[sz]er"):
        run_experiment(other, progress=False)
    shutil.copy(world / "teacher/tokenizer.json", tmp_path / "student/tokenizer.json")
    assert run_experiment(other, progress=False, count_flops=False).steps == 6


def test_texts_longer_than_the_positions_are_refused_before_training(config, world, tmp_path):
    names = ["cat", "dog", "cow"] * 120
    rows = [{"text": f"n{i} " + "the cat purrs " * 30, "label": name} for i, name in enumerate(names)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    long = config.replace(**{"task.name": str(tmp_path / "long.jsonl"), "training.max_length": 64})
    with pytest.raises(
        ValueError, match=r"has 64 tokens at training.max_length: 64, and the teacher .* has 32 positions"
    ):
        run_experiment(long, progress=False)


def test_auto_is_one_run_id_and_the_record_says_what_it_came_to(config, tmp_path, monkeypatch):
    config = config.replace(**{"training.bf16": "auto", "training.steps": 2})
    for fast, name in ((True, "bf16"), (False, "float32")):
        monkeypatch.setattr("fakit.training.precision.bf16_is_fast", lambda device, fast=fast: fast)
        result = run_experiment(config, tmp_path / name, progress=False)
        assert result.precision == name and str(result).endswith(f", {name}")
        record = RunStore(tmp_path / name).record(config.run_id)
        assert (record["precision"], record["config"]["training"]["bf16"]) == (name, "auto")
    assert config.run_id != config.replace(**{"training.bf16": True}).run_id


def test_a_run_goes_on_in_the_precision_that_it_began_in(config, tmp_path, monkeypatch):
    """Begun where bf16 is fast, resumed where it is slow."""
    whole, broken = (
        config.replace(out=str(tmp_path / name), **{"training.save_every": 2, "training.bf16": "auto"}) for name in "ab"
    )
    monkeypatch.setattr("fakit.training.precision.bf16_is_fast", lambda device: True)
    whole = run_experiment(whole, progress=False, count_flops=False)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(broken, callbacks=[_Stop()], progress=False, count_flops=False)
    monkeypatch.setattr("fakit.training.precision.bf16_is_fast", lambda device: False)
    with pytest.warns(UserWarning, match="bf16 was requested, and this cpu takes"):
        resumed = run_experiment(broken, resume=True, progress=False, count_flops=False)
    assert resumed.precision == "bf16" and resumed.test == whole.test
    for ours, theirs in zip(resumed.student.parameters(), whole.student.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def _named_teacher(world, folder, names: list[str], order: list[int]):
    """The toy teacher with its outputs in another order, named accordingly."""
    from transformers import AutoTokenizer, BertForSequenceClassification

    teacher = BertForSequenceClassification.from_pretrained(world / "teacher")
    with torch.no_grad():
        for tensor in (teacher.classifier.weight, teacher.classifier.bias):
            tensor.copy_(tensor[order])
    teacher.config.id2label = {i: names[number] for i, number in enumerate(order)}
    teacher.save_pretrained(folder)
    AutoTokenizer.from_pretrained(world / "teacher").save_pretrained(folder)
    return str(folder)


def test_a_teacher_whose_classes_stand_in_another_order_teaches_the_same_and_the_student_names_the_tasks(
    config, world, tmp_path
):
    from transformers import AutoConfig

    names = ["cat", "cow", "dog"]
    in_order = _named_teacher(world, tmp_path / "in_order", names, [0, 1, 2])
    turned = _named_teacher(world, tmp_path / "turned", [name.upper() for name in names], [2, 0, 1])
    scores = []
    for teacher in (in_order, turned):
        out = tmp_path / f"out-{len(scores)}"
        result = run_experiment(config.replace(**{"teacher.id": teacher, "out": str(out)}), progress=False)
        scores.append(result.test | {"loss": result.history[-1]["loss"]})
        assert AutoConfig.from_pretrained(out).id2label == dict(enumerate(names))
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)


def test_rows_that_are_dropped_are_recorded(config, world, tmp_path):
    rows = (world / "animals.jsonl").read_text()
    (tmp_path / "twice.jsonl").write_text(rows + rows)
    store = RunStore.open(tmp_path / "runs")
    result = run_experiment(config.replace(**{"task.name": str(tmp_path / "twice.jsonl")}), store=store, progress=False)
    assert result.dropped["train: repeats a text"] >= 360
    assert store.record(result.run_id)["dropped"] == result.dropped
