"""Calibration: does a predicted probability of 0.8 come true in 80 % of the cases?

Everything takes logits (N, C) and labels (N,), softmaxes in float64, and returns plain floats or NumPy arrays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Reliability:
    """The bins of a reliability diagram.

    Attributes:
        edges: (bins + 1,) limits of the confidence bins; bin i holds edges[i] < confidence ≤ edges[i + 1].
        confidence: (bins,) mean confidence in each bin; NaN where it is empty.
        accuracy: (bins,) share of right predictions in each bin; NaN where it is empty.
        count: (bins,) examples in each bin.
    """

    edges: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray

    @property
    def ece(self) -> float:
        """Σ (count / N) · |accuracy − confidence| over the bins that hold examples (Guo et al. 2017, eq. 3)."""
        filled = self.count > 0
        gap = np.abs(self.accuracy[filled] - self.confidence[filled])
        return float((self.count[filled] / self.count.sum() * gap).sum())


def reliability(logits: Tensor, labels: Tensor, bins: int = 15) -> Reliability:
    """Confidence (the largest probability) against accuracy, in bins of equal width over 0…1.

    Args:
        logits: (N, C). labels: (N,) classes. bins: number of bins, 15 as in Guo et al. 2017.
    """
    log_probs, labels = _checked(logits, labels)
    if bins < 1:
        raise ValueError(f"reliability: bins={bins} was asked; use at least 1 (15 is customary)")
    top, predicted = log_probs.max(dim=-1)
    confidence, right = top.exp().numpy(), (predicted == labels).double().numpy()
    edges = np.linspace(0.0, 1.0, bins + 1)
    index = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)  # (N,): lower < c ≤ upper
    count = np.bincount(index, minlength=bins)

    def bin_means(values: np.ndarray) -> np.ndarray:
        sums = np.bincount(index, weights=values, minlength=bins)
        return np.divide(sums, count, out=np.full(bins, np.nan), where=count > 0)

    return Reliability(edges, bin_means(confidence), bin_means(right), count)


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """ECE, 0…1: the mean gap between confidence and accuracy over equal-width bins (Guo et al. 2017)."""
    return reliability(logits, labels, bins).ece


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> float:
    """Mean −log P(label), in nats."""
    log_probs, labels = _checked(logits, labels)
    return float(-log_probs.gather(1, labels[:, None]).mean())


def brier_score(logits: Tensor, labels: Tensor) -> float:
    """Mean over examples of Σ_c (P_c − [c is the label])², 0…2 (Brier 1950; twice the one-class binary form)."""
    log_probs, labels = _checked(logits, labels)
    truth = torch.nn.functional.one_hot(labels, log_probs.shape[-1]).double()
    return float((log_probs.exp() - truth).square().sum(dim=-1).mean())


def _checked(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N, C) in float64 and labels (N,) on the CPU."""
    logits, labels = torch.as_tensor(logits).detach().cpu(), torch.as_tensor(labels).detach().cpu()
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)}, labels {tuple(labels.shape)}; give logits (N, C) and labels (N,)"
        )
    if len(labels) == 0:
        raise ValueError("logits and labels are empty; calibration needs at least one example")
    classes = logits.shape[1]
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, the logits have {classes} classes; "
            "drop unlabeled rows (-100) and check that model and data agree on the classes"
        )
    return torch.log_softmax(logits.double(), dim=-1), labels.long()
