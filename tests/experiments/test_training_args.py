"""Arguments of transformers' Trainer that a configuration hands on, and the shipped recipe that uses them."""

import json
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from transformers import TrainerCallback, TrainingArguments

from fakit.experiments import ExperimentConfig, run_experiment
from fakit.experiments.arguments import FIXED, SET_BY
from fakit.experiments.baselines import baseline_id
from fakit.experiments.build import build_arguments
from tests.families import tiny
from tests.tasks.test_instructions import CHATML, letters, messages

LARGE = Path(__file__).parents[2] / "configs" / "distill_large_lm.yaml"
CHAT = LARGE.with_name("llama3_8b_to_1b.yaml")


def test_every_argument_is_handed_on_or_decided_by_the_kit(tmp_path):
    """None is both, which would be Python's "multiple values" in the middle of a run."""
    names = {field.name for field in fields(TrainingArguments) if field.init}
    assert SET_BY.keys() | FIXED.keys() <= names
    free = {f.name: f.default for f in fields(TrainingArguments) if f.init and f.default is not MISSING}
    free = {name: value for name, value in free.items() if name not in SET_BY and name not in FIXED}
    args = build_arguments(ExperimentConfig(training_args=free, device="cpu"), tmp_path)
    assert args.save_total_limit is None  # transformers' default in place of the kit's


def test_the_value_arrives(tmp_path):
    config = ExperimentConfig(device="cpu")
    for size, expected in ((32, 32), (200, 64)):  # what fits a step fits an evaluation
        args = build_arguments(config.replace(**{"training.batch_size": size}), tmp_path)
        assert args.per_device_eval_batch_size == expected
    args = build_arguments(config.replace(training_args={"per_device_eval_batch_size": 2}), tmp_path)
    assert (args.per_device_eval_batch_size, args.save_total_limit) == (2, 2)


def test_a_value_that_transformers_refuses_is_refused_before_work(config):
    with pytest.raises(ValueError, match=r"training_args: .* were refused by transformers"):
        run_experiment(
            config.replace(training_args={"optim": "adamm"}, teacher={"id": "nowhere/at-all"}), progress=False
        )


def test_run_ids_of_before_stay():
    """Also those of baselines, which no training argument changes."""
    config = ExperimentConfig()
    with_one = config.replace(training_args={"max_grad_norm": 0.5})
    assert "training_args" not in config.to_dict()
    assert with_one.run_id != config.run_id
    assert baseline_id(with_one, "teacher") == baseline_id(config, "teacher")


class _Seen(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, optimizer=None, **rest):
        self.optimizer = type(getattr(optimizer, "optimizer", optimizer)).__name__
        self.recomputes = model.student.is_activation_checkpointing


def test_the_recipe_for_a_large_teacher_runs_on_a_small_one(config, world):
    """The shipped file, with another model and other sizes."""
    large = ExperimentConfig.from_yaml(LARGE)
    small = large.replace(
        **{"task.name": str(world / "animals.jsonl"), "task.labels": 64},
        **{"task.options": {"kind": "causal-lm", "validation": 8, "test": 8}},
        **{"training.steps": 6, "training.batch_size": 8, "training.accumulation": 1, "training.max_length": 48},
        **{"training.log_every": 2, "training.save_every": None, "training.bf16": False},
        teacher={"id": str(world / "causal")},
        student={"layers": 1},
        layer_map=[[1, 2]],
        device="cpu",
        out=None,
        training_args=large.training_args | {"optim": "sgd"},
    )
    seen = _Seen()
    result = run_experiment(small, callbacks=[seen], progress=False)
    assert (seen.optimizer, seen.recomputes) == ("SGD", True)
    assert (result.metric, result.steps) == ("perplexity", 6)
    assert {"features", "attention", "outputs", "task"} <= result.history[0].keys()


def test_the_recipe_from_a_chat_model_to_a_smaller_one_runs_on_small_ones(tmp_path):
    """The shipped file: two models of their own, of other depth and width, and packed rows of several turns."""
    chat = ExperimentConfig.from_yaml(CHAT)
    tokenizer = letters(CHATML)
    size = {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
    for name, more in (("teacher", {}), ("student", {"num_hidden_layers": 2, "hidden_size": 16})):
        tiny("llama", **size, **more).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    asked = [[f"is {n} a cat", "no", f"and {n + 1}", "it is"] for n in range(40)]
    rows = [messages(*zip(("user", "assistant") * 2, turns, strict=True)) for turns in asked]
    text = "".join(json.dumps({"messages": row}) + "\n" for row in rows)
    (tmp_path / "chats.jsonl").write_text(text)
    small = chat.replace(
        **{
            "task.name": str(tmp_path / "chats.jsonl"),
            "task.options": {**chat.task.options, "validation": 5, "test": 5},
        },
        **{
            "teacher.id": str(tmp_path / "teacher"),
            "teacher.quantize": None,
            "student.path": str(tmp_path / "student"),
        },
        **{"training.steps": 3, "training.accumulation": 1, "training.max_length": 200, "training.log_every": 1},
        **{"training.save_every": None, "training.bf16": False},
        device="cpu",
        out=None,
        training_args=chat.training_args | {"optim": "sgd"},
    )
    seen = _Seen()
    result = run_experiment(small, callbacks=[seen], progress=False)
    assert (seen.optimizer, seen.recomputes, result.steps) == ("SGD", True, 3)
    assert {"features", "outputs", "task"} <= result.history[0].keys()
    assert {"perplexity", "rougeL", "bits_per_byte", "acceptance"} <= result.test.keys()
