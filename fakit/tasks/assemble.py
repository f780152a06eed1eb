"""`task_from`: any loaded data as a `TextTask`, with held-out splits that share no text with what is trained on."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fakit import renamed
from fakit.tasks.conversations import as_turns, shape_of
from fakit.tasks.instructions import check_options
from fakit.tasks.split_names import choose_splits
from fakit.tasks.splits import ANSWERS, TEXT_COLUMNS, carve, distinct, labeled_subset, same_text
from fakit.tasks.task import KINDS, TextTask, counted, say

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

METRICS = {"sequence-classification": ("accuracy", "f1"), "regression": ("pearson", "spearman")}
MOST_CARVED = 2000  # rows of a held-out split that nobody sized: an accuracy of .85 then has a standard error of .008


@renamed(licence="license")
def task_from(
    data: Dataset | DatasetDict,
    *,
    name: str,
    labels: int | str | None = None,
    seed: int = 0,
    kind: str | None = None,
    text: str = "text",
    text_pair: str | None = None,
    label: str = "label",
    source_text: str = "source",
    target_text: str = "target",
    validation: int | float | None = None,
    test: int | float | None = None,
    pool: int | float = 0,
    template: str = "auto",
    tokens: str = "completion",
    too_long: str | None = None,
    packing: bool = False,
    metrics: tuple[str, ...] | None = None,
    splits: Mapping[str, str] | None = None,
    more_tests: Sequence[str] = (),
    source: str = "",
    license: str = "its owner's terms",
) -> TextTask:
    """A task from loaded data, whatever they came from.

    Splits that the data have (train, validation, test, unsupervised) are used. Validation and test that they lack, or
    that have no labels, are carved out of train, and so is the pool. A text in two splits stays in the first of test,
    validation, train, pool; train has each text once. Rows of train without a label join the pool. `teacher_train` is
    what remains of train; the student's `train` is its labeled part. Rows that are in no split are counted by reason in
    `TextTask.dropped`, and the log says so.

    Args:
        data: one dataset, or splits by name.
        labels: labeled examples for the student (stratified, seeded); None or "all": every one.
        kind: "sequence-classification", "regression" or "causal-lm"; by default told by the columns: labels with
            fractions are a regression, other labels a classification, source and target without a label text to text.
        text, text_pair, label: columns of a classification or regression.
        source_text, target_text: columns of text to text (causal LM); a causal LM without them learns the text column
            itself. Data with none of these columns may be instruction data (`fakit.tasks.instructions`): messages,
            conversations, prompt and completion, or instruction (, input) and output; or text alone.
        template: of instruction data, what stands around a prompt: "auto" (the tokenizer's chat template, if it has
            one), "none", or a text that holds {prompt}.
        tokens: of instruction data, the tokens that have labels: those of the "completion" (all answers), or "all".
        too_long: what becomes of rows longer than max_length: of instruction data "cut" takes from their prompt (the
            default), of plain texts "pieces" makes several rows (the default); "refuse" raises.
        packing: of a language model, put rows of train and pool together into sequences of full length, each row a
            document of its own (`fakit.tasks.packing`).
        validation, test, pool: rows to carve out of train, a number or a share; by default a tenth, at most 2,000, and
            no pool.
        metrics: what is reported, the headline first; by default the kind's.
        splits: the data's own names of train, validation, test and pool, where they are others: {"train": "train_sft"};
            by default those of `fakit.tasks.split_names`.
        more_tests: names of further splits to hold out.

    Raises:
        ValueError: columns, splits or kinds that are not there (says which are), sizes that leave nothing to train on,
            fewer than two classes, scores that are not numbers.
    """
    found = choose_splits(data, splits or {}, more_tests, name)
    check_options(template, tokens)
    shape = _shape(found["train"], kind, text, label, {source_text, target_text})
    if shape == "text":
        kind = "causal-lm"
    elif shape is not None:
        kind, text = "causal-lm", "text"
        found = {split: as_turns(rows, shape, f"{name}: {split}") for split, rows in found.items()}
    if shape in (None, "text") and (template, tokens) != ("auto", "completion"):
        raise ValueError(
            f"{name}: template and tokens are for instruction data (messages, conversations, prompt and completion, or "
            f"instruction and output); its columns are {', '.join(found['train'].column_names)}."
        )
    kind = kind or _told_kind(found["train"], label, {source_text, target_text})
    if kind not in KINDS:
        raise ValueError(f"{name}: kind={kind!r} is not known; choose one of {', '.join(map(repr, KINDS))}.")
    if packing not in (True, False):
        raise ValueError(f"{name}: packing={packing!r} is not known; choose True or False.")
    if packing and kind != "causal-lm":
        raise ValueError(
            f"{name}: packing was requested, and the task is a {kind}, whose texts have one answer each; packing is "
            "for language models (kind='causal-lm')."
        )
    if kind != "causal-lm":
        columns = {"text": text, "text_pair": text_pair, "label": label}
    elif {source_text, target_text} <= set(found["train"].column_names):
        columns = {"source": source_text, "target": target_text}
    else:
        columns = {"text": text}
    if "turns" in found["train"].column_names and shape not in (None, "text"):
        columns |= {"turns": "turns", "answer": "answer"}
    columns = {ours: theirs for ours, theirs in columns.items() if theirs is not None}
    too_long = _checked_too_long(too_long, kind, columns, name)
    _check_columns(found, columns, name)
    names = _label_names(found["train"], label, name) if kind == "sequence-classification" else None
    dropped: Counter[str] = Counter()
    tidy = {
        split: _with_text(_tidy(rows, columns, kind, names, name, split == "pool"), split, dropped)
        for split, rows in found.items()
    }

    unlabeled = [_unanswered(tidy["train"]), *([tidy["pool"]] if "pool" in tidy else [])]
    held_out = {split: _answered(tidy[split]) for split in ("test", *more_tests, "validation") if split in tidy}
    for split, rows in held_out.items():
        if lost := len(tidy[split]) - len(rows):
            dropped[f"{split}: no {_answer(tidy[split])}"] = lost
    held_out = {split: rows for split, rows in held_out.items() if len(rows)}  # a test set with hidden labels is none
    if "validation" in held_out:
        held_out["validation"] = distinct(
            held_out["validation"],
            *(rows for split, rows in held_out.items() if split != "validation"),
            split="validation",
            dropped=dropped,
        )
    train = distinct(_answered(tidy["train"]), *held_out.values(), split="train", dropped=dropped)
    asked = {"test": test, "validation": validation, "pool": pool}
    sizes = {split: _size(size, len(train), split, name) for split, size in asked.items() if split not in held_out}
    train, carved = carve(train, sizes, seed, kind == "sequence-classification", name)
    carved_pool = _unanswered(carved.pop("pool"), strip=True)
    held_out |= carved
    pool_rows = _joined([carved_pool, *unlabeled], [*held_out.values(), train], dropped)
    if dropped:
        say(f"{name}: left out are {counted(dropped)}.")
    return TextTask(
        name=name,
        kind=kind,
        label_names=names,
        metrics=metrics or METRICS.get(kind) or (("cer",) if "target" in columns else ("perplexity",)),
        train=labeled_subset(train, labels, seed, kind == "sequence-classification", name),
        pool=pool_rows,
        validation=held_out["validation"],
        test=held_out["test"],
        teacher_train=train,
        source=source,
        license=license,
        more_tests={f"test_{split.removeprefix('validation_')}": held_out[split] for split in more_tests},
        dropped=dict(dropped),
        template=template,
        tokens=tokens,
        too_long=too_long,
        packing=packing,
    )


def _checked_too_long(asked: str | None, kind: str, columns: Mapping[str, str], name: str) -> str:
    """What becomes of rows that are too long: as asked, or what is usual for such columns."""
    if kind != "causal-lm" or "source" in columns:
        if asked is not None:
            raise ValueError(
                f"{name}: too_long is for instruction data and for plain texts of a language model; rows of "
                f"{' and '.join(columns)} are cut, and the log says how many."
            )
        return "cut"
    what, known = (
        ("instruction data", ("cut", "refuse")) if "turns" in columns else ("plain texts", ("pieces", "refuse"))
    )
    if asked is not None and asked not in known:
        raise ValueError(f"{name}: too_long={asked!r} is not known of {what}; choose {' or '.join(map(repr, known))}.")
    return asked or known[0]


def _shape(train: Dataset, kind: str | None, text: str, label: str, pair: set[str]) -> str | None:
    """The shape of instruction data that `train` is in; "text" where that is its only column;
    None where it is of another kind, or its columns were named.
    """
    columns = set(train.column_names)
    if kind not in (None, "causal-lm") or label in columns or pair <= columns or (kind and text in columns):
        return None
    return shape_of(columns) or ("text" if columns == {text} else None)


def _told_kind(train: Dataset, label: str, pair: set[str]) -> str:
    if label in train.column_names:
        # a whole-number column with gaps is read as floats too, so the values decide
        scores = "float" in str(train.features[label]) and not all(
            _missing(v) or float(v).is_integer() for v in train[label]
        )
        return "regression" if scores else "sequence-classification"
    return "causal-lm" if pair <= set(train.column_names) else "sequence-classification"


def _with_text(rows: Dataset, split: str, dropped: Counter[str]) -> Dataset:
    """The rows that have a text; one of a pair's two will do."""
    texts = zip(*(rows[column] for column in TEXT_COLUMNS if column in rows.column_names), strict=True)
    keep = [row for row, parts in enumerate(texts) if any(part.strip() for part in parts)]
    if lost := len(rows) - len(keep):
        dropped[f"{split}: no text"] = lost
    return rows.select(keep) if lost else rows


