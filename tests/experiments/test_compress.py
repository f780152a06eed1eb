"""`fakit compress`: from a YAML file to a student and a record."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from fakit.__main__ import main
from fakit.compression import layerwise, local, low_rank
from fakit.experiments import RunStore
from fakit.experiments.compress import CompressConfig, run_compression
from fakit.models import find_blocks


@pytest.fixture
def compression(world, tmp_path):
    """The file of a small compression: a 4-layer teacher to 2 layers."""
    config = CompressConfig.from_dict(
        {
            "method": "layerwise",
            "task": {
                "name": str(world / "animals.jsonl"),
                "labels": 30,
                "options": {"validation": 40, "test": 60, "pool": 150},
            },
            "teacher": {"id": str(world / "teacher")},
            "layerwise": {"layers": 2, "steps": 2, "batch_size": 8, "scored": 16},
            "max_length": 16,
            "device": "cpu",
        }
    )
    path = tmp_path / "compress.yaml"
    config.to_yaml(path)
    return path


def test_the_command_prunes_exports_records_and_goes_on(compression, tmp_path, capsys, monkeypatch):
    runs = tmp_path / "runs"
    typed = ["compress", str(compression), "--out", str(runs), "--set", "seed=1", "--set", f"out={tmp_path / 'rounds'}"]
    assert main(typed) == 0
    said = capsys.readouterr().out
    (record,) = RunStore(runs).records()
    assert record["arm"] == "layerwise" and record["seed"] == 1 and record["steps"] == 4
    assert [len(made["layers"]) for made in record["rounds"]] == [3, 2]
    assert record["labeled"] == 30 and record["unlabeled"] == 150
    assert record["parameters"] < record["teacher_parameters"]
    assert {"accuracy", "agreement", "kl"} <= record["test"].keys()
    assert f"test accuracy {record['score']:.4f} (teacher {record['teacher']['accuracy']:.4f})" in said
    folder = tmp_path / "rounds" / "round-2"
    assert f"The student is in {folder}, the run in {runs}." in said and said.count("healing: KL") == 2
    student = AutoModelForSequenceClassification.from_pretrained(folder)
    assert len(find_blocks(student)) == 2 and (folder / "tokenizer.json").is_file()
    assert json.loads((folder / "round.json").read_text())["layers"] == record["rounds"][1]["layers"]
    # once more: refused, or returned as recorded, without any work
    monkeypatch.setattr(layerwise, "prune", lambda *_, **__: pytest.fail("there was something to do"))
    assert main(typed) == 2
    assert "recorded in" in capsys.readouterr().err
    assert main([*typed, "--resume"]) == 0
    assert capsys.readouterr().out == said


def test_low_rank_from_the_command_to_a_student_that_loads(compression, tmp_path, capsys):
    runs, out = tmp_path / "runs", tmp_path / "pairs"
    changes = ["method=low_rank", "low_rank.keep=0.9", "low_rank.texts=60", "low_rank.calibration=40", f"out={out}"]
    typed = ["compress", str(compression), "--out", str(runs), *(x for change in changes for x in ("--set", change))]
    assert main(typed) == 0
    said = capsys.readouterr().out
    (record,) = RunStore(runs).records()
    assert record["arm"] == "low rank, bottom" and "low-rank-bottom-s0" in record["run_id"]
    assert record["parameters"] <= 0.9 * record["teacher_parameters"] and record["kept"] <= 0.9
    first = record["blocks"][0]
    assert len(first["losses"]) == 2 and first["losses"][1] < first["losses"][0]
    assert f"The student is in {out} (for fakit.compression.low_rank.load)" in said and "block 1: loss" in said
    student = low_rank.load(out)
    assert low_rank.ranks(student) == record["ranks"] and (out / "tokenizer.json").is_file()
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == []  # nothing of the work is left
    assert main([*typed, "--resume"]) == 0 and capsys.readouterr().out == said


def test_low_rank_goes_on_where_it_was_stopped(compression, tmp_path, monkeypatch):
    changes = {"low_rank.keep": 0.85, "low_rank.texts": 40, "low_rank.ranks": "uniform", "low_rank.start": "weights"}
    config = CompressConfig.from_yaml(compression).replace(method="low_rank", **changes)
    whole = run_compression(config.replace(out=str(tmp_path / "whole")), tmp_path / "runs")
    broken, done = config.replace(out=str(tmp_path / "broken")), []
    layer = local._Run.layer
    monkeypatch.setattr(local._Run, "layer", lambda run, n: done.append(n) or layer(run, n) if n < 3 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_compression(broken, tmp_path / "others")
    monkeypatch.undo()
    assert done == [1, 2]
    with pytest.raises(ValueError, match=r"holds a compression that was begun; resume=True"):
        run_compression(broken, tmp_path / "others")
    found = run_compression(broken, tmp_path / "others", resume=True)
    assert (found["score"], found["ranks"]) == (whole["score"], whole["ranks"])
    assert [one["losses"] for one in found["blocks"]] == [one["losses"] for one in whole["blocks"]]
    weights = [(tmp_path / name / "low_rank.safetensors").read_bytes() for name in ("whole", "broken")]
    assert weights[0] == weights[1]


def test_a_run_is_not_named_by_another_method_s_section(compression):
    config = CompressConfig.from_yaml(compression)
    assert config.replace(**{"low_rank.keep": 0.5}).run_id == config.run_id
    other = config.replace(method="low_rank")
    assert other.replace(**{"layerwise.steps": 7}).run_id == other.run_id != config.run_id


def test_a_budget_that_cannot_be_reached_is_refused_before_work(compression, tmp_path, monkeypatch):
    monkeypatch.setattr(low_rank, "spectra", lambda *_: pytest.fail("worked"))
    config = CompressConfig.from_yaml(compression).replace(method="low_rank", **{"low_rank.keep": 0.05})
    with pytest.raises(ValueError, match="energy is measured on texts"):
        config.replace(**{"low_rank.ranks": "energy", "low_rank.start": "weights"})
    with pytest.raises(ValueError, match=r"keep=0\.05 was requested"):
        run_compression(config, tmp_path / "runs")


@pytest.mark.parametrize("name", ["compress_glosses.yaml", "compress_glosses_low_rank.yaml"])
def test_the_files_that_are_shipped_can_be_read(name):
    config = CompressConfig.from_yaml(Path(__file__).parents[2] / "configs" / name)
    assert config.arm == {"layerwise": "layerwise", "low_rank": "low rank, bottom"}[config.method]


def test_one_shot_is_an_arm_of_its_own_with_as_many_steps(compression, tmp_path):
    config = CompressConfig.from_yaml(compression)
    one_shot = config.replace(**{"layerwise.one_shot": True})
    assert one_shot.run_id != config.run_id and "one-shot-s0" in one_shot.run_id
    assert config.replace(out="elsewhere").run_id == config.run_id
    record = run_compression(one_shot, tmp_path / "runs")
    assert (tmp_path / "runs" / one_shot.run_id / "round-1" / "config.json").is_file()
    assert record["steps"] == 4 and [len(made["removed"]) for made in record["rounds"]] == [2]


def test_a_score_that_no_round_reaches_is_said(compression, tmp_path):
    config = CompressConfig.from_yaml(compression)
    with pytest.raises(ValueError, match="the teacher itself comes to"):
        run_compression(config.replace(**{"layerwise.at_least": 1.1}), tmp_path / "runs")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "method: layerwise",
            "method: layer",
            "method: 'layer' is not one of layerwise, low_rank. Did you mean 'layerwise'?",
        ),
        ("method: layerwise", "", "method: missing at the top level"),
        (
            "max_length: 16",
            "max_lengths: 16",
            "unknown key at the top level; the keys are method, task, teacher, layerwise",
        ),
        (
            "scored: 16",
            "score: 16",
            "layerwise.score: unknown key at layerwise; the keys are layers, at_least, importance",
        ),
        ("importance: kl", "importance: kk", "layerwise.importance: 'kk' is not one of kl, quality, block_influence"),
        ("steps: 2", "steps: -2", "layerwise.steps: found -2, expected a value at least 0"),
        ("layers: 2", "layers: null", "layerwise.layers and layerwise.at_least: both are null"),
        ("layers: 2", "layers: 4", "layers=4 asked of a 4-layer teacher, of which at least one goes: choose 1…3"),
        ("device: cpu", "device: gpu", "device: 'gpu' is not one of"),
    ],
)
def test_what_is_wrong_in_the_file_is_one_message(compression, tmp_path, capsys, old, new, said):
    text = compression.read_text()
    assert old in text
    compression.write_text(text.replace(old, new, 1))
    assert main(["compress", str(compression), "--out", str(tmp_path / "runs")]) == 2
    assert said in capsys.readouterr().err
