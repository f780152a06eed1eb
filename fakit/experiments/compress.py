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
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from fakit.compression.importance import MEASURES
from fakit.compression.ranks import METHODS as RANKS
from fakit.experiments.baselines import parameters_of, prepare_run, scores_of
from fakit.experiments.build import Prepared, check_lengths
from fakit.experiments.config import ExperimentConfig, TaskConfig, TeacherConfig
from fakit.experiments.quiet import without_side_bars
from fakit.experiments.schema import Count, Natural, Number, Section, Truth, Whole
from fakit.experiments.statistics import LOWER_IS_BETTER
from fakit.experiments.store import RunStore, now, strict_json

if TYPE_CHECKING:
    from fakit.compression.layerwise import Round

METHODS = ("layerwise", "low_rank")
BEGUN = "distillation"  # in the folder of a low-rank compression that is not recorded yet


class LayerwiseConfig(Section):
    """Layers taken out one a round, healing after each: see `fakit.compression.layerwise.prune`."""

    section: ClassVar[str] = "layerwise"
    layers: Count | None = 3  # the depth to stop at
    at_least: Number | None = None  # stop before the round that would fall below this validation score
    importance: Literal[MEASURES] = "kl"  # "quality" is the task's headline metric on the validation texts
    one_shot: Truth = False  # all layers in one round, as a comparison
    scored: Count = 256  # training texts that layers are scored on
    steps: Natural = 100  # of healing, for each layer that is taken out
    batch_size: Count = 32
    learning_rate: Annotated[Number, Field(gt=0.0)] = 1e-4
    bf16: Truth | Literal["auto"] = "auto"

    def _check(self) -> None:
        if self.layers is None and self.at_least is None:
            raise ValueError("layerwise.layers and layerwise.at_least: both are null; one of them says when to stop.")
        if self.one_shot and (self.layers is None or self.at_least is not None):
            raise ValueError("layerwise.one_shot: takes out all layers at once; give layerwise.layers and no at_least.")


class LowRankConfig(Section):
    """Weights as pairs of thin matrices, distilled block by block: see `fakit.compression.low_rank`."""

    section: ClassVar[str] = "low_rank"
    keep: Annotated[Number, Field(gt=0.0, le=1.0)] = 0.8  # of the model's parameters
    ranks: Literal[RANKS] = "bottom"  # whose rank goes down first
    lowest: Annotated[Number, Field(ge=0.0, le=1.0)] = 0.25  # rank, as a share of the highest that saves something
    start: Literal["activations", "weights"] = "activations"  # what the pairs are made of
    calibration: Count = 400  # texts that activations are measured on
    texts: Count = 2000  # texts that blocks are distilled on, of the pool first
    epochs: Natural = 2  # 0: no distillation
    batch_size: Count = 32
    learning_rate: Annotated[Number, Field(gt=0.0)] = 1e-3
    bf16: Truth | Literal["auto"] = "auto"

    def _check(self) -> None:
        if self.ranks == "energy" and self.start == "weights":
            raise ValueError(
                "low_rank.ranks: energy is measured on texts; low_rank.start: activations, or other ranks."
            )


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
    rows, labeled = _texts(task, tokenizer, config.max_length)
    for split in (rows, prepared.validation, prepared.test):
        check_lengths(split, config.max_length, teacher=teacher)
    compressed = {"layerwise": _layerwise, "low_rank": _low_rank}[config.method]
    folder = Path(config.out or store.path / config.run_id)
    with without_side_bars():
        student, facts = compressed(config, prepared, rows, labeled, folder, resume)
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
        **facts,
        "parameters": parameters_of(student),
        "teacher_parameters": parameters_of(teacher),
        "labeled": labeled,
        "unlabeled": len(rows) - labeled,
        "config": config.to_dict(),
        "finished": now(),
        "versions": versions(),
        "data": prepared.fingerprint(),
    }
    store.append_run(strict_json(record))
    shutil.rmtree(folder / BEGUN, ignore_errors=True)  # states between blocks: many times the model's size
    return record


