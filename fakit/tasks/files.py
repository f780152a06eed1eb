"""Your own data as a task: CSV, TSV, JSON lines, parquet, a directory written by `save_to_disk`, or a data set of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fakit.tasks.assemble import task_from
from fakit.tasks.task import TextTask

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


def load_path(path: str | Path, *, labels: int | str | None = None, seed: int = 0, **options) -> TextTask:
    """A task from a file, or from a directory that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote.

    Args:
        path: .csv, .tsv, .jsonl (or .json, one object a line), each also with .gz, .parquet, or such a directory.
        labels, seed, options: see `task_from`.

    Raises:
        ValueError: nothing there, a format that is not read, a file that cannot be parsed, and what `task_from` raises.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"no file or directory at {path} (looked from {Path.cwd()}).")
    return task_from(read(path), name=path.name, labels=labels, seed=seed, source=str(path), **options)


def load_hub(
    name: str, *, config: str | None = None, labels: int | str | None = None, seed: int = 0, **options
) -> TextTask:
    """A task from a data set of the Hugging Face hub; `config` names its configuration where it has several. Remote code never runs.

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
        return load_dataset(name, config)
    except ConnectionError as error:
        raise ValueError(
            f"the hub cannot be reached for {name!r}: {error}. Without a network use an embedded task (reviews, glosses, scans) or "
            "a file of your own; with one, look at HF_HUB_OFFLINE and the proxy."
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"the hub has no readable data set {name!r} with configuration {config!r}: {error}") from error


def read(path: Path) -> Dataset | DatasetDict:
    """The rows of a file, or the splits of a directory, as `datasets` objects."""
    import datasets
    import pandas

    if path.is_dir():
        if not {"dataset_dict.json", "state.json"} & {entry.name for entry in path.iterdir()}:
            raise ValueError(
                f"{path} was not written by save_to_disk of datasets (it has no dataset_dict.json and no state.json); "
                f"give such a directory, or one file ({', '.join(SUFFIXES)})."
            )
        return datasets.load_from_disk(str(path))
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if suffix not in SUFFIXES:
        raise ValueError(f"{path.name}: files that end in {path.suffix!r} are not read; {', '.join(SUFFIXES)} are.")
    try:
        if suffix == ".parquet":
            frame = pandas.read_parquet(path)
        elif suffix in (".json", ".jsonl"):
            frame = pandas.read_json(path, lines=True, dtype=False)
        else:  # only an empty cell is missing: "NA", "null" and "None" are words
            frame = pandas.read_csv(path, sep="\t" if suffix == ".tsv" else ",", keep_default_na=False, na_values=[""])
    except (ValueError, OSError, EOFError) as error:  # parser errors of pandas and pyarrow are ValueErrors
        raise ValueError(f"{path} cannot be read as {suffix[1:]}: {error}") from error
    return datasets.Dataset.from_pandas(frame, preserve_index=False)
