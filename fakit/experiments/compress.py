"""`run_compression`: a smaller model from a teacher, from one YAML file to a record; what `fakit compress` calls.

    method: layerwise                                         method: low_rank
    task: {name: glosses, labels: 350}                        task: {name: glosses, labels: 350}
    layerwise: {layers: 3, importance: kl, steps: 50}         low_rank: {keep: 0.8, ranks: bottom, texts: 2000}

Each method has a section of its own name, and does not look at the others'.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from fakit.compression import low_rank
from fakit.experiments.baselines import prepare_run
from fakit.experiments.build import Prepared
from fakit.experiments.compression_config import LayerwiseConfig, LowRankConfig
from fakit.experiments.config import ExperimentConfig, TaskConfig, TeacherConfig
from fakit.experiments.quiet import without_side_bars
from fakit.experiments.schema import Natural, Section, Whole
from fakit.experiments.scores import parameters_of, scores_of
from fakit.experiments.smaller import BEGUN, make_smaller
from fakit.experiments.statistics import LOWER_IS_BETTER
from fakit.experiments.store import RunStore, now, strict_json

METHODS = ("layerwise", "low_rank")


class CompressConfig(Section):
    """One compression: what is compressed, on which texts, and how."""

    method: Literal[METHODS]
    task: TaskConfig = TaskConfig()
    teacher: TeacherConfig = TeacherConfig()
    layerwise: LayerwiseConfig = LayerwiseConfig()
    low_rank: LowRankConfig = LowRankConfig()
    max_length: Annotated[Whole, Field(ge=2)] = 128  # tokens
    seed: Annotated[Natural, Field(le=2**32 - 1)] = 0
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    out: str | None = None  # the folder of the rounds; null: RUNS_DIR/RUN_ID

    def _check(self) -> None:
        self.experiment()

    def experiment(self) -> ExperimentConfig:
        """Task, teacher, seed, length and device, as the rest of the kit takes them."""
        return ExperimentConfig(
            task=self.task,
            teacher=self.teacher,
            training={"max_length": self.max_length},
            seed=self.seed,
            device=self.device,
        )

    @property
    def arm(self) -> str:
        """The method in tables."""
        if self.method == "low_rank":
            return f"low rank, {self.low_rank.ranks}"
        return "layerwise, one shot" if self.layerwise.one_shot else "layerwise"

    @property
    def run_id(self) -> str:
        """Task, method and seed, then a hash of all but `out` and the sections of other methods."""
        aside = {"out", *METHODS} - {self.method}
        content = {key: value for key, value in self.to_dict().items() if key not in aside}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
        name = Path(self.task.name).stem.replace("/", "-")
        return f"{name}-{self.arm.replace(', ', '-').replace(' ', '-')}-s{self.seed}-{digest}"


def run_compression(
    config: CompressConfig,
    store: RunStore | str | Path,
    resume: bool = False,
    prepared: Prepared | None = None,
) -> dict[str, Any]:
    """Compress as configured, evaluate on the task's validation and test texts, and record.

    Args:
        store: a `RunStore`, or its folder (made when missing): the finished run is added to it, and its student is
            saved in `config.out`, or in a folder of the run's id.
        resume: a run that is recorded is returned as recorded; one that was stopped goes on from its finished rounds,
            or blocks.
        prepared: what `fakit.experiments.build.prepare` gave for an experiment of the same task, teacher, seed and
            length.

    Returns:
        The record: test and validation scores of the student, the teacher's, and each round, or block.

    Raises:
        ValueError: before any work; what `prune` refuses, and a run that is recorded while `resume` is off.
    """
    from fakit.training.checkpoints import versions

    store = RunStore.open(store, what="compressions") if isinstance(store, str | Path) else store
    if store.has(config.run_id):
        if resume:
            return store.record(config.run_id)
        raise ValueError(
            f"{config.run_id} is recorded in {store.path} already. resume=True (--resume) returns it; change the seed "
            "or another key for a new run."
        )
    prepared = prepared or prepare_run(config.experiment())
    prepared.check(config.experiment())
    task, teacher, tokenizer = prepared.task, prepared.teacher, prepared.tokenizer
    folder = Path(config.out or store.path / config.run_id)
    asked = {"layerwise": config.layerwise, "low_rank": config.low_rank}[config.method]
    with without_side_bars():
        made = make_smaller(asked, prepared, config.max_length, config.seed, folder, resume)
    student = made.model
    if config.method == "low_rank":
        low_rank.save(student, folder, tokenizer)
    scores = scores_of(student, prepared.test, task, tokenizer, prepared.reference())
    record = {
        "run_id": config.run_id,
        "kind": "compression",
        "task": task.name,
        "arm": config.arm,
        "seed": config.seed,
        "metric": task.metric,
        "score": scores[task.metric],
        "higher_is_better": task.metric not in LOWER_IS_BETTER,
        "validation": scores_of(student, prepared.validation, task, tokenizer),
        "test": scores,
        "teacher": prepared.teacher_scores(),
        **made.facts,
        "parameters": parameters_of(student),
        "teacher_parameters": parameters_of(teacher),
        "config": config.to_dict(),
        "finished": now(),
        "versions": versions(),
        "data": prepared.fingerprint(),
    }
    store.append_run(strict_json(record))
    shutil.rmtree(folder / BEGUN, ignore_errors=True)  # states between blocks: many times the model's size
    return record


def in_words(record: dict[str, Any], folder: str | Path, runs: str | Path) -> str:
    """What the command prints of a record, whose rounds are in `folder`, in a runs directory."""
    rounds = record.get("rounds", [])
    lines = [
        f"round {made['number']}: without teacher layer {', '.join(map(str, made['removed']))}, "
        f"{len(made['layers'])} stay; healing: KL {made['kl_cut']:.4f} → {made['kl_healed']:.4f}, validation "
        f"{record['metric']} {made['score_cut']:.4f} → {made['score_healed']:.4f}; {made['seconds']:.0f} s"
        for made in rounds
    ]
    lines += [
        f"block {made['layer']}: loss {made['losses'][0]:.4f} → {made['losses'][-1]:.4f}; {made['seconds']:.0f} s"
        for made in record.get("blocks", [])
        if made["losses"]
    ]
    lines.append(
        f"{record['task']}, {record['arm']}, seed {record['seed']}: test {record['metric']} {record['score']:.4f} "
        f"(teacher {record['teacher'][record['metric']]:.4f}) with {record['parameters']:,} of "
        f"{record['teacher_parameters']:,} parameters."
    )
    if rounds:
        where = f"{Path(folder) / f'round-{len(rounds)}'}"
    else:
        where = f"{folder} (for fakit.compression.low_rank.load)"
    lines.append(f"The student is in {where}, the run in {runs}.")
    return "\n".join(lines)
