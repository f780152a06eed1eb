"""Your own data: every format gives the same task; what cannot work is said with what there is."""

import json

import pandas
import pytest
from datasets import ClassLabel, Dataset, DatasetDict

from fakit.tasks import load_task, task_from
from fakit.tasks.splits import text_keys

FRAME = pandas.DataFrame(
    {
        "sentence": [f"this is text, number {i} of\ttwo" for i in range(60)],
        "stars": (["bad", "good", "NA"] * 20),
    }
)


def write(frame: pandas.DataFrame, path):
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        frame.to_parquet(path)
    elif name.endswith((".json", ".jsonl")):
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_csv(path, index=False, sep="\t" if name.endswith(".tsv") else ",")
    return path


@pytest.mark.parametrize("name", ["d.csv", "d.csv.gz", "d.tsv", "d.jsonl", "d.jsonl.gz", "d.json", "d.parquet"])
def test_every_format_gives_the_same_task(tmp_path, name):
    options = {"text": "sentence", "label": "stars", "validation": 6, "test": 0.2, "pool": 9}
    task = load_task(write(FRAME, tmp_path / name), labels=15, **options)
    assert task.label_names == ["NA", "bad", "good"]  # "NA" is a word here, not a gap
    assert (len(task.train), len(task.pool), len(task.validation), len(task.test), len(task.teacher_train)) == (
        15,
        9,
        6,
        12,
        33,
    )
    parts = [key for part in (task.teacher_train, task.pool, task.validation, task.test) for key in text_keys(part)]
    assert sorted(parts) == sorted(text_keys(Dataset.from_dict({"text": FRAME["sentence"]})))
    reference = task_from(Dataset.from_pandas(FRAME, preserve_index=False), name="x", labels=15, **options)
    assert task.train.to_dict() == reference.train.to_dict() and task.test.to_dict() == reference.test.to_dict()
    labels = dict(zip(FRAME["sentence"], FRAME["stars"], strict=True))
    assert all(task.label_names[row["label"]] == labels[row["text"]] for row in task.test)


def test_saved_directories(tmp_path):
    rows = Dataset.from_pandas(FRAME, preserve_index=False).rename_columns({"sentence": "text", "stars": "label"})
    rows.save_to_disk(tmp_path / "one")
    assert len(load_task(tmp_path / "one").teacher_train) == 48
    parts = DatasetDict(train=rows.select(range(40)), dev=rows.select(range(35, 50)), test=rows.select(range(45, 60)))
    parts["unsupervised"] = rows.select([0, 46, 59]).remove_columns("label")
    parts.save_to_disk(tmp_path / "splits")
    task = load_task(tmp_path / "splits")
    # a text in two splits stays in the first of test, validation, train; of the pool's nothing is new
    assert (len(task.test), len(task.validation), len(task.train)) == (15, 10, 35)
    assert task.pool is None


def test_rows_without_a_label_are_the_pool(tmp_path):
    frame = FRAME.assign(stars=[None if i >= 50 else str(i % 2) for i in range(60)])
    task = load_task(write(frame, tmp_path / "d.csv"), text="sentence", label="stars")
    assert (len(task.pool), task.pool.column_names) == (10, ["text"])
    assert task.label_names == ["0", "1"] and None not in task.teacher_train["label"][:]
    assert set(task.pool["text"]) == set(frame["sentence"][50:])


def test_repeated_texts_occur_once_and_never_on_both_sides(tmp_path):
    frame = pandas.concat([FRAME, FRAME.assign(sentence=FRAME["sentence"].str.upper())])
    task = load_task(write(frame, tmp_path / "d.csv"), text="sentence", label="stars", test=20)
    parts = [key for part in (task.teacher_train, task.validation, task.test) for key in text_keys(part)]
    assert len(parts) == len(set(parts)) == 60
    assert task.dropped == {"train: repeats a text": 60} and "left out: 60 rows (train: repeats a text 60)" in repr(
        task
    )


