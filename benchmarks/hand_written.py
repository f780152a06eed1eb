"""The yardsticks: what a good engineer writes by hand in plain PyTorch. Imports torch and transformers alone.

Attention maps come from eager attention, the only implementation under which transformers returns them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BertForMaskedLM

from benchmarks.measure import Way
from benchmarks.models import Batch, Size, models

PAIRS = ((1, 2), (2, 4), (3, 6))  # (student layer, teacher layer), evenly spaced
TEMPERATURE = 2.0


def hidden_state_loss(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    """Mean squared error over valid tokens and layer pairs; entry i of a tuple is layer i, (B, T, d)."""
    losses = [F.mse_loss(student[s][mask], teacher[t][mask]) for s, t in PAIRS]
    return sum(losses) / len(losses)


def attention_loss(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    """KL(A_T ‖ A_S) over valid queries, heads and layer pairs; entry i of a tuple is layer i + 1, (B, H, T, T)."""
    losses = []
    for s, t in PAIRS:
        ours, theirs = student[s - 1], teacher[t - 1]
        divergence = F.kl_div(ours.clamp_min(1e-30).log(), theirs, reduction="none").sum(-1)  # (B, H, T)
        losses.append((divergence * mask[:, None]).sum() / (mask.sum() * ours.shape[1]))
    return sum(losses) / len(losses)


def output_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """τ² KL of the distributions of valid tokens, (N, V)."""
    ours, theirs = (logits / TEMPERATURE for logits in (student, teacher))
    divergence = F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="batchmean", log_target=True)
    return TEMPERATURE**2 * divergence


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy where there is a label. (B, T, V), (B, T)"""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def all_terms(teacher: BertForMaskedLM, student: BertForMaskedLM, batch: Batch, attention: bool = True) -> Tensor:
    """Hidden states + attention maps + logits + labels, weight 1 each. `attention=False` leaves the maps out."""
    mask = batch["attention_mask"].bool()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    asked = {"output_hidden_states": True, "output_attentions": attention}
    with torch.no_grad():
        theirs = teacher(**inputs, **asked)
    ours = student(**inputs, **asked)
    total = hidden_state_loss(ours.hidden_states, theirs.hidden_states, mask)
    if attention:
        total = total + attention_loss(ours.attentions, theirs.attentions, mask)
    total = total + output_loss(ours.logits[mask], theirs.logits[mask])
    return total + label_loss(ours.logits, batch["labels"])


def without_attention(teacher: BertForMaskedLM, student: BertForMaskedLM, batch: Batch) -> Tensor:
    """Hidden states + logits + labels, which any attention implementation gives."""
    return all_terms(teacher, student, batch, attention=False)


def features_and_attention(teacher: BertForMaskedLM, student: BertForMaskedLM, batch: Batch) -> Tensor:
    """Hidden states + attention maps; the heads are left out."""
    mask = batch["attention_mask"].bool()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    asked = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        theirs = teacher.bert(**inputs, **asked)
    ours = student.bert(**inputs, **asked)
    total = hidden_state_loss(ours.hidden_states, theirs.hidden_states, mask)
    return total + attention_loss(ours.attentions, theirs.attentions, mask)


def outputs_alone(teacher: BertForMaskedLM, student: BertForMaskedLM, batch: Batch) -> Tensor:
    """Logits alone."""
    mask = batch["attention_mask"].bool()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        theirs = teacher(**inputs).logits
    return output_loss(student(**inputs).logits[mask], theirs[mask])


def floor(teacher: BertForMaskedLM, student: BertForMaskedLM, batch: Batch) -> Tensor:
    """No alignment: the teacher's forward pass, whose answer nobody reads, and the student on labels."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        teacher(**inputs)
    return label_loss(student(**inputs).logits, batch["labels"])


def by_hand(loss: Callable[..., Tensor], attention: str, size: Size, device: torch.device | str = "cpu") -> Way:
    """One of the losses above as a way, over models with this attention implementation."""
    teacher, student = models(size, attention, device=device)
    return Way(partial(loss, teacher, student), list(student.parameters()))
