"""`ExperimentConfig`: one distillation run as one object, the same in a notebook and in a YAML file.

Example:
    >>> config = ExperimentConfig(task=TaskConfig("glosses", labels=1400), student=StudentConfig(layers=2))
    >>> config.arm, config.run_id
    ('all', 'glosses-all-s0-…')
    >>> ExperimentConfig.from_yaml(config.to_yaml("run.yaml") and "run.yaml") == config
    True
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from fakit import recipes
from fakit.experiments.arguments import check_lora, check_training_args
from fakit.experiments.cache_config import TeacherCacheConfig, without_place
from fakit.experiments.compression_config import LayerwiseConfig, LowRankConfig
from fakit.experiments.on_policy_config import OnPolicyConfig
from fakit.experiments.schema import Count, Natural, Number, Section, Truth, Weight, Whole, describe, did_you_mean
from fakit.experiments.terms import (
    AttentionConfig,
    FeaturesConfig,
    MapInAFile,
    OutputsConfig,
    built,
    check_further_terms,
    highest,
    schedule_at,
)
from fakit.objective.balancing import KINDS as BALANCINGS
from fakit.objective.balancing import Balancing
from fakit.objective.schedules import Schedule

TRANSFER = ("features", "attention", "outputs")
ARMS = {
    "none": (),
    "outputs": ("outputs",),
    "features": ("features",),
    "attention": ("attention",),
    "all": ("features", "attention", "outputs"),
}
"""The study's arms: which transfer terms each keeps beside the task loss."""


def _check_filled(path: str, value: str | None) -> None:
    """An empty text would be taken for the folder that the command runs in."""
    if value is not None and (not value.strip() or "\0" in value):
        raise ValueError(f"{path}: found {describe(value)}, expected a name or a path.")


class TaskConfig(Section):
    """What is learned: a task of the kit ("reviews", "glosses", "scans"), "glue/sst2", "hub:ID", or a path to data."""

    section: ClassVar[str] = "task"
    name: str = "glosses"
    labels: Annotated[Whole, Field(ge=1)] | Literal["all"] | None = None  # labeled examples; null: the task's default
    seed: Natural | None = None  # of the labeled subset; null: see build_task
    options: dict[str, Any] = Field(default_factory=dict)  # further keywords of load_task

    def _check(self) -> None:
        _check_filled("task.name", self.name)
        if twice := sorted({"name", "labels", "seed"} & set(self.options)):
            raise ValueError(f"task.options.{twice[0]}: is a key of task itself; write task.{twice[0]}.")


class TeacherConfig(Section):
    """Who teaches: "embedded" (the kit's own teacher of the task), or a path or hub id for load_teacher."""

    section: ClassVar[str] = "teacher"
    later: ClassVar[tuple[str, ...]] = ("dtype", "attn_implementation", "revision")
    id: str = "embedded"
    adapter: str | None = None
    quantize: Literal["8bit", "4bit"] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # null: float32 on a CPU, else as it is stored
    attn_implementation: str | None = None  # sdpa, eager, flash_attention_2 …, as transformers names them
    revision: str | None = None  # of a hub id: a branch, a tag or a commit

    def _check(self) -> None:
        for key in ("id", "adapter", "attn_implementation", "revision"):
            _check_filled(f"teacher.{key}", getattr(self, key))
        if self.id == "embedded" and (also := [key for key in self.later if getattr(self, key) is not None]):
            raise ValueError(
                f"teacher.{also[0]}: is for a teacher that is loaded by its path or hub id; the embedded one is loaded "
                "as it was recorded."
            )

    def to_dict(self) -> dict[str, Any]:
        """Without later keys where nothing is asked: the ids of runs from before them stay."""
        return {key: value for key, value in super().to_dict().items() if key not in self.later or value is not None}


class StudentLayerwise(LayerwiseConfig):
    """The teacher with layers taken out one a round, healing after each: where the run starts."""

    section: ClassVar[str] = "student.layerwise"


class StudentLowRank(LowRankConfig):
    """The teacher with pairs of thin matrices for its weights, distilled block by block: where the run starts."""

    section: ClassVar[str] = "student.low_rank"


