"""Dealing rows into splits: stratified, seeded, and without a text that occurs in two of them."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from typing import TYPE_CHECKING
from unicodedata import normalize

if TYPE_CHECKING:
    from datasets import Dataset

TEXT_COLUMNS = ("text", "text_pair", "source")
ANSWERS = ("label", "target", "answer")  # the column that a row without an answer leaves empty
FOLDED = re.compile("[^²³¹\u2070-\u209f]+")  # all but raised and lowered digits and signs


def same_text(text: str) -> str:
    """What two texts have in common that count as one text: all but the form of a character (Unicode's NFKC)
    and its case.

    Signs, punctuation, vowel marks, emoji and line breaks tell texts apart, and so do raised and lowered digits, which
    NFKC would make digits: x² is not x2.
    """
    return FOLDED.sub(lambda part: normalize("NFKC", normalize("NFKC", part[0]).casefold()), text)


def text_keys(dataset: Dataset) -> list[tuple[str, ...]]:
    """`same_text` of every row (of both texts of a pair)."""
    columns = [column for column in TEXT_COLUMNS if column in dataset.column_names]
    return [tuple(map(same_text, texts)) for texts in zip(*(dataset[column] for column in columns), strict=True)]


def spread_order(dataset: Dataset, seed: int, classes: bool) -> list[int]:
    """Row numbers in a random order every prefix of which keeps the classes' shares (to within one row a class).

    So a smaller labeled subset is part of a larger one with the same seed. Without classes: a plain shuffle.
    """
    rng = random.Random(seed)
    members: dict[object, list[int]] = defaultdict(list)
    for row, label in enumerate(dataset["label"] if classes else [None] * len(dataset)):
        members[label].append(row)
    placed = []
    for label in sorted(members, key=str):
        rng.shuffle(members[label])
        placed += [((i + 0.5) / len(members[label]), str(label), row) for i, row in enumerate(members[label])]
    return [row for _, _, row in sorted(placed)]


def labeled_subset(train: Dataset, labels: int | str | None, seed: int, classes: bool, name: str) -> Dataset:
    """`labels` rows of `train`, stratified and seeded; None or "all": every row.

    Raises:
        ValueError: more than there are, fewer than one a class, or not a number.
    """
    if labels is None or labels == "all":
        return train
    if not isinstance(labels, int) or isinstance(labels, bool):
        raise ValueError(
            f"labels={labels!r} is no number of examples; give an integer, 'all', or None for the task's default."
        )
    least = len(set(train["label"])) if classes else 1
    if not least <= labels <= len(train):
        raise ValueError(
            f"labels={labels} was asked of {name}; choose {least} (one a class) to {len(train)} (all it has)."
        )
    return train.select(spread_order(train, seed, classes)[:labels])


def carve(
    train: Dataset, sizes: dict[str, int], seed: int, classes: bool, name: str
) -> tuple[Dataset, dict[str, Dataset]]:
    """Take splits of the given sizes out of `train`: (what is left, the splits).
    Disjoint by text if `train` is `distinct`.

    Raises:
        ValueError: nothing would be left to train on.
    """
    if sum(sizes.values()) >= len(train):
        wanted = ", ".join(f"{split}={size}" for split, size in sizes.items())
        raise ValueError(
            f"{name}: {wanted} would be carved out of {len(train)} training examples, and none would be left; ask for "
            "less."
        )
    order = spread_order(train, seed, classes)
    taken, start = {}, 0
    for split, size in sizes.items():
        taken[split] = train.select(order[start : start + size])
        start += size
    return train.select(order[start:]), taken


def distinct(dataset: Dataset, *held_out: Dataset, split: str, dropped: Counter[str]) -> Dataset:
    """`dataset` with the first row of each text only, and none whose text occurs in a held-out set.

    Args:
        split: the name of `dataset`, for `dropped`, which counts the rows that go and why.
    """
    known = {key for other in held_out for key in text_keys(other)}
    answer = next((column for column in ANSWERS if column in dataset.column_names), None)
    first: dict[tuple[str, ...], object] = {}
    keep = []
    for row, (key, value) in enumerate(
        zip(text_keys(dataset), dataset[answer] if answer else [None] * len(dataset), strict=True)
    ):
        if key in known:
            dropped[f"{split}: the text is held out"] += 1
        elif key not in first:
            first[key] = value
            keep.append(row)
        elif first[key] == value:
            dropped[f"{split}: repeats a text"] += 1
        else:
            dropped[f"{split}: repeats a text with another {answer}"] += 1
    return dataset if len(keep) == len(dataset) else dataset.select(keep)