def _check_columns(found: dict[str, Dataset], columns: dict[str, str], name: str) -> None:
    from datasets import ClassLabel, Value

    for split, rows in found.items():
        for ours, theirs in columns.items():
            if ours == "turns" or (split == "pool" and ours in ANSWERS):
                continue
            keyword = {"source": "source_text", "target": "target_text"}.get(ours, ours)
            if theirs not in rows.column_names:
                raise ValueError(
                    f"{name}: {split} has no column {theirs!r}; its columns are {', '.join(rows.column_names)}. Say "
                    f"which with {keyword}=…."
                )
            if not isinstance(rows.features[theirs], ClassLabel | Value):
                raise ValueError(
                    f"{name}: column {theirs!r} holds {rows.features[theirs]}, not one value a row; choose another "
                    f"with {keyword}=…."
                )


def _label_names(train: Dataset, label: str, name: str) -> list[str]:
    """One name a class: the data set's own (ClassLabel), else the values in order."""
    from datasets import ClassLabel

    if isinstance(train.features[label], ClassLabel):
        return list(train.features[label].names)
    names = sorted({_word(value) for value in train[label] if not _missing(value)}, key=_order)
    folded: dict[str, str] = {}
    for word in names:
        if (other := folded.setdefault(same_text(word), word)) != word:
            say(f"{name}: the labels {other!r} and {word!r} are two classes; they differ by case alone.")
    if len(names) < 2:
        raise ValueError(
            f"{name}: column {label!r} has the labels {names}; a classification needs two or more. Say which column "
            "with label=…."
        )
    return names


