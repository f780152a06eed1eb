"""What a training session writes down: the curve, the changes, the looks at the student,
and news for whoever watches.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fakit.files import write_whole
from fakit.objective.schedules import Schedule
from fakit.training.probes import Sample

FILE = "session.json"


class News(NamedTuple):
    """What happened: `kind` is "curve", "similarity", "samples", "log" or "state"; `step` = steps done by then."""

    kind: str
    step: int
    value: Any


class Setting(NamedTuple):
    """A weight or a temperature: its number of this step, and what it was set to."""

    number: float
    written: float | Schedule

    def __str__(self) -> str:
        scheduled = isinstance(self.written, Schedule)
        return f"{self.number:g} ({self.written})" if scheduled else f"{self.number:g}"


class Record:
    """One thread writes, any thread reads. The records are complete; the news are a bounded queue beside them.

    A reader who is slow, or who is not there, loses the oldest news and never holds up the writer.

    Args:
        capacity: news kept.

    Attributes: see `fakit.training.session.session.TrainSession`.
    """

    def __init__(self, capacity: int = 256) -> None:
        if capacity < 1:
            raise ValueError(f"capacity = {capacity}: room for at least one piece of news is needed")
        self.curve: list[dict[str, float]] = []
        self.events: list[dict[str, Any]] = []
        self.similarity: dict[int, np.ndarray] = {}
        self.samples: dict[int, list[Sample]] = {}
        self.log: list[tuple[int, str]] = []
        self._news: deque[News] = deque(maxlen=capacity)  # full: the oldest makes way; append and popleft are atomic

    def tell(self, kind: str, step: int, value: Any) -> None:
        """Put up a piece of news; never waits."""
        self._news.append(News(kind, step, value))

    def poll(self) -> list[News]:
        """Take the news since the last call; never waits."""
        news = []
        while self._news:
            news.append(self._news.popleft())
        return news

    def point(self, step: int, logs: Mapping[str, float], weights: Mapping[str, float]) -> None:
        """A log of the trainer, made with `weights`: a point of the curve, the terms also weighted. Of a scheduled
        weight, which is another in each step, the trainer logs the mean itself.
        """
        row = {f"weighted/{name}": weight * logs[name] for name, weight in weights.items() if name in logs}
        row = {"step": step, **row, **logs}
        self.curve.append(row)
        self.tell("curve", step, row)

    def change(self, step: int, name: str, old: Setting, new: Setting) -> None:
        """A weight, or the temperature, that is another from this step on; each as its number and as it was written."""
        self.events.append({"step": step, "name": name, "old": old.number, "new": new.number})
        self.note(step, f"{name} {old} → {new}")

    def note(self, step: int, text: str) -> None:
        """A line of the log."""
        self.log.append((step, text))
        self.tell("log", step, text)

    def look(self, step: int, values: np.ndarray) -> None:
        """(S + 1, T + 1) CKA at a step."""
        self.similarity[step] = values
        self.tell("similarity", step, values)

    def answers(self, step: int, samples: list[Sample]) -> None:
        """What both models said at a step."""
        self.samples[step] = samples
        self.tell("samples", step, samples)

    def history(self, terms: Sequence[str], weighted: bool = False) -> list[dict[str, float]]:
        """The curve as `figures.loss_curves` takes it: step and a column a term."""
        prefix = "weighted/" if weighted else ""
        return [
            {"step": row["step"], **{name: row[prefix + name] for name in terms if prefix + name in row}}
            for row in list(self.curve)
        ]

    def write(self, folder: Path) -> None:
        """Beside a checkpoint, as JSON."""
        record = {
            "curve": self.curve,
            "events": self.events,
            "log": self.log,
            "similarity": {step: values.tolist() for step, values in self.similarity.items()},
            "samples": {
                step: [(sample.text, sample.teacher, sample.student) for sample in samples]
                for step, samples in self.samples.items()
            },
        }
        write_whole(folder / FILE, json.dumps(record))

    def read(self, folder: Path) -> None:
        """The records up to a checkpoint. One that was written without a session has none: the curve then begins there.

        Raises:
            ValueError: a file that is cut short or holds something else. The records stay as they were.
        """
        if not (folder / FILE).is_file():
            return
        try:
            record = json.loads((folder / FILE).read_text())
            curve, events = record["curve"], record["events"]
            log = [(step, text) for step, text in record["log"]]
            similarity = {int(step): np.array(values) for step, values in record["similarity"].items()}
            samples = {
                int(step): [Sample(text, theirs and tuple(theirs), tuple(ours)) for text, theirs, ours in said]
                for step, said in record["samples"].items()
            }
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{folder / FILE} is damaged ({type(error).__name__}: {error}). Resume from another checkpoint, or "
                "delete this file: the run then goes on from here without the curve and events before it."
            ) from error
        self.curve[:], self.events[:], self.log[:] = curve, events, log
        self.similarity.update(similarity)
        self.samples.update(samples)
