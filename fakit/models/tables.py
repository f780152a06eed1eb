"""What rows of tokens a model can read: the sizes of its tables of tokens, positions and types,
and whether data stay within them.

Beyond a table a CPU says "index out of range in self", and an accelerator stops for good.
So the data are looked through before work.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from fakit.losses.task import REGRESSION, SEVERAL_LABELS
from fakit.models.blocks import is_encoder_decoder, without_adapter
from fakit.models.head_kinds import problem_type

_LABELS = ("labels", "label", "label_ids")
_COLUMNS = ("input_ids", "token_type_ids", "position_ids", "decoder_input_ids", *_LABELS)
# In a batch: what a teacher with a tokenizer of its own is given (`fakit.tasks.two_tokenizers`).
TEACHER_BATCH = "teacher_batch"
_ROWS = 10_000  # looked through at a time


@dataclass(frozen=True)
class Stack:
    """One stack's tables: how many rows each has; None for a table that it does not have,
    or that has no end (rotary and relative positions).
    """

    tokens: int | None = None
    positions: int | None = None
    types: int | None = None


@dataclass(frozen=True)
class Tables:
    """A model's tables. `decoder` is that of an encoder-decoder; `classes` are those its labels may name,
    None where labels are no classes.
    """

    name: str
    encoder: Stack
    decoder: Stack | None
    classes: int | None
    problem_type: str | None


def tables(model: nn.Module) -> Tables:
    """The tables of a transformers model, read off its modules."""
    model = without_adapter(model)
    both = is_encoder_decoder(model)
    encoder = _stack(model, model.get_encoder() if both else model)
    decoder = _stack(model, model.get_decoder()) if both else None
    head = model.get_output_embeddings()
    if head is not None:
        classes, problem = getattr(head, "out_features", None), None
    else:
        classes, problem = getattr(model, "num_labels", None), problem_type(model.config)
    return Tables(type(model).__name__, encoder, decoder, classes, problem)


def _stack(model: nn.Module, root: nn.Module) -> Stack:
    """Positions and types stand beside the tokens' table, in one module."""
    try:
        embeddings = root.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return Stack()
    if getattr(embeddings, "num_embeddings", None) is None:  # images, sounds
        return Stack()
    positions = types = None
    for parent in root.modules():
        children = dict(parent.named_children())
        if not any(getattr(child, "weight", None) is embeddings.weight for child in children.values()):
            continue
        for name, child in children.items():
            if not isinstance(child, nn.Embedding) or child.weight is embeddings.weight:
                continue
            if (
                re.search("pos|wpe", name)
                and getattr(model.config, "position_embedding_type", "absolute") == "absolute"
            ):
                # BART begins at 2, RoBERTa after the number of its padding token
                begins = getattr(child, "offset", 0) if child.padding_idx is None else child.padding_idx + 1
                positions = child.num_embeddings - begins
            elif "type" in name:
                types = child.num_embeddings
    return Stack(embeddings.num_embeddings, positions, types)


@dataclass
class Extent:
    """What a data set or a batch holds, by column: the lowest and highest number (of labels those that count), the most
    tokens of a row, whether numbers are floats, lists.
    """

    lowest: dict[str, float] = field(default_factory=dict)
    highest: dict[str, float] = field(default_factory=dict)
    shortest: dict[str, int] = field(default_factory=dict)
    longest: dict[str, int] = field(default_factory=dict)
    floats: set[str] = field(default_factory=set)

    def add(self, column: str, low: float, high: float, shortest: int, longest: int, floats: bool) -> None:
        """Take a part of the rows into account; `longest` is 0 where a row holds one number."""
        self.lowest[column] = min(low, self.lowest.get(column, low))
        self.highest[column] = max(high, self.highest.get(column, high))
        self.shortest[column] = min(shortest, self.shortest.get(column, shortest))
        self.longest[column] = max(longest, self.longest.get(column, longest))
        if floats:
            self.floats.add(column)


def extent_of_batch(batch: Mapping) -> Extent:
    """Of what a collator made; tensors (B, …)."""
    extent = Extent()
    for column in _COLUMNS:
        values = batch.get(column)
        if isinstance(values, torch.Tensor) and values.numel() and values.dtype != torch.bool:
            tokens = values.shape[-1] if values.dim() > 1 else 0
            counted = values[values != -100] if column in _LABELS else values
            low, high = (x.item() for x in torch.aminmax(counted)) if counted.numel() else (0, 0)
            extent.add(column, low, high, tokens, tokens, values.is_floating_point())
    return extent