class StudentConfig(Section):
    """Who learns: the teacher shrunk to a number of evenly spaced layers, or to layers by number; a model at
    `path`; one of any family, `untrained`; or the teacher compressed first, by `layerwise` or `low_rank`.
    """

    section: ClassVar[str] = "student"
    shrunk: ClassVar[tuple[str, ...]] = ("layers", "hidden_size", "heads", "init")
    layers: Count | tuple[Whole, ...] = 2
    hidden_size: Count | None = None
    heads: Count | None = None
    init: Literal["copy", "random"] = "copy"
    path: str | None = None  # a saved model instead of a shrunken teacher
    freeze_embeddings: Truth = False  # keep the copied word embeddings: less to train and, with few labels, to forget
    layerwise: StudentLayerwise | None = None
    low_rank: StudentLowRank | None = None
    # random weights of any family: model_type and keys of its configuration, as {model_type: mamba, hidden_size: 128}
    untrained: dict[str, Any] | None = None
    # train an adapter in place of all weights: keys of peft.LoraConfig, such as {r: 16, lora_alpha: 32}
    lora: dict[str, Any] | None = None
    # the weights under an adapter in 8 or 4 bits (QLoRA), of a language model at `path`
    quantize: Literal["8bit", "4bit"] | None = None

    def _check(self) -> None:
        _check_filled("student.path", self.path)
        if self.quantize is not None and (self.path is None or self.lora is None):
            raise ValueError(
                f"student.quantize: found {self.quantize} with path {describe(self.path)} and lora "
                f"{describe(self.lora)}; weights of few bits are not trained: give student.path, a saved model, and "
                "student.lora, the adapter that is (lora: {r: 16})."
            )
        made = [key for key in ("layerwise", "low_rank", "untrained", "path") if getattr(self, key) is not None]
        if len(made) > 1:
            raise ValueError(f"student.{made[0]} and student.{made[1]}: each makes a student; keep one of them.")
        defaults = {key: type(self).model_fields[key].default for key in self.shrunk}
        if self._made_otherwise and (also := [key for key in self.shrunk if getattr(self, key) != defaults[key]]):
            raise ValueError(
                f"student.{also[0]}: is of a teacher that is shrunk, and student.{made[0]} makes this student; "
                "leave one of them out."
            )
        if self.untrained is not None:
            from fakit.models.untrained import check_settings

            check_settings(self.untrained, "student.untrained")
            if self.freeze_embeddings or self.lora is not None:
                key = "freeze_embeddings" if self.freeze_embeddings else "lora"
                raise ValueError(f"student.{key}: keeps weights as they are, and student.untrained has random ones.")
        if self.lora is not None:
            check_lora(self.lora)
            if self.low_rank is not None:
                raise ValueError("student.lora: is beside dense weights, and student.low_rank leaves none; drop one.")

    @property
    def compression(self) -> LayerwiseConfig | LowRankConfig | None:
        """How the teacher is compressed before the run."""
        return self.layerwise or self.low_rank

    @property
    def _made_otherwise(self) -> bool:
        return self.compression is not None or self.untrained is not None

    def to_dict(self) -> dict[str, Any]:
        """Without later keys where they are not used, and with one without what it stands for: ids of runs stay."""
        later = ("layerwise", "low_rank", "untrained", "lora", "quantize")
        aside = {key for key in later if getattr(self, key) is None}
        aside |= {*self.shrunk, "path"} if self._made_otherwise else set()
        return {key: value for key, value in super().to_dict().items() if key not in aside}


class BalancingConfig(Section):
    """Factors on the terms' weights that are found while training; see `fakit.objective.balancing`."""

    section: ClassVar[str] = "balancing"
    kind: Literal[tuple(BALANCINGS)]
    learning_rate: Annotated[Number, Field(gt=0.0)] | None = None  # of "uncertainty"
    every: Count | None = None  # steps, of "gradient_norm"
    momentum: Annotated[Number, Field(ge=0.0, lt=1.0)] | None = None  # of "gradient_norm"

    def _check(self) -> None:
        takes = inspect.signature(BALANCINGS[self.kind]).parameters
        if other := [key for key in self._given() if key not in takes]:
            raise ValueError(f"balancing.{other[0]}: {self.kind} has no such key; it takes {', '.join(takes)}.")

    def _given(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in self.keys() if key != "kind" and getattr(self, key) is not None}

    def to_dict(self) -> dict[str, Any]:
        """Without what is as it would be anyway."""
        return {"kind": self.kind, **self._given()}

    def build(self) -> Balancing:
        """The module."""
        return BALANCINGS[self.kind](**self._given())


