"""`TextTask`: labeled, unlabeled and held-out text of one task, and the way from it to batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch

from fakit.tasks.instructions import Seen, encode_turns, uses_chat
from fakit.tasks.packing import pack
from fakit.tasks.progress import laid_out, progress
from fakit.tasks.prose import SeenTexts, encode_prose
from fakit.tasks.scans import SEPARATOR
from fakit.tasks.special_tokens import added_tokens, with_end, without_begin

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

KINDS = ("sequence-classification", "regression", "causal-lm")
SPLITS = ("train", "pool", "validation", "test", "teacher_train")
PACKED = ("train", "pool")  # splits that are trained on; what is evaluated stays in rows of its own
CHUNK = 10_000  # rows tokenized at a time: bounds the memory that Python's lists take
IGNORED = -100  # PyTorch's label that no loss counts


@dataclass(frozen=True)
class TextTask:
    """A task with its splits; every task of the kit, GLUE, the hub and your own files come as one of these.

    Columns are "text" (, "text_pair") and "label"; for text to text "source" and "target"; for plain language modeling
    "text" alone; for instruction data "text", "turns" and "answer". The pool has no label, target or answer. No text
    (whatever its case, see `same_text`) occurs in two of teacher_train, pool, validation, test.

    Attributes:
        name: what `load_task` was asked for.
        kind: "sequence-classification", "regression" or "causal-lm".
        label_names: one name a class, by label number; None unless it is a classification.
        metrics: what is reported, the headline first ("accuracy", "f1", "matthews", "pearson", "spearman", "cer",
            "perplexity").
        train: the student's labeled examples.
        pool: unlabeled text that the teacher was not trained on, None where there is none.
        validation, test: held out.
        teacher_train: what the teacher was (or is to be) trained on.
        source, license: where the text is from and on what terms.
        more_tests: further test sets by name, such as MNLI's "test_mismatched"; `encode` knows them too.
        dropped: rows of the data that are in no split, by split and reason.
        template, tokens: of instruction data, how its rows are encoded (`fakit.tasks.instructions`).
        too_long: of a language model's rows, what becomes of those that are too long.
        packing: rows of train and pool share sequences (`fakit.tasks.packing`).
        cut: of the splits encoded so far by name, how many texts were cut to the length, and of how many.
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
    license: str
    more_tests: dict[str, Dataset]
    dropped: dict[str, int] = field(default_factory=dict)
    template: str = "auto"
    tokens: str = "completion"
    too_long: str = "cut"
    packing: bool = False
    cut: dict[str, tuple[int, int]] = field(default_factory=dict, compare=False, repr=False)

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

    def encode(
        self, data: str | Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int = 128, read: bool = False
    ) -> Dataset:
        """Tokenize a split (by name) or a dataset with this task's columns.

        A causal LM gets the special tokens that the tokenizer adds by itself (a BOS), and an end (eos) where a text
        ends, nowhere else. A text longer than `max_length` becomes several rows (`fakit.tasks.prose`). A source is cut
        where its target needs the room; a target that does not fit beside one token of its source is cut, too, and has
        no end. Rows of instruction data: see `fakit.tasks.instructions`. With `packing`, rows of train and pool are
        then put together into sequences of at most `max_length` tokens.

        Args:
            read: of a language model, also the columns "row", which of the rows each was made of, and "read", what of
                the text is read behind each token (`fakit.tasks.progress`).

        Returns:
            A dataset with input_ids, attention_mask (, token_type_ids; of packed rows position_ids) and labels. Labels
            are the class, the score, or for a causal LM one per token: -100 on what is given (BOS, context, the source
            and its separator), the token itself on the text or the target and on the closing eos. Unlabeled rows: -100.
            The log says what was cut.

        Raises:
            ValueError: unknown or empty split, missing columns,
                or a tokenizer without an eos token where one must close the target.
        """
        from datasets import Dataset, concatenate_datasets

        dataset = self._split(data)
        if len(dataset) == 0:
            raise ValueError(f"{self.name}: there is no row to encode in {data!r}.")
        columns = ("source",) if self._text_to_text else ("text",)
        if missing := [column for column in columns if column not in dataset.column_names]:
            raise ValueError(
                f"{self.name}: the data to encode have columns {dataset.column_names}, but {missing} must be among "
                "them."
            )
        if self.kind == "causal-lm" and tokenizer.eos_token_id is None:
            raise ValueError(
                f"{self.name}: the target ends with an eos token and {type(tokenizer).__name__} has none; set "
                "tokenizer.eos_token."
            )
        what = f"{self.name}, {data}" if isinstance(data, str) else self.name
        texts_cut = 0
        if "turns" in dataset.column_names:
            encoded, texts_cut = self._encode_instructions(what, dataset, tokenizer, max_length, read)
        elif self.kind == "causal-lm" and not self._text_to_text:
            learned = not (isinstance(data, str) and data == "pool")  # else every text would be its own label
            encoded = self._encode_prose(what, dataset, tokenizer, max_length, read, learned)
        else:
            cut, encode = Cut(), partial(self._encode_pairs, read=read) if self._text_to_text else self._encode_texts
            encoded = concatenate_datasets(
                [Dataset.from_dict(encode(rows, tokenizer, max_length, cut)) for rows in _chunks(dataset)]
            )
            if read:
                encoded = encoded.add_column("row", list(range(len(encoded))))
            cut.say(what, len(dataset), max_length)
            texts_cut = cut.rows
        if isinstance(data, str):
            self.cut[data] = texts_cut, len(dataset)
        trained_on = isinstance(data, str) and data in PACKED
        return self._packed(what, encoded, max_length) if self.packing and trained_on else encoded

    def _packed(self, what: str, rows: Dataset, max_length: int) -> Dataset:
        packed = pack(rows, max_length)
        tokens = sum(map(len, packed["input_ids"]))
        labels = sum(label != IGNORED for row in packed["labels"] for label in row)
        say(
            f"{what}: {len(rows):,} rows of {tokens:,} tokens, {labels:,} of them with labels, are packed into "
            f"{len(packed):,} sequences of at most {max_length} tokens, {tokens / len(packed) / max_length:.0%} full; "
            "no token attends to another row, or is predicted from one."
        )
        return packed

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

    def _encode_instructions(
        self, what: str, dataset: Dataset, tokenizer, max_length: int, read: bool
    ) -> tuple[Dataset, int]:
        from datasets import Dataset, concatenate_datasets

        seen, encoded = Seen(), []
        for chunk in _chunks(dataset):
            try:
                rows = encode_turns(
                    chunk,
                    tokenizer,
                    max_length,
                    self.template,
                    self.tokens,
                    self.too_long,
                    seen,
                    read,
                )
            except ValueError as error:
                raise ValueError(f"{what}: {error}") from error
            encoded += [Dataset.from_dict(rows)] if rows["labels"] else []
        if not encoded:
            raise ValueError(
                f"{what}: no answer of its {len(dataset):,} rows fits into max_length={max_length} beside one token of "
                "its prompt; give a larger one."
            )
        how = "by the tokenizer's chat template" if uses_chat(self.template, tokenizer) else "without a chat template"
        say(seen.said(what, max_length, how, self.tokens))
        return concatenate_datasets(encoded), seen.cut

    def _encode_prose(
        self, what: str, dataset: Dataset, tokenizer, max_length: int, read: bool, learned: bool
    ) -> Dataset:
        from datasets import Dataset, concatenate_datasets

        seen, encoded = SeenTexts(), []
        for chunk in _chunks(dataset):
            try:
                rows = encode_prose(chunk, tokenizer, max_length, self.too_long, seen, read)
            except ValueError as error:
                raise ValueError(f"{what}: {error}") from error
            if not learned:
                rows["labels"] = [[IGNORED] * len(labels) for labels in rows["labels"]]
            encoded.append(Dataset.from_dict(rows))
        say(seen.said(what, max_length))
        return concatenate_datasets(encoded)

    @property
    def _text_to_text(self) -> bool:
        return "source" in self.train.column_names

    def _split(self, data: str | Dataset) -> Dataset:
        if not isinstance(data, str):
            return data
        if data not in self.splits:
            raise ValueError(f"{self.name} has no split {data!r}; it has {', '.join(self.splits)}.")
        return self.splits[data]

    def _encode_texts(self, rows: dict[str, list], tokenizer, max_length: int, cut: Cut) -> dict[str, list]:
        added = tokenizer.num_special_tokens_to_add(pair="text_pair" in rows)
        if max_length <= added:
            raise ValueError(
                f"{self.name}: max_length={max_length} was requested, and {added} special tokens take all of it; a row "
                f"takes {added + 1} or more."
            )
        batch = tokenizer(rows["text"], rows.get("text_pair"), truncation=True, max_length=max_length)
        for row in batch.encodings or ():  # none from a tokenizer that is not fast
            if row.overflowing:
                # of a pair the parts that were cut overlap: how many tokens that makes is not told
                cut.rows, cut.tokens = cut.rows + 1, cut.tokens + (0 if "text_pair" in rows else _overflow(row))
        encoded = dict(batch)
        missing = float(IGNORED) if self.kind == "regression" else IGNORED
        encoded["labels"] = rows.get("label", [missing] * len(rows["text"]))
        return encoded

    def _encode_pairs(
        self, rows: dict[str, list], tokenizer, max_length: int, cut: Cut, read: bool = False
    ) -> dict[str, list]:
        begin, end = added_tokens(tokenizer)
        end = end or [tokenizer.eos_token_id]
        separator = tokenizer(SEPARATOR, add_special_tokens=False).input_ids
        if not separator:
            raise ValueError(
                f"{self.name}: a line break stands between source and target, and {type(tokenizer).__name__} makes no "
                "token of it; source and target would run together. Use a tokenizer that keeps line breaks."
            )
        sources = tokenizer(rows["source"], add_special_tokens=False, verbose=False).input_ids
        targets, keys = [[]] * len(sources), [[]] * len(sources)  # of an unlabeled row: the prompt alone
        if "target" in rows:
            found = tokenizer(rows["target"], add_special_tokens=False, verbose=False, return_offsets_mapping=read)
            targets = [with_end(target, end) for target in found.input_ids]
            if read:
                both = zip(found.offset_mapping, rows["target"], strict=True)
                keys = [progress(offsets, 0, len(text)) for offsets, text in both]
        encoded: dict[str, list] = {"input_ids": [], "attention_mask": [], "labels": []}
        if read:
            encoded["read"] = []
        room = max_length - len(begin) - len(separator)  # for source and target
        if room < 2:
            raise ValueError(
                f"{self.name}: max_length={max_length} was requested; a row takes {max_length - room + 2} or more."
            )
        for source, target, known in zip(sources, targets, keys, strict=True):
            source = without_begin(source, begin)
            kept = min(len(source), room - len(target))
            if kept < min(1, len(source)):  # no room for the whole target: a source keeps up to half of it
                kept = min(len(source), room // 2)
                cut.targets += 1
            if (lost := len(source) + len(target) - kept - len(target[: room - kept])) > 0:
                cut.rows, cut.tokens = cut.rows + 1, cut.tokens + lost
            given = begin + source[:kept] + separator
            _append(encoded, given, target[: room - kept])
            if read:
                encoded["read"].append(laid_out(known, len(given), len(encoded["input_ids"][-1])))
        return encoded


def _chunks(dataset: Dataset) -> Iterator[dict[str, list]]:
    # not Dataset.map: it would hash the task with all its splits first
    return (dataset[start : start + CHUNK] for start in range(0, len(dataset), CHUNK))


@dataclass
class Cut:
    """Rows of which something was cut, how many of them lost the end of their target, and how many tokens went."""

    rows: int = 0
    targets: int = 0
    tokens: int = 0

    def say(self, what: str, rows: int, max_length: int) -> None:
        """A line of the log, where anything was cut."""
        if self.rows:
            targets = f", {self.targets:,} of them in the target, which then has no end" if self.targets else ""
            tokens = f"; {self.tokens:,} tokens are left out" if self.tokens else ""
            say(f"{what}: {self.rows:,} of {rows:,} texts are cut to max_length={max_length}{targets}{tokens}.")


@cache
def say(message: str) -> None:
    """Log a line, once: a study loads and encodes the same task for each of its runs."""
    logger.warning(message)


def _overflow(row) -> int:
    """Tokens of an encoded text that truncation left out; special tokens are not counted."""
    return sum(len(part.ids) - sum(part.special_tokens_mask) for part in row.overflowing)


def _append(encoded: dict[str, list], given: list[int], labeled: list[int]) -> None:
    encoded["input_ids"].append(given + labeled)
    encoded["attention_mask"].append([1] * len(given + labeled))
    encoded["labels"].append([IGNORED] * len(given) + labeled)


def counted(dropped: Mapping[str, int]) -> str:
    """`TextTask.dropped` in words: "24 rows (train: repeats a text 24)"."""
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in dropped.items())
    return f"{sum(dropped.values()):,} rows ({reasons})"


@dataclass(frozen=True)
class Collator:
    """Pad and stack encoded examples: input_ids, attention_mask (, token_type_ids) (B, T); labels (B,), or (B, T)
    for a causal LM.
    """

    pad_token_id: int
    padding_side: str
    per_token: bool

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(example["input_ids"]) for example in examples)
        fill = {"input_ids": self.pad_token_id, "labels": IGNORED}
        batch = {}
        for name in examples[0]:
            values = [example[name] for example in examples]
            if name == "labels" and self.per_token and self.padding_side == "left":
                # nothing precedes a row's first token; behind padding, a shift of the labels would have padding predict
                # it
                values = [[IGNORED, *row[1:]] for row in values]
            if name != "labels" or self.per_token:
                values = [self._pad(list(row), longest, fill.get(name, 0)) for row in values]
            batch[name] = torch.tensor(values)
        return batch

    def _pad(self, row: list[int], length: int, value: int) -> list[int]:
        padding = [value] * (length - len(row))
        return padding + row if self.padding_side == "left" else row + padding