def extent_of_data(dataset) -> Extent | None:
    """Of all rows of a `datasets.Dataset` or a list; None for what computes its rows as they are asked for,
    which the batches tell.
    """
    import datasets

    if isinstance(dataset, datasets.Dataset):
        if dataset.format["type"] == "custom":
            return None
        columns = [column for column in _COLUMNS if column in dataset.column_names]
        return _extent(_arrow_parts(dataset, columns))
    if isinstance(dataset, list | tuple) and all(isinstance(row, Mapping) for row in dataset):
        return _extent(_list_parts(dataset))
    return None


def _extent(parts: Iterator[tuple[str, np.ndarray, np.ndarray | None]]) -> Extent:
    extent = Extent()
    for column, numbers, lengths in parts:
        if numbers.size and numbers.dtype.kind in "iuf":
            shortest, longest = (0, 0) if lengths is None else (int(lengths.min()), int(lengths.max()))
            counted = numbers[numbers != -100] if column in _LABELS else numbers
            low, high = (counted.min().item(), counted.max().item()) if counted.size else (0, 0)
            extent.add(column, low, high, shortest, longest, numbers.dtype.kind == "f")
    return extent


def _arrow_parts(dataset, columns: list[str]) -> Iterator[tuple[str, np.ndarray, np.ndarray | None]]:
    """(column, all its numbers, tokens of each row) of some rows after another, from Arrow's own buffers."""
    import pyarrow.compute as pc
    from pyarrow import types

    if not columns:
        return
    for table in dataset.select_columns(columns).with_format("arrow").iter(_ROWS):
        for column in columns:
            values, lengths = table[column].combine_chunks(), None
            while (
                types.is_list(values.type) or types.is_large_list(values.type) or types.is_fixed_size_list(values.type)
            ):
                lengths = pc.list_value_length(values).to_numpy(zero_copy_only=False)
                values = values.flatten()
            if types.is_integer(values.type) or types.is_floating(values.type):
                yield column, values.drop_null().to_numpy(zero_copy_only=False), lengths


def _list_parts(rows) -> Iterator[tuple[str, np.ndarray, np.ndarray | None]]:
    for start in range(0, len(rows), _ROWS):
        for column in _COLUMNS:
            given = [row[column] for row in rows[start : start + _ROWS] if row.get(column) is not None]
            values = [np.asarray(value.cpu() if isinstance(value, torch.Tensor) else value) for value in given]
            if values and all(value.dtype.kind in "iufb" for value in values):
                lengths = np.array([value.shape[-1] for value in values]) if values[0].ndim else None
                yield column, np.concatenate([value.reshape(-1) for value in values]), lengths


def check_extent(
    extent: Extent, sides: Mapping[str, Tables], what: str, task: bool = True, padding: int | None = None
) -> None:
    """Raise ValueError unless all sides can read the rows, and the student's labels are labels.

    Args:
        sides: {"teacher": …, "student": …}, those that will run.
        what: the data's name, for the message.
        task: the labels are learned; otherwise they only say which tokens count.
        padding: the token that shorter rows are filled up with.
    """
    highest = dict(extent.highest)
    if padding is not None and "input_ids" in highest and extent.shortest["input_ids"] < extent.longest["input_ids"]:
        highest["input_ids"] = max(highest["input_ids"], padding)
    labels = next((column for column in _LABELS if column in highest), None)
    from_labels = labels if labels is not None and extent.longest[labels] and labels not in extent.floats else None

    def check(column: str, number: float, noun: str, size: Callable[[Tables], int | None], fix: str):
        sizes = {side: size(t) for side, t in sides.items()}
        short = [side for side, n in sizes.items() if n is not None and number >= n]
        if short or extent.lowest[column] < 0:
            found = number if short else extent.lowest[column]
            have = ", ".join(f"the {side} ({sides[side].name}) has {n}" for side, n in sizes.items() if n is not None)
            beyond = f"beyond the {' and the '.join(short)}" if short else "below 0"
            raise ValueError(
                f"{what} holds {noun} {found:g} in {column}, which is {beyond}; {have}, counted from 0. {fix}"
            )

    tokens_fix = (
        "Use the tokenizer that the models were made with, or give the side that is short the rows it lacks "
        "(model.resize_token_embeddings(len(tokenizer)))."
    )
    if "input_ids" in highest:
        check("input_ids", highest["input_ids"], "token", lambda t: t.encoder.tokens, tokens_fix)
    decoder = "decoder_input_ids" if "decoder_input_ids" in highest else from_labels
    if decoder is not None and any(t.decoder for t in sides.values()):
        size = lambda t: t.decoder and t.decoder.tokens  # noqa: E731
        check(decoder, highest[decoder], "token", size, tokens_fix)
        _check_length(extent, decoder, sides, lambda t: t.decoder and t.decoder.positions, what)
    if "token_type_ids" in highest:
        fix = "Leave the column out, or take models that know as many types."
        check("token_type_ids", highest["token_type_ids"], "type", lambda t: t.encoder.types, fix)
    if "position_ids" in highest:
        fix = "Cut the rows into shorter ones."
        check("position_ids", highest["position_ids"], "position", lambda t: t.encoder.positions, fix)
    elif "input_ids" in highest:
        _check_length(extent, "input_ids", sides, lambda t: t.encoder.positions, what)
    if task and labels is not None and "student" in sides:
        _check_labels(extent, labels, sides["student"], what)


