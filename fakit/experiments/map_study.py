"""Does the CKA score of a layer map predict the student's quality? Every increasing map, trained and tested,
beside three controls.

A map's score is the mean similarity of its pairs, student layer to teacher layer, measured on unlabeled texts before
any training; its quality is the test score of the student trained with it. Nothing is scored and tested on the same
text, and the teacher was trained on neither.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from fakit.experiments.build import Prepared, build_student, prepare
from fakit.experiments.config import ExperimentConfig
from fakit.experiments.run import RunResult, without_side_bars
from fakit.experiments.schema import from_file, option
from fakit.experiments.store import RunStore
from fakit.experiments.study import (
    Experiments,
    StudyConfig,
    check_pairing,
    check_workers,
    run_missing,
    run_recorded,
    silent,
)
from fakit.files import write_whole
from fakit.layer_maps import LayerMap

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONTROLS = ("none", "reverse", "random")
SIMILARITY = "similarity.json"
BATCH = 64  # texts that are scored together
Pairs = tuple[tuple[int, int], ...]


def increasing_maps(student_layers: int, teacher_layers: int) -> list[LayerMap]:
    """Every map that gives each student layer a teacher layer of its own, deeper ones to deeper layers:
    T over S of them.

    Raises:
        ValueError: more student layers than teacher layers.

    >>> len(increasing_maps(3, 6))
    20
    """
    if student_layers > teacher_layers:
        raise ValueError(
            f"each of {student_layers} student layers would have a teacher layer of its own, and the teacher has "
            f"{teacher_layers}: make the student no deeper than its teacher."
        )
    chosen = combinations(range(1, teacher_layers + 1), student_layers)
    return [LayerMap(enumerate(layers, start=1), name="-".join(map(str, layers))) for layers in chosen]


@dataclass(frozen=True)
class MapStudyConfig(Experiments):
    """Experiments × maps × seeds.

    Attributes:
        experiments: one for each task; their layer map is what varies. In a file, mappings or names of YAML files
            beside it.
        maps: which maps are trained, beside the controls; in a file, the key that tells this study from one of arms.
        seeds: each runs every map from the same student, labeled texts and batches.
        texts: unlabeled texts on which a map is scored.
    """

    experiments: tuple[ExperimentConfig, ...]
    maps: str = option("increasing", choices=("increasing",))
    seeds: tuple[int, ...] = (0, 1, 2)
    texts: int = option(512, at_least=8)
    what: str = field(default="does a map's CKA score predict the student's quality?")

    def _check(self) -> None:
        check_pairing(self.experiments, self.seeds)

    def runs(self, student_layers: int, teacher_layers: int) -> list[ExperimentConfig]:
        """Every map of every task, seed by seed, so that a study that was stopped early compares whole sets of maps.

        "random" draws each student layer's teacher layer freely, in any order, anew for every seed.
        """
        maps = {layer_map.name: tuple(layer_map.pairs) for layer_map in increasing_maps(student_layers, teacher_layers)}
        maps |= {"none": "none", "reverse": tuple(LayerMap.reverse(student_layers, teacher_layers).pairs)}
        return [
            experiment.replace(seed=seed, name=name, layer_map=pairs)
            for seed in self.seeds
            for experiment in self.experiments
            for name, pairs in {**maps, "random": random_pairs(student_layers, teacher_layers, seed)}.items()
        ]


def study_from_yaml(path: str | Path) -> MapStudyConfig | StudyConfig:
    """A study's file: of maps where it has the key `maps`, else of arms."""

    def read(data: Any) -> MapStudyConfig | StudyConfig:
        kind = MapStudyConfig if isinstance(data, Mapping) and "maps" in data else StudyConfig
        return kind.from_dict(data, Path(path).parent)

    return from_file(path, read)


def random_pairs(student_layers: int, teacher_layers: int, seed: int) -> Pairs:
    """A teacher layer for each student layer, drawn freely: any order, repeats allowed."""
    draw = random.Random(f"fakit maps {seed}")
    return tuple((layer, draw.randint(1, teacher_layers)) for layer in range(1, student_layers + 1))


