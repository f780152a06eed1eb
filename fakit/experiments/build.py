"""From a configuration to the parts of a run: task, teacher, student, objective, training rows, arguments.

`run_experiment` puts them together; a notebook may take single parts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fakit.experiments.batches import batch_plan, labeled_rows
from fakit.experiments.config import TRANSFER, ExperimentConfig
from fakit.experiments.on_policy_config import check_prompts
from fakit.experiments.schema import did_you_mean
from fakit.experiments.terms import KEPT, Pairs, build_further_term, built
from fakit.layer_maps import LayerMap
from fakit.objective.objective import Objective
from fakit.objective.task import Task

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
)

BYTES_A_ROW = 50
"""Of the plan of a run: an index in it, one in the data set that is walked through, and a Python number in between."""

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from fakit.tasks import TextTask


def build_task(config: ExperimentConfig) -> TextTask:
    """The task with its labeled subset, chosen by `task.seed`.

    By default that is the run's seed for the kit's own tasks, whose held-out texts are fixed. Elsewhere it is 0,
    because there the same seed may carve the test split: it must not change between runs,
    nor reach what a teacher was trained on.

    Raises:
        ValueError: on-policy distillation, and a task without prompts.
    """
    from fakit.tasks import load_task
    from fakit.tasks.embedded import EMBEDDED

    default = config.seed if config.task.name in EMBEDDED else 0
    seed = default if config.task.seed is None else config.task.seed
    task = load_task(config.task.name, labels=config.task.labels, seed=seed, **config.task.options)
    if config.on_policy is not None:
        check_prompts(task)
    return task


def build_teacher(
    config: ExperimentConfig, task: TextTask, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen teacher and its tokenizer.

    Raises:
        ValueError: "embedded" for a task without an embedded teacher, or a classifier of other classes. The same
            classes in another order are put into the task's.
    """
    from fakit.models.class_names import class_names, order_classes
    from fakit.tasks.embedded import EMBEDDED, embedded_teacher

    if config.teacher.id == "embedded":
        if config.task.name not in EMBEDDED:
            raise ValueError(
                f"teacher.id: 'embedded' was asked for the task {config.task.name!r}; teachers are embedded for "
                f"{', '.join(EMBEDDED)}. Give a path or hub id of a model trained on your task."
                + did_you_mean(config.task.name, EMBEDDED)
            )
        teacher, tokenizer = embedded_teacher(config.task.name, quantize=config.teacher.quantize, device=device)
    else:
        from fakit.models.load import load_teacher, load_tokenizer

        teacher = load_teacher(
            config.teacher.id,
            task=task.model_task,
            quantize=config.teacher.quantize,
            adapter=config.teacher.adapter,
            dtype=None if config.teacher.dtype is None else getattr(torch, config.teacher.dtype),
            device=device,
            **{key: value for key in ("attn_implementation", "revision") if (value := getattr(config.teacher, key))},
        )
        tokenizer = load_tokenizer(config.teacher.id)
        check_tokenizer(tokenizer, config.teacher.id)
    if task.num_labels is not None and teacher.config.num_labels != task.num_labels:
        raise ValueError(
            f"the teacher {config.teacher.id} has {teacher.config.num_labels} outputs, the task {task.name} has "
            f"{task.num_labels} ({', '.join(map(str, (task.label_names or ['one score'])[:4]))} …); fine-tune the "
            "teacher on this task first, or give the adapter that does. The teacher's outputs are "
            f"{', '.join(class_names(teacher.config)[:8])}."
        )
    if task.label_names:
        order_classes(teacher, task.label_names, f"the teacher {config.teacher.id}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # GPT-2 and kin; masks and labels leave padding out either way
        teacher.config.pad_token_id = tokenizer.pad_token_id  # the student's, too: its configuration is a copy
    return teacher, tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, whose: str) -> None:
    """Raise ValueError for a tokenizer without a vocabulary, as transformers makes one for a folder that holds none.

    It would turn every word into the unknown token.
    """
    special = {*tokenizer.all_special_tokens, *map(str, tokenizer.added_tokens_decoder.values())}
    if not {token for token in tokenizer.get_vocab() if token.strip("▁Ġ ")} - special:
        raise ValueError(
            f"{whose} has no tokenizer: transformers made a {type(tokenizer).__name__} of {len(special)} special "
            "tokens and no words, to which every text is the same. Save the teacher's tokenizer beside it "
            "(tokenizer.save_pretrained), or name a folder that has one."
        )


def shared(config: ExperimentConfig) -> dict[str, Any]:
    """The keys that `Prepared` is made by, and their values."""
    return {name: attrgetter(name)(config) for name in ("task", "teacher", "seed", "training.max_length")}


