"""Packing: several rows in one sequence, each a document of its own.

A sequence holds whole rows, one after another. Its position_ids begin again with each, which is how transformers and
`fakit.tracing.inputs` see where a document begins: no token attends to another document, none is predicted from one,
and every term of the objective is what it is over rows of their own. A document's first label is taken away, since
nothing precedes it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100


def pack(rows: Dataset, max_length: int) -> Dataset:
    """Encoded rows in sequences of at most `max_length` tokens, with the column position_ids.

    Args:
        rows: input_ids, attention_mask and labels, one a token; none longer than max_length.
    """
    from datasets import Dataset

    columns = [rows[name] for name in ("input_ids", "labels")]
    packed: dict[str, list] = {"input_ids": [], "attention_mask": [], "position_ids": [], "labels": []}
    for sequence in sequences([len(ids) for ids in columns[0]], max_length):
        made: dict[str, list] = {name: [] for name in packed}
        for row in sequence:
            ids, labels = (list(column[row]) for column in columns)
            made["input_ids"] += ids
            made["attention_mask"] += [1] * len(ids)
            made["position_ids"] += range(len(ids))
            made["labels"] += [IGNORED, *labels[1:]]
        for name, values in made.items():
            packed[name].append(values)
    return Dataset.from_dict(packed)


def sequences(lengths: list[int], max_length: int) -> list[list[int]]:
    """Which rows share a sequence: each, the longest first, goes where it leaves the least room (best fit).

    >>> sequences([5, 3, 4, 2], max_length=7)
    [[0, 3], [1, 2]]
    """
    found: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free places, sequence) of those that have any, in order
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        fits = bisect_left(room, (lengths[row], 0))
        free, number = room.pop(fits) if fits < len(room) else (max_length, len(found))
        if number == len(found):
            found.append([])
        found[number].append(row)
        if free > lengths[row]:
            insort(room, (free - lengths[row], number))
    return sorted(sorted(sequence) for sequence in found)


def documents(rows: Dataset) -> int:
    """The number of rows before they were packed, if they were."""
    if "position_ids" not in rows.column_names:
        return len(rows)
    return sum(positions.count(0) for positions in rows["position_ids"])
