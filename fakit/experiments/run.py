"""`run_experiment`: one configuration from data to numbers; what `fakit distill` and the notebooks call."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from fakit.checkpoints import began_in_bf16, last_whole_checkpoint
from fakit.experiments.build import (
    Prepared,
    TrainingRows,
    build_arguments,
    build_objective,
    build_student,
    build_training_rows,
    check_lengths,
    prepare,
    student_tokenizer,
)
from fakit.experiments.config import ExperimentConfig
from fakit.experiments.statistics import LOWER_IS_BETTER
from fakit.experiments.store import RunStore
from fakit.precision import AUTO

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerCallback

    from fakit.trainer import DistillationTrainer


@dataclass
class RunResult:
    """What one run gave; draws itself in a notebook, prints itself in a terminal, and is one line of a store.

    Attributes:
        metric, score: the task's headline metric and its value on the test split.
        higher_is_better: which way `score` improves.
        validation, test: all metrics by name; test also has the agreement with the teacher.
        steps, seconds: optimiser steps, and the wall time of training alone (of a resumed run: since it was resumed).
        flops_per_step, flops: of one optimiser step and of all, teacher included; None with a quantised teacher, whose
            kernels no counter sees, with a cache, whose teacher worked elsewhere, and in a study that does not count them.
        teacher_cache: the precision of the cache that stood for the teacher; None where the teacher itself answered in each step.
        precision: what training computed in, "float32" or "bf16" (autocast): what `bf16: auto` came to. Evaluation is in float32.
        labelled, unlabelled: training rows.
        dropped: rows of the task's data that are in no split, by reason.
        history: the logged steps. student: the trained model; None when the run was read from a store.
    """

    run_id: str
    task: str
    arm: str
    seed: int
    metric: str
    score: float
    higher_is_better: bool
    validation: dict[str, float]
    test: dict[str, float]
    steps: int
    seconds: float
    flops_per_step: float | None
    flops: float | None
    parameters: int
    teacher_parameters: int
    labelled: int
    unlabelled: int
    config: dict[str, Any]
    finished: str
    kind: str = "run"
    teacher_cache: str | None = None
    precision: str | None = None  # of records from before it was noted
    dropped: dict[str, int] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list, repr=False)
    student: PreTrainedModel | None = field(default=None, repr=False, compare=False)

    def record(self) -> dict[str, Any]:
        """The line of runs.jsonl: everything but the history, which goes to steps.jsonl, and the model."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("history", "student")}

    @classmethod
    def from_store(cls, store: RunStore, run_id: str) -> RunResult:
        """A recorded run again, without its model."""
        steps = store.steps(run_id).drop(columns="run_id")
        history = [{k: v for k, v in row.items() if not pd.isna(v)} for row in steps.to_dict("records")]
        return cls(**store.record(run_id), history=history)

    def __str__(self) -> str:
        agreement = f", agreement with the teacher {self.test['agreement']:.3f}" if "agreement" in self.test else ""
        return (
            f"{self.task}, {self.arm}, seed {self.seed}: test {self.metric} {self.score:.4f}{agreement} "
            f"after {self.steps} steps in {self.seconds:.0f} s" + (f", {self.precision}" if self.precision else "")
        )

    def _repr_markdown_(self) -> str:
        names = [*self.test, *(name for name in self.validation if name not in self.test)]
        rows = [f"| {n} | {self.validation.get(n, math.nan):.4f} | {self.test.get(n, math.nan):.4f} |" for n in names]
        return "\n".join([f"**{self}**", "", "| metric | validation | test |", "|---|---|---|", *rows]).replace(
            "nan", "–"
        )


