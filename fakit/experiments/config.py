"""`ExperimentConfig`: one distillation run as one dataclass, the same object in a notebook and in a YAML file.

Example:
    >>> config = ExperimentConfig(task=TaskConfig("glosses", labels=1400), student=StudentConfig(layers=2))
    >>> config.arm, config.run_id
    ('all', 'glosses-all-s0-…')
    >>> ExperimentConfig.from_yaml(config.to_yaml("run.yaml") and "run.yaml") == config
    True
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fakit import renamed
from fakit.experiments.arguments import check_training_args
from fakit.experiments.schema import Section, describe, did_you_mean, option
from fakit.experiments.terms import (
    LAYER_MAPS,
    AttentionConfig,
    FeaturesConfig,
    OutputsConfig,
    check_further_terms,
)

OLD_NAMES = {"labelled_fraction": "labeled_fraction", "normalised_mse": "normalized_mse"}
"""Of keys and losses, as runs of before have them; both are read, the new ones are written."""
TRANSFER = ("features", "attention", "outputs")
SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup")
ARMS = {
    "none": (),
    "outputs": ("outputs",),
    "features": ("features",),
    "attention": ("attention",),
    "all": ("features", "attention", "outputs"),
}
"""The study's arms: which transfer terms each keeps beside the task loss."""


@dataclass(frozen=True)
class TaskConfig(Section):
    """What is learned: a task of the kit ("reviews", "glosses", "scans"), "glue/sst2", "hub:ID", or a path to data."""

    section: ClassVar[str] = "task"
    name: str = "glosses"
    labels: int | str | None = option(None, at_least=1, choices=("all",))  # labeled examples; null: the task's default
    seed: int | None = option(None, at_least=0)  # of the labeled subset; null: see build_task
    options: dict[str, Any] = field(default_factory=dict)  # further keywords of load_task

    def _check(self) -> None:
        _check_filled("task.name", self.name)
        if twice := sorted({"name", "labels", "seed"} & set(self.options)):
            raise ValueError(f"task.options.{twice[0]}: is a key of task itself; write task.{twice[0]}.")


@dataclass(frozen=True)
class TeacherConfig(Section):
    """Who teaches: "embedded" (the kit's own teacher of the task), or a path or hub id for load_teacher."""

    section: ClassVar[str] = "teacher"
    id: str = "embedded"
    adapter: str | None = None
    quantize: str | None = option(None, choices=("8bit", "4bit"))

    def _check(self) -> None:
        _check_filled("teacher.id", self.id)
        _check_filled("teacher.adapter", self.adapter)


@dataclass(frozen=True)
class StudentConfig(Section):
    """Who learns: the teacher shrunk to a number of evenly spaced layers, or to layers by number; or `path`."""

    section: ClassVar[str] = "student"
    layers: int | tuple[int, ...] = option(2, at_least=1)
    hidden_size: int | None = option(None, at_least=1)
    heads: int | None = option(None, at_least=1)
    init: str = option("copy", choices=("copy", "random"))
    path: str | None = None  # a saved model instead of a shrunken teacher
    freeze_embeddings: bool = False  # keep the copied word embeddings: less to train and, with few labels, to forget

    def _check(self) -> None:
        _check_filled("student.path", self.path)


@renamed(labelled_fraction="labeled_fraction")
@dataclass(frozen=True)
class TrainingConfig(Section):
    """How long and how fast. `steps` are optimizer steps; each takes `batch_size` × `accumulation` texts a process."""

    section: ClassVar[str] = "training"
    old_names: ClassVar[dict[str, str]] = {"labelled_fraction": "labeled_fraction"}
    steps: int = option(600, at_least=1)
    batch_size: int = option(32, at_least=1)
    labeled_fraction: float = option(0.5, above=0.0, at_most=1.0)  # of each batch, where an unlabeled pool is used
    learning_rate: float = option(2e-4, above=0.0)
    scheduler: str = option("linear", choices=SCHEDULERS)
    warmup: int | float = option(0.1, at_least=0)  # steps when ≥ 1, else a share of all steps
    weight_decay: float = option(0.01, at_least=0.0)
    bf16: bool | str = option("auto", choices=("auto",))  # auto: where the device computes it faster than float32
    accumulation: int = option(1, at_least=1)
    max_length: int = option(128, at_least=2)  # tokens
    log_every: int = option(10, at_least=1)  # steps
    eval_every: int | None = option(None, at_least=1)  # steps; null: at the end only
    save_every: int | None = option(None, at_least=1)  # steps; null: no checkpoint

    def _check(self) -> None:
        if self.warmup > max(1, self.steps):
            raise ValueError(
                f"training.warmup: found {self.warmup} steps of training.steps: {self.steps}, so the learning rate "
                "would never be reached; give fewer, or a share of all steps (below 1)."
            )
        if isinstance(self.warmup, float) and self.warmup >= 1 and not self.warmup.is_integer():
            raise ValueError(
                f"training.warmup: found {self.warmup}, expected whole steps (≥ 1) or a share of all steps (below 1)."
            )


