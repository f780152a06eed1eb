"""Which of a data set's splits are train, validation, test and pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fakit.tasks.task import say

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

# Names under which data sets of the hub keep these splits, the usual first.
SPLIT_NAMES = {
    "train": ("train",),
    "validation": ("validation", "valid", "dev"),
    "test": ("test",),
    "pool": ("unsupervised", "unlabeled", "unlabelled", "pool"),
}


def choose_splits(
    data: Dataset | DatasetDict, asked: Mapping[str, str], more_tests: Sequence[str], name: str
) -> dict[str, Dataset]:
    """The splits by our names, and `more_tests` by their own.

    What is asked by name is taken; else a split has one of the usual names (`SPLIT_NAMES`). Where no "train" is there
    and a single split begins so ("train_sft"), that is train, and the others end as it does ("test_sft"). The log says
    which were taken by such names.

    Args:
        data: one data set, which is train, or splits by name.
        asked: {ours: theirs}.

    Raises:
        ValueError: a split that is not there, or none or several that could be train; lists what there is.
    """
    if not isinstance(data, dict):
        if asked:
            raise ValueError(f"{name} has no splits to choose from, and splits={dict(asked)!r} names some.")
        return {"train": data}
    if unknown := [ours for ours in asked if ours not in SPLIT_NAMES]:
        raise ValueError(f"{name}: splits names {', '.join(unknown)}; it is a mapping from {', '.join(SPLIT_NAMES)}.")
    if missing := [split for split in (*asked.values(), *more_tests) if split not in data]:
        raise ValueError(f"{name} has no split {', '.join(map(repr, missing))}; its splits are {', '.join(data)}.")
    train = asked.get("train") or _train(data, name)
    ending = train.removeprefix("train")
    chosen = {"train": train}
    for split, candidates in SPLIT_NAMES.items():
        names = candidates if train == "train" else (*(f"{usual}{ending}" for usual in candidates), *candidates)
        if found := next((theirs for theirs in (asked.get(split), *names) if theirs in data), None):
            chosen.setdefault(split, found)
    if train != "train" and not asked:
        say(f"{name}: its splits are {', '.join(data)}; {', '.join(f'{o} is {t}' for o, t in chosen.items())}.")
    return {ours: data[theirs] for ours, theirs in chosen.items()} | {split: data[split] for split in more_tests}


def _train(data: Mapping[str, Dataset], name: str) -> str:
    candidates = ["train"] if "train" in data else [split for split in data if split.startswith("train")]
    if len(candidates) == 1:
        return candidates[0]
    example = candidates[0] if candidates else next(iter(data))
    raise ValueError(
        f"{name} has no split 'train'; its splits are {', '.join(data)}"
        + (f", and {' or '.join(candidates)} could be it" if candidates else "")
        + f". Say which is, and which are validation, test and pool: splits={{'train': {example!r}, …}}."
    )
