"""The task's own loss on the labels."""

from torch import Tensor
from torch.nn import functional as F

from fakit.losses.reduce import at_least_float32, check_labels


def task_loss(logits: Tensor, labels: Tensor, causal: bool = False) -> Tensor:
    """The task's own loss, a mean over the labels that count; 0 (with graph) when all of them are -100.

    Args:
        logits: (B, C) or (B, T, V); C = 1 means regression.
        labels: (B,) or (B, T); -100, or NaN in regression, takes no part.
        causal: logits at t predict the label at t + 1.

    Raises:
        ValueError: no logits, labels of another shape, or (on the CPU, where looking costs nothing) a label that is no class and not -100.
    """
    if logits is None:
        raise ValueError("the task loss needs the student's logits, and its trace has none; capture(..., logits=True).")
    labels = labels.to(logits.device)
    logits = at_least_float32(logits)
    if logits.dim() == 3 and causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}; one label a prediction."
        )
    if logits.shape[-1] == 1:
        valid = (labels != -100) & ~labels.isnan()
        error = (logits.squeeze(-1) - labels.masked_fill(~valid, 0)).square()
        return (error * valid).sum() / valid.sum().clamp_min(1)
    check_labels("task_loss", labels, logits.shape[-1])
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten().long(), ignore_index=-100, reduction="sum")
    return loss / (labels != -100).sum().clamp_min(1)
