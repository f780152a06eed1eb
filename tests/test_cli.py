"""The commands: what is typed reaches the functions, what they refuse is one message, and each really runs."""

# ruff: noqa: F811  (an argument that asks for a fixture has the fixture's name)
from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from transformers import AutoModelForSequenceClassification

from fakit.__main__ import main
from fakit.experiments import ExperimentConfig, RunStore, Study
from fakit.experiments.compress import CompressConfig
from tests.experiments.conftest import config, world  # noqa: F401 (fixtures: a toy teacher and texts on disk)

ROOT = Path(__file__).parents[1]


@pytest.fixture
def experiment(config, tmp_path):
    """The file of a small experiment; nothing of it names where the student goes."""
    path = tmp_path / "experiment.yaml"
    config.replace(**{"training.steps": 4}).to_yaml(path)
    return path


# --- run -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """Stands in for the notebooks: records what was asked, answers with the statuses it is given."""
    from fakit.teaching import runner as notebooks

    class Asked(dict):
        statuses = ("ok",)

    calls = Asked()

    def run_notebooks(notebooks_dir, out, profile, only, jobs):
        calls.update(notebooks_dir=notebooks_dir, out=out, profile=profile, only=only, jobs=jobs)
        return [notebooks.NotebookResult("00", "00_a", "A", "Why?", status=status) for status in calls.statuses]

    monkeypatch.setattr(notebooks, "run_notebooks", run_notebooks)
    return calls


def test_run_hands_on_what_is_typed(asked):
    assert main(["run", "--profile", "workshop", "--only", "02,05", "--out", "pages", "--jobs", "3"]) == 0
    assert asked == dict(notebooks_dir=None, out=Path("pages"), profile="workshop", only="02,05", jobs=3)


def test_run_without_options_is_the_quick_profile_of_all_notebooks(asked):
    assert main(["run"]) == 0
    assert asked == dict(notebooks_dir=None, out=Path("reports"), profile="quick", only=None, jobs=2)


def test_run_fails_where_a_notebook_fails(asked):
    asked.statuses = ("ok", "failed")
    assert main(["run"]) == 1


# --- distill, report
# ---------------------------------------------------------------------------------------------------


def test_distill_exports_records_and_report_reads(experiment, tmp_path, capsys):
    runs = tmp_path / "runs"
    assert main(["distill", str(experiment), "--out", str(runs)]) == 0
    said = capsys.readouterr()
    (record,) = RunStore(runs).records()
    assert record["run_id"] == ExperimentConfig.from_yaml(experiment).run_id
    assert record["steps"] == 4
    student = AutoModelForSequenceClassification.from_pretrained(runs / record["run_id"])
    assert student.config.num_hidden_layers == 2
    assert str(runs / record["run_id"]) in said.out and f"fakit report {runs}" in said.out
    assert "step 4 of 4, 00:00 left, loss " in said.err
    for noise in ("{'loss'", "Writing model shards", "Loading weights", "Map:"):
        assert noise not in said.out + said.err

    assert main(["report", str(runs)]) == 0
    assert f"Written to {runs / 'report' / 'report.html'}" in capsys.readouterr().out
    assert main(["report", str(runs), "--out", str(tmp_path / "elsewhere")]) == 0
    table = pd.read_csv(tmp_path / "elsewhere/table.csv")
    assert table["mean"].tolist() == pytest.approx([record["score"]])


