"""What stands beside the runs of a study: the teacher, the untrained student, the input left as it is."""

from __future__ import annotations

import tempfile
from typing import Any

from fakit.experiments.build import Prepared, build_arguments, prepare
from fakit.experiments.config import ExperimentConfig
from fakit.experiments.quiet import without_side_bars
from fakit.experiments.scores import parameters_of, scores_of
from fakit.experiments.statistics import LOWER_IS_BETTER
from fakit.experiments.store import now
from fakit.experiments.students import make_student
from fakit.training.checkpoints import versions


def prepare_run(config: ExperimentConfig) -> Prepared:
    """`prepare` on the device that the run is going to train on."""
    device = build_arguments(config, tempfile.gettempdir()).device
    with without_side_bars():
        return prepare(config, device)


def evaluate_baselines(config: ExperimentConfig) -> list[dict[str, Any]]:
    """Records, to stand beside the runs of a configuration, of what is there without any training of a student.

    "teacher"; "untrained", the student as it starts; and for text to text "copy", the input left as it is.
    """
    from transformers import set_seed

    set_seed(config.seed)
    prepared = prepare_run(config)
    task, teacher, tokenizer = prepared.task, prepared.teacher, prepared.tokenizer
    splits = {"validation": prepared.validation, "test": prepared.test}
    set_seed(config.seed)
    with without_side_bars():
        student = make_student(config, prepared).model
    teachers = {name: prepared.of_teacher(name) for name in splits}
    scores = {"teacher": {n: scores_of(teacher, rows, task, own) for n, (own, rows) in teachers.items()}}
    copied = f"{task.metric}_copy"
    if copied in scores["teacher"]["test"]:
        scores["copy"] = {name: {task.metric: scores["teacher"][name][copied]} for name in splits}
    reference = None if prepared.teacher_tokenizer is not None else teacher
    scores["untrained"] = {n: scores_of(student, split, task, tokenizer, reference) for n, split in splits.items()}
    parameters = {"teacher": parameters_of(teacher), "untrained": parameters_of(student)}
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
            "versions": versions(),
            "data": prepared.fingerprint(),
        }
        for arm, of_arm in scores.items()
    ]


def baseline_id(config: ExperimentConfig, arm: str) -> str:
    """The run id of a baseline beside `config`: whatever its terms and training, so it is evaluated once."""
    bare = config.replace(
        features=None,
        attention=None,
        outputs=None,
        task_weight=1.0,
        balancing=None,
        on_policy=None,
        training_args={},
        name=f"baseline {arm}",
    )
    return bare.replace(training={"max_length": config.training.max_length}).run_id
