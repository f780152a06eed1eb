"""`evaluate`: the numbers that belong to a task, in one pass over an encoded dataset."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fakit.evaluation import calibration, metrics
from fakit.evaluation.batches import device_of, eval_mode, length_sorted_batches, rows_of
from fakit.evaluation.fidelity import Agreement
from fakit.evaluation.generation import SCORED, Generations, generation_metrics, written_text
from fakit.evaluation.labeled import UNLABELED, labeled_logits
from fakit.evaluation.language_modeling import exponential, summed_nll
from fakit.losses.task import REGRESSION, SEVERAL_LABELS
from fakit.models.class_names import class_names, class_order
from fakit.models.head_kinds import problem_type
from fakit.tracing.capture import capture

KINDS = ("sequence-classification", "regression", "causal-lm")
TOP = 5  # of CR@k and MOR@k


def evaluate(
    model,
    dataset,
    collator: Callable,
    task,
    tokenizer=None,
    batch_size: int = 64,
    teacher=None,
    max_examples: int = SCORED,
    generated: Generations | None = None,
) -> dict[str, float]:
    """Evaluate a model on an encoded dataset, by the metrics of the task's kind.

    | kind | keys |
    |---|---|
    | sequence-classification | accuracy, f1 (binary for two classes, else macro), matthews, ece, nll, brier |
    | regression | pearson, spearman, mse |
    | causal-lm | perplexity and nll of the labeled tokens |
    | causal-lm, from source to target | also cer and cer_copy |
    | causal-lm, instructions with labels on the answers | also bits_per_byte, rougeL, bleu, cer |

    cer, bleu and rougeL are those of greedy decoding from the source, or from all that stands before the last answer;
    cer_copy is that of leaving the source as it is; bits_per_byte is −log₂ P of the answers, their ends included, over
    their UTF-8 bytes. With a teacher also: agreement (share of equal top-1) and kl (teacher ‖ student, nats); for
    causal-lm acceptance; where there are more than five classes or tokens to choose from, cr@5 and mor@5 (see
    `Agreement`); for regression teacher_pearson and teacher_mse.

    Batches go by length and hold `batch_size` rows or `batches.TOKENS` tokens at most; logits of a language model are
    made at the labeled tokens, some at a time. Dropout is off, and models keep their device and training mode. Rows
    with label -100 count for the agreement with the teacher only; for causal-lm the labeled tokens alone count,
    everywhere. A model that gives NaN for a row has no predictions: every number is NaN, not the share of class 0.

    Args:
        model: a transformers model. dataset: encoded examples (input_ids, attention_mask, labels).
        collator: pads a list of examples to a batch of tensors.
        task: a TextTask; its kind, label_names and columns are read.
        tokenizer: to decode generated text (None leaves cer out), and where teacher and student pad their vocabulary
            to different sizes, to know the size that they share.
        teacher: compared on the same batches; same classes or vocabulary. For classification and regression also its
            `predictions` on this dataset, (N, C), which many students may share.
        max_examples: generate for the first so many lines.
        generated: what `generation_metrics` gave for this model and dataset, in place of generating once more.

    Raises:
        ValueError: unknown kind, an empty or unlabeled dataset, logits of another size than labels or teacher, a model
            whose class names are the task's in another order.
    """
    if task.kind not in KINDS:
        raise ValueError(f"evaluate: the task's kind is {task.kind!r}; known are {', '.join(KINDS)}")
    if task.kind == "causal-lm":
        shared_vocabulary = None if tokenizer is None else len(tokenizer)
        results, nll = _language_modeling(model, dataset, collator, batch_size, teacher, shared_vocabulary)
        names = written_metrics(task) if tokenizer is not None else ()
        if "bits_per_byte" in names:
            results["bits_per_byte"] = nll / math.log(2) / _answer_bytes(dataset, tokenizer)
        written = [name for name in names if name != "bits_per_byte"]
        if written and math.isnan(results["nll"]):  # greedy decoding would still pick tokens
            return dict.fromkeys((*results, *written), math.nan)
        if written:
            if generated is None:
                generated = generation_metrics(model, dataset, tokenizer, max_examples, batch_size=batch_size)
            results |= {name: generated.metrics[name] for name in written}
        return results

    problem = problem_type(model.config) if hasattr(model, "config") else None
    if (problem is not None and (problem == REGRESSION) != (task.kind == "regression")) or problem == SEVERAL_LABELS:
        raise ValueError(
            f"evaluate: the task's kind is {task.kind!r}, and the model's problem_type is {problem!r}: its logits are "
            "not what these metrics measure. Evaluate a model of the task's kind; for several labels a text take "
            "`predictions` and a metric of your own."
        )
    for name, one in (("model", model), ("teacher", teacher)):
        _check_classes(name, one, task)
    logits, labels = _predict(model, dataset, collator, batch_size)  # (N, C), (N,)
    teacher_logits = (
        teacher
        if teacher is None or isinstance(teacher, Tensor)
        else predictions(teacher, dataset, collator, batch_size)
    )
    if labels is None or not (labeled := labels != UNLABELED).any():
        raise ValueError(
            f"evaluate: none of the {len(logits)} rows has a label (column labels, -100 = none); evaluate on a "
            "labeled split, or compare with a teacher alone through Agreement"
        )
    return _score(logits, labels, labeled, teacher_logits, task)


def score_predictions(logits: Tensor, labels: Tensor, task) -> dict[str, float]:
    """The metrics of `evaluate`, of logits that are there already.

    Args:
        logits: (N, C), as `predictions` gives them. labels: (N,), -100 = none. task: a classification or regression.

    Raises:
        ValueError: no row has a label, or logits and task have other numbers of classes.
    """
    if not (labeled := labels != UNLABELED).any():
        raise ValueError(f"score_predictions: none of the {len(logits)} rows has a label (-100 = none).")
    return _score(logits, labels, labeled, None, task)


def _score(logits, labels, labeled, teacher_logits, task) -> dict[str, float]:
    if task.kind == "regression":
        return _regression(logits, labels, labeled, teacher_logits)
    return _classification(logits, labels, labeled, teacher_logits, task.label_names)


def written_metrics(task) -> tuple[str, ...]:
    """What `evaluate` adds for a language model whose task has something to write: targets, or answers with labels."""
    columns = set(task.test.column_names)
    if {"source", "target"} <= columns:
        return ("cer", "cer_copy")
    if "answer" in columns and task.tokens == "completion":
        return ("bits_per_byte", "rougeL", "bleu", "cer")
    return ()


def _answer_bytes(dataset, tokenizer) -> int:
    """UTF-8 bytes of all labeled text, without special tokens."""
    kept = [[label for label in row["labels"] if label != UNLABELED] for row in rows_of(dataset)]
    return max(1, sum(len(written_text(tokenizer, labels).encode()) for labels in kept))


def predictions(model, dataset, collator: Callable, batch_size: int = 64) -> Tensor:
    """Logits (N, C), float32 on the CPU, in the order of the dataset; labels may be absent.

    They carry no gradient and may serve as fixed targets of a loss.
    """
    return _predict(model, dataset, collator, batch_size)[0]


def _predict(model, dataset, collator, batch_size) -> tuple[Tensor, Tensor | None]:
    rows = rows_of(dataset)
    order, logits, labels = [], [], []
    # no_grad, not inference_mode: an inference tensor could never take part in a loss.
    with torch.no_grad(), eval_mode(model):
        for indices, batch in length_sorted_batches(rows, collator, batch_size, device_of(model)):
            batch_labels = batch.pop("labels", None)
            output = capture(model, batch).logits.float().cpu()
            if output.ndim != 2:
                raise ValueError(
                    f"predictions: the model gives logits of shape {tuple(output.shape)}, (B, C) was expected; "
                    "use a sequence classifier, or a task of kind 'causal-lm'"
                )
            order += indices
            logits.append(output)
            labels.append(batch_labels)
    found = torch.tensor(order).argsort()  # back to the order of the dataset
    return torch.cat(logits)[found], None if labels[0] is None else torch.cat(labels).cpu()[found]


def _check_classes(who: str, model, task) -> None:
    """Refuse a classifier whose own names say that its outputs stand in another order than the task's classes."""
    config = getattr(model, "config", None)
    if task.kind != "sequence-classification" or not task.label_names or not hasattr(config, "id2label"):
        return
    found = class_names(config)
    if len(found) != len(task.label_names):
        return  # refused where the logits are looked at
    order, _ = class_order(found, task.label_names)
    if order != sorted(order):
        raise ValueError(
            f"evaluate: the {who}'s classes are {', '.join(found)}, the task's {', '.join(task.label_names)}: the same "
            "ones in another order. fakit.models.class_names.order_classes(model, task.label_names) puts the model's "
            "into the task's order."
        )


