"""What a record says beside settings and scores, so that `fakit.experiments.doctor` need not guess: the texts that were
read, what the teacher scores and how soft its outputs were, how deep the models are, where the run was made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fakit.evaluation.labeled import UNLABELED
from fakit.experiments.build import Prepared, TrainingRows
from fakit.objective.objective import Objective
from fakit.objective.outputs import Outputs
from fakit.training.environment import environment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fakit.tasks import TextTask

LINES = 16  # of a language model's test rows, whose teacher outputs are looked at


def facts_of_texts(task: TextTask, rows: TrainingRows) -> dict[str, Any]:
    """What training and evaluation read, in the student's tokens.

    Returns:
        padding: of all places in the planned batches, the share that is padding. cut: split → [texts that were cut,
        texts], of the splits that were encoded and where it is known. validation, test: texts. majority: of a
        classification, the share of the test texts in the largest class.
    """
    lengths = np.array([len(ids) for ids in rows.rows["input_ids"]])[rows.plan]  # (batches, batch_size)
    places = lengths.max(axis=1).sum() * lengths.shape[1]
    read = ("train", "pool", "validation", "test") if len(rows.rows) > rows.labeled else ("train", "validation", "test")
    found = {
        "padding": round(1 - float(lengths.sum() / places), 4),
        "cut": {split: list(task.cut[split]) for split in read if split in task.cut},
        "validation": len(task.validation),
        "test": len(task.test),
    }
    if task.kind == "sequence-classification" and task.label_names:
        counts = Counter(label for label in task.test["label"] if label is not None and label != UNLABELED)
        found["majority"] = max(counts.values()) / counts.total() if counts else None
    return found


def scores_of_teacher(prepared: Prepared) -> dict[str, float] | None:
    """A classifier's metrics on the test split, from the logits that students are compared with; None of a language
    model, whose evaluation would take as long as the student's.
    """
    from fakit.evaluation.evaluator import score_predictions

    logits = None if prepared.task.kind == "causal-lm" else prepared.reference()
    if logits is None:
        return None
    return score_predictions(logits, torch.tensor(prepared.test["labels"]), prepared.task)


def softness(prepared: Prepared, objective: Objective, history: Sequence[Mapping[str, float]]) -> dict[str, Any] | None:
    """How soft the teacher's outputs are at the temperature that each `Outputs` term had in the end.

    Returns:
        term → temperature; classes, the exponential of the mean entropy (nats) of softmax(logits / τ): as many classes
        of equal probability are as uncertain; of, how many there are. None without such a term, and where none of the
        first test rows fits in the tokens of a teacher that has its own.
    """
    terms = {name: term for name, term in objective.of_kind(Outputs).items() if term.loss != "logit_mse"}
    if not terms or prepared.task.kind == "regression":
        return None
    logits = _teacher_logits(prepared)  # (N, C)
    if logits is None:
        return None
    last = next((row for row in reversed(history) if any(key.startswith("temperature") for key in row)), {})
    found = {}
    for name, term in terms.items():
        tau = float(last.get(f"temperature/{name}", last.get("temperature", objective.taus[name])))
        x = logits[:, : term.vocab_size].double() / tau
        logs = x.log_softmax(dim=-1)
        entropy = -(logs.exp() * logs.masked_fill(logs == -torch.inf, 0.0)).sum(-1)  # (N,)
        classes = entropy.mean().exp().item()
        found[name] = {"temperature": tau, "classes": round(classes, 4), "of": x.shape[-1]}
    return found


def _teacher_logits(prepared: Prepared) -> Tensor | None:
    """Of a classifier on the test split, (N, C); of a language model at the labels of the first test rows, (n, V)."""
    from fakit.evaluation.batches import eval_mode, to_device
    from fakit.evaluation.labeled import labeled_logits
    from fakit.tracing.capture import capture

    if prepared.task.kind != "causal-lm":  # whose teacher and student read the same tokens
        return prepared.reference().float()
    teacher, (tokenizer, rows) = prepared.teacher, _rows_of_teacher(prepared)
    if not rows:
        return None
    batch = to_device(prepared.task.collator(tokenizer)(rows), teacher.device)
    labels = batch.pop("labels")
    with torch.no_grad(), eval_mode(teacher):
        trace = capture(teacher, batch, logits="head")
        logits, _ = next(labeled_logits([trace], trace.own_labels(labels)), ([None], None))
    return None if logits[0] is None else logits[0].float().cpu()


def _rows_of_teacher(prepared: Prepared) -> tuple[PreTrainedTokenizerBase, list[dict[str, Any]]]:
    """The first test rows in the teacher's tokens, without those that are too long in them: when a run asks, it has
    been trained, and must not end here.
    """
    from fakit.models.positions import longest_row

    task, tokenizer = prepared.task, prepared.teacher_tokenizer
    if tokenizer is None:
        return prepared.tokenizer, prepared.test.select(range(min(LINES, len(prepared.test)))).to_list()
    texts = task.test.select(range(min(LINES, len(task.test))))
    try:
        rows = task.encode(texts, tokenizer, prepared.config.training.max_length).to_list()
    except ValueError:  # not one that fits, or one that does not where that is refused
        return tokenizer, []
    longest = longest_row(prepared.teacher)
    return tokenizer, [row for row in rows if longest is None or len(row["input_ids"]) <= longest][:LINES]


def made_on() -> dict[str, Any]:
    """The processor, GPU and commit that a run is made with: records of one folder may come from several."""
    found = environment()
    return {key: found["machine"][key] for key in ("processor", "gpu")} | {"commit": found["commit"]}