def _check_length(extent: Extent, column: str, sides, size: Callable[[Tables], int | None], what: str) -> None:
    longest = extent.longest[column]
    sizes = {side: n for side, t in sides.items() if (n := size(t)) is not None}
    if sizes and longest > min(sizes.values()):
        have = ", ".join(f"the {side} ({sides[side].name}) has {n}" for side, n in sizes.items())
        raise ValueError(
            f"{what} has rows of up to {longest} tokens in {column}, and positions end before: {have}. Truncate the "
            f"rows to {min(sizes.values())} tokens (max_length={min(sizes.values())}), or cut them into pieces."
        )


def _check_labels(extent: Extent, column: str, student: Tables, what: str) -> None:
    low, high, floats = extent.lowest[column], extent.highest[column], column in extent.floats
    if student.classes is None or student.problem_type == REGRESSION:
        return
    several = student.problem_type == SEVERAL_LABELS or (
        floats and extent.longest[column] and student.problem_type is None
    )
    if several:
        if high > 1 or low < 0:
            raise ValueError(
                f"{what} holds {low if low < 0 else high:g} in {column}, and {student.name} has {student.classes} "
                "independent labels of 0 to 1 a text."
            )
        if extent.longest[column] != student.classes or extent.shortest[column] != student.classes:
            raise ValueError(
                f"{what} has {extent.shortest[column]} to {extent.longest[column]} labels a row in {column}, and "
                f"{student.name} has {student.classes}: one number for each class, in a list; one class a row is "
                "problem_type='single_label_classification'."
            )
    elif floats:
        raise ValueError(
            f"{what} holds floats ({low:g} to {high:g}) in {column}, and {student.name} has {student.classes} classes, "
            "which are integers. Cast the column to integers; a regression has one output (num_labels=1), several "
            "labels a text are lists of floats."
        )
    elif high >= student.classes or low < 0:
        raise ValueError(
            f"{what} holds {high if high >= student.classes else low:g} in {column}, and {student.name} knows labels "
            f"from 0 to {student.classes - 1}, and -100 for 'no label'. Look at the labels, at the collator's padding, "
            "and at num_labels."
        )


@dataclass(frozen=True)
class CheckedCollator:
    """A collator whose batches are looked at before a model reads them; in a worker, so that no accelerator waits."""

    collator: Callable
    sides: Mapping[str, Tables]
    task: bool

    def __call__(self, features):
        """What the collator makes of the rows, or ValueError."""
        batch = self.collator(features)
        if isinstance(batch, Mapping):
            own, sides = batch.get(TEACHER_BATCH), dict(self.sides)
            if own is not None and "teacher" in sides:
                check_extent(extent_of_batch(own), {"teacher": sides.pop("teacher")}, "a teacher's batch", False)
            check_extent(extent_of_batch(batch), sides, "a batch", self.task)
        return batch


def check_data(dataset, collator: Callable, sides: Mapping[str, Tables], what: str, task: bool) -> None:
    """`check_extent` of all rows, where they are at hand and the collator is known to leave them as they are but for
    padding.
    """
    collator = getattr(collator, "collator", collator)  # of rows of a cache
    made_by = collator if hasattr(collator, "__module__") else type(collator)
    if dataset is None or str(made_by.__module__).split(".")[0] not in ("transformers", "fakit"):
        return
    extent = extent_of_data(dataset)
    if extent is not None:
        padding = getattr(getattr(collator, "tokenizer", None), "pad_token_id", None)
        check_extent(extent, sides, what, task, padding)