def run_map_study(study: MapStudyConfig, out: str | Path, workers: int = 1, progress: bool = True) -> RunStore:
    """Run what is not recorded in `out` yet, then score the maps; one line of progress a run.

    Args:
        out: the runs directory, made when missing; the similarities go to similarity.json in it.
        workers: processes side by side, each with one thread.
    """
    from fakit.models.blocks import depth

    check_workers(workers)
    store = RunStore.open(out, what=study.what)
    first = [experiment.replace(seed=study.seeds[0]) for experiment in study.experiments]
    with without_side_bars():
        prepared = [prepare(config) for config in first]
    students = [build_student(config, p.teacher, p.task) for config, p in zip(first, prepared, strict=True)]
    depths = {(depth(student), depth(p.teacher)) for student, p in zip(students, prepared, strict=True)}
    if len(depths) > 1:
        raise ValueError(
            f"experiments: (student, teacher) depths are {sorted(depths)}; one study compares the same maps."
        )
    names = [p.task.name for p in prepared]
    if len(set(names)) < len(names):
        asked = ", ".join(experiment.task.name for experiment in study.experiments)
        raise ValueError(
            f"experiments: {asked} are all called {names[0]} in tables and figures; rename one of the files."
        )
    runs = study.runs(*depths.pop())
    found = {p.task.name: similarity(student, p, study.texts) for student, p in zip(students, prepared, strict=True)}
    write_whole(Path(out) / SIMILARITY, json.dumps(found, indent=1) + "\n")
    run_missing(runs, store, workers, print if progress else silent, run=_run)
    return store


def similarity(student: PreTrainedModel, prepared: Prepared, texts: int) -> dict[str, Any]:
    """CKA of the untrained student's layers with the teacher's on the first `texts` unlabeled texts of the task's pool.

    Debiased, one token a sequence; (S + 1, T + 1) by layer number.
    """
    from fakit.training.watch import SimilarityWatch

    task, tokenizer = prepared.task, prepared.tokenizer
    rows = task.pool.select(range(min(texts, len(task.pool))))
    encoded = task.encode(rows, tokenizer, prepared.config.training.max_length)
    collate = task.collator(tokenizer)
    starts = range(0, len(encoded), BATCH)
    batches = [collate(encoded.select(range(i, min(i + BATCH, len(encoded)))).to_list()) for i in starts]
    matrix = SimilarityWatch(prepared.teacher, batches).measure(student, step=0)
    cka = [[round(value, 5) for value in row] for row in matrix.tolist()]
    return {"texts": len(rows), "estimator": "debiased, one token a sequence", "student": "before training", "cka": cka}


def recorded_similarity(path: str | Path) -> dict[str, list[list[float]]]:
    """Task → CKA (S + 1, T + 1) of a recorded map study.

    Raises:
        ValueError: a folder without a map study.
    """
    file = Path(path) / SIMILARITY
    if not file.is_file():
        raise ValueError(
            f"{file} is missing: {path} holds no map study; `fakit study configs/maps.yaml --out {path}` makes one."
        )
    return {task: found["cka"] for task, found in json.loads(file.read_text()).items()}


@dataclass(frozen=True)
class UnfinishedSeed:
    """A seed of a task that lacks maps, as a study that was stopped leaves it;
    `seed` is None for a task without any run.
    """

    task: str
    seed: int | None
    maps: int
    planned: int

    def __str__(self) -> str:
        seed = "no seed" if self.seed is None else f"seed {self.seed}"
        return f"{self.task}, {seed} ({self.maps} of {self.planned} maps)"


