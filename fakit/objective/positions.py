"""Which tokens two traces are compared at."""

from typing import Literal, get_args

import torch
from torch import Tensor

from fakit.layer_maps import Pair
from fakit.tracing.trace import Trace

Tokens = Literal["all", "labeled", "later"]
TOKENS: tuple[str, ...] = get_args(Tokens)


def predicting(student: Trace, teacher: Trace, labels: Tensor | None, like: Tensor) -> Tensor:
    """Which positions of (B, T, …) predict something on both sides: see `predicting_positions`."""
    mask = on_both_sides(student.logits_mask, teacher.logits_mask)
    mask = torch.ones(like.shape[:2], dtype=torch.bool, device=like.device) if mask is None else mask
    return predicting_positions(mask, labels, student.causal, student.documents)


def aligned(
    student: Trace, teacher: Trace, labels: Tensor | None, ours: Tensor, theirs: Tensor, how: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of tokens (B, T_S, …), (B, T_T, …) side by side, where the two sides may have been given the texts in
    tokens of their own: by the teacher's map `how` ("order", "text"), or where it has none the k-th predicting position
    of each row beside the teacher's k-th, as long as both have one.

    Without a map, labels say which tokens predict on the student's side, and on the teacher's where it has as many
    tokens; else its mask does.

    Returns:
        (B, K, …), (B, K, …) and a mask (B, K), K the student's positions, or without a map the shorter side's.
    """
    if how is not None:
        assert teacher.same is not None, "asked by the term"
        same = teacher.same[how].to(ours.device)
        mask = corresponding(student, labels, same)
        rows = torch.arange(len(theirs), device=theirs.device).unsqueeze(1)
        chosen = same[:, : mask.shape[1]].clamp_min(0).to(theirs.device)
        return ours[:, : mask.shape[1]], theirs[rows, chosen], mask
    masks = []
    for trace, logits in ((student, ours), (teacher, theirs)):
        mask = trace.logits_mask
        mask = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device) if mask is None else mask
        known = labels if labels is not None and labels.shape == mask.shape else None
        masks.append(predicting_positions(mask, known, trace.causal, trace.documents).to(ours.device))
    K = min(mask.shape[1] for mask in masks)
    sides = []
    for values, mask in zip((ours, theirs), masks, strict=True):
        first = (~mask).long().argsort(dim=1, stable=True)[:, :K]  # the predicting ones, in their order
        sides.append(values[torch.arange(len(values), device=first.device).unsqueeze(1), first])
    counts = torch.stack([mask.sum(1) for mask in masks]).amin(0)  # (B,)
    return sides[0], sides[1], torch.arange(K, device=ours.device) < counts.unsqueeze(1)


def corresponding_positions(
    mask: Tensor, labels: Tensor | None, same: Tensor, causal: bool, documents: Tensor | None = None
) -> Tensor:
    """Which tokens of a student's mask (B, T) predict something, where a token of the teacher's stands for them (`same`
    (B, T), -1 where none does). bool (B, T), or (B, T - 1) in causal models
    """
    mask = predicting_positions(mask, labels, causal, documents)
    return mask & (same[:, : mask.shape[1]].to(mask.device) >= 0)


def corresponding(student: Trace, labels: Tensor | None, same: Tensor) -> Tensor:
    """`corresponding_positions` of a trace.

    Raises:
        ValueError: a map that is not of the student's tokens.
    """
    mask = student.logits_mask
    mask = torch.ones_like(same, dtype=torch.bool) if mask is None else mask
    if same.shape != mask.shape:
        raise ValueError(
            f"the teacher's tokens are mapped to {tuple(same.shape)} of the student's, which read {tuple(mask.shape)} "
            "(B, T): both sides of a batch must be of the same rows (fakit.tasks.two_tokenizers)."
        )
    return corresponding_positions(mask, labels, same, student.causal, student.documents)


def predicting_positions(mask: Tensor, labels: Tensor | None, causal: bool, documents: Tensor | None = None) -> Tensor:
    """Which tokens of a mask (B, T) predict something: all of them, or in causal models those before a valid one, (B,
    T - 1).

    `documents` (B, T) numbers those of packed rows: the last token of one does not predict the first of the next.
    """
    if not causal:
        return mask
    mask = mask[:, :-1] & mask[:, 1:]
    if documents is not None:
        mask = mask & (documents[:, :-1] == documents[:, 1:])
    if labels is not None:
        labeled = labels[:, 1:].to(mask.device) != -100
        # texts without any label are unlabeled, and every token of theirs counts; others count where they carry one
        if documents is None:
            found = labeled.any(dim=1, keepdim=True)
        else:
            own = (labeled & mask).long()
            found = torch.zeros_like(documents).scatter_add_(1, documents[:, 1:], own).gather(1, documents[:, 1:]) > 0
        mask = mask & (labeled | ~found)
    return mask


def labeled_tokens(mask: Tensor, labels: Tensor, documents: Tensor | None = None) -> Tensor:
    """Which tokens of a mask (B, T) carry a label (not -100); of texts without any label all of them. bool (B, T)

    `documents` (B, T) numbers those of packed rows, each a text of its own.
    """
    labeled = mask & (labels.to(mask.device) != -100)
    if documents is None:
        return torch.where(labeled.any(dim=1, keepdim=True), labeled, mask)
    of_document = torch.zeros_like(documents).scatter_add_(1, documents, labeled.long()).gather(1, documents)
    return torch.where(of_document > 0, labeled, mask)


def later_tokens(mask: Tensor, documents: Tensor | None = None) -> Tensor:
    """The tokens of a mask (B, T) but the first of each text, where decoders keep their attention sinks. bool (B, T)

    `documents` (B, T) numbers those of packed rows, each a text of its own.
    """
    if documents is None:
        return mask & (mask.cumsum(dim=1) > 1)
    before = torch.zeros_like(mask)
    before[:, 1:] = mask[:, :-1] & (documents[:, 1:] == documents[:, :-1])
    return mask & before


def check_tokens(term: str, tokens: str) -> None:
    """Raise ValueError for what a term cannot be compared at."""
    if tokens not in TOKENS:
        raise ValueError(f"{term}(tokens={tokens!r}) is not known; choose one of {', '.join(map(repr, TOKENS))}.")


def compared_tokens(name: str, tokens: str, student: Trace, mask: Tensor | None, like: Tensor) -> Tensor | None:
    """Of a mask (B, T) what a term compares by its `tokens`: all, `labeled_tokens` (without labels all), or
    `later_tokens`.

    Args:
        like: (B, T, …), of the tokens that the mask is of; None of it counts all of them.

    Raises:
        ValueError: labels that are not the tokens'.
    """
    labels = student.labels
    if tokens == "all" or (tokens == "labeled" and labels is None):
        return mask
    mask = torch.ones(like.shape[:2], dtype=torch.bool, device=like.device) if mask is None else mask
    if tokens == "later" or labels is None:
        return later_tokens(mask, student.documents)
    if labels.shape != mask.shape:
        raise ValueError(
            f"{name} compares tokens that carry a label (tokens='labeled'), and the labels are "
            f"{tuple(labels.shape)} beside {tuple(mask.shape)} tokens (B, T); take tokens='all' where labels "
            "are of texts, and for the encoder of an encoder-decoder."
        )
    return labeled_tokens(mask, labels, student.documents)


def common_mask(student: Trace, teacher: Trace, pair: Pair) -> Tensor | None:
    """The tokens that count on both sides at a layer pair. bool (B, T)

    Raises:
        ValueError: an encoder's layer with a decoder's, or batches of different shapes.
    """
    ours, theirs = student.encoder_layers, teacher.encoder_layers
    if ours is not None and theirs is not None and (pair[0] > ours) != (pair[1] > theirs):
        raise ValueError(
            f"pair S{pair[0]}←T{pair[1]} matches an encoder's layer with a decoder's, which work on different tokens: "
            f"the student's encoder ends with layer {ours}, the teacher's with {theirs}. Map each stack by itself: "
            "LayerMap.uniform([encoder, decoder], [encoder, decoder])."
        )
    return on_both_sides(student.layer_mask(pair[0]), teacher.layer_mask(pair[1]))


def on_both_sides(student: Tensor | None, teacher: Tensor | None) -> Tensor | None:
    """The tokens that both masks count. bool (B, T)"""
    if student is None or teacher is None:
        return student if teacher is None else teacher
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student saw {tuple(student.shape)} tokens, the teacher {tuple(teacher.shape)} (B, T): both must be "
            "given the same batch, made by the same tokenizer, and a layer map pairs encoder with encoder and decoder "
            "with decoder."
        )
    return student & teacher.to(student.device)


def kept(trace: Trace, what: str, layer: int):
    """A trace's "hidden_states", "attention_outputs", "queries" … or all attention inputs ("attentions") of a layer.

    Raises:
        ValueError: the trace holds other layers.
    """
    found = trace.attention if what == "attentions" else getattr(trace, what)
    if layer not in found:
        keeps = "attentions" if what in ("queries", "keys", "values") else what
        raise ValueError(
            f"{what} of layer {layer} asked of a trace of {trace.name} that holds layers {sorted(found)}; "
            f"capture(..., {keeps}=[{layer}]) keeps it."
        )
    return found[layer]
