"""Your own data as a task: CSV, TSV, JSON, parquet, a directory written by `save_to_disk`, or a data set of the hub."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from fakit.tasks.assemble import task_from
from fakit.tasks.reading import SUFFIXES, format_of, read_file
from fakit.tasks.task import TextTask

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

COLUMNS = {"text": "text", "text_pair": None, "label": "label", "source_text": "source", "target_text": "target"}
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def load_path(path: str | Path, *, labels: int | str | None = None, seed: int = 0, **options) -> TextTask:
    """A task from a file, or from a directory that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote.

    Cells of CSV and TSV are text: "00014" stays, "NA" is a word, and an empty cell alone is missing. Labels that are
    numbers, some with fractions, make a regression; "2.0" among whole numbers is the class 2, as pandas writes whole
    numbers of a column with gaps.

    Args:
        path: .csv, .tsv, .jsonl, .json (one object a line, or one array of objects), each also with .gz, .parquet, or
            such a directory. UTF-8, or UTF-16 and UTF-32 with a byte-order mark.
        labels, seed, options: see `task_from`.

    Raises:
        ValueError: nothing there, a format that is not read, a file that cannot be parsed (with the line),
            and what `task_from` raises.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"no file or directory at {path} (looked from {Path.cwd()}).")
    asked = {keyword: options.get(keyword, column) for keyword, column in COLUMNS.items()}
    rows = read(path, {"messages", "conversations", *filter(None, asked.values())})
    if not path.is_dir() and format_of(path) in (".csv", ".tsv") and asked["label"] in rows.column_names:
        rows, kind = _told_labels(rows, asked["label"])
        options["kind"] = options.get("kind") or kind
    return task_from(rows, name=path.name, labels=labels, seed=seed, source=str(path), **options)


def _told_labels(rows: Dataset, column: str) -> tuple[Dataset, str | None]:
    """Labels of a table of text: the rows with whole numbers written as such,
    and "regression" where there are fractions.
    """
    found = {value for value in rows[column] if value is not None and value.strip()}
    if not found or not all(NUMBER.fullmatch(value.strip()) for value in found):
        return rows, None
    if not all(float(value).is_integer() for value in found):
        return rows, "regression"
    whole = {value: value.strip().split(".")[0] for value in found if re.fullmatch(r"-?\d+\.0*", value.strip())}
    values = [whole.get(value, value) for value in rows[column]]
    return (rows.remove_columns(column).add_column(column, values) if whole else rows), None


def load_hub(
    name: str, *, config: str | None = None, labels: int | str | None = None, seed: int = 0, **options
) -> TextTask:
    """A task from a data set of the Hugging Face hub; `config` names its configuration where it has several.
    Remote code never runs.

    Raises:
        ValueError: what `fetch` and `task_from` raise.
    """
    source = f"https://huggingface.co/datasets/{name}"
    return task_from(fetch(name, config), name=f"hub:{name}", labels=labels, seed=seed, source=source, **options)


def fetch(name: str, config: str | None = None) -> DatasetDict:
    """All splits of a data set of the hub.

    Raises:
        ValueError: the hub cannot be reached, or has no such data set or configuration.
    """
    from datasets import load_dataset

    try:
        return load_dataset(name, config, trust_remote_code=False)
    except ConnectionError as error:
        raise ValueError(
            f"the hub cannot be reached for {name!r}: {error}. Without a network use an embedded task (reviews, "
            "glosses, scans) or a file of your own; with one, look at HF_HUB_OFFLINE and the proxy."
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"the hub has no readable data set {name!r} with configuration {config!r}: {error}") from error


def read(path: Path, wanted: Collection[str] = ()) -> Dataset | DatasetDict:
    """The rows of a file, or the splits of a directory, as `datasets` objects; `wanted` columns have to be readable."""
    if not path.is_dir():
        return read_file(path, wanted)
    import datasets

    if not {"dataset_dict.json", "state.json"} & {entry.name for entry in path.iterdir()}:
        raise ValueError(
            f"{path} was not written by save_to_disk of datasets (it has no dataset_dict.json and no state.json); "
            f"give such a directory, or one file ({', '.join(SUFFIXES)})."
        )
    try:
        return datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} was written by save_to_disk of datasets, but it is damaged or not whole ({type(error).__name__}: "
            f"{error}); write it again."
        ) from error
