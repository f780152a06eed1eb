"""Arguments of transformers' Trainer and of PEFT that a configuration hands on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from fakit.experiments.schema import did_you_mean
from fakit.models.peft_students import LORA

SET_BY = {
    "output_dir": "out",
    "max_steps": "training.steps",
    "num_train_epochs": "training.steps",
    "per_device_train_batch_size": "training.batch_size",
    "gradient_accumulation_steps": "training.accumulation",
    "learning_rate": "training.learning_rate",
    "lr_scheduler_type": "training.scheduler",
    "warmup_steps": "training.warmup",
    "weight_decay": "training.weight_decay",
    "bf16": "training.bf16",
    "fp16": "training.bf16",
    "logging_strategy": "training.log_every",
    "logging_steps": "training.log_every",
    "eval_strategy": "training.eval_every",
    "eval_steps": "training.eval_every",
    "save_strategy": "training.save_every",
    "save_steps": "training.save_every",
    "seed": "seed",
    "use_cpu": "device",
}
"""Argument → the key of a configuration that decides it."""

FIXED = {
    "train_sampling_strategy": "the rows come in the planned order, the same for every arm of a seed",
    "auto_find_batch_size": "the rows of each step are planned beforehand",
    "remove_unused_columns": "the objective looks at columns that the model does not take",
    "load_best_model_at_end": "a run reports its last step, and chooses nothing",
    "disable_tqdm": "run_experiment shows its own progress bar",
    "resume_from_checkpoint": "run_experiment(…, resume=True), or --resume, does it",
}
"""Argument → why the kit decides it."""


def check_training_args(given: Mapping[str, Any]) -> None:
    """Raise ValueError for an argument that transformers does not know, or that the kit sets itself."""
    if not given:
        return
    from transformers import TrainingArguments

    known = [field.name for field in fields(TrainingArguments) if field.init]
    for name in given:
        if name in SET_BY:
            raise ValueError(f"training_args.{name}: is decided by the key {SET_BY[name]}; set that one.")
        if name in FIXED:
            raise ValueError(f"training_args.{name}: is set by the kit: {FIXED[name]}. Leave it out.")
        if name not in known:
            raise ValueError(
                f"training_args.{name}: transformers.TrainingArguments has no such argument; they are listed at "
                f"https://huggingface.co/docs/transformers/main_classes/trainer.{did_you_mean(name, known)}"
            )


LORA_SET_BY = {"task_type": "task.name", "inference_mode": "training.steps", "base_model_name_or_path": "student.path"}


def check_lora(given: Mapping[str, Any]) -> None:
    """Raise ValueError for a key that peft.LoraConfig does not know or that the kit sets, or a value it refuses."""
    from peft import LoraConfig

    known = [field.name for field in fields(LoraConfig) if field.init]
    for name in given:
        if name in LORA_SET_BY:
            raise ValueError(f"student.lora.{name}: follows from {LORA_SET_BY[name]}; leave it out.")
        if name not in known:
            raise ValueError(
                f"student.lora.{name}: peft.LoraConfig has no such argument; the common ones are r, lora_alpha, "
                f"lora_dropout, target_modules and modules_to_save.{did_you_mean(name, known)}"
            )
    rank = given.get("r", 8)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"student.lora.r: found {rank!r}, expected a whole number above 0.")
    targets = given.get("target_modules", LORA["target_modules"])
    names = targets if isinstance(targets, list | tuple) else [targets]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"student.lora.target_modules: found {targets!r}, expected all-linear, a pattern, or a list of names."
        )
    alpha = given.get("lora_alpha", 8)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < float("inf"):
        raise ValueError(f"student.lora.lora_alpha: found {alpha!r}, expected a number above 0.")
    dropout = given.get("lora_dropout", 0.0)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"student.lora.lora_dropout: found {dropout!r}, expected a number of at least 0 and below 1.")
    try:
        LoraConfig(**{**LORA, **given})
    except (TypeError, ValueError) as error:
        raise ValueError(f"student.lora: {dict(given)} was refused by PEFT: {error}") from error
