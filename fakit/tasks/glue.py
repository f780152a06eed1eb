"""GLUE (Wang et al. 2019, https://gluebenchmark.com) from the hub, by task name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fakit.tasks.files import fetch, task_from
from fakit.tasks.task import TextTask

if TYPE_CHECKING:
    from datasets import DatasetDict

REPOSITORY = "nyu-mll/glue"


@dataclass(frozen=True)
class GlueTask:
    """Text columns and metrics of one task; the headline metric first."""

    text: str
    text_pair: str | None = None
    metrics: tuple[str, ...] = ("accuracy",)
    kind: str = "sequence-classification"
    tests: tuple[str, ...] = ("validation",)  # the public dev set(s), which serve as test


GLUE = {
    "cola": GlueTask("sentence", metrics=("matthews",)),
    "sst2": GlueTask("sentence"),
    "mrpc": GlueTask("sentence1", "sentence2", metrics=("accuracy", "f1")),
    "qqp": GlueTask("question1", "question2", metrics=("accuracy", "f1")),
    "stsb": GlueTask("sentence1", "sentence2", metrics=("pearson", "spearman"), kind="regression"),
    "mnli": GlueTask("premise", "hypothesis", tests=("validation_matched", "validation_mismatched")),
    "qnli": GlueTask("question", "sentence"),
    "rte": GlueTask("sentence1", "sentence2"),
}
EXCLUDED = {
    "wnli": "its dev set repeats the training sentences with the opposite label, so a majority guess beats every model "
    "that learns (GLUE FAQ 12)",
    "ax": "it is a diagnostic test set without training data",
}


def load_glue(
    name: str,
    *,
    labels: int | str | None = None,
    seed: int = 0,
    validation: int | float | None = None,
    pool: int | float = 0,
    data: DatasetDict | None = None,
) -> TextTask:
    """A GLUE task. GLUE hides its test labels, so the public dev set is `.test` here,
    and `.validation` is carved out of train.

    So nothing is chosen on what is reported; numbers are comparable with the dev-set columns of papers. MNLI: `.test`
    is the matched dev set, and `.more_tests["test_mismatched"]` the other.
    Training rows whose text occurs in a dev set, or twice, are left out.

    Args:
        name: "cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli" or "rte".
        labels: labeled examples for the student; None: all.
        validation: rows to carve out of train, or a share; by default a tenth, at most 2,000.
        pool: the same, as unlabeled text. A teacher from the hub has most likely seen it with its labels, since it was
            trained on all of train; a teacher trained on `.teacher_train` has not.
        data: the splits, already loaded; None: from the hub.

    Raises:
        ValueError: unknown or excluded task (says why), hub not reachable.
    """
    if name in EXCLUDED:
        raise ValueError(f"glue/{name} is left out: {EXCLUDED[name]}. Choose one of {', '.join(GLUE)}.")
    if name not in GLUE:
        raise ValueError(f"GLUE has no task {name!r}; choose one of {', '.join(GLUE)}.")
    about = GLUE[name]
    data = fetch(REPOSITORY, name) if data is None else data
    if missing := [split for split in ("train", *about.tests) if split not in data]:
        raise ValueError(f"glue/{name} needs the splits {missing}; the data have {', '.join(data)}.")

    return task_from(
        {"train": data["train"], "test": data[about.tests[0]], **{split: data[split] for split in about.tests[1:]}},
        name=f"glue/{name}",
        kind=about.kind,
        text=about.text,
        text_pair=about.text_pair,
        labels=labels,
        seed=seed,
        validation=validation,
        pool=pool,
        metrics=about.metrics,
        more_tests=about.tests[1:],
        source=f"https://huggingface.co/datasets/{REPOSITORY} ({name})",
        license="of each constituent data set, see https://gluebenchmark.com",
    )
