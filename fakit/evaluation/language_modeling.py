"""Perplexity and bits per byte of a causal language model over a corpus, by a sliding window."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fakit.evaluation.batches import device_of, eval_mode
from fakit.evaluation.labeled import labeled_logits
from fakit.models.positions import declared_positions
from fakit.tracing.capture import capture


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and all that one must know to compare it.

    Perplexities of models with different tokenizers are not comparable; their bits per byte are.

    Attributes:
        corpus: what was read. window, stride: of the sliding window, in tokens.
        tokens: tokens scored. bytes: UTF-8 bytes of the text they stand for.
        nll: summed −log P of the scored tokens, in nats.
    """

    corpus: str
    window: int
    stride: int
    tokens: int
    bytes: int
    nll: float

    @property
    def value(self) -> float:
        """exp of the mean −log P per token (token-weighted: long texts count for more)."""
        return exponential(self.nll / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """−log₂ P of the text over its bytes: independent of the tokenizer."""
        return self.nll / math.log(2) / self.bytes

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return (
            f"perplexity {self.value:.2f}, {self.bits_per_byte:.3f} bits per byte "
            f"({self.corpus}: {self.tokens} tokens, {self.bytes} bytes; window {self.window}, stride {self.stride})"
        )


def perplexity(
    model,
    tokenizer,
    texts: str | Sequence[str],
    window: int | None = None,
    stride: int | None = None,
    corpus: str = "text",
    batch_size: int = 8,
) -> Perplexity:
    """Score every token once, each with at least `window − stride` tokens of context where the text has them.

    A window of `window` tokens moves on by `stride`; in each, only the tokens that no earlier window scored count.
    Texts of a list are read apart: no context crosses from one to the next. Special tokens that the tokenizer adds (a
    BOS) give context and are not scored; without one, the first token of a text has no context, so neither it nor its
    bytes count.

    Args:
        model: a causal language model. tokenizer: its (fast) tokenizer.
        texts: one text or a list of them.
        window: tokens the model sees at once; None takes all its positions, at most 1024.
        stride: tokens the window moves on, below `window`; None takes half the window.
        corpus: a name for the result. batch_size: windows per forward pass.

    Raises:
        ValueError: no text, nothing to score, a window beyond the model's positions, a stride that leaves a token
            without context.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise ValueError("perplexity: no texts were given; give a str or a list with at least one")
    if not tokenizer.is_fast:
        raise ValueError(f"perplexity: {type(tokenizer).__name__} gives no character offsets; load the fast tokenizer")
    if batch_size < 1:
        raise ValueError(f"perplexity: batch_size={batch_size} was asked; use at least 1")
    positions = declared_positions(model) or 1024
    window = min(positions, 1024) if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    if not 2 <= window <= positions:
        raise ValueError(
            f"perplexity: window={window} was asked of a model with {positions} positions; use 2…{positions}"
        )
    if not 1 <= stride < window:
        raise ValueError(
            f"perplexity: stride={stride} with window={window} would leave tokens without context; "
            "use 1 ≤ stride < window"
        )
    spans, scored_bytes = [], 0
    for text in texts:
        ids, scored, unscored_bytes = _tokenize(tokenizer, text)
        spans += _windows(ids, scored, window, stride)
        scored_bytes += len(text.encode()) - unscored_bytes
    tokens = sum(int((labels != -100).sum()) for _, labels in spans)
    if tokens == 0:
        raise ValueError(f"perplexity: {len(texts)} texts hold no token with context; give texts of at least 2 tokens")
    spans.sort(key=lambda span: -len(span[0]))
    nll = 0.0
    with torch.no_grad(), eval_mode(model):
        for start in range(0, len(spans), batch_size):
            nll += _summed_nll(model, spans[start : start + batch_size])
    return Perplexity(corpus, window, stride, tokens, scored_bytes, nll)


def exponential(mean_nll: float) -> float:
    """Perplexity of a mean −log P (nats); inf where it is beyond a float, as a diverged model's is."""
    return math.inf if mean_nll > math.log(sys.float_info.max) else math.exp(mean_nll)


def _tokenize(tokenizer, text: str) -> tuple[list[int], list[bool], int]:
    """Token ids, which of them are scored, and the bytes of the text that nobody scores."""
    encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)
    ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
    scored = [index > 0 and not special[index] for index in range(len(ids))]
    all_scored = not ids or special[0]  # the text starts behind a special token, which is its context
    unscored = 0 if all_scored else len(text[: encoded["offset_mapping"][0][1]].encode())
    return ids, scored, unscored


def _windows(ids: list[int], scored: list[bool], window: int, stride: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and labels (-100 = not scored here) of each window; every scored token is labeled in exactly one."""
    done = 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        labels = [
            token if scored[position] and position >= done else -100
            for position, token in enumerate(ids[begin:end], start=begin)
        ]
        yield torch.tensor(ids[begin:end]), torch.tensor(labels)
        done = end
        if end == len(ids):
            return


def _summed_nll(model, spans: list[tuple[Tensor, Tensor]]) -> float:
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([ids for ids, _ in spans], batch_first=True).to(device_of(model))  # (B, W), padded on the right
    labels = pad([labels for _, labels in spans], batch_first=True, padding_value=-100).to(ids.device)
    mask = pad([torch.ones_like(ids) for ids, _ in spans], batch_first=True).to(ids.device)
    trace = capture(model, {"input_ids": ids, "attention_mask": mask}, logits="head")
    return sum(summed_nll(logits, targets) for (logits,), targets in labeled_logits([trace], labels))


def summed_nll(logits: Tensor, targets: Tensor) -> float:
    """−log P of the targets, (N, V) and (N,), in nats; the sum is taken in float64."""
    return cross_entropy(logits.float(), targets, reduction="none").double().sum().item()
