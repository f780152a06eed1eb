"""A small distillation run: data, models, arguments. What the tests of the trainer stand on."""

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments, default_data_collator
from transformers.trainer_callback import PrinterCallback

from fakit import Attention, DistillationTrainer, Features, LayerMap, Objective, Outputs, Task, TeacherCache, shrink
from tests.families import VOCAB, batch, tiny

ROWS = 24


def data(causal: bool = False, padding: int = 2, rows: int = ROWS) -> list[dict[str, Tensor]]:
    """Rows of 7 tokens, every second one with padding; labels are a function of the tokens."""
    full, padded = batch(rows, padding=0), batch(rows, padding=0)
    if padding:
        padded["attention_mask"][::2, -padding:] = 0
        padded["input_ids"] = full["input_ids"] * padded["attention_mask"]
    ids, mask = padded["input_ids"], padded["attention_mask"]
    labels = ids.masked_fill(mask == 0, -100) if causal else (ids[:, 0] > VOCAB // 2).long()
    return [{"input_ids": i, "attention_mask": m, "labels": y} for i, m, y in zip(ids, mask, labels, strict=True)]


def cache_of(folder, teacher, objective) -> TeacherCache:
    """What the objective needs of the teacher on `data`, in float32."""
    rows = [{key: row[key] for key in ("input_ids", "attention_mask")} for row in data()]
    return TeacherCache.build(folder, teacher, rows, objective, dtype="float32")


def parts(family: str = "bert", width: int | None = 16, layers: int = 2, layer_map: LayerMap | None = None, **changes):
    """Teacher, student and objective with all four terms; fresh, and the same at every call."""
    teacher = tiny(family, **changes)
    torch.manual_seed(1)
    student = shrink(teacher, layers, hidden_size=width)
    torch.manual_seed(2)
    objective = Objective(
        layer_map or LayerMap.uniform(layers, 3),
        Features("mse", weight=0.5),
        Attention("kl", weight=2.0, heads="group-mean"),
        Outputs("forward_kl", temperature=2.0, weight=1.5),
        Task(weight=0.7),
    )
    return teacher, student, objective


def arguments(folder, **changes) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "optim": "adamw_torch",
        "train_sampling_strategy": "sequential",
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(**(settings | changes))


def make(
    folder, family: str = "bert", callbacks=(), train=None, made=None, evaluated=None, extra=None, **changes
) -> DistillationTrainer:
    teacher, student, objective = made or parts(family)
    trainer = DistillationTrainer(
        teacher,
        student,
        objective,
        args=arguments(folder, **changes),
        train_dataset=data(family == "gpt2") if train is None else train,
        eval_dataset=evaluated,
        data_collator=default_data_collator,
        callbacks=list(callbacks),
        **(extra or {}),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def logged(trainer: DistillationTrainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(trainer: DistillationTrainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


class At(TrainerCallback):
    """Calls `what(objective)` when a step has ended."""

    def __init__(self, step: int, objective: Objective, what):
        self.step, self.objective, self.what = step, objective, what

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.what(self.objective)
