"""Text in, batches out: the tasks of the kit, GLUE, the hub, and your own files, all as a `TextTask`.

from fakit.tasks import load_task, embedded_teacher

task = load_task("reviews", labels=500)            # embedded: "reviews", "glosses", "scans"
task = load_task("glue/sst2")                      # from the hub
task = load_task("hub:stanfordnlp/imdb", labels=1000, pool=10_000)
task = load_task("mine.csv", text="sentence", label="stars")
task = load_task("instructions")                   # embedded, for a chat model such as "smollm2"
task = load_task("chats.jsonl")                    # instruction data: {"messages": […]} and kin, by their columns

teacher, tokenizer = embedded_teacher("reviews", quantize="8bit")
batch = task.collator(tokenizer)([*task.encode("test", tokenizer)][:32])
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

from fakit.tasks.assemble import task_from
from fakit.tasks.embedded import (
    EMBEDDED,
    INSTRUCTIONS,
    MINILM,
    data_dir,
    embedded_teacher,
    load_embedded,
    load_instructions,
)
from fakit.tasks.files import load_hub, load_path
from fakit.tasks.glue import GLUE, load_glue
from fakit.tasks.task import TextTask

__all__ = ["MINILM", "TextTask", "data_dir", "embedded_teacher", "load_task", "task_from"]


def load_task(name_or_path: str | Path, *, labels: int | str | None = None, seed: int = 0, **options) -> TextTask:
    """A task by name or path.

    Args:
        name_or_path: "reviews", "glosses", "scans", "instructions"; "glue/NAME"; "hub:ID"; or a CSV, TSV, JSON lines or
            parquet file, or a directory that `datasets` saved.
        labels: labeled examples the student sees (stratified, seeded); "all"; or None for the default (500 and 1,400
            for `reviews` and `glosses`, all elsewhere).
        seed: of the labeled subset, and of the splits carved out of data that have none.
        options: keywords of the source: `load_embedded` (kind), `load_glue` (validation, pool, data), `load_hub` and
            `load_path` (those of `task_from`: text, text_pair, label, kind, validation, test, pool, …).

    Raises:
        ValueError: unknown name, option, column or split; each message lists what there is.
    """
    name = str(name_or_path)
    if name in EMBEDDED:
        loader: Callable[..., TextTask] = load_embedded
    elif name == INSTRUCTIONS:
        loader = load_instructions
    elif name.startswith("glue/"):
        loader, name = load_glue, name.removeprefix("glue/")
    elif name.startswith("hub:"):
        loader, name = load_hub, name.removeprefix("hub:")
    elif Path(name).suffix or Path(name).exists():
        loader = load_path
    else:
        raise ValueError(
            f"no task {name!r}: the names are {', '.join([*EMBEDDED, INSTRUCTIONS])}, "
            f"{', '.join(f'glue/{task}' for task in GLUE)}, "
            "hub:ID, or the path of a CSV, TSV, JSON lines or parquet file or of a datasets directory (nothing lies "
            "at this one)."
        )
    if unknown := sorted(options.keys() - (allowed := _options(loader))):
        raise ValueError(
            f"{name_or_path} takes no option {', '.join(unknown)}; it takes labels, seed, {', '.join(sorted(allowed))}."
        )
    return loader(name, labels=labels, seed=seed, **options)


def _options(loader: Callable[..., TextTask]) -> set[str]:
    """The keywords a loader understands; the generic ones pass theirs on to `task_from`."""
    own = inspect.signature(loader).parameters
    names = set(own)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values()):
        names |= inspect.signature(task_from).parameters.keys() - {"source"}
    return names - {"name", "path", "labels", "seed", "options", "data" if loader is not load_glue else ""}
