"""The shipped tasks: sizes, balance, disjoint splits, labeled subsets, checksums."""

import gzip
import json
import shutil
from collections import Counter

import pytest

from fakit.experiments.build import prepare
from fakit.experiments.config import ExperimentConfig
from fakit.tasks import data_dir, load_task
from fakit.tasks.embedded import checked_file
from fakit.tasks.splits import text_keys

SIZES = {
    "reviews": {"train": 500, "pool": 3500, "validation": 500, "test": 1570, "teacher_train": 4500},
    "glosses": {"train": 1400, "pool": 4200, "validation": 700, "test": 2100, "teacher_train": 5600},
    "scans": {"train": 16000, "pool": 8000, "validation": 500, "test": 1000, "teacher_train": 40000},
}


@pytest.fixture(scope="module", params=list(SIZES))
def task(request):
    return load_task(request.param)


def test_sizes_and_columns(task):
    assert {name: len(split) for name, split in task.splits.items()} == SIZES[task.name]
    columns = ["source", "target"] if task.name == "scans" else ["text", "label"]
    assert task.train.column_names == task.test.column_names == columns
    assert task.pool.column_names == columns[:1]


def test_the_held_out_texts_and_the_pool_are_new_to_the_teacher(task):
    if task.name == "scans":  # by the clean line: the noisy one of another seed would differ anyway
        with gzip.open(checked_file("scans.jsonl.gz"), "rt") as lines:
            rows = [json.loads(line) for line in lines]
        key = lambda row: "".join(c for c in row["text"].lower() if c.isalnum())  # noqa: E731
        texts = {name: [key(row) for row in rows if row["split"] == name] for name in SIZES["scans"]}
        verses = {name: {row["verse"] for row in rows if row["split"] == name} for name in SIZES["scans"]}
        assert sum(map(len, verses.values())) == len(set.union(*verses.values()))
    else:
        texts = {name: text_keys(task.splits[name]) for name in ("teacher_train", "pool", "validation", "test")}
    everything = [text for split in texts.values() for text in split]
    assert len(everything) == len(set(everything))


@pytest.mark.parametrize("name", ["reviews", "glosses"])
def test_labeled_subsets_are_stratified_seeded_nested_and_of_the_teachers_world(name):
    few, more, other = load_task(name, labels=210), load_task(name, labels=420), load_task(name, labels=210, seed=1)
    shares = Counter(load_task(name).teacher_train["label"])
    for label, count in Counter(few.train["label"]).items():
        assert abs(count - 210 * shares[label] / shares.total()) <= 1
    assert few.train["text"][:] == load_task(name, labels=210).train["text"][:]
    assert set(few.train["text"]) < set(more.train["text"]) < set(few.teacher_train["text"])
    assert len(set(few.train["text"]) & set(other.train["text"])) < 60
    assert few.test["text"][:] == other.test["text"][:]


def test_all_labels_and_a_subset_of_scans():
    assert len(load_task("glosses", labels="all").train) == 5600
    assert len(load_task("scans", labels=300).train) == 300


def test_reviews_as_a_regression_agree_with_the_classes():
    scores, classes = load_task("reviews", kind="regression"), load_task("reviews")
    assert (scores.metric, scores.num_labels, scores.label_names) == ("pearson", 1, None)
    assert [score > 0 for score in scores.test["label"]] == [bool(label) for label in classes.test["label"]]
    assert min(map(abs, scores.test["label"])) >= 0.5


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("reviews", {"labels": 4501}, "labels=4501 was asked of reviews; choose 2 .* to 4500"),
        ("glosses", {"labels": 13}, r"choose 14 \(one a class\) to 5600"),
        ("glosses", {"labels": 0.5}, "is no number of examples"),
        ("glosses", {"kind": "regression"}, "has no kind 'regression'; choose 'sequence-classification'"),
        ("glosses", {"text": "gloss"}, "takes no option text; it takes labels, seed, kind"),
        ("gloses", {}, "no task 'gloses': the names are reviews, glosses, scans, instructions, glue/cola"),
    ],
)
def test_wrong_names_and_options_are_answered_with_the_right_ones(name, options, message):
    with pytest.raises(ValueError, match=message):
        load_task(name, **options)


@pytest.fixture
def copied_data(tmp_path, monkeypatch):
    for name in ("manifest.json", "reviews.jsonl.gz"):
        shutil.copy(data_dir() / name, tmp_path / name)
    monkeypatch.setenv("FAKIT_DATA", str(tmp_path))
    return tmp_path


def test_a_truncated_or_changed_file_is_refused_with_both_sums_and_the_way_to_rebuild(copied_data):
    assert len(load_task("reviews").test) == 1570
    path = copied_data / "reviews.jsonl.gz"
    content = path.read_bytes()
    for damaged in (content[:-1000], content[:5000] + b"\0" + content[5001:]):
        path.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"expected 542,086 bytes with sha256 e56719.*found.*scripts/build_reviews.py"
        ):
            load_task("reviews")
    path.unlink()
    with pytest.raises(ValueError, match=r"reviews.jsonl.gz is missing.*build_reviews"):
        load_task("reviews")


def test_a_damaged_manifest_is_refused(copied_data):
    path = copied_data / "manifest.json"
    for damaged in (path.read_text()[:200], '{"files": 3}', ""):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"manifest.json is damaged .*git checkout"):
            load_task("reviews")


def test_a_directory_without_a_manifest_is_no_data_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKIT_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"no manifest.json.*FAKIT_DATA"):
        data_dir()


def test_every_file_in_data_is_in_the_manifest_with_origin_license_script_and_size():
    entries = json.loads((data_dir() / "manifest.json").read_text())["files"]
    for entry in entries:
        assert checked_file(entry["file"]).stat().st_size == entry["bytes"] < 5_000_000
        assert entry["source"] and entry["license"]
        assert (data_dir().parent / entry["script"].split()[0]).is_file()
    listed = {entry["file"] for entry in entries}
    assert {"reviews.jsonl.gz", "glosses.jsonl.gz", "scans.jsonl.gz"} <= listed
    shipped = {
        path.relative_to(data_dir()).as_posix()
        for folder in ("adapters", "teachers")
        for path in (data_dir() / folder).rglob("*.*")
    }
    assert shipped <= listed
    assert "Princeton University" in (data_dir() / "LICENSE.WordNet.txt").read_text()
    assert "Hutto" in (data_dir() / "LICENSE.VADER.txt").read_text()


def test_instructions_are_of_six_kinds_and_no_prompt_stands_in_two_splits():
    task = load_task("instructions", labels=600)
    assert (len(task.train), len(task.validation), len(task.test)) == (600, 180, 300) and task.pool is None
    assert (task.kind, task.metric, task.dropped) == ("causal-lm", "perplexity", {})
    splits = [set(split["text"]) for split in (task.teacher_train, task.validation, task.test)]
    assert sum(map(len, splits)) == len(set.union(*splits)) == 2040
    first = {text.split()[0] for text in task.test["text"]}
    assert first == {"What", "Does", "Correct", "Put", "How", "Which"}
    for row in task.test:
        prompt, answer = row["turns"][0]["content"], row["answer"]
        if prompt.startswith("Put"):
            words = prompt.removesuffix(".").split(": ")[1].split(", ")
            assert answer == ", ".join(sorted(words)) + "."
        if prompt.startswith("How many"):
            assert answer == f"It has {len(prompt.split(chr(10))[-1].split())} words."
    with pytest.raises(ValueError, match="teachers are embedded for reviews"):
        prepare(ExperimentConfig(task={"name": "instructions"}))
