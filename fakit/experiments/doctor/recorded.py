"""What a store has recorded, put together by task and arm, as the rules of the doctor look at it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any

import pandas as pd

from fakit.experiments.config import TRANSFER
from fakit.experiments.map_study import SIMILARITY, recorded_similarity
from fakit.experiments.store import RunStore
from fakit.experiments.table import distinct_arms, distinct_tasks, scale, study_table
from fakit.experiments.terms import built
from fakit.layer_maps import STRATEGIES, LayerMap
from fakit.objective.schedules import Schedule

Pairs = list[tuple[int, int]]


@dataclass(frozen=True)
class Arm:
    """The runs of a task and arm, as `study_table` tells arms apart.

    Attributes:
        records: one a seed, as the store has them. histories: the logged steps of each, by their number.
        similarity: CKA of student and teacher layers before training, (S + 1, T + 1), where a study of maps has it.
    """

    task: str
    name: str
    records: list[dict[str, Any]]
    histories: list[pd.DataFrame]
    similarity: list[list[float]] | None = None

    @property
    def config(self) -> dict[str, Any]:
        """Of the first seed; arms hold runs that differ in the seed alone."""
        return self.records[0].get("config") or {}

    @property
    def metric(self) -> str:
        """The headline metric."""
        return self.records[0]["metric"]

    @property
    def scores(self) -> list[float]:
        """One a seed, NaN where the student gave none."""
        return [math.nan if record["score"] is None else float(record["score"]) for record in self.records]

    @property
    def finite_scores(self) -> list[float]:
        """Without the seeds that have none."""
        return [score for score in self.scores if math.isfinite(score)]

    def better(self, score: float, than: float) -> bool:
        """Whether a score is strictly better than another."""
        return score > than if self.records[0]["higher_is_better"] else score < than

    def shown(self, score: float) -> str:
        """A score with its unit: "77.6 %", "26.70"."""
        factor, unit = scale(self.metric)
        return f"{factor * score:.{1 if factor == 100 else 2}f}{unit}"

    @cached_property
    def weights(self) -> dict[str, float]:
        """The terms that are on, by name, at their highest weight over training."""
        config = self.config
        given = {name: config[name].get("weight", 1.0) for name in TRANSFER if config.get(name)}
        given |= {name: term.get("weight", 1.0) for name, term in (config.get("terms") or {}).items()}
        if config.get("task_weight") is not None:
            given["task"] = config["task_weight"]
        tops = {name: (ends(weight) or (0.0, math.inf))[1] for name, weight in given.items()}
        return {name: top for name, top in tops.items() if top > 0}

    def maps_nothing(self, term: str) -> bool:
        """Whether a term compares no layers, as its layer map has it."""
        own = self.config.get(term) or (self.config.get("terms") or {}).get(term) or {}
        given = own.get("layer_map", self.config.get("layer_map")) if term not in ("outputs", "task") else "uniform"
        return given in ("none", [], ())

    @property
    def transfers(self) -> bool:
        """Whether a term looks at the teacher."""
        return bool(self.weights.keys() - {"task"})

    @cached_property
    def changes(self) -> bool:
        """Whether what the loss is made of changes over training: schedules, balancing, texts of the student's own."""
        return bool(self.config.get("balancing") or self.config.get("on_policy")) or _has_schedule(self.config)

    @property
    def depths(self) -> tuple[int | None, int | None]:
        """Layers of student and teacher, None where they are not known."""
        if layers := self.records[0].get("layers"):
            return layers["student"], layers["teacher"]
        if self.similarity:
            return len(self.similarity) - 1, len(self.similarity[0]) - 1
        return None, None

    def typed_maps(self) -> dict[str, Pairs]:
        """Layer maps that the configuration gives pair by pair, by the key that holds them; of terms that are on."""
        config = self.config
        terms = {name: config.get(name) for name in TRANSFER} | dict(config.get("terms") or {})
        own = {name: term["layer_map"] for name, term in terms.items() if term and term.get("layer_map") is not None}
        found = {f"{name}.layer_map": given for name, given in own.items() if name in self.weights}
        if any(name in self.weights and name not in own for name in ("features", "attention")):
            found["layer_map"] = config.get("layer_map")
        return {key: [(s, t) for s, t in given] for key, given in found.items() if isinstance(given, list | tuple)}

    def compared(self, number: int) -> dict[str, Pairs]:
        """Term → pairs that run `number` compared: as its steps name them, else as its configuration does."""
        found: dict[str, Pairs] = {}
        history = self.histories[number]
        for column in history:
            term, slash, pair = str(column).rpartition("/S")
            student, _, teacher = pair.partition("_T")
            if slash and student.isdigit() and teacher.isdigit() and history[column].notna().any():
                found.setdefault(term, []).append((int(student), int(teacher)))
        if found or not (self.weights.keys() & {"features", "attention"}):
            return {term: sorted(pairs) for term, pairs in found.items()}
        given, depths = (self.records[number].get("config") or {}).get("layer_map"), self.depths
        if isinstance(given, list | tuple):
            return {"layer_map": [(s, t) for s, t in given]}
        if given in STRATEGIES and given not in ("random", "none") and None not in depths:
            return {"layer_map": list(LayerMap.named(given, *depths).pairs)}
        return {}


