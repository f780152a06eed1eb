"""The task's own loss on the labels."""

from torch import Tensor
from torch.nn import functional as F

from fakit.losses.reduce import at_least_float32, check_labels, values_known

# what logits (B, C) of a classifier mean, in transformers' words (config.problem_type)
REGRESSION, SEVERAL_LABELS = "regression", "multi_label_classification"


def task_loss(logits: Tensor, labels: Tensor, causal: bool = False, problem_type: str | None = None) -> Tensor:
    """The task's own loss, a mean over the labels that count; 0 (with graph) when all of them are -100.

    | problem | logits | labels | loss |
    |---|---|---|---|
    | classes | (B, C) or (B, T, V) | integers (B,) or (B, T) | cross-entropy |
    | several labels a text | (B, C) | 0 … 1, (B, C) | binary cross-entropy, mean over texts and labels |
    | regression | (B, 1) or (B, C) | (B,) or (B, C) | mean squared error |

    Args:
        logits: what the model says.
        labels: -100, or NaN among floats, takes no part.
        causal: logits at t predict the label at t + 1.
        problem_type: "single_label_classification", "multi_label_classification" or "regression", of logits (B, C).
            None: one output is a regression, floats (B, C) are several labels, everything else is classes,
            as in transformers.

    Raises:
        ValueError: no logits, labels of another shape, floats for classes, or (on the CPU, where looking costs nothing)
            a label that is no class and not -100, or of several outside 0 … 1.
    """
    if logits is None:
        raise ValueError("the task loss needs the student's logits, and its trace has none; capture(..., logits=True).")
    labels = labels.to(logits.device)
    logits = at_least_float32(logits)
    if logits.dim() == 3 and causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    if logits.shape[-1] == 1 and labels.dim() == logits.dim() - 1:  # one output may have labels (B,)
        labels = labels.unsqueeze(-1)
        problem_type = problem_type or REGRESSION
    if logits.dim() > 2:
        problem_type = REGRESSION if logits.shape[-1] == 1 else None
    elif problem_type is None and labels.shape == logits.shape:
        problem_type = REGRESSION if logits.shape[1] == 1 else SEVERAL_LABELS
    if problem_type in (REGRESSION, SEVERAL_LABELS):
        return _by_entry(logits, labels, problem_type)
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}; one label a prediction."
        )
    if labels.is_floating_point():
        raise ValueError(
            f"labels are {str(labels.dtype).removeprefix('torch.')} {tuple(labels.shape)}, and the head has "
            f"{logits.shape[-1]} classes, which are integers. Cast the labels to integers; a regression has one output "
            "(num_labels=1), several labels a text are floats (B, C)."
        )
    check_labels("task_loss", labels, logits.shape[-1])
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten().long(), ignore_index=-100, reduction="sum")
    return loss / (labels != -100).sum().clamp_min(1)


def _by_entry(logits: Tensor, labels: Tensor, problem_type: str) -> Tensor:
    """The mean over all entries of (B, C) that carry a label."""
    if logits.shape != labels.shape:
        raise ValueError(
            f"labels {tuple(labels.shape)} do not fit logits {tuple(logits.shape)} of {problem_type}: one label an "
            "output. Classes are integers (B,) and problem_type='single_label_classification'."
        )
    valid = (labels != -100) & ~labels.isnan()
    labels = labels.masked_fill(~valid, 0).to(logits.dtype)
    if problem_type == REGRESSION:
        errors = (logits - labels).square()
    else:
        _check_several(labels)
        errors = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return (errors * valid).sum() / valid.sum().clamp_min(1)


def _check_several(labels: Tensor) -> None:
    if not values_known(labels):
        return
    wrong = labels[(labels < 0) | (labels > 1)]
    if len(wrong):
        raise ValueError(
            "labels of several a text are 0 to 1, one for each class, or -100 where one takes no part; found "
            f"{wrong.unique().tolist()[:5]} at {len(wrong)} of {labels.numel()} places."
        )
