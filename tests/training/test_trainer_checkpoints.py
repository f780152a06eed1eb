"""What DistillationTrainer writes: a student that needs no fakit, checkpoints that continue exactly."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fakit import DistillationTrainer, LayerMap
from tests.families import batch
from tests.training.runs import At, data, logged, make, parts, weights

LOAD_WITHOUT_FAKIT = """
import json, sys, torch
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
ids = torch.tensor(json.load(open(folder + "/ids.json")))
json.dump(model(input_ids=ids).logits.tolist(), open(folder + "/logits.json", "w"))
assert "fakit" not in sys.modules
"""


def test_the_exported_student_is_a_plain_transformers_model(tmp_path):
    trainer = make(tmp_path, "gpt2")
    trainer.train()
    exported = tmp_path / "exported"
    trainer.save_model(str(exported))
    assert sorted(path.name for path in exported.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    with safe_open(exported / "model.safetensors", "pt") as tensors:
        names = set(tensors.keys())
    assert not any("projection" in name or name.startswith(("student", "objective")) for name in names)
    assert names <= set(trainer.student.state_dict())
    ids = batch()["input_ids"]
    (exported / "ids.json").write_text(json.dumps(ids.tolist()))
    subprocess.run([sys.executable, "-c", LOAD_WITHOUT_FAKIT, str(exported)], check=True, cwd=tmp_path)
    again = torch.tensor(json.loads((exported / "logits.json").read_text()))
    assert torch.equal(again, trainer.student.eval()(input_ids=ids).logits.detach())

    trainer.student.save_pretrained(tmp_path / "directly")
    assert (tmp_path / "directly/model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()


def test_a_checkpoint_holds_the_projections_and_settings_beside_the_student(tmp_path):
    trainer = make(tmp_path, save_strategy="steps", save_steps=6)
    trainer.train()
    folder = tmp_path / "checkpoint-6"
    with safe_open(folder / "projections.safetensors", "pt") as tensors:
        saved = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    assert {f"objective.{name}" for name in saved} == {
        name for name in weights(trainer) if name.startswith("objective")
    }
    assert all(torch.equal(weights(trainer)[f"objective.{name}"], p) for name, p in saved.items())
    assert json.loads((folder / "objective.json").read_text()) == {
        "features": {"weight": 0.5},
        "attention": {"weight": 2.0},
        "outputs": {"weight": 1.5, "temperature": 2.0},
        "task": {"weight": 0.7},
    }


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_resume_continues_exactly(family, accumulation, tmp_path):
    dropout = {"hidden_dropout_prob": 0.1} if family == "bert" else {"resid_pdrop": 0.1}

    def run(folder: Path, resume: Path | None = None) -> DistillationTrainer:
        made = parts(family, layer_map=LayerMap.random(2, 3, seed=8), **dropout)

        def change(objective):
            objective.weights.update(features=0.1, task=3.0)
            objective.outputs.temperature = 4.0

        trainer = make(
            folder,
            family,
            made=made,
            callbacks=[At(2, made[2], change)],
            num_train_epochs=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulation,
            train_sampling_strategy="random",
            max_grad_norm=1.0,
            lr_scheduler_type="linear",
            save_strategy="steps",
            save_steps=4 * 2 // accumulation,  # in the middle of the first epoch
        )
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return trainer

    straight = run(tmp_path / "straight")
    resumed = run(tmp_path / "resumed", resume=tmp_path / "straight" / f"checkpoint-{8 // accumulation}")
    assert straight.state.global_step == resumed.state.global_step == 36 // accumulation
    assert (
        dict(resumed.objective.weights) == dict(straight.objective.weights) and resumed.objective.weights["task"] == 3.0
    )
    assert resumed.objective.outputs.temperature == 4.0
    for name, p in weights(straight).items():
        assert torch.equal(weights(resumed)[name], p), name
    later = 8 // accumulation + 1
    assert logged(resumed)[-20 // accumulation :] == logged(straight)[-20 // accumulation :] and later > 1


def test_the_best_checkpoint_comes_back_with_its_projections(tmp_path):
    trainer = make(
        tmp_path,
        evaluated=data(rows=8),
        learning_rate=0.3,  # so large that training only makes it worse
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
    )
    trainer.train()
    losses = logged(trainer, "eval_loss")
    best = losses.index(min(losses)) + 1
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}") and best < 3
    with safe_open(tmp_path / f"checkpoint-{best}" / "projections.safetensors", "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            assert torch.equal(trainer.objective.state_dict()[name], tensors.get_tensor(name))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)