def _tidy(rows: Dataset, columns: dict[str, str], kind: str, names: list[str] | None, name: str, pool: bool) -> Dataset:
    """Our columns only: text as str, labels as class number or score; a missing label or target is None.
    A pool has neither.
    """
    from datasets import Dataset

    tidy = {}
    for ours, theirs in columns.items():
        values = list(rows[theirs]) if theirs in rows.column_names else []
        if ours == "label" and not pool:
            tidy[ours] = (
                _scores(values, theirs, name) if kind == "regression" else _classes(rows, theirs, names or [], name)
            )
        elif ours == "turns":
            tidy[ours] = values
        elif ours in ("target", "answer") and not pool:
            tidy[ours] = [None if _missing(value) else _string(value, f"{name}: column {theirs!r}") for value in values]
        elif ours not in ANSWERS:
            tidy[ours] = ["" if _missing(value) else _string(value, f"{name}: column {theirs!r}") for value in values]
    return Dataset.from_dict(tidy)


def _classes(rows: Dataset, column: str, names: list[str], name: str) -> list[int | None]:
    from datasets import ClassLabel

    if isinstance(rows.features[column], ClassLabel):  # the hub marks hidden labels by -1
        return [None if value is None or value < 0 else value for value in rows[column]]
    words = [None if _missing(value) else _word(value) for value in rows[column]]
    number = {word: i for i, word in enumerate(names)}
    if unknown := {word for word in words if word is not None and word not in number}:
        raise ValueError(
            f"{name}: the labels {', '.join(sorted(unknown))} occur outside train only; train has {', '.join(number)}."
        )
    return [None if word is None else number[word] for word in words]


