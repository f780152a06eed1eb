"""Faults that are trained in: tiny runs, each with one thing wrong, and what the doctor says of it."""

import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from fakit.experiments import RunStore, Study, diagnose, report
from fakit.models.load import load_tokenizer
from fakit.tasks import load_task
from tests.experiments.conftest import ANIMALS, FILLER, _write

# arm → what is changed, and the rule that has to speak of it; teacher of 4 layers, student of 2
FAULTS = {
    "reversed": ({"layer_map": [[1, 4], [2, 2]]}, "layer map: reversed"),
    "by name": ({"layer_map": "reverse", "outputs": None}, "layer map: reversed"),
    "counted from 0": ({"layer_map": [[1, 1], [2, 3]]}, "layer map: off by one"),
    "hard": ({"outputs.temperature": 0.05}, "temperature: hard labels"),
    "uniform": ({"outputs.temperature": 500.0}, "temperature: uniform"),
    "leads": ({"features.weight": 1e4}, "a term leads"),
    "nothing": ({"attention.weight": 1e-6}, "a term at zero"),
    "short": ({"training.learning_rate": 1e-4, "training.scheduler": "constant"}, "loss still falls"),
    "warming": ({"training.warmup": 0.8}, "warm-up"),
    "cut": ({"training.max_length": 6}, "texts cut"),
    "away": ({"training.learning_rate": 3.0, "features": None, "attention": None}, "no better than no training"),
}


@pytest.fixture(scope="module")
def taught(world):
    """The toy teacher, trained for once: it tells the animals apart."""
    tokenizer = load_tokenizer(str(world / "teacher"))
    task = load_task(str(world / "animals.jsonl"), labels=30, seed=0, validation=40, test=60, pool=150)
    rows, collate = task.encode("teacher_train", tokenizer, 16).to_list(), task.collator(tokenizer)
    torch.manual_seed(0)
    options = {"initializer_range": 0.1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    teacher = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(world / "teacher", **options))
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, 150)
    teacher.train()
    for _ in range(150):
        loss = teacher(**collate([rows[i] for i in torch.randint(len(rows), (16,))])).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    teacher.save_pretrained(world / "taught")
    tokenizer.save_pretrained(world / "taught")
    return world / "taught"


@pytest.fixture(scope="module")
def healthy(world, taught):
    """What the faults are planted in."""
    from fakit.experiments import ExperimentConfig

    return ExperimentConfig.from_dict(
        {
            "task": {
                "name": str(world / "animals.jsonl"),
                "labels": 30,
                "options": {"validation": 40, "test": 60, "pool": 150},
            },
            "teacher": {"id": str(taught)},
            "student": {"layers": [1, 4], "freeze_embeddings": False},
            "training": {"steps": 40, "batch_size": 8, "log_every": 2, "max_length": 16, "learning_rate": 3e-3}
            | {"bf16": False},
            "device": "cpu",
        }
    )


@pytest.fixture(scope="module")
def planted(healthy, tmp_path_factory):
    vary = {"healthy": {}} | {arm: changes for arm, (changes, _) in FAULTS.items()}
    folder = tmp_path_factory.mktemp("planted")
    study = Study(healthy, vary, seeds=[0], count_flops=False, what="faults that were planted")
    return study.run(folder / "runs", progress=False)


def rules_of(store, arm):
    return {finding.rule for finding in diagnose(store).findings if arm in finding.arms}


def test_a_healthy_run_is_silent(planted):
    assert rules_of(planted, "healthy") == set()


@pytest.mark.parametrize("arm", FAULTS)
def test_a_planted_fault_is_found(planted, arm):
    assert FAULTS[arm][1] in rules_of(planted, arm)


def test_a_report_ends_with_what_was_found(planted, tmp_path):
    made = report(planted, tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    for text in (str(made), page, (tmp_path / "report" / "report.md").read_text()):
        section = text[text.index("What the doctor found") :]
        assert "layer map: off by one" in section and "S1→T1, S2→T3" in section


def test_what_is_recorded_is_what_was_read(planted, healthy):
    record = next(record for record in planted.records() if record["arm"] == "healthy")
    assert record["layers"] == {"student": 2, "teacher": 4}
    assert record["texts"]["majority"] == pytest.approx(1 / 3) and record["texts"]["test"] == 60
    assert record["texts"]["cut"] == {"train": [0, 30], "pool": [0, 150], "validation": [0, 40], "test": [0, 60]}
    teacher = next(record for record in planted.records() if record["arm"] == "teacher")
    assert record["teacher"]["accuracy"] == teacher["score"] > 0.9
    assert 1 < record["softness"]["outputs"]["classes"] < 3 and record["softness"]["outputs"]["of"] == 3


def test_a_teacher_of_another_task_is_found(healthy, world, tmp_path):
    config = healthy.replace(name="untaught", **{"teacher.id": str(world / "teacher"), "training.steps": 2})
    store = Study(config, {"untaught": {}}, seeds=[0], count_flops=False).run(tmp_path / "runs", progress=False)
    assert "teacher no better than chance" in rules_of(store, "untaught")


def test_batches_of_mostly_padding_are_found(healthy, tmp_path):
    rng = random.Random(0)
    verbs = [(verb, label) for label, of_label in ANIMALS.items() for verb in of_label]
    rows = [{"text": f"{word} {verb}", "label": label} for word in FILLER for verb, label in verbs]
    rows += [{"text": " ".join([*rng.choices(FILLER, k=13), verb]), "label": label} for verb, label in 2 * verbs]
    _write(tmp_path / "uneven.jsonl", rows)
    options = {"validation": 10, "test": 10}
    config = healthy.replace(name="uneven", task={"name": str(tmp_path / "uneven.jsonl"), "options": options})
    config = config.replace(
        features=None, attention=None, outputs=None, **{"training.steps": 2, "training.batch_size": 16}
    )
    store = Study(config, {"uneven": {}}, [0], baselines=False, count_flops=False).run(
        tmp_path / "runs", progress=False
    )
    (record,) = store.records()
    found = diagnose(RunStore(tmp_path / "runs")).of("padding")
    assert record["texts"]["padding"] > 0.5 and [finding.arms for finding in found] == [("uneven",)]
