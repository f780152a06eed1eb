"""`TextTask`: labelled, unlabelled and held-out text of one task, and the way from it to batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fakit.tasks.scans import SEPARATOR

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

KINDS = ("sequence-classification", "regression", "causal-lm")
SPLITS = ("train", "pool", "validation", "test", "teacher_train")
CHUNK = 10_000  # rows tokenised at a time: bounds the memory that Python's lists take
IGNORED = -100  # PyTorch's label that no loss counts


@dataclass(frozen=True)
class TextTask:
    """A task with its splits; every task of the kit, GLUE, the hub and your own files come as one of these.

    Columns are "text" (, "text_pair") and "label"; for text to text "source" and "target"; for plain language modelling "text" alone. The
    pool has no label or target. No text (whatever its case, see `same_text`) occurs in two of teacher_train, pool, validation, test.

    Attributes:
        name: what `load_task` was asked for.
        kind: "sequence-classification", "regression" or "causal-lm".
        label_names: one name a class, by label number; None unless it is a classification.
        metrics: what is reported, the headline first ("accuracy", "f1", "matthews", "pearson", "spearman", "cer", "perplexity").
        train: the student's labelled examples.
        pool: unlabelled text that the teacher was not trained on, None where there is none.
        validation, test: held out.
        teacher_train: what the teacher was (or is to be) trained on.
        source, licence: where the text is from and on what terms.
        more_tests: further test sets by name, such as MNLI's "test_mismatched"; `encode` knows them too.
        dropped: rows of the data that are in no split, by split and reason.
    """

    name: str
    kind: str
    label_names: list[str] | None
    metrics: tuple[str, ...]
    train: Dataset
    pool: Dataset | None
    validation: Dataset
    test: Dataset
    teacher_train: Dataset
    source: str
    licence: str
    more_tests: dict[str, Dataset]
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def metric(self) -> str:
        """The headline metric."""
        return self.metrics[0]

    @property
    def model_task(self) -> str:
        """The `task` argument of `fakit.load_teacher`."""
        return "causal-lm" if self.kind == "causal-lm" else "sequence-classification"

    @property
    def num_labels(self) -> int | None:
        """Outputs of the classification head: the classes, 1 for a regression, None for a language model."""
        return {"regression": 1, "causal-lm": None}.get(self.kind, len(self.label_names or ()))

    @property
    def splits(self) -> dict[str, Dataset]:
        """The splits that exist, by name."""
        named = {name: getattr(self, name) for name in SPLITS} | self.more_tests
        return {name: split for name, split in named.items() if split is not None}

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {len(split):,}" for name, split in self.splits.items())
        classes = f", {len(self.label_names)} classes" if self.label_names else ""
        left_out = f"; left out: {counted(self.dropped)}" if self.dropped else ""
        return f"TextTask({self.name!r}: {self.kind}{classes}, {' and '.join(self.metrics)}; {sizes}{left_out})"

    def encode(self, data: str | Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int = 128) -> Dataset:
        """Tokenise a split (by name) or a dataset with this task's columns.

        Returns:
            A dataset with input_ids, attention_mask (, token_type_ids) and labels. Labels are the class, the score, or for a causal LM one
            per token: -100 on the source and its separator, the token itself on the target and the closing eos. Unlabelled rows: -100.

        Raises:
            ValueError: unknown or empty split, missing columns, or a tokenizer without an eos token where one must close the target.
        """
        from datasets import Dataset, concatenate_datasets

        dataset = self._split(data)
        if len(dataset) == 0:
            raise ValueError(f"{self.name}: there is no row to encode in {data!r}.")
        columns = ("source",) if self._text_to_text else ("text",)
        if missing := [column for column in columns if column not in dataset.column_names]:
            raise ValueError(
                f"{self.name}: the data to encode have columns {dataset.column_names}, but {missing} must be among them."
            )
        if self.kind == "causal-lm" and tokenizer.eos_token_id is None:
            raise ValueError(
                f"{self.name}: the target ends with an eos token and {type(tokenizer).__name__} has none; set tokenizer.eos_token."
            )
        encode = (
            self._encode_pairs
            if self._text_to_text
            else self._encode_prose
            if self.kind == "causal-lm"
            else self._encode_texts
        )
        # not Dataset.map: it would hash this task with all its splits first
        chunks = [dataset[start : start + CHUNK] for start in range(0, len(dataset), CHUNK)]
        return concatenate_datasets([Dataset.from_dict(encode(rows, tokenizer, max_length)) for rows in chunks])

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]:
        """A function that pads encoded examples to their longest and stacks them, labels padded with -100.

        Raises:
            ValueError: the tokenizer has no padding token.
        """
        if tokenizer.pad_token_id is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no padding token, so batches cannot be padded; "
                "set tokenizer.pad_token = tokenizer.eos_token (labels and masks exclude padding either way)."
            )
        return Collator(tokenizer.pad_token_id, tokenizer.padding_side, per_token=self.kind == "causal-lm")

    @property
    def _text_to_text(self) -> bool:
        return "source" in self.train.column_names

    def _split(self, data: str | Dataset) -> Dataset:
        if not isinstance(data, str):
            return data
        if data not in self.splits:
            raise ValueError(f"{self.name} has no split {data!r}; it has {', '.join(self.splits)}.")
        return self.splits[data]

    def _encode_texts(self, rows: dict[str, list], tokenizer, max_length: int) -> dict[str, list]:
        encoded = dict(tokenizer(rows["text"], rows.get("text_pair"), truncation=True, max_length=max_length))
        missing = float(IGNORED) if self.kind == "regression" else IGNORED
        encoded["labels"] = rows.get("label", [missing] * len(rows["text"]))
        return encoded

    def _encode_prose(self, rows: dict[str, list], tokenizer, max_length: int) -> dict[str, list]:
        texts = tokenizer(rows["text"], truncation=True, max_length=max_length - 1, add_special_tokens=False).input_ids
        texts = [[*ids, tokenizer.eos_token_id] for ids in texts]
        return {"input_ids": texts, "attention_mask": [[1] * len(ids) for ids in texts], "labels": texts}

    def _encode_pairs(self, rows: dict[str, list], tokenizer, max_length: int) -> dict[str, list]:
        separator = tokenizer(SEPARATOR, add_special_tokens=False).input_ids
        sources = tokenizer(rows["source"], add_special_tokens=False).input_ids
        if "target" in rows:
            targets = tokenizer(rows["target"], add_special_tokens=False).input_ids
            targets = [[*ids[: max_length // 2 - 1], tokenizer.eos_token_id] for ids in targets]
        else:
            targets = [[] for _ in sources]
        encoded: dict[str, list] = {"input_ids": [], "attention_mask": [], "labels": []}
        for source, target in zip(sources, targets, strict=True):
            prompt = source[: max_length - len(separator) - len(target)] + separator
            encoded["input_ids"].append(prompt + target)
            encoded["attention_mask"].append([1] * len(prompt + target))
            encoded["labels"].append([IGNORED] * len(prompt) + target)
        return encoded


def counted(dropped: Mapping[str, int]) -> str:
    """`TextTask.dropped` in words: "24 rows (train: repeats a text 24)"."""
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in dropped.items())
    return f"{sum(dropped.values()):,} rows ({reasons})"


@dataclass(frozen=True)
class Collator:
    """Pad and stack encoded examples: input_ids, attention_mask (, token_type_ids) (B, T); labels (B,), or (B, T) for a causal LM."""

    pad_token_id: int
    padding_side: str
    per_token: bool

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(example["input_ids"]) for example in examples)
        fill = {"input_ids": self.pad_token_id, "labels": IGNORED}
        batch = {}
        for name in examples[0]:
            values = [example[name] for example in examples]
            if name != "labels" or self.per_token:
                values = [self._pad(list(row), longest, fill.get(name, 0)) for row in values]
            batch[name] = torch.tensor(values)
        return batch

    def _pad(self, row: list[int], length: int, value: int) -> list[int]:
        padding = [value] * (length - len(row))
        return padding + row if self.padding_side == "left" else row + padding
