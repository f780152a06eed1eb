"""Dealing rows into splits: stratified, seeded, and without a text that occurs in two of them."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

TEXT_COLUMNS = ("text", "text_pair", "source")


def normalised(text: str) -> str:
    """Letters and digits in lower case: texts that agree in this count as one text."""
    return "".join(character for character in text.lower() if character.isalnum())


def text_keys(dataset: Dataset) -> list[str]:
    """The normalised text of every row (both texts of a pair)."""
    columns = [column for column in TEXT_COLUMNS if column in dataset.column_names]
    return ["\n".join(map(normalised, texts)) for texts in zip(*(dataset[column] for column in columns), strict=True)]


def spread_order(dataset: Dataset, seed: int, classes: bool) -> list[int]:
    """Row numbers in a random order every prefix of which keeps the classes' shares (to within one row a class).

    So a smaller labelled subset is part of a larger one with the same seed. Without classes: a plain shuffle.
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


def labelled_subset(train: Dataset, labels: int | str | None, seed: int, classes: bool, name: str) -> Dataset:
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
    """Take splits of the given sizes out of `train`: (what is left, the splits). Disjoint by text if `train` is `distinct`.

    Raises:
        ValueError: nothing would be left to train on.
    """
    if sum(sizes.values()) >= len(train):
        wanted = ", ".join(f"{split}={size}" for split, size in sizes.items())
        raise ValueError(
            f"{name}: {wanted} would be carved out of {len(train)} training examples, and none would be left; ask for less."
        )
    order = spread_order(train, seed, classes)
    taken, start = {}, 0
    for split, size in sizes.items():
        taken[split] = train.select(order[start : start + size])
        start += size
    return train.select(order[start:]), taken


def distinct(dataset: Dataset, *held_out: Dataset) -> Dataset:
    """`dataset` with the first row of each text only, and none whose text occurs in a held-out set."""
    known = {key for other in held_out for key in text_keys(other)}
    keep = []
    for row, key in enumerate(text_keys(dataset)):
        if key not in known:
            known.add(key)
            keep.append(row)
    return dataset if len(keep) == len(dataset) else dataset.select(keep)