def whole_seeds(path: str | Path) -> tuple[list[dict[str, Any]], list[UnfinishedSeed]]:
    """The runs of a recorded map study whose seed has every map of the plan with a score, and the seeds that have not.

    The plan is that of `MapStudyConfig.runs`: each increasing map and the controls, for every task and seed. Records of
    anything else in the folder (baselines, other arms) are no part of it.

    Raises:
        ValueError: a folder without a map study, tasks without similarity, or a map recorded twice for a task and seed.
    """
    similarities = recorded_similarity(path)
    records = [record for record in RunStore(path).records() if record.get("kind", "run") == "run"]
    if foreign := sorted({record["task"] for record in records} - set(similarities)):
        raise ValueError(
            f"{path} holds runs of {', '.join(foreign)}, and {SIMILARITY} the similarity of {', '.join(similarities)}: "
            "these are two studies. Record each in a folder of its own."
        )
    whole, unfinished = [], []
    seeds = sorted({record["seed"] for record in records}) or [None]
    for task, cka in similarities.items():
        planned = {layer_map.name for layer_map in increasing_maps(len(cka) - 1, len(cka[0]) - 1)} | set(CONTROLS)
        for seed in seeds:
            found: dict[str, dict[str, Any]] = {}
            for record in records:
                if (record["task"], record["seed"]) != (task, seed) or record["arm"] not in planned:
                    continue
                if record["score"] is None:  # its student gave NaN
                    continue
                if other := found.get(record["arm"]):
                    raise ValueError(
                        f"map {record['arm']} of {task}, seed {seed}, is recorded twice: {other['run_id']}, "
                        f"{record['run_id']}. These are two studies; record each in a folder of its own."
                    )
                found[record["arm"]] = record
            if len(found) == len(planned):
                whole += found.values()
            else:
                unfinished.append(UnfinishedSeed(task, seed, len(found), len(planned)))
    return whole, unfinished


def map_scores(path: str | Path) -> pd.DataFrame:
    """One row a task and map of a recorded study, the mean over seeds beside each seed's score; of whole seeds alone.

    A seed that lacks a map of the plan, as where a study was stopped, is left out, with a UserWarning that names it.

    Returns:
        columns task, map, kind ("increasing" or a control), pairs, cka (mean over the map's pairs, before training; NaN
        without pairs), metric, higher_is_better, score (mean over seeds), agreement, seeds, and scores: the tuple of
        the seeds' test scores, in the order of the seeds.

    Raises:
        ValueError: a folder without a map study, one that holds more than one study, or no whole seed;
            says what is there.
    """
    similarities = recorded_similarity(path)
    whole, unfinished = whole_seeds(path)
    missing = "; ".join(map(str, unfinished))
    if not whole:
        raise ValueError(
            f"{path}: no seed has all the maps of the plan yet: {missing}. The same `fakit study … --out {path}` goes "
            "on where it stopped."
        )
    if unfinished:
        warnings.warn(f"{path}: left out, since maps are missing: {missing}", stacklevel=2)
    runs = pd.DataFrame(sorted(whole, key=lambda record: record["seed"]))
    rows = []
    for (task, name), group in runs.groupby(["task", "arm"], sort=False):
        cka = similarities[task]
        # a random map is another one for every seed: its score is the mean over the draws
        pairs = [() if c["layer_map"] == "none" else tuple(map(tuple, c["layer_map"])) for c in group["config"]]
        values = [sum(cka[s][t] for s, t in each) / len(each) for each in pairs if each]
        rows.append(
            {
                "task": task,
                "map": name,
                "kind": name if name in CONTROLS else "increasing",
                "pairs": pairs[0] if name != "random" else (),
                "cka": sum(values) / len(values) if values else float("nan"),
                "metric": group["metric"].iloc[0],
                "higher_is_better": bool(group["higher_is_better"].iloc[0]),
                "score": group["score"].mean(),
                "agreement": pd.Series([test["agreement"] for test in group["test"]]).mean(),
                "seeds": tuple(group["seed"]),
                "scores": tuple(group["score"]),
            }
        )
    return pd.DataFrame(rows)


_prepared: Prepared | None = None  # of this process; the last one only: runs come seed by seed and task by task


def _run(config: ExperimentConfig, path: Path) -> RunResult:
    global _prepared
    if _prepared is None or _prepared.differs(config):
        with without_side_bars():
            _prepared = prepare(config)
    return run_recorded(config, path, prepared=_prepared, count_flops=False)