def _kind_alone(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


class TrainingConfig(Section):
    """How long and how fast. `steps` are optimizer steps; each takes `batch_size` × `accumulation` texts a process."""

    section: ClassVar[str] = "training"
    old_names: ClassVar[dict[str, str]] = {"labelled_fraction": "labeled_fraction"}
    steps: Count = 600
    batch_size: Count = 32
    labeled_fraction: Annotated[Number, Field(gt=0.0, le=1.0)] = 0.5  # of each batch, where an unlabeled pool is used
    learning_rate: Annotated[Number, Field(gt=0.0)] = 2e-4
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup: Natural | Weight = 0.1  # steps when ≥ 1, else a share of all steps
    weight_decay: Weight = 0.01
    bf16: Truth | Literal["auto"] = "auto"  # auto: where the device computes it faster than float32
    accumulation: Count = 1
    max_length: Annotated[Whole, Field(ge=2)] = 128  # tokens
    log_every: Count = 10  # steps
    eval_every: Count | None = None  # steps; null: at the end only
    save_every: Count | None = None  # steps; null: no checkpoint

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


OLD_NAMES = {**TrainingConfig.old_names, **FeaturesConfig.old_names}
"""Of keys and losses, as runs of before have them; both are read, the new ones are written."""


class ExperimentConfig(Section):
    """One run. A term set to null (None) is not computed; without any transfer term the student only sees labels.

    `recipe` stands for the terms, layer map and name of a published objective (`fakit.recipes`). Keys beside it change
    them one by one; a term that is given with its loss is a new one, and null leaves a term out, also one of `terms`.
    What is recorded are the settings themselves.

    Example:
        >>> config = ExperimentConfig(recipe="distilbert", features={"weight": 0.5})
        >>> config.arm, config.features.loss, config.outputs.weight, config.attention
        ('distilbert', 'cosine', 5.0, None)
    """

    shorthands: ClassVar[tuple[str, ...]] = ("recipe",)
    task: TaskConfig = TaskConfig()
    teacher: TeacherConfig = TeacherConfig()
    student: StudentConfig = StudentConfig()
    # a strategy, or pairs [student, teacher]; "random" is drawn anew with every pass over the labeled texts, and "kept"
    # is the teacher layer that each student layer was, and the last for the last
    layer_map: MapInAFile = "uniform"
    features: FeaturesConfig | None = FeaturesConfig()
    attention: AttentionConfig | None = AttentionConfig()
    outputs: OutputsConfig | None = OutputsConfig()
    task_weight: Weight | schedule_at("task_weight") | None = 1.0
    training: TrainingConfig = TrainingConfig()
    seed: Annotated[Natural, Field(le=2**32 - 1)] = 0
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    out: str | None = None  # the folder of the exported student and of checkpoints; null: nothing is saved
    name: str | None = None  # the arm's name in tables; null: derived from the terms
    # further terms by name: {kind: features, attention, outputs or package.module:Class, and its settings}
    terms: dict[str, Any] = Field(default_factory=dict)
    # uncertainty, gradient_norm, or {kind: gradient_norm, every: 10}; null: weights as they are
    balancing: Annotated[BalancingConfig | None, BeforeValidator(_kind_alone)] = None
    # in a share of the steps the student writes the answers: {share: 0.5, max_new_tokens: 64}; null: never
    on_policy: OnPolicyConfig | None = None
    # the teacher reads each text once: {folder: cache, dtype: float16, top_k: 64}; null: it reads along in every step
    teacher_cache: TeacherCacheConfig | None = None
    # handed on to transformers.TrainingArguments, such as {optim: adamw_8bit, activation_checkpointing: true}
    training_args: dict[str, Any] = Field(default_factory=dict)

    def _check(self) -> None:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            allowed = ("auto", "cpu", "cuda", "cuda:0", "mps")
            raise ValueError(
                f"device: {self.device!r} is not one of {', '.join(allowed)}.{did_you_mean(self.device, allowed)}"
            )
        check_further_terms(self.terms)
        check_training_args(self.training_args)
        self._check_schedules()
        if not self.transfers and not (self.task_weight is not None and highest(self.task_weight)):
            raise ValueError(
                "features, attention, outputs, task_weight: all are null or of weight 0, so there is nothing to "
                "learn from; give at least one a weight above 0."
            )
        if self.on_policy is not None and not self.transfers:
            raise ValueError(
                "on_policy: what the student writes is scored by the teacher, and no term looks at one (features, "
                "attention, outputs); give one a weight above 0, or set on_policy: null."
            )
        if self.training.save_every and not self.out:
            raise ValueError(
                f"training.save_every: found {describe(self.training.save_every)} and no `out`; checkpoints need a "
                "folder: set out: runs/my-student, or save_every: null."
            )

    def _check_schedules(self) -> None:
        """Where one goes on until the end, it starts before that."""
        sections = {name: getattr(self, name) for name in TRANSFER if getattr(self, name) is not None}
        settings = {f"{name}.{key}": value for name, section in sections.items() for key, value in section}
        settings |= {f"terms.{name}.{key}": value for name, given in self.terms.items() for key, value in given.items()}
        settings |= {} if self.on_policy is None else {"on_policy.share": self.on_policy.share}
        for path, value in (settings | {"task_weight": self.task_weight}).items():
            schedule = built(value)
            if isinstance(schedule, Schedule):
                try:
                    schedule.until(self.training.steps)
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from error

    @classmethod
    def _by_current_names(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        given = {key: value for key, value in data.items() if key != "recipe"}
        return super()._by_current_names(given if data.get("recipe") is None else _beside(data["recipe"], given))

    def to_dict(self) -> dict[str, Any]:
        """Without later keys where they are empty: the ids of runs from before them stay."""
        later = ("terms", "balancing", "training_args", "on_policy", "teacher_cache")
        return {key: value for key, value in super().to_dict().items() if key not in later or value}

    def __reduce__(self):
        """Pickled as what a file says: the schemas of terms and schedules are made at run time, under no name that
        another process could import.
        """
        return ExperimentConfig.from_dict, (self.to_dict(),)

    @property
    def transfers(self) -> tuple[str, ...]:
        """The transfer terms that are on: "features", "attention", "outputs" and further ones, with a weight above 0 at
        some time.
        """
        own = [name for name in TRANSFER if getattr(self, name) is not None and highest(getattr(self, name).weight) > 0]
        return (*own, *(name for name, given in self.terms.items() if highest(given.get("weight", 1.0)) > 0))

    @property
    def arm(self) -> str:
        """The arm in tables: `name` when given, else "none", "outputs", … "all", or the terms joined by "+"."""
        named = {terms: arm for arm, terms in ARMS.items()}
        return self.name or named.get(self.transfers, "+".join(self.transfers))

    @property
    def run_id(self) -> str:
        """Task, arm and seed, then a hash of all but the folders, which decide nothing: "glosses-all-s0-1f6c2a9d"."""
        content = without_place({key: value for key, value in self.to_dict().items() if key != "out"})
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
        dropped = dict.fromkeys(term for term in TRANSFER if term in self.transfers and term not in ARMS[arm])
        if not ARMS[arm]:  # without a teacher nobody scores what the student writes
            dropped |= {"on_policy": None, "teacher_cache": None}
        return self.replace(terms=kept, **dropped)


def _beside(recipe: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's settings, changed by the keys beside it, which may be dotted."""
    found = recipes.named(recipe)
    settings = {**found.configuration, "name": found.name}
    for key, value in given.items():
        head, *inner = key.split(".") if key.split(".")[0] in settings else [key]
        for part in reversed(inner):
            value = {part: value}
        if inner and settings[head] is None:
            raise ValueError(
                f"{key}: the recipe {found.name} has no {head}, so its keys cannot be changed one by one; give the "
                f"whole of it: {head}: {{…}}."
            )
        settings[head] = _merged(settings.get(head), value)
    return {**settings, "terms": {name: term for name, term in settings["terms"].items() if term is not None}}


def _merged(old: Any, new: Any) -> Any:
    """Mappings key by key; but another loss is another term, with none of the old one's parameters."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)) or "loss" in new:
        return new
    return {**old, **{key: _merged(old.get(key), value) for key, value in new.items()}}


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


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[-40:]
