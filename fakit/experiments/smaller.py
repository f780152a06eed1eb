"""`make_smaller`: the teacher of a task compressed as a file says, for `fakit compress` and for students."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fakit.experiments.build import Prepared, check_lengths, training_texts
from fakit.experiments.compression_config import LayerwiseConfig, LowRankConfig
from fakit.experiments.scores import scores_of
from fakit.experiments.statistics import LOWER_IS_BETTER
from fakit.experiments.terms import Pairs

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from fakit.compression.layerwise import Round

BEGUN = "distillation"  # in the folder of a low-rank compression that is not finished


@dataclass(frozen=True)
class Made:
    """A student before a run's first step.

    Attributes:
        model: trainable.
        kept: see `kept`; None where it is not known.
        facts: of a compression, for its record: texts, seconds, steps; rounds, or ranks and blocks. Empty without one.
    """

    model: PreTrainedModel
    kept: Pairs | None
    facts: dict[str, Any] = field(default_factory=dict)


def kept(layers: Sequence[int], depth: int) -> Pairs:
    """(student layer, the teacher layer that it was), but the last one aims at the teacher's last, which is what the
    head reads.

    >>> kept([1, 3, 4], depth=6)
    ((1, 1), (2, 3), (3, 6))
    """
    return tuple(enumerate([*layers[:-1], depth], start=1))


def make_smaller(
    asked: LayerwiseConfig | LowRankConfig,
    prepared: Prepared,
    max_length: int,
    seed: int,
    folder: Path | None = None,
    resume: bool = False,
    scored: bool = True,
) -> Made:
    """Compress the teacher on all training texts of the task, the pool's too; no label is learned from.

    Args:
        asked: how.
        max_length: tokens of a text.
        seed: of the order of the texts, and of dropout.
        folder: for finished rounds, or blocks; None: they are lost when the work is stopped.
        resume: go on from what is in `folder`.
        scored: also score each round of layers on the validation texts, before and after healing.

    Raises:
        ValueError: before any work; what `prune`, `compress` and `distill` refuse.
    """
    dtype = next(prepared.teacher.parameters()).dtype
    if isinstance(asked, LowRankConfig) and dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"low_rank: the teacher is held in {str(dtype).removeprefix('torch.')}, and pairs are made and trained in "
            "float32; load it so (teacher.dtype: float32)."
        )
    # each text in a row of its own: blocks are fitted one by one, outside of a model that would keep packed ones apart
    rows, labeled = training_texts(replace(prepared.task, packing=False), prepared.tokenizer, max_length)
    for split in (rows, prepared.validation, prepared.test):
        check_lengths(split, max_length, teacher=prepared.teacher)
    if isinstance(asked, LayerwiseConfig):
        made = _layerwise(asked, prepared, rows, seed, folder, resume, scored)
    else:
        made = _low_rank(asked, prepared, rows, labeled, seed, folder, resume)
    return replace(made, facts=made.facts | {"labeled": labeled, "unlabeled": len(rows) - labeled})


def _layerwise(
    asked: LayerwiseConfig,
    prepared: Prepared,
    rows: Dataset,
    seed: int,
    folder: Path | None,
    resume: bool,
    scored: bool,
) -> Made:
    from fakit.compression.layerwise import prune
    from fakit.models.blocks import depth

    task, tokenizer = prepared.task, prepared.tokenizer
    sign = -1 if task.metric in LOWER_IS_BETTER else 1

    def quality(model) -> float:
        return sign * scores_of(model, prepared.validation, task, tokenizer)[task.metric]

    if asked.at_least is not None and (found := quality(prepared.teacher)) < sign * asked.at_least:
        raise ValueError(
            f"layerwise.at_least: {asked.at_least} {task.metric} was asked, and the teacher itself comes to "
            f"{sign * found:.4g} on the validation texts; ask for what it can do."
        )
    needed = scored or asked.importance == "quality" or asked.at_least is not None
    rounds = prune(
        prepared.teacher,
        asked.layers,
        rows,
        task.collator(tokenizer),
        at_least=None if asked.at_least is None else sign * asked.at_least,
        importance=asked.importance,
        quality=quality if needed else None,
        scored=rows.select(range(min(asked.scored, len(rows)))),
        one_shot=asked.one_shot,
        steps=asked.steps,
        batch_size=asked.batch_size,
        learning_rate=asked.learning_rate,
        bf16=asked.bf16,
        seed=seed,
        tokenizer=tokenizer,
        out=folder,
        resume=resume,
    )
    if not rounds:
        raise ValueError(
            f"layerwise.at_least: {asked.at_least}: no layer can be taken out without falling below it; ask for less."
        )
    last = rounds[-1]
    return Made(
        last.student,
        kept(last.layers, depth(prepared.teacher)),
        {
            "rounds": [_facts(made, sign) for made in rounds],
            "steps": asked.steps * sum(len(made.removed) for made in rounds),
            "seconds": sum(made.seconds for made in rounds),
        },
    )


def _facts(made: Round, sign: int) -> dict[str, Any]:
    """A round as the record has it: the score as the task counts it."""
    scores = {"score_cut": made.quality_cut, "score_healed": made.quality_healed}
    return {
        "number": made.number,
        "removed": made.removed,
        "layers": made.layers,
        "importance": {str(layer): cost for layer, cost in made.importance.items()},
        "kl_cut": made.kl_cut,
        "kl_healed": made.kl_healed,
        **{name: None if score is None else sign * score for name, score in scores.items()},
        "seconds": made.seconds,
    }


def _low_rank(
    asked: LowRankConfig,
    prepared: Prepared,
    rows: Dataset,
    labeled: int,
    seed: int,
    folder: Path | None,
    resume: bool,
) -> Made:
    import numpy as np

    from fakit.compression import low_rank
    from fakit.models.blocks import depth

    teacher, work = prepared.teacher, None if folder is None else folder / BEGUN
    if work is not None and not resume and work.exists():
        raise ValueError(
            f"{folder} holds a compression that was begun; resume=True (--resume) goes on with it, or choose another "
            "folder (out)."
        )
    # the pool first: the teacher was not trained on it
    draw = np.random.default_rng(seed)
    order = [*(labeled + draw.permutation(len(rows) - labeled)), *draw.permutation(labeled)]
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
            seed=seed,
            folder=work,
        )
    layers = depth(teacher)
    return Made(
        student.eval(),
        kept(range(1, layers + 1), layers),
        {
            "kept": plan.after / plan.before,
            "ranks": low_rank.ranks(student),
            "blocks": [{"layer": one.layer, "losses": list(one.losses), "seconds": one.seconds} for one in blocks],
            "seconds": time.perf_counter() - began,
        },
    )


def _batches(prepared: Prepared, rows: Dataset, size: int) -> list[dict[str, Any]]:
    """Rows of like length share a batch; without labels, but where a model makes its decoder's inputs of them."""
    from fakit.evaluation.batches import length_sorted_batches
    from fakit.models.blocks import is_encoder_decoder

    collator, teacher = prepared.task.collator(prepared.tokenizer), prepared.teacher
    aside = set() if is_encoder_decoder(teacher) else {"labels"}
    made = length_sorted_batches(rows, collator, size, teacher.device, tokens=None)
    return [{name: x for name, x in batch.items() if name not in aside} for _, batch in made]