def run_experiment(
    config: ExperimentConfig,
    store: RunStore | str | Path | None = None,
    resume: bool = False,
    callbacks: Iterable[TrainerCallback] = (),
    progress: bool = True,
    prepared: Prepared | None = None,
    count_flops: bool = True,
    teacher_cache: str | Path | None = None,
    cache_dtype: str = "bfloat16",
) -> RunResult:
    """Train a student as configured, evaluate it on validation and test, export and record it.

    Everything random follows `config.seed`: runs that share it start from the same student, see the same labelled
    texts in the same order, and may be compared in pairs.

    Args:
        store: a `RunStore` or its folder (made when missing): the finished run is added to it. None records nothing.
        resume: a run that is recorded is returned as recorded; one with checkpoints in `config.out` goes on from the last whole one.
        callbacks: of transformers, passed to the trainer.
        progress: the trainer's progress bar.
        prepared: what `prepare` gave for a configuration of the same task, teacher, seed and length, so that many runs load it once.
        count_flops: count a step's FLOPs, which costs the time of some steps.
        teacher_cache: a folder. The teacher answers each training text once, into a `TeacherCache` there, and the steps read it; runs of
            the same texts (task, labels, seed, length) whose terms ask for the same layers share it.
        cache_dtype: how it is stored: "float32", "bfloat16", "float16" or "int8".

    Raises:
        ValueError: before any training, for parts that do not fit, or a run that is recorded while `resume` is off.
    """
    from transformers import PrinterCallback, set_seed

    from fakit.teacher_cache import TeacherCache
    from fakit.trainer import DistillationTrainer, check_fit

    store = RunStore.open(store) if isinstance(store, str | Path) else store
    if store is not None and store.has(config.run_id):
        if resume:
            return RunResult.from_store(store, config.run_id)
        raise ValueError(
            f"{config.run_id} is recorded in {store.path} already. resume=True (--resume) returns it; "
            "change the seed or another key for a new run."
        )
    if teacher_cache is not None and not config.terms:
        raise ValueError(
            f"a teacher cache was asked for in {teacher_cache}, and the arm {config.arm!r} has no term that looks at a teacher (features, "
            "attention, outputs): leave the cache out, or turn one on."
        )
    out = None if config.out is None else Path(config.out)
    folder = tempfile.TemporaryDirectory() if out is None else nullcontext(out / "checkpoints")
    with without_side_bars(), folder as folder:
        args = build_arguments(config, folder, progress)
        checkpoint = last_whole_checkpoint(folder, args.world_size) if resume else None
        if checkpoint is not None and config.training.bf16 == AUTO:
            began = began_in_bf16(checkpoint)
            args.bf16 = args.bf16 if began is None else began
        set_seed(config.seed)
        prepared = prepared or prepare(config, args.device)
        prepared.check(config)
        task, teacher, tokenizer = prepared.task, prepared.teacher, prepared.tokenizer
        set_seed(config.seed)  # the student's first weights depend on the seed alone, not on what loading drew
        student = build_student(config, teacher, task)
        rows = build_training_rows(config, task, tokenizer, processes=args.world_size)
        objective = build_objective(config, student, teacher)
        check_fit(teacher, student, objective, tokenizer, student_tokenizer(config))
        check_lengths(rows.rows, config.training.max_length, teacher=teacher, student=student)
        cache = None
        if teacher_cache is not None:
            cache = TeacherCache.build(
                teacher_cache, teacher, rows.rows, objective, dtype=cache_dtype, tokenizer=tokenizer
            )
        trainer = DistillationTrainer(
            teacher,
            student,
            objective,
            args=args,
            teacher_cache=cache,
            train_dataset=rows.dataset(),
            eval_dataset=prepared.validation,
            data_collator=task.collator(tokenizer),
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)  # what stands in for a progress bar that was switched off
        flops_per_step = step_flops(trainer, rows) if count_flops and cache is None else None
        trained = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        student = trainer.whole_student()

    scores = _evaluate(student, prepared.test, task, tokenizer, prepared.reference())
    result = RunResult(
        run_id=config.run_id,
        task=task.name,
        arm=config.arm,
        seed=config.seed,
        metric=task.metric,
        score=scores[task.metric],
        higher_is_better=task.metric not in LOWER_IS_BETTER,
        validation=_evaluate(student, prepared.validation, task, tokenizer),
        test=scores,
        steps=trainer.state.global_step,
        seconds=trained.metrics["train_runtime"],
        flops_per_step=flops_per_step,
        flops=None if flops_per_step is None else flops_per_step * trainer.state.global_step,
        parameters=_parameters(student),
        teacher_parameters=_parameters(teacher),
        labelled=rows.labelled,
        unlabelled=len(rows.rows) - rows.labelled,
        config=config.to_dict(),
        finished=now(),
        teacher_cache=None if cache is None else cache.content.dtype,
        precision=trainer.precision,
        dropped=task.dropped,
        history=_history(trainer.state.log_history),
        student=student,
    )
    if trainer.is_world_process_zero():
        if out is not None:
            student.save_pretrained(out)
            tokenizer.save_pretrained(out)
            config.to_yaml(out / "experiment.yaml")
        if store is not None:
            store.append_steps(config.run_id, result.history)
            store.append_run(result.record())
    return result


