"""What people type by mistake: each is refused in one sentence that names it, before any work."""

import json

import pytest

from fakit.__main__ import main
from fakit.experiments import ExperimentConfig
from fakit.experiments.store import RunStore
from fakit.models.load import check_device
from fakit.planner import plan
from fakit.planner.cards import find_card
from fakit.teaching.runner import find_notebooks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {"options": {"labels": 3}}}, r"task.options.labels: is a key of task itself; write task.labels"),
        ({"task": {"options": {"seed": 3}}}, r"write task.seed"),
        ({"task": {"name": ""}}, r"task.name: found '' \(text\), expected a name or a path"),
        ({"task": {"name": "a\0b"}}, r"task.name: found"),
        ({"teacher": {"id": "  "}}, r"teacher.id: found"),
        ({"teacher": {"adapter": ""}}, r"teacher.adapter: found"),
        ({"student": {"path": ""}}, r"student.path: found"),
        ({"training": {"warmup": 601}}, r"training.warmup: found 601 steps of training.steps: 600"),
        (
            {"outputs": {"temperature": 1e-300}},
            r"outputs.temperature: found 1e-300, expected a value of 0.001 at least",
        ),
    ],
)
def test_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        ExperimentConfig.from_dict(changes)


def test_a_warm_up_of_all_steps_is_allowed():
    assert ExperimentConfig.from_dict({"training": {"steps": 5, "warmup": 5}}).training.warmup == 5


@pytest.mark.parametrize(
    ("training", "said"),
    [({"steps": 10**12}, "training.steps 1,000,000,000,000"), ({"batch_size": 10**11}, "batch_size 100,000,000,000")],
)
def test_a_run_whose_plan_fills_the_memory_is_refused_before_anything_is_loaded(training, said, tmp_path, capsys):
    path = tmp_path / "a.yaml"
    ExperimentConfig.from_dict({"training": training, "device": "cpu", "teacher": {"id": "./nowhere"}}).to_yaml(path)
    assert main(["distill", str(path), "--out", str(tmp_path / "runs")]) == 2
    found = capsys.readouterr().err
    assert found.startswith("fakit: ") and said in found and "GB are free" in found


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "'gpu' is not known to torch"),
        ("cuda:99", "'cuda:99' was asked"),
        ("cpu,cuda", "is not known"),
        (3.5, "not known"),
    ],
)
def test_devices(device, message):
    with pytest.raises(ValueError, match=message):
        check_device(device)


@pytest.mark.parametrize("memory", ["-5GB", "- 16 GB", "0GB", "nanGB", "", float("inf"), float("nan"), -1])
def test_amounts_of_memory(memory):
    with pytest.raises(ValueError, match="is neither an amount"):
        find_card(memory)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert", "num_attention_heads": 0}, "could not be loaded as a .* model: .*ZeroDivisionError"),
        ({"model_type": "bert", "hidden_act": "no-such-act"}, "could not be loaded as a .* model: .*no-such-act"),
        ({"model_type": "roberta", "hidden_size": "big"}, "could not be loaded as a configuration: .*'hidden_size'"),
        ({"model_type": ["bert"]}, "could not be loaded as a configuration"),
        ({}, "Unrecognized model"),
    ],
)
def test_plans_of_configurations_that_make_no_model(config, message, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", "--teacher", str(tmp_path), "--student", "1"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"fakit: '{tmp_path}' ") and said.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        plan(tmp_path, 1)


@pytest.mark.parametrize("asked", [{"batch": 10**12}, {"seq": 10**30}])
def test_plans_of_more_than_torch_counts(asked):
    with pytest.raises(ValueError, match=f"{next(iter(asked))} is 1e.*no more than"):
        plan("gpt2", 1, **asked)


@pytest.mark.parametrize("path", ["a.jpg", "nowhere/a.svg", "folder.svg"])
def test_a_figure_that_cannot_be_written_is_refused_before_the_plan(path, tmp_path, monkeypatch, capsys):
    (tmp_path / "folder.svg").mkdir()
    monkeypatch.setattr("fakit.planner.planning.plan", lambda *_, **__: pytest.fail("the plan was made first"))
    assert main(["plan", "--teacher", "gpt2", "--student", "1", "--figure", str(tmp_path / path)]) == 2
    assert "cannot save a figure as" in capsys.readouterr().err


RECORD = {"run_id": "a", "kind": "run", "task": "t", "arm": "none", "seed": 0, "metric": "accuracy", "score": 0.5}
RECORD |= {"higher_is_better": True, "test": {"accuracy": 0.5}, "validation": {}, "config": {}, "steps": 1}


@pytest.mark.parametrize(
    "changes", [{"score": "high"}, {"task": ["t"]}, {"seed": "zero"}, {"arm": None}, {"higher_is_better": 1}]
)
def test_a_record_that_is_none_is_named(changes, tmp_path, capsys):
    store = RunStore.open(tmp_path / "runs")
    (tmp_path / "runs/runs.jsonl").write_text(json.dumps(RECORD | changes) + "\n")
    assert main(["report", str(store.path)]) == 2
    said = capsys.readouterr().err
    assert f"the run a has {next(iter(changes.values()))!r} as its {next(iter(changes))}" in said
    (tmp_path / "runs/runs.jsonl").write_text('{"run_id": "a"}\n')
    assert main(["report", str(store.path)]) == 2 and "the run a has nothing as its task" in capsys.readouterr().err


def notebooks(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / f"{name}.ipynb").write_text('{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}')
    return folder


@pytest.mark.parametrize(
    ("only", "found"),
    [
        ("0", ["00_a"]),
        ("00,2", ["00_a", "02_b"]),
        ("02_b", ["02_b"]),
        (",", None),
        ("2,", None),
        ("02 ,07", None),
        ("a", None),
    ],
)
def test_only_names_notebooks_by_number_or_name_and_nothing_else(only, found, tmp_path):
    folder = notebooks(tmp_path / "notebooks", "00_a", "02_b")
    if found is None:
        with pytest.raises(ValueError, match=r"no notebook .* it holds 00_a, 02_b: ask by number"):
            find_notebooks(folder, only)
    else:
        assert [path.stem for path in find_notebooks(folder, only)] == found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not a readable notebook"),
        (b"[1]", "is not a readable notebook"),
        (b"\xff\xfe", "is not a readable notebook"),
        (b'{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}', "has no cell tagged 'parameters'"),
    ],
)
def test_files_that_are_no_notebooks(content, message, tmp_path, capsys):
    notebooks(tmp_path, "00_a")
    (tmp_path / "00_a.ipynb").write_bytes(content)
    assert main(["run", "--notebooks", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said and "00_a.ipynb" in said and not (tmp_path / "out").exists()