def test_kinds_told_by_the_columns(tmp_path):
    scores = task_from(Dataset.from_dict({"text": list("abcdefghijkl"), "label": [i / 2 for i in range(12)]}), name="x")
    assert (scores.kind, scores.metrics) == ("regression", ("pearson", "spearman"))
    pairs = write(
        pandas.DataFrame({"noisy": list("abcdefghijkl"), "clean": list("ABCDEFGHIJKL")}), tmp_path / "p.jsonl"
    )
    task = load_task(pairs, kind="causal-lm", source_text="noisy", target_text="clean", pool=2)
    assert (task.kind, task.metric, task.test.column_names, task.pool.column_names) == (
        "causal-lm",
        "cer",
        ["source", "target"],
        ["source"],
    )
    assert all(row["target"] == row["source"].upper() for row in task.train)


def test_hidden_test_labels_are_no_test_set():
    names = ClassLabel(names=["no", "yes"])
    part = lambda prefix, labels: Dataset.from_dict(  # noqa: E731
        {"text": [f"{prefix} {i}" for i in range(len(labels))], "label": labels}
    ).cast_column("label", names)
    task = task_from(DatasetDict(train=part("a", [0, 1] * 30), test=part("b", [-1] * 10)), name="x")
    assert len(task.test) == 6 and {text[0] for text in task.test["text"]} == {"a"}
    assert task.label_names == ["no", "yes"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"text": "body", "label": "stars"},
            r"train has no column 'body'; its columns are sentence, stars. Say which with text=",
        ),
        ({"text": "sentence"}, r"no column 'label'; its columns are sentence, stars. Say which with label="),
        (
            {"text": "sentence", "label": "stars", "kind": "ranking"},
            "kind='ranking' is not known; choose one of 'sequence-classification'",
        ),
        ({"text": "sentence", "label": "stars", "kind": "regression"}, "holds a value that is no number.*'bad'"),
        (
            {"text": "sentence", "label": "stars", "test": 50, "validation": 10},
            "test=50, validation=10, pool=0 would be carved out of 60",
        ),
        ({"text": "sentence", "label": "stars", "test": 1.5}, "test=1.5 is neither a number of rows"),
        ({"text": "sentence", "label": "stars", "test": 0}, "test=0 is neither a number of rows"),
        (
            {"text": "sentence", "label": "stars", "labels": 2},
            r"labels=2 was asked of d.csv; choose 3 \(one a class\) to 48",
        ),
        (
            {"text": "sentence", "label": "stars", "column": "x"},
            "takes no option column; it takes labels, seed, .*text, text_pair",
        ),
    ],
)
def test_wrong_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        load_task(write(FRAME, tmp_path / "d.csv"), **options)


def test_one_class_is_no_classification():
    with pytest.raises(ValueError, match=r"has the labels \['0'\]; a classification needs two or more"):
        task_from(Dataset.from_dict({"text": list("abcdef"), "label": [0] * 6}), name="x")


def test_a_list_is_no_text():
    with pytest.raises(ValueError, match=r"column 'text' holds List.*not one value a row"):
        task_from(Dataset.from_dict({"text": [["a"], ["b"]], "label": [0, 1]}), name="x")


def test_labels_unknown_in_train():
    data = DatasetDict(train=Dataset.from_dict({"text": list("abcdef"), "label": list("xyxyxy")}))
    data["test"] = Dataset.from_dict({"text": ["g"], "label": ["z"]})
    with pytest.raises(ValueError, match="the labels z occur outside train only; train has x, y"):
        task_from(data, name="x")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.csv", None, "no file or directory at"),
        ("d.xlsx", b"x", r"files that end in '.xlsx' are not read; .csv, .tsv, .jsonl, .json, .parquet are"),
        ("d.parquet", b"PAR1 no such thing", "d.parquet cannot be read as parquet"),
        ("d.jsonl", b'{"text": "a"\n{', "d.jsonl cannot be read as jsonl"),
        ("d.csv.gz", b"not gzip", "d.csv.gz cannot be read as csv"),
        ("empty.csv", b"", "empty.csv cannot be read as csv"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_task(tmp_path / name)


def test_directories_that_are_no_dataset(tmp_path):
    (tmp_path / "state.txt").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="was not written by save_to_disk"):
        load_task(tmp_path)
    with pytest.raises(ValueError, match="has no split 'train'; its splits are test"):
        task_from(DatasetDict(test=Dataset.from_dict({"text": ["a"], "label": [0]})), name="x")