def _classification(logits, labels, labeled, teacher_logits, label_names) -> dict[str, float]:
    classes = logits.shape[1]
    if label_names is not None and len(label_names) != classes:
        raise ValueError(
            f"evaluate: the model has {classes} classes, the task has {len(label_names)}: {label_names[:5]}…; "
            "load the model with num_labels of the task"
        )
    results = {}
    if teacher_logits is not None:
        # of five classes and fewer, the top five are all of them
        results = Agreement(k=TOP if classes > TOP else None).update(logits, teacher_logits).compute()
    has_nan = bool(logits.isnan().any())
    logits, labels = logits[labeled], labels[labeled]
    if has_nan:  # argmax would call them class 0
        names = ("accuracy", "f1", "matthews", "ece", "nll", "brier")
        return dict.fromkeys((*names, *results), math.nan)
    predicted = logits.argmax(dim=-1)
    return {
        "accuracy": metrics.accuracy(predicted, labels),
        "f1": metrics.f1(predicted, labels, average="binary" if classes == 2 else "macro"),
        "matthews": metrics.matthews(predicted, labels),
        "ece": calibration.expected_calibration_error(logits, labels),
        "nll": calibration.negative_log_likelihood(logits, labels),
        "brier": calibration.brier_score(logits, labels),
    } | results


