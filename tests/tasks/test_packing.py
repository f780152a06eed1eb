"""Packing: whole rows share sequences, each begins again, nothing is lost, and held-out rows stay by themselves."""

import logging

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from fakit.tasks import task_from
from fakit.tasks.packing import documents, sequences
from fakit.tasks.task import say
from tests.tasks.test_instructions import LLAMA3, letters, messages


def chats(**options):
    rows = [
        {"messages": messages(("user", f"{n} " + "q" * (n % 4)), ("assistant", "a" * (1 + n % 5)))} for n in range(40)
    ]
    asked = [{"messages": messages(("user", f"and {n}?"))} for n in range(6)]
    return task_from(Dataset.from_list(rows + asked), name="chats", **options)


def texts(rows: Dataset) -> list[tuple]:
    """Tokens and labels of each document, as they stand in packed rows."""
    found = []
    for row in rows:
        assert row["attention_mask"] == [1] * len(row["input_ids"]) and row["position_ids"][0] == 0
        starts = [place for place, position in enumerate(row["position_ids"]) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            assert row["position_ids"][start:end] == list(range(end - start))
            found.append((tuple(row["input_ids"][start:end]), tuple(row["labels"][start:end])))
    return sorted(found)


@pytest.mark.parametrize("tokens", ["completion", "all"])
def test_packed_rows_are_the_rows_one_after_another(tokens):
    tokenizer = letters(LLAMA3)
    for split in ("train", "pool"):
        packed = chats(packing=True, tokens=tokens).encode(split, tokenizer, 150)
        alone = chats(tokens=tokens).encode(split, tokenizer, 150)
        assert len(packed) < len(alone) / 2 and documents(packed) == documents(alone) == len(alone)
        assert max(map(len, packed["input_ids"])) <= 150
        wanted = [(tuple(row["input_ids"]), (-100, *row["labels"][1:])) for row in alone]
        assert texts(packed) == sorted(wanted)


def test_what_is_evaluated_is_not_packed():
    tokenizer = letters(LLAMA3)
    for split in ("validation", "test", "teacher_train"):
        found, wanted = (chats(packing=packing).encode(split, tokenizer, 150) for packing in (True, False))
        assert found.column_names == wanted.column_names and found.to_list() == wanted.to_list()


def test_long_texts_are_packed_by_their_pieces():
    rows = Dataset.from_dict({"text": [f"{n} {'word ' * (n % 9)}" for n in range(40)]})
    tokenizer = letters(LLAMA3)
    packed, alone = (
        task_from(rows, name="x", packing=packing).encode("train", tokenizer, 30) for packing in (True, False)
    )
    assert texts(packed) == sorted((tuple(row["input_ids"]), (-100, *row["labels"][1:])) for row in alone)
    assert max(map(len, packed["input_ids"])) <= 30 and len(packed) < len(alone)


def test_the_log_says_how_full_they_are(caplog):
    say.cache_clear()
    with caplog.at_level(logging.WARNING):
        packed = chats(packing=True).encode("train", letters(LLAMA3), 150)
    tokens = sum(map(len, packed["input_ids"]))
    labels = sum(label != -100 for row in packed["labels"] for label in row)
    full = tokens / len(packed) / 150
    assert labels == 128 and full > 0.8
    said = (
        f"chats, train: 32 rows of {tokens} tokens, 128 of them with labels, are packed into {len(packed)} sequences of at "
        f"most 150 tokens, {full:.0%} full; no token attends to another row, or is predicted from one."
    )
    assert said in caplog.text and "chats, train: 32 rows read, 32 kept; 863 tokens of prompts and 128" in caplog.text


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_every_row_is_in_one_sequence_and_two_that_fit_together_are(lengths):
    found = sequences(lengths, 20)
    assert sorted(row for sequence in found for row in sequence) == list(range(len(lengths)))
    sizes = sorted(sum(lengths[row] for row in sequence) for sequence in found)
    assert sizes[-1] <= 20
    assert len(sizes) < 2 or sizes[0] + sizes[1] > 20


def test_what_is_no_language_model_is_refused():
    rows = Dataset.from_dict({"text": [f"t{n}" for n in range(20)], "label": [0, 1] * 10})
    with pytest.raises(ValueError, match="x: packing was requested, and the task is a sequence-classification"):
        task_from(rows, name="x", packing=True)
    with pytest.raises(ValueError, match="packing='yes' is not known; choose True or False"):
        chats(packing="yes")
