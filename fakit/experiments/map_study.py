"""What is particular to a study of maps: does the CKA score of a layer map predict the student's quality?

A map's score is the mean similarity of its pairs, student layer to teacher layer, measured on unlabeled texts before
any training; its quality is the test score of the student trained with it. Nothing is scored and tested on the same
text, and the teacher was trained on neither. `fakit.experiments.vary.maps` names the maps, `Study` trains them.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from fakit.experiments.baselines import prepare_run
from fakit.experiments.build import Prepared
from fakit.experiments.config import ExperimentConfig
from fakit.experiments.store import RunStore
from fakit.experiments.students import make_student
from fakit.experiments.vary import CONTROLS, increasing_maps
from fakit.files import write_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SIMILARITY = "similarity.json"
BATCH = 64  # texts that are scored together


def planned_maps(student_layers: int, teacher_layers: int) -> set[str]:
    """The names of the maps that a study of maps trains."""
    return {layer_map.name for layer_map in increasing_maps(student_layers, teacher_layers)} | set(CONTROLS)


def record_similarity(experiments: Iterable[ExperimentConfig], texts: int, arms: Iterable[str], folder: Path) -> None:
    """Measure `similarity` for each experiment and write similarity.json.

    Raises:
        ValueError: before anything is measured: tasks of one name, or arms that are not all the maps of the models.
    """
    from transformers import set_seed

    from fakit.models.blocks import depth

    arms = set(arms)
    by_task: dict[str, tuple[PreTrainedModel, Prepared]] = {}
    for config in experiments:
        prepared = prepare_run(config)
        set_seed(config.seed)  # the student that is going to be trained
        student = make_student(config, prepared).model
        layers, task = (depth(student), depth(prepared.teacher)), prepared.task.name
        if arms != planned_maps(*layers):
            raise ValueError(
                f"similarity_texts: is for a study of maps, and a student of {layers[0]} layers with a teacher of "
                f"{layers[1]}, as {task} has them, have other arms than {', '.join(sorted(arms))}: give vary: {{kind: "
                f"maps, student_layers: {layers[0]}, teacher_layers: {layers[1]}}}, or leave similarity_texts out."
            )
        if task in by_task:
            raise ValueError(
                f"base: {config.task.name} and another are both called {task} in tables and figures; rename one of "
                "the files."
            )
        by_task[task] = student, prepared
    found = {task: similarity(student, prepared, texts) for task, (student, prepared) in by_task.items()}
    write_whole(folder / SIMILARITY, json.dumps(found, indent=1) + "\n")


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

    The plan is that of `vary.maps`: each increasing map and the controls, for every task and seed. Records of
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
        planned = planned_maps(len(cka) - 1, len(cka[0]) - 1)
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