@dataclass(frozen=True)
class ExperimentConfig(Section):
    """One run. A term set to null (None) is not computed; without any transfer term the student only sees labels."""

    task: TaskConfig = field(default_factory=TaskConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    # a strategy, or pairs [student, teacher]; "random" is drawn anew with every pass over the labeled texts
    layer_map: str | tuple[tuple[int, int], ...] = option("uniform", choices=LAYER_MAPS)
    features: FeaturesConfig | None = field(default_factory=FeaturesConfig)
    attention: AttentionConfig | None = field(default_factory=AttentionConfig)
    outputs: OutputsConfig | None = field(default_factory=OutputsConfig)
    task_weight: float | None = option(1.0, at_least=0.0)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    seed: int = option(0, at_least=0, at_most=2**32 - 1)
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    out: str | None = None  # the folder of the exported student and of checkpoints; null: nothing is saved
    name: str | None = None  # the arm's name in tables; null: derived from the terms
    # further terms by name: {kind: features, attention, outputs or package.module:Class, and its settings}
    terms: dict[str, Any] = field(default_factory=dict)
    # handed on to transformers.TrainingArguments, such as {optim: adamw_8bit, activation_checkpointing: true}
    training_args: dict[str, Any] = field(default_factory=dict)

    def _check(self) -> None:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            allowed = ("auto", "cpu", "cuda", "cuda:0", "mps")
            raise ValueError(
                f"device: {self.device!r} is not one of {', '.join(allowed)}.{did_you_mean(self.device, allowed)}"
            )
        check_further_terms(self.terms)
        check_training_args(self.training_args)
        if not self.transfers and not self.task_weight:
            raise ValueError(
                "features, attention, outputs, task_weight: all are null or of weight 0, so there is nothing to "
                "learn from; give at least one a weight above 0."
            )
        if self.training.save_every and not self.out:
            raise ValueError(
                f"training.save_every: found {describe(self.training.save_every)} and no `out`; checkpoints need a "
                "folder: set out: runs/my-student, or save_every: null."
            )

    def to_dict(self) -> dict[str, Any]:
        """Without `terms` and `training_args` where they are empty: the ids of runs from before them stay."""
        later = ("terms", "training_args")
        return {key: value for key, value in super().to_dict().items() if key not in later or value}

    @property
    def transfers(self) -> tuple[str, ...]:
        """The transfer terms that are on: "features", "attention", "outputs" and further ones with a weight above 0."""
        own = [name for name in TRANSFER if getattr(self, name) is not None and getattr(self, name).weight > 0]
        return (*own, *(name for name, given in self.terms.items() if given.get("weight", 1.0) > 0))

    @property
    def arm(self) -> str:
        """The arm in tables: `name` when given, else "none", "outputs", … "all", or the terms joined by "+"."""
        named = {terms: arm for arm, terms in ARMS.items()}
        return self.name or named.get(self.transfers, "+".join(self.transfers))

    @property
    def run_id(self) -> str:
        """Task, arm and seed, then a hash of all but `out`, which decides nothing: "glosses-all-s0-1f6c2a9d"."""
        content = {key: value for key, value in self.to_dict().items() if key != "out"}
        content = by_names(content, {new: old for old, new in OLD_NAMES.items()})  # the ids of recorded runs stay
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
        return f"{_slug(self.task.name)}-{_slug(self.arm)}-s{self.seed}-{digest}"

    def with_arm(self, arm: str) -> ExperimentConfig:
        """This experiment with only an arm's terms kept, for the controls of a study.

        Raises:
            ValueError: for an unknown arm, or one that needs a term this experiment does not have.
        """
        if arm not in ARMS:
            raise ValueError(f"arm: {arm!r} is not one of {', '.join(ARMS)}.{did_you_mean(arm, ARMS)}")
        lacking = [term for term in ARMS[arm] if term not in self.transfers]
        if lacking:
            raise ValueError(
                f"arm {arm!r} needs the terms {', '.join(ARMS[arm])}; this experiment has "
                f"{', '.join(self.transfers) or 'none'}. Give {lacking[0]} a mapping with a weight above 0."
            )
        kept = {name: given for name, given in self.terms.items() if name in ARMS[arm]}
        return self.replace(
            terms=kept, **{term: None for term in TRANSFER if term in self.transfers and term not in ARMS[arm]}
        )


def by_names(config: Any, names: Mapping[str, str]) -> Any:
    """A plain configuration with keys and texts exchanged by `names`, at any depth.

    >>> by_names({"features": {"loss": "normalised_mse"}}, OLD_NAMES)
    {'features': {'loss': 'normalized_mse'}}
    """
    if isinstance(config, Mapping):
        return {names.get(key, key): by_names(value, names) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [by_names(item, names) for item in config]
    return names.get(config, config) if isinstance(config, str) else config


def _check_filled(path: str, value: str | None) -> None:
    """An empty text would be taken for the folder that the command runs in."""
    if value is not None and (not value.strip() or "\0" in value):
        raise ValueError(f"{path}: found {describe(value)}, expected a name or a path.")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[-40:]