def evaluate_baselines(config: ExperimentConfig) -> list[dict[str, Any]]:
    """Records, to stand beside the runs of a configuration, of what is there without any training of a student.

    "teacher"; "untrained", the student as it starts; and for text to text "copy", the input left as it is.
    """
    from transformers import set_seed

    args = build_arguments(config, tempfile.gettempdir())
    set_seed(config.seed)
    with without_side_bars():
        prepared = prepare(config, args.device)
        task, teacher, tokenizer = prepared.task, prepared.teacher, prepared.tokenizer
        splits = {"validation": prepared.validation, "test": prepared.test}
        set_seed(config.seed)
        student = build_student(config, teacher, task)
    scores = {"teacher": {name: _evaluate(teacher, split, task, tokenizer) for name, split in splits.items()}}
    copied = f"{task.metric}_copy"
    if copied in scores["teacher"]["test"]:
        scores["copy"] = {name: {task.metric: scores["teacher"][name][copied]} for name in splits}
    scores["untrained"] = {n: _evaluate(student, split, task, tokenizer, teacher) for n, split in splits.items()}
    parameters = {"teacher": _parameters(teacher), "untrained": _parameters(student)}
    return [
        {
            "run_id": baseline_id(config, arm),
            "kind": "baseline",
            "task": task.name,
            "arm": arm,
            "seed": config.seed,
            "metric": task.metric,
            "score": of_arm["test"][task.metric],
            "higher_is_better": task.metric not in LOWER_IS_BETTER,
            **of_arm,
            "parameters": parameters.get(arm),
            "config": config.to_dict(),
            "finished": now(),
        }
        for arm, of_arm in scores.items()
    ]


def baseline_id(config: ExperimentConfig, arm: str) -> str:
    """The run id of a baseline beside `config`: whatever its terms and training, so it is evaluated once."""
    bare = config.replace(features=None, attention=None, outputs=None, task_weight=1.0, name=f"baseline {arm}")
    return bare.replace(training={"max_length": config.training.max_length}).run_id


def step_flops(trainer: DistillationTrainer, rows: TrainingRows, batches: int = 4) -> float | None:
    """FLOPs of one optimiser step, forward and backward, teacher included: the mean over typical batches.

    The teacher's forward ends where the objective needs no more of it, and this counts what is done. None for a
    quantised teacher. Random numbers drawn here (dropout) do not count: the run goes on as if nothing was measured.
    """
    from fakit.evaluation.cost import count_flops
    from fakit.models.load import is_quantized
    from fakit.models.random_state import random_state_kept

    if is_quantized(trainer.teacher):
        return None
    distiller, device = trainer.model, trainer.args.device
    distiller.to(device)
    was_training = distiller.training
    trainable = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
    counts = []
    with random_state_kept(device):
        distiller.train()
        for examples in rows.typical_batches(batches):
            batch = {name: value.to(device) for name, value in trainer.data_collator(examples).items()}

            def step(batch=batch):
                torch.autograd.grad(distiller(**batch)["loss"], trainable, allow_unused=True)

            counts.append(count_flops(step))
        distiller.train(was_training)
    per_batch = sum(counts) / len(counts)
    return per_batch * trainer.args.gradient_accumulation_steps * trainer.args.world_size


@contextmanager
def without_side_bars():
    """No progress bars of loading and tokenising, which take moments here; the trainer's own stays."""
    import datasets
    from transformers.utils import logging

    were_on = datasets.is_progress_bar_enabled(), logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_on[0]:
            datasets.enable_progress_bars()
        if were_on[1]:
            logging.enable_progress_bar()


def now() -> str:
    """The time of a record: UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _evaluate(model, dataset, task, tokenizer, teacher=None) -> dict[str, float]:
    from fakit.evaluation import evaluate

    scores = evaluate(model, dataset, task.collator(tokenizer), task, tokenizer=tokenizer, teacher=teacher)
    if task.metric not in scores:
        raise ValueError(f"the headline metric of {task.name} is {task.metric}; evaluate gave {', '.join(scores)}.")
    return scores


def _history(log: list[dict[str, float]]) -> list[dict[str, float]]:
    """One entry a logged step, evaluations at that step included; their timings are no result."""
    timings = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    by_step: dict[int, dict[str, float]] = {}
    for entry in log:
        if "loss" in entry or "eval_loss" in entry:
            kept = {name: value for name, value in entry.items() if name not in ("step", *timings)}
            by_step.setdefault(entry["step"], {"step": entry["step"]}).update(kept)
    return list(by_step.values())


def _parameters(model) -> int:
    from fakit.evaluation.cost import count_parameters

    return count_parameters(model)["parameters"]