def _regression(logits, labels, labeled, teacher_logits) -> dict[str, float]:
    scores = _single_output(logits, "model")
    if scores[labeled].isnan().any():
        names = ("pearson", "spearman", "mse")
        return dict.fromkeys(
            (*names, *(("teacher_pearson", "teacher_mse") if teacher_logits is not None else ())), math.nan
        )
    results = {
        "pearson": metrics.pearson(scores[labeled], labels[labeled]),
        "spearman": metrics.spearman(scores[labeled], labels[labeled]),
        "mse": float((scores[labeled] - labels[labeled].double()).square().mean()),
    }
    if teacher_logits is not None:
        teacher_scores = _single_output(teacher_logits, "teacher")
        results["teacher_pearson"] = metrics.pearson(scores, teacher_scores)
        results["teacher_mse"] = float((scores - teacher_scores).square().mean())
    return results


def _single_output(logits: Tensor, who: str) -> Tensor:
    if logits.shape[1] != 1:
        raise ValueError(
            f"evaluate: a regression needs one output, the {who} has {logits.shape[1]}; load it with num_labels=1"
        )
    return logits[:, 0].double()


def _language_modeling(
    model, dataset, collator, batch_size, teacher, shared_vocabulary
) -> tuple[dict[str, float], float]:
    """Metrics by name, and the summed −log P."""
    nll, tokens = 0.0, 0
    agreement: Agreement | None = None
    with torch.no_grad(), eval_mode(model), eval_mode(model if teacher is None else teacher):
        for _, batch in length_sorted_batches(rows_of(dataset), collator, batch_size, device_of(model)):
            labels = batch.pop("labels", None)  # (B, T)
            if labels is None:
                raise ValueError(
                    f"evaluate: a batch has {sorted(batch)}, but no labels; encode the dataset with its targets"
                )
            asked = [model] if teacher is None else [model, teacher]
            traces = [capture(one, batch, logits="head") for one in asked]
            for logits, targets in labeled_logits(traces, traces[0].own_labels(labels)):
                nll, tokens = nll + summed_nll(logits[0], targets), tokens + len(targets)
                if teacher is not None:
                    sizes = {one.shape[-1] for one in logits}
                    if len(sizes) == 2 and shared_vocabulary is not None and min(sizes) >= shared_vocabulary:
                        logits = [one[:, :shared_vocabulary] for one in logits]
                    if agreement is None:
                        agreement = Agreement(TOP if logits[0].shape[-1] > TOP else None, acceptance=True)
                    agreement.update(*logits)
    if tokens == 0:
        raise ValueError("evaluate: no labeled token (all labels are -100); evaluate on a labeled split")
    results = {"perplexity": exponential(nll / tokens), "nll": nll / tokens}
    results |= {} if agreement is None else agreement.compute()
    return dict.fromkeys(results, math.nan) if math.isnan(nll) else results, nll