@dataclass(frozen=True)
class Recorded:
    """A store's runs by task and arm.

    Attributes:
        arms: of runs, compressions too. baselines: task → "teacher", "untrained", "copy" → test score.
        table: `study_table`.
    """

    arms: list[Arm]
    baselines: dict[str, dict[str, float]]
    table: pd.DataFrame

    @classmethod
    def of(cls, store: RunStore, baselines: Sequence[str] | None = None) -> Recorded:
        """Read a store. Raises ValueError as `study_table` does."""
        table = study_table(store, baselines)
        runs = store.runs()
        runs = runs.assign(task=distinct_tasks(runs), kind=runs["kind"].replace("compression", "run"))
        runs = runs.assign(arm=distinct_arms(runs))
        records = store.records()
        steps = dict(list(store.steps().sort_values("step", kind="stable").groupby("run_id")))
        similarity = recorded_similarity(store.path) if (store.path / SIMILARITY).is_file() else {}
        nothing = pd.DataFrame(columns=["step"])
        arms = []
        for (task, arm), group in runs[runs["kind"] == "run"].groupby(["task", "arm"], sort=False):
            own = [records[index] for index in group.sort_values("seed").index]
            histories = [steps.get(record["run_id"], nothing).set_index("step") for record in own]
            arms.append(Arm(task, arm, own, histories, similarity.get(task)))
        beside = runs[(runs["kind"] == "baseline") & runs["score"].notna()]
        scores: dict[str, dict[str, float]] = {}
        for _, row in beside.drop_duplicates(["task", "arm"]).iterrows():
            scores.setdefault(row["task"], {})[row["arm"]] = float(row["score"])
        return cls(arms, scores, table)

    def by_task(self) -> dict[str, list[Arm]]:
        """Task → its arms."""
        found: dict[str, list[Arm]] = {}
        for arm in self.arms:
            found.setdefault(arm.task, []).append(arm)
        return found


def ends(value: Any) -> tuple[float, float] | None:
    """Lowest and highest of a number or schedule in a configuration; None of what this fakit does not know."""
    try:
        value = built(value)
    except ValueError:  # a schedule of another version's
        return None
    if isinstance(value, Schedule):
        return value.lowest, value.highest
    return (float(value), float(value)) if isinstance(value, Real) else None


def seeds_of(arm: Arm) -> str:
    """ "3 seeds", "seed 4"."""
    seeds = [record["seed"] for record in arm.records]
    return f"{len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"


def over(arm: Arm) -> str:
    """How a number of several seeds came about: "median of 3 seeds", "seed 4"."""
    return f"median of {seeds_of(arm)}" if len(arm.records) > 1 else seeds_of(arm)


def _has_schedule(value: Any) -> bool:
    if isinstance(value, dict):
        return {"from", "to"} <= value.keys() or any(map(_has_schedule, value.values()))
    return isinstance(value, list | tuple) and any(map(_has_schedule, value))