def test_set_changes_any_key_of_the_file(experiment, tmp_path):
    runs = tmp_path / "runs"
    changes = ["training.steps=2", "features.weight=0.3", "attention=null", "student={layers: [1, 2]}", "name='3'"]
    options = [part for change in changes for part in ("--set", change)]
    assert main(["distill", str(experiment), "--out", str(runs), *options]) == 0
    (record,) = RunStore(runs).records()
    config = record["config"]
    assert record["steps"] == 2 and record["arm"] == "3" and config["attention"] is None
    assert config["features"]["weight"] == 0.3 and config["student"]["layers"] == [1, 2]
    unchanged = ExperimentConfig.from_yaml(experiment)
    assert record["run_id"] != unchanged.run_id and config["outputs"] == unchanged.to_dict()["outputs"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.step=5", "training.step: unknown key; the keys are steps, .* Did you mean 'steps'?"),
        ("training.steps", "found no KEY=VALUE; write --set training.steps=50"),
        ("=5", "found no KEY=VALUE"),
        ("training.steps=many", "training.steps: found 'many' .text., expected a whole number"),
        ("training.steps=0100", "--set training.steps: line 1: YAML reads 0100 as a number to base 8"),
        ("features.loss=msee", "features.loss: 'msee' is not one of mse"),
        ("name={a: [1", "--set name: line 1, column"),
        ("training.steps.more=1", "training.steps: is .*, so its keys more cannot be changed"),
    ],
)
def test_what_cannot_be_set_is_refused_in_one_sentence(change, message, experiment, tmp_path, capsys):
    assert main(["distill", str(experiment), "--out", str(tmp_path / "runs"), "--set", change]) == 2
    assert re.search(message, said := capsys.readouterr().err), said
    assert "Traceback" not in said and not (tmp_path / "runs").exists()
    assert main(["distill", str(experiment), "--set", "seed=1", "--set", "seed=2"]) == 2
    assert "--set seed: given twice" in capsys.readouterr().err