@dataclass
class Prepared:
    """What runs of one task, teacher, seed and length have in common, see `prepare`.

    Attributes:
        tokenizer: of the rows that students read: the teacher's, or that of `student.path`.
        validation, test: encoded splits.
        teacher_tokenizer: the teacher's, where it is another one.
        compressed: the last student that was compressed from the teacher, and what it was asked as; see `make_student`.
    """

    config: ExperimentConfig
    task: TextTask
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    validation: Dataset
    test: Dataset
    teacher_tokenizer: PreTrainedTokenizerBase | None = None
    compressed: tuple[Any, Any] | None = None
    _logits: Tensor | None = None
    _scores: dict[str, float] | None = None

    def teacher_scores(self) -> dict[str, float]:
        """The teacher's own metrics on the test split, measured once."""
        if self._scores is None:
            from fakit.evaluation import evaluate

            tokenizer, rows = self.of_teacher("test")
            collator = self.task.collator(tokenizer)
            self._scores = evaluate(self.teacher, rows, collator, self.task, tokenizer)
        return self._scores

    def of_teacher(self, split: str) -> tuple[PreTrainedTokenizerBase, Dataset]:
        """The teacher's tokenizer, and "validation" or "test" in its tokens."""
        if self.teacher_tokenizer is None:
            return self.tokenizer, getattr(self, split)
        from fakit.tasks.two_tokenizers import apart

        tokenizer = self.teacher_tokenizer
        return tokenizer, apart(self.task).encode(split, tokenizer, self.config.training.max_length)

    def collator(self) -> Callable:
        """Makes batches of training rows: those of `build_training_rows`."""
        from fakit.tasks.two_tokenizers import both_collator

        if self.teacher_tokenizer is None:
            return self.task.collator(self.tokenizer)
        return both_collator(self.task, self.tokenizer, self.teacher_tokenizer)

    def reference(self) -> PreTrainedModel | Tensor | None:
        """What students are compared with on the test split: a classifier's logits (N, C), asked once;
        else the teacher itself; None where it reads other tokens.
        """
        if self.teacher_tokenizer is not None:
            return None
        if self.task.kind == "causal-lm":
            return self.teacher
        if self._logits is None:
            from fakit.evaluation import predictions

            self._logits = predictions(self.teacher, self.test, self.task.collator(self.tokenizer))
        return self._logits

    def fingerprint(self) -> str:
        """Of the texts and labels that runs are evaluated on: scores on others are not scores of the same task."""
        from fakit.training.ownership import data_fingerprint

        both = "".join(data_fingerprint(split) for split in (self.task.validation, self.task.test))
        return hashlib.sha256(both.encode()).hexdigest()[:16]

    def differs(self, config: ExperimentConfig) -> dict[str, tuple]:
        """Keys in which a run's configuration needs other parts than these: {key: (ours, the run's)}."""
        theirs = shared(config)
        found = {name: (ours, theirs[name]) for name, ours in shared(self.config).items() if ours != theirs[name]}
        ours, asked = self.config.student.path, config.student.path
        if not found and ours != asked:  # a tokenizer lies beside each
            from fakit.tasks.two_tokenizers import differ

            teachers = self.teacher_tokenizer or self.tokenizer
            own = student_tokenizer(config)
            if differ(teachers if own is None else own, self.tokenizer):
                found["student.path"] = ours, asked
        return found

    def check(self, config: ExperimentConfig) -> None:
        """Raise ValueError where a run's configuration needs other parts than these."""
        for name, (ours, asked) in self.differs(config).items():
            raise ValueError(
                f"prepared for {name} = {ours}, but the run has {asked}; call prepare with the run's own configuration."
            )


def prepare(config: ExperimentConfig, device: str | torch.device = "cpu") -> Prepared:
    """Load a run's task and teacher and encode the splits that it is evaluated on."""
    from fakit.evaluation.generation import SCORED, check_references

    task = build_task(config)
    teacher, tokenizer = build_teacher(config, task, device)
    own = own_tokenizer(config, task, tokenizer)
    teachers, tokenizer = (None, tokenizer) if own is None else (tokenizer, own)
    splits = {name: task.encode(name, tokenizer, config.training.max_length) for name in ("validation", "test")}
    if "target" in task.test.column_names:
        for split in splits.values():
            check_references(list(split)[:SCORED], tokenizer)
    return Prepared(config, task, teacher, tokenizer, **splits, teacher_tokenizer=teachers)


