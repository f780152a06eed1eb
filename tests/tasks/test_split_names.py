"""Splits of other names: by rule where one alone can be meant, by key, and refused with the list."""

import logging

import pytest
from datasets import Dataset, DatasetDict

from fakit.tasks import load_task, task_from
from fakit.tasks.task import say


def splits(*names: str) -> DatasetDict:
    return DatasetDict(
        {
            name: Dataset.from_list([{"prompt": f"{name} {n}", "completion": "a"} for n in range(20 + place)])
            for place, name in enumerate(names)
        }
    )


def sizes(task) -> tuple[int, ...]:
    return tuple(map(len, (task.train, task.validation, task.test)))


def test_one_that_begins_with_train_is_train_and_others_that_end_as_it_does_are_theirs(caplog):
    say.cache_clear()
    with caplog.at_level(logging.WARNING):
        found = task_from(splits("test_sft", "train_sft", "dev_sft", "test_gen"), name="chats")
    assert sizes(found) == (21, 22, 20) and "train_sft 0" in found.train["text"]
    assert (
        "chats: its splits are test_sft, train_sft, dev_sft, test_gen; train is train_sft, validation is dev_sft, test "
        "is test_sft." in caplog.text
    )


def test_train_is_train_whatever_else_there_is():
    found = task_from(splits("train_sft", "train", "test_sft", "test"), name="chats")
    assert (len(found.test), found.test["text"][0]) == (23, "test 0")


def test_where_several_could_be_train_the_key_says_which(tmp_path):
    data = splits("train_sft", "test_sft", "train_gen", "test_gen")
    with pytest.raises(
        ValueError,
        match=r"has no split 'train'; its splits are train_sft, test_sft, train_gen, test_gen, and train_sft or "
        r"train_gen could be it. Say which is, .*splits={'train': 'train_sft', …}",
    ):
        task_from(data, name="chats")
    found = task_from(data, name="chats", splits={"train": "train_gen"})
    assert found.test["text"][0] == "test_gen 0"
    data.save_to_disk(tmp_path / "chats")
    found = load_task(tmp_path / "chats", splits={"train": "train_gen", "test": "train_sft", "validation": "test_sft"})
    assert sizes(found) == (22, 21, 20)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"train": "train_dpo"}, r"has no split 'train_dpo'; its splits are train_sft, test_sft"),
        ({"held_out": "test_sft"}, r"splits names held_out; it is a mapping from train, validation, test, pool"),
    ],
)
def test_names_that_are_not_there_are_refused(asked, said):
    with pytest.raises(ValueError, match=said):
        task_from(splits("train_sft", "test_sft"), name="chats", splits=asked)
    with pytest.raises(ValueError, match=r"has no splits to choose from, and splits={'train': 'x'}"):
        task_from(splits("a")["a"], name="chats", splits={"train": "x"})