def test_distill_goes_on_from_a_checkpoint_and_returns_what_is_recorded(config, tmp_path, capsys):
    path, runs = tmp_path / "experiment.yaml", tmp_path / "runs"
    saving = config.replace(**{"training.save_every": 2, "training.steps": 4, "out": str(tmp_path / "student")})
    saving.to_yaml(path)
    assert main(["distill", str(path), "--out", str(runs)]) == 0
    whole = RunStore(runs).records()
    assert main(["distill", str(path), "--out", str(runs)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["distill", str(path), "--out", str(runs), "--resume"]) == 0
    assert RunStore(runs).records() == whole

    # as if the power had failed after step 2
    shutil.rmtree(tmp_path / "student/checkpoints/checkpoint-4")
    shutil.rmtree(runs)
    assert main(["distill", str(path), "--out", str(runs), "--resume"]) == 0
    (again,) = RunStore(runs).records()
    assert (again["steps"], again["test"]) == (4, whole[0]["test"])


def test_distill_from_a_cache(experiment, tmp_path):
    command = ["distill", str(experiment), "--teacher-cache", str(tmp_path / "cache"), "--cache-dtype", "int8"]
    assert main([*command, "--out", str(tmp_path / "runs")]) == 0
    (record,) = RunStore(tmp_path / "runs").records()
    assert record["teacher_cache"] == "int8" and (tmp_path / "cache/manifest.json").is_file()


def test_the_largest_logits_from_the_command_and_from_the_file(experiment, config, tmp_path, capsys):
    runs, cache = tmp_path / "runs", tmp_path / "cache"
    short = ["--set", "outputs.temperature=1.0", "--set", "training.steps=1", "--out", str(runs)]
    command = ["distill", str(experiment), *short, "--teacher-cache", str(cache)]
    assert main([*command, "--cache-top-k", "2", "--cache-dtype", "float16"]) == 0
    assert main([*command, "--set", "teacher_cache={top_k: 0}"]) == 2
    assert "teacher_cache.top_k: found 0" in capsys.readouterr().err
    assert main(["distill", str(experiment), *short, "--cache-top-k", "2"]) == 2
    assert "(top_k 2) and no folder for it" in capsys.readouterr().err
    shutil.rmtree(runs)
    filed = f"teacher_cache={{folder: {cache}, top_k: 2, dtype: float16}}"
    assert main(["distill", str(experiment), *short, "--set", filed]) == 0
    (record,) = RunStore(runs).records()
    assert record["teacher_cache"] == "float16, top 2" and record["config"]["teacher_cache"]["top_k"] == 2


def test_a_config_that_names_its_student_folder_keeps_it(config, tmp_path):
    path = tmp_path / "experiment.yaml"
    config.replace(**{"training.steps": 1, "out": str(tmp_path / "mine")}).to_yaml(path)
    assert main(["distill", str(path), "--out", str(tmp_path / "runs")]) == 0
    assert (tmp_path / "mine/model.safetensors").is_file()
    assert sorted(item.name for item in (tmp_path / "runs").iterdir() if item.is_dir()) == []


# --- study -----------------------------------------------------------------------------------------------------------


def test_study_runs_and_continues(experiment, tmp_path, capsys):
    path, runs = tmp_path / "study.yaml", tmp_path / "runs"
    path.write_text("base: experiment.yaml\nvary: {kind: arms, names: [none, all]}\nseeds: [0]\n")
    assert main(["study", str(path), "--out", str(runs)]) == 0
    arms = [record["arm"] for record in RunStore(runs).records()]
    assert sorted(arms) == ["all", "none", "teacher", "untrained"]
    assert "4 runs are recorded" in capsys.readouterr().out
    path.write_text(path.read_text().replace("seeds: [0]", "seeds: [0, 1]"))
    assert main(["study", str(path), "--out", str(runs)]) == 0
    assert "2 of 4 runs are recorded" in capsys.readouterr().out
    assert len(RunStore(runs).records()) == 6


def test_the_shipped_configurations_are_readable():
    files = sorted((ROOT / "configs").glob("*.yaml"))
    assert {"study.yaml", "distill_glosses.yaml"} <= {path.name for path in files}
    for path in files:  # by what stands in it: a name says little of the kind
        keys = set(yaml.safe_load(path.read_text(encoding="utf-8")))
        kind = Study if "vary" in keys else CompressConfig if "method" in keys else ExperimentConfig
        kind.from_yaml(path)


# --- errors ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_done_is_one_message_and_status_2(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"fakit: {tmp_path} is no runs directory")
    assert "Traceback" not in captured.err


def test_a_wrong_key_is_answered_with_the_allowed_ones(experiment, capsys):
    experiment.write_text(experiment.read_text().replace("steps:", "stepz:"))
    assert main(["distill", str(experiment)]) == 2
    said = capsys.readouterr().err
    assert "stepz" in said and "steps" in said and "batch_size" in said


def test_the_run_of_a_study_that_failed_is_named(experiment, tmp_path, capsys):
    ExperimentConfig.from_yaml(experiment).replace(**{"student.layers": 9}).to_yaml(experiment)
    path = tmp_path / "study.yaml"
    path.write_text("base: experiment.yaml\nvary: {kind: arms, names: [none]}\nseeds: [0]\nbaselines: false\n")
    assert main(["study", str(path), "--out", str(tmp_path / "runs")]) == 2
    said = capsys.readouterr().err
    assert "9" in said and "in the run " in said and "arm none, seed 0" in said


def test_debug_shows_where(tmp_path):
    with pytest.raises(ValueError, match="no runs directory"):
        main(["report", str(tmp_path), "--debug"])


def test_an_unknown_command_is_answered_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["distil"])
    assert stopped.value.code == 2
    assert "run" in (said := capsys.readouterr().err) and "distill" in said and "study" in said and "report" in said


def test_the_module_and_the_installed_command_are_the_same():
    script = Path(sys.executable).with_name("fakit")
    helps = [
        subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for command in ([str(script)], [sys.executable, "-m", "fakit"])
    ]
    assert helps[0] == helps[1] and "distill" in helps[0]


def test_help_imports_nothing_heavy():
    code = """
import json, sys
from fakit.__main__ import parser
parser().format_help()
print(json.dumps([name for name in ("torch", "transformers", "plotly", "nbclient") if name in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_a_file_where_a_folder_should_be_is_one_message_and_status_2(experiment, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for options in (["--teacher-cache", str(tmp_path / "file")], ["--out", str(tmp_path / "file" / "runs")]):
        assert main(["distill", str(experiment), *options]) == 2
        said = capsys.readouterr().err
        assert str(tmp_path / "file") in said and "Traceback" not in said
