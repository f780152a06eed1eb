"""GLUE through the code that the hub's data take, on a small data set of the same shape."""

from collections import Counter

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from fakit.tasks import load_task
from fakit.tasks.glue import GLUE
from fakit.tasks.splits import text_keys

NAMES = {"mnli": ["entailment", "neutral", "contradiction"], "sst2": ["negative", "positive"]}


def split(name: str, prefix: str, n: int, hidden: bool = False) -> Dataset:
    about = GLUE[name]
    columns = {about.text: [f"{prefix} sentence number {i}" for i in range(n)]}
    if about.text_pair:
        columns[about.text_pair] = [f"{prefix} other {i}" for i in range(n)]
    names = NAMES.get(name, ["no", "yes"])
    label = Value("float32") if about.kind == "regression" else ClassLabel(names=names)
    if about.kind == "regression":
        columns["label"] = [i % 11 / 2 for i in range(n)]
    else:
        columns["label"] = [-1 if hidden else i % len(names) for i in range(n)]
    features = {column: Value("string") for column in columns if column != "label"} | {
        "label": label,
        "idx": Value("int32"),
    }
    return Dataset.from_dict(columns | {"idx": list(range(n))}, features=Features(features))


def fake(name: str) -> DatasetDict:
    """The hub's layout: hidden labels in test, public ones in train and the dev set(s)."""
    tests = {test: split(name, test, 30) for test in GLUE[name].tests}
    return DatasetDict(train=split(name, "train", 200), test=split(name, "test", 40, hidden=True), **tests)


@pytest.mark.parametrize("name", list(GLUE))
def test_every_task(name, words):
    data = fake(name)
    task = load_task(f"glue/{name}", data=data, labels=60, pool=40)
    about = GLUE[name]
    assert (task.name, task.kind, task.metrics) == (f"glue/{name}", about.kind, about.metrics)
    # the public dev set is the test set, whole and in order; validation comes out of train
    assert task.test["text"][:] == data[about.tests[0]][about.text][:]
    assert (len(task.train), len(task.pool), len(task.validation), len(task.teacher_train)) == (60, 40, 20, 140)
    assert set(task.validation["text"]) < set(data["train"][about.text])
    parts = [key for part in (task.teacher_train, task.pool, task.validation, task.test) for key in text_keys(part)]
    assert len(parts) == len(set(parts))
    assert ("text_pair" in task.train.column_names) == (about.text_pair is not None)
    assert "labels" in task.encode("test", words).column_names


def test_headline_metrics():
    assert {name: load_task(f"glue/{name}", data=fake(name)).metric for name in GLUE} == {
        "cola": "matthews",
        "sst2": "accuracy",
        "mrpc": "accuracy",
        "qqp": "accuracy",
        "stsb": "pearson",
        "mnli": "accuracy",
        "qnli": "accuracy",
        "rte": "accuracy",
    }


def test_mnli_has_both_dev_sets_and_neither_is_trained_on():
    data = fake("mnli")
    data["train"] = Dataset.from_dict(
        {
            column: [*data["train"][column], data["validation_mismatched"][column][0]]
            for column in data["train"].column_names
        },
        features=data["train"].features,
    )
    task = load_task("glue/mnli", data=data)
    assert task.label_names == NAMES["mnli"]
    assert task.more_tests["test_mismatched"]["text"][0] == data["validation_mismatched"]["premise"][0]
    assert len(task.more_tests["test_mismatched"]) == len(task.test) == 30
    assert len(task.teacher_train) + len(task.validation) == 200  # the 201st row repeats a test pair
    assert "test_mismatched" in task.splits


def test_labels_are_stratified_and_seeded():
    few = load_task("glue/mnli", data=fake("mnli"), labels=30)
    assert set(Counter(few.train["label"]).values()) <= {9, 10, 11}
    assert few.train["text"][:] == load_task("glue/mnli", data=fake("mnli"), labels=30).train["text"][:]
    assert few.train["text"][:] != load_task("glue/mnli", data=fake("mnli"), labels=30, seed=1).train["text"][:]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("glue/wnli", {}, "glue/wnli is left out: its dev set repeats the training sentences"),
        ("glue/ax", {}, "without training data"),
        ("glue/sst", {}, "GLUE has no task 'sst'; choose one of cola, sst2"),
        ("glue/sst2", {"text": "sentence"}, "takes no option text; it takes labels, seed, data, pool, validation"),
        ("glue/sst2", {"data": {"train": None}}, r"needs the splits \['validation'\]; the data have train"),
        ("glue/sst2", {}, r"the hub cannot be reached for 'nyu-mll/glue'.*embedded task \(reviews, glosses, scans\)"),
        ("hub:stanfordnlp/imdb", {}, r"the hub cannot be reached for 'stanfordnlp/imdb'"),
    ],
)
def test_errors(name, options, message):
    with pytest.raises(ValueError, match=message):
        load_task(name, **options)