def _scores(values: list, column: str, name: str) -> list[float | None]:
    try:
        scores = [None if _missing(value) else float(value) for value in values]
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{name}: column {column!r} holds a value that is no number ({error}); a regression needs scores."
        ) from error
    if endless := [value for value in scores if value is not None and not math.isfinite(value)]:
        raise ValueError(f"{name}: column {column!r} holds {endless[0]}; a regression needs finite scores.")
    return scores


def _missing(value) -> bool:
    return (
        value is None
        or (isinstance(value, str | bytes) and not value.strip())
        or (isinstance(value, float) and math.isnan(value))
    )


def _string(value, where: str = "a label") -> str:
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} holds {value[:40]!r}, bytes that are not UTF-8 ({error.reason}); store the column as text."
        ) from error


def _word(value) -> str:
    """The name of a label: without blanks around it, and 2.0 as 2."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else _string(value).strip()


def _order(word: str) -> tuple[bool, int, str]:
    """Class names in order: whole numbers by size, then the others by letters."""
    whole = re.fullmatch(r"-?\d+", word) is not None
    return (not whole, int(word) if whole else 0, word)


def _answer(rows: Dataset) -> str | None:
    return next((column for column in ANSWERS if column in rows.column_names), None)


def _answered(rows: Dataset) -> Dataset:
    """The rows that have a label or target; all of them where the task knows neither."""
    if (answer := _answer(rows)) is None:
        return rows
    return rows.select([i for i, value in enumerate(rows[answer]) if value is not None])


def _unanswered(rows: Dataset, strip: bool = False) -> Dataset:
    """The rows without label or target, that column removed; with `strip` every row counts as one."""
    if (answer := _answer(rows)) is None:
        return rows if strip else rows.select([])
    keep = rows if strip else rows.select([i for i, value in enumerate(rows[answer]) if value is None])
    return keep.remove_columns(answer)


def _joined(parts: list[Dataset], held_out: list[Dataset], dropped: Counter[str]) -> Dataset | None:
    from datasets import concatenate_datasets

    parts = [part for part in parts if len(part)]
    rows = distinct(concatenate_datasets(parts), *held_out, split="pool", dropped=dropped) if parts else []
    return rows or None


def _size(asked: int | float | None, rows: int, split: str, name: str) -> int:
    """A number of rows to carve, given as one, as a share, or as None: a tenth."""
    if asked is None:
        return max(1, min(MOST_CARVED, rows // 10))
    size = int(asked * rows) if isinstance(asked, float) and 0 < asked < 1 else asked
    least = 0 if split == "pool" else 1
    if isinstance(size, bool) or not isinstance(size, int) or size < least:
        raise ValueError(
            f"{name}: {split}={asked!r} is neither a number of rows (from {least}) nor a share (below 1) of the {rows} "
            "in train."
        )
    return size
