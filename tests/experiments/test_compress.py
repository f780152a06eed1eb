"""`fakit compress`: from a YAML file to a student and a record."""

import json

import pytest
from transformers import AutoModelForSequenceClassification

from fakit.__main__ import main
from fakit.compression import layerwise
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
        ("method: layerwise", "method: layer", "method: 'layer' is not one of layerwise. Did you mean 'layerwise'?"),
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