def student_tokenizer(config: ExperimentConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies beside the model at `student.path`; None where none does,
    or the student is cut from the teacher.
    """
    if config.student.path is None:
        return None
    from fakit.models.load import resolve_model

    return tokenizer_beside(Path(resolve_model(config.student.path)))


def own_tokenizer(config: ExperimentConfig, task: TextTask, teachers: PreTrainedTokenizerBase):
    """The tokenizer of the model at `student.path`, where it is not the teacher's; else None.

    Raises:
        ValueError: a task that two tokenizers cannot read.
    """
    from fakit.tasks.two_tokenizers import check_both, differ

    own = student_tokenizer(config)
    if own is None or not differ(own, teachers):
        return None
    check_tokenizer(own, config.student.path)
    check_both(task, (own, teachers))
    if own.pad_token_id is None:
        own.pad_token = own.eos_token
    return own


def tokenizer_beside(model: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies in a model's folder; None where none does."""
    from fakit.models.load import load_tokenizer

    if model.is_dir() and not any((model / name).is_file() for name in _TOKENIZER_FILES):
        return None
    return load_tokenizer(model)


def pad_as(model: PreTrainedModel, token: int | None) -> None:
    """Have a model without a token for padding take this one: a classifier of several texts at once needs to know
    where they end.
    """
    if model.config.pad_token_id is None:
        model.config.pad_token_id = token


def check_lengths(rows: Dataset, max_length: int, column: str = "input_ids", **models: PreTrainedModel) -> None:
    """Raise ValueError where a row is longer than a model has positions."""
    from fakit.models.positions import longest_row

    longest = max(map(len, rows[column]))
    for side, model in models.items():
        positions = longest_row(model)
        if positions is not None and longest > positions:
            raise ValueError(
                f"a text has {longest} tokens at training.max_length: {max_length}, and the {side} "
                f"({type(model).__name__}) has {positions} positions; set training.max_length to at most {positions}."
            )


def build_objective(
    config: ExperimentConfig, student: PreTrainedModel, teacher: PreTrainedModel, kept: Pairs | None = None
) -> Objective:
    """The objective of the configured terms, with projections where the widths differ.

    Args:
        kept: what the layer map "kept" stands for.
    """
    from fakit.models.blocks import stack_depths

    def map_of(given: str | Pairs) -> LayerMap:
        if given == KEPT:
            if kept is None:
                whose = f"the model saved at {config.student.path}" if config.student.path else "an untrained model"
                raise ValueError(
                    f"layer_map: {KEPT} is the teacher layer that each student layer was, and nobody knows that of "
                    f"{whose}; give pairs [student layer, teacher layer], or a strategy."
                )
            return LayerMap(kept)
        return LayerMap.named(given, stack_depths(student), stack_depths(teacher), seed=config.seed)

    objective = Objective(
        map_of(config.layer_map),
        **{name: getattr(config, name) and getattr(config, name).build(map_of) for name in TRANSFER},
        task=None if config.task_weight is None else Task(weight=built(config.task_weight)),
        terms={name: build_further_term(name, given, map_of) for name, given in config.terms.items()},
        balancing=config.balancing and config.balancing.build(),
    )
    return objective.prepare(*(model.config.get_text_config().hidden_size for model in (student, teacher)))


@dataclass(frozen=True)
class TrainingRows:
    """Encoded rows and the order in which the steps take them.

    Attributes:
        rows: encoded labeled rows, then the pool's (labels -100).
        plan: (batches, batch_size) row numbers, see `batch_plan`; the batches of an optimizer step follow each other.
        labeled: how many of the rows carry a label.
    """

    rows: Dataset
    plan: np.ndarray
    labeled: int

    def dataset(self) -> Dataset:
        """The rows in the order of the plan: what a trainer with sequential sampling walks through."""
        return self.rows.select(self.plan.ravel().tolist())

    def typical_batches(self, count: int = 4) -> list[list[dict]]:
        """`count` planned batches that stand for all: at evenly spaced ranks of their padded length."""
        lengths = np.array([len(ids) for ids in self.rows["input_ids"]])
        ranks = np.argsort(lengths[self.plan].max(axis=1), kind="stable")
        chosen = ranks[((np.arange(count) + 0.5) / count * len(ranks)).astype(int)]
        return [self.rows.select(self.plan[batch].tolist()).to_list() for batch in chosen]


def training_texts(
    task: TextTask,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    pool: bool = True,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[Dataset, int]:
    """The encoded training texts, labeled ones first, then the pool's; and how many of them carry a label.

    Args:
        teacher_tokenizer: where it is not the student's; the rows are then in the tokens of both, without the pool,
            whose texts have no answers to align.
    """
    from datasets import concatenate_datasets

    if teacher_tokenizer is not None:
        from fakit.tasks.task import say
        from fakit.tasks.two_tokenizers import encode_both

        if pool and task.pool is not None:
            say(
                f"{task.name}: the {len(task.pool):,} unlabeled texts of its pool are left out: teacher and student "
                "have tokenizers of their own, which are aligned by labeled tokens."
            )
        rows = encode_both(task, "train", tokenizer, teacher_tokenizer, max_length)
        return rows, len(rows)
    rows = task.encode("train", tokenizer, max_length)
    if not pool or task.pool is None:
        return rows, len(rows)
    unlabeled = task.encode("pool", tokenizer, max_length)
    return concatenate_datasets([rows, unlabeled.cast(rows.features)]), len(rows)


def build_training_rows(
    config: ExperimentConfig,
    task: TextTask,
    tokenizer: PreTrainedTokenizerBase,
    processes: int = 1,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> TrainingRows:
    """Labeled rows, and the unlabeled pool where batches have room for it and a transfer term is on; without one,
    unlabeled text teaches nothing.
    """
    training = config.training
    each = training.accumulation * processes  # batches of an optimizer step
    room = labeled_rows(training.batch_size * each, training.labeled_fraction) < training.batch_size * each
    pool = room and bool(config.transfers)
    rows, labeled = training_texts(task, tokenizer, training.max_length, pool, teacher_tokenizer)
    plan = batch_plan(
        labeled,
        len(rows) - labeled,
        batches=training.steps,
        batch_size=training.batch_size * each,
        labeled_fraction=training.labeled_fraction,
        seed=config.seed,
    )
    # a step's rows are dealt out like cards, so that they, and each batch's share of labels, do not depend on who takes
    # them
    dealt = plan.reshape(training.steps, training.batch_size, each).swapaxes(1, 2)
    return TrainingRows(rows, dealt.reshape(-1, training.batch_size), labeled)


def check_plan(config: ExperimentConfig, processes: int = 1) -> None:
    """Raise ValueError where the order of all rows of all steps, which is laid out beforehand,
    does not fit into the free memory.
    """
    import psutil

    training = config.training
    rows = training.steps * training.batch_size * training.accumulation * processes
    needed, free = rows * BYTES_A_ROW, psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"training.steps {training.steps:,} × batch_size {training.batch_size:,} × accumulation "
            f"{training.accumulation:,} are {rows:,.0f} rows, and their order alone takes {needed / 1e9:,.1f} GB; "
            f"{free / 1e9:,.1f} GB are free. Lower training.steps: resume or start another run from the student for "
            "more."
        )


def build_arguments(config: ExperimentConfig, folder: str | Path) -> TrainingArguments:
    """transformers' TrainingArguments of a configuration; checkpoints go to `folder`.

    Batches are taken in order (`train_sampling_strategy="sequential"`): the rows come in the planned order already.

    Raises:
        ValueError: a device that is not there, a plan of rows that does not fit, or a value in `training_args` that
            transformers refuses.
    """
    from transformers import TrainingArguments

    training = config.training
    check_plan(config)
    if config.device != "auto":
        from fakit.models.load import check_device

        check_device(config.device, "device: ")
    if ":" in config.device:
        torch.cuda.set_device(config.device)
    asked = {
        "per_device_eval_batch_size": min(64, training.batch_size),  # what fits a step fits an evaluation
        "save_total_limit": 2,
        "report_to": "none",
        "dataloader_pin_memory": config.device not in ("cpu", "mps") and torch.cuda.is_available(),
        **config.training_args,
    }
    own = dict(
        output_dir=str(folder),
        max_steps=training.steps,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.accumulation,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.scheduler,
        warmup_steps=training.warmup,
        weight_decay=training.weight_decay,
        bf16=training.bf16 is True,
        # the Trainer takes bf16 on a CPU only where it is told that a CPU it is
        use_cpu=config.device == "cpu" or (config.device == "auto" and not torch.accelerator.is_available()),
        seed=config.seed,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        logging_steps=training.log_every,
        eval_strategy="steps" if training.eval_every else "no",
        eval_steps=training.eval_every,
        save_strategy="steps" if training.save_every else "no",
        save_steps=training.save_every or 500,
        disable_tqdm=True,  # it prints a dictionary at every log; run_experiment has a bar of its own
    )
    try:
        args = TrainingArguments(**own, **asked)
    except (TypeError, ValueError) as error:
        if not config.training_args:
            raise
        raise ValueError(f"training_args: {config.training_args} were refused by transformers: {error}") from error
    args.bf16 = training.bf16  # "auto" is decided by the DistillationTrainer, when all processes are there
    return args
