"""What one run gave, as it is returned and recorded."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import pandas as pd

from fakit.experiments.store import RunStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class RunResult:
    """What one run gave; draws itself in a notebook, prints itself in a terminal, and is one line of a store.

    Attributes:
        metric, score: the task's headline metric and its value on the test split.
        higher_is_better: which way `score` improves.
        validation, test: all metrics by name; test also has the agreement with the teacher.
        steps, seconds: optimizer steps, and the wall time of training alone (of a resumed run: since it was resumed).
        flops_per_step, flops: of one optimizer step and of all, teacher included; None with a quantized teacher, whose
            kernels no counter sees, with balancing by gradient norms, with a cache, whose teacher worked elsewhere,
            with a student that was compressed first or writes on-policy, and in a study that does not count them.
        teacher_cache: the precision (and k) of the cache that stood for the teacher; None where the teacher itself
            answered in each step.
        precision: what training computed in, "float32" or "bf16" (autocast): what `bf16: auto` came to. Evaluation is
            in float32.
        on_policy: of a student that wrote: "share" of the steps, "tokens" an answer, "ended", the share of the answers
            that did, and "tokens_per_second" of writing (of a resumed run: since it was resumed).
        labeled, unlabeled: training rows.
        compression: of a student that was compressed first: seconds, steps; rounds, or ranks and blocks.
        dropped: rows of the task's data that are in no split, by reason.
        teacher: of a classifier, the teacher's own metrics on the test split.
        softness: of each term of outputs, its last temperature and how many classes the teacher then spreads over.
        texts: share of padding, texts cut, sizes of the splits, share of the largest class; see
            `fakit.experiments.facts`. layers: depth of "student" and "teacher".
        made_on: processor, gpu and commit.
        versions, data: what the run was made with, and the fingerprint of the texts it was evaluated on; None in
            records of before.
        history: the logged steps. student: the trained model; None when the run was read from a store.
    """

    run_id: str
    task: str
    arm: str
    seed: int
    metric: str
    score: float
    higher_is_better: bool
    validation: dict[str, float]
    test: dict[str, float]
    steps: int
    seconds: float
    flops_per_step: float | None
    flops: float | None
    parameters: int
    teacher_parameters: int
    labeled: int
    unlabeled: int
    config: dict[str, Any]
    finished: str
    kind: str = "run"
    teacher_cache: str | None = None
    precision: str | None = None  # of records from before it was noted
    dropped: dict[str, int] = field(default_factory=dict)
    compression: dict[str, Any] | None = None
    on_policy: dict[str, float] | None = None
    teacher: dict[str, float] | None = None
    softness: dict[str, dict[str, float]] | None = None
    texts: dict[str, Any] | None = None
    layers: dict[str, int] | None = None
    made_on: dict[str, Any] | None = None
    versions: dict[str, str] | None = None
    data: str | None = None
    history: list[dict[str, float]] = field(default_factory=list, repr=False)
    student: PreTrainedModel | None = field(default=None, repr=False, compare=False)

    def record(self) -> dict[str, Any]:
        """The line of runs.jsonl: everything but the history, which goes to steps.jsonl, and the model."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("history", "student")}

    @classmethod
    def from_store(cls, store: RunStore, run_id: str) -> RunResult:
        """A recorded run again, without its model, and without what only a newer fakit records."""
        steps = store.steps(run_id).drop(columns="run_id")
        history = [{k: v for k, v in row.items() if not pd.isna(v)} for row in steps.to_dict("records")]
        record = store.record(run_id)
        for name in ("validation", "test", "teacher"):  # JSON has no nan: a student that diverged has null for a score
            if record.get(name) is not None:
                record[name] = {metric: math.nan if value is None else value for metric, value in record[name].items()}
        record["score"] = math.nan if record["score"] is None else record["score"]
        known = {f.name for f in fields(cls)} - {"history", "student"}
        return cls(**{name: value for name, value in record.items() if name in known}, history=history)

    def __str__(self) -> str:
        agreement = f", agreement with the teacher {self.test['agreement']:.3f}" if "agreement" in self.test else ""
        return (
            f"{self.task}, {self.arm}, seed {self.seed}: test {self.metric} {self.score:.4f}{agreement} "
            f"after {self.steps} steps in {self.seconds:.0f} s" + (f", {self.precision}" if self.precision else "")
        )

    def _repr_markdown_(self) -> str:
        names = [*self.test, *(name for name in self.validation if name not in self.test)]
        rows = [f"| {n} | {self.validation.get(n, math.nan):.4f} | {self.test.get(n, math.nan):.4f} |" for n in names]
        return "\n".join([f"**{self}**", "", "| metric | validation | test |", "|---|---|---|", *rows]).replace(
            "nan", "–"
        )