def _layerwise(config: CompressConfig, prepared: Prepared, rows, labeled: int, folder: Path, resume: bool):
    """The student of the last round, and what its record says of the rounds."""
    from fakit.compression.layerwise import prune

    asked, task, tokenizer = config.layerwise, prepared.task, prepared.tokenizer
    sign = -1 if task.metric in LOWER_IS_BETTER else 1

    def quality(model) -> float:
        return sign * scores_of(model, prepared.validation, task, tokenizer)[task.metric]

    rounds = prune(
        prepared.teacher,
        asked.layers,
        rows,
        task.collator(tokenizer),
        at_least=None if asked.at_least is None else sign * asked.at_least,
        importance=asked.importance,
        quality=quality,
        scored=rows.select(range(min(asked.scored, len(rows)))),
        one_shot=asked.one_shot,
        steps=asked.steps,
        batch_size=asked.batch_size,
        learning_rate=asked.learning_rate,
        bf16=asked.bf16,
        seed=config.seed,
        tokenizer=tokenizer,
        out=folder,
        resume=resume,
    )
    if not rounds:
        raise ValueError(
            f"layerwise.at_least: {asked.at_least}: no layer can be taken out without falling below it; ask for less."
        )
    return rounds[-1].student, {
        "rounds": [_facts(made, sign) for made in rounds],
        "steps": asked.steps * sum(len(made.removed) for made in rounds),
        "seconds": sum(made.seconds for made in rounds),
    }


def _low_rank(config: CompressConfig, prepared: Prepared, rows, labeled: int, folder: Path, resume: bool):
    """The student, saved in `folder` as pairs, and what its record says of the plan and the blocks."""
    from fakit.compression import low_rank

    asked, teacher = config.low_rank, prepared.teacher
    if not resume and (folder / BEGUN).exists():
        raise ValueError(
            f"{folder} holds a compression that was begun; resume=True (--resume) goes on with it, or choose another "
            "folder (out)."
        )
    order = [*range(labeled, len(rows)), *range(labeled)]  # the pool first: the teacher was not trained on it
    chosen = rows.select(order[: max(asked.texts, asked.calibration)])
    began = time.perf_counter()
    calibration = None
    if asked.start == "activations":
        calibration = _batches(prepared, chosen.select(range(min(asked.calibration, len(chosen)))), asked.batch_size)
    plan = low_rank.plan(teacher, asked.keep, asked.ranks, calibration, asked.lowest)
    student = low_rank.compress(teacher, plan=plan)
    blocks = []
    if asked.epochs:
        blocks = low_rank.distill(
            student,
            teacher,
            _batches(prepared, chosen.select(range(min(asked.texts, len(chosen)))), asked.batch_size),
            epochs=asked.epochs,
            learning_rate=asked.learning_rate,
            bf16=asked.bf16,
            seed=config.seed,
            folder=folder / BEGUN,
        )
    low_rank.save(student, folder, prepared.tokenizer)
    return student.eval(), {
        "kept": plan.after / plan.before,
        "ranks": low_rank.ranks(student),
        "blocks": [{"layer": one.layer, "losses": list(one.losses), "seconds": one.seconds} for one in blocks],
        "seconds": time.perf_counter() - began,
    }


def _batches(prepared: Prepared, rows, size: int) -> list[dict[str, Any]]:
    """Rows of like length share a batch; without labels, but where a model makes its decoder's inputs of them."""
    from fakit.evaluation.batches import length_sorted_batches
    from fakit.models.blocks import is_encoder_decoder

    collator, teacher = prepared.task.collator(prepared.tokenizer), prepared.teacher
    aside = set() if is_encoder_decoder(teacher) else {"labels"}
    made = length_sorted_batches(rows, collator, size, teacher.device)
    return [{name: x for name, x in batch.items() if name not in aside} for _, batch in made]


def _texts(task, tokenizer, max_length: int):
    """All training texts, the pool's too (no label is learned from); how many of them carry a label."""
    from datasets import concatenate_datasets

    rows = task.encode("train", tokenizer, max_length)
    if task.pool is None:
        return rows, len(rows)
    pool = task.encode("pool", tokenizer, max_length)
    return concatenate_datasets([rows, pool.cast(rows.features)]), len(rows)


def _facts(made: Round, sign: int) -> dict[str, Any]:
    """A round as the record has it: the score as the task counts it."""
    assert made.quality_cut is not None and made.quality_healed is not None
    return {
        "number": made.number,
        "removed": made.removed,
        "layers": made.layers,
        "importance": {str(layer): cost for layer, cost in made.importance.items()},
        "kl_cut": made.kl_cut,
        "kl_healed": made.kl_healed,
        "score_cut": sign * made.quality_cut,
        "score_healed": sign * made.quality_healed,
        "seconds": made.seconds,
    }


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
