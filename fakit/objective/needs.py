"""What a term asks of the models, and what a batch holds for it to count."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fakit.models.tables import TEACHER_BATCH
from fakit.objective.positions import (
    corresponding_positions,
    labeled_tokens,
    later_tokens,
    predicting_positions,
)
from fakit.tracing.inputs import find_documents
from fakit.tracing.trace import Trace

MLP = ("mlp_outputs", "mlp_ups", "mlp_gates")  # places inside of a block's MLP, `fakit.tracing.mlp`
LAYERS = ("hidden_states", "attentions", "attention_outputs", *MLP)


@dataclass(frozen=True)
class Needs:
    """What `capture` must keep of one side. Two of them are joined by `|`.

    Attributes:
        hidden_states: layers 0…L.
        attentions: layers 1…L, whose attention inputs are kept.
        attention_outputs: layers 1…L, of which is kept what their attention adds to the hidden states.
        mlp_outputs, mlp_ups, mlp_gates: layers 1…L, of whose MLP is kept what it adds to the hidden states, and what
            its up and gate projections give.
        lens: True where hidden states are read by the model's own head.
        logits: True where logits are looked at.
        in_chunks: `capture(..., logits="head")` will do: the head and its input in place of logits over a large
            vocabulary.
        inputs: which of "queries", "keys" and "values" a cache must keep of an attention layer;
            `capture` keeps all three.
    """

    hidden_states: frozenset[int] = frozenset()
    attentions: frozenset[int] = frozenset()
    logits: bool = False
    in_chunks: bool = field(default=False, compare=False)
    inputs: frozenset[str] = field(default=frozenset({"queries", "keys"}), compare=False)
    attention_outputs: frozenset[int] = frozenset()
    lens: bool = False
    mlp_outputs: frozenset[int] = frozenset()
    mlp_ups: frozenset[int] = frozenset()
    mlp_gates: frozenset[int] = frozenset()

    def __post_init__(self):
        for name in (*LAYERS, "inputs"):
            object.__setattr__(self, name, frozenset(getattr(self, name)))
        object.__setattr__(self, "in_chunks", bool(self.in_chunks and self.logits))

    def __or__(self, other: "Needs") -> "Needs":
        in_chunks = all(needs.in_chunks for needs in (self, other) if needs.logits)
        return Needs(
            logits=self.logits or other.logits,
            in_chunks=in_chunks,
            inputs=self.inputs | other.inputs
            if self.attentions and other.attentions
            else (self if self.attentions else other).inputs,
            lens=self.lens or other.lens,
            **{name: getattr(self, name) | getattr(other, name) for name in LAYERS},
        )

    def __bool__(self) -> bool:
        return bool(self.layers or self.logits)

    @property
    def layers(self) -> frozenset[int]:
        """All that anything is asked of."""
        return frozenset().union(*(getattr(self, name) for name in LAYERS))

    def asked(self, whole: bool = False) -> dict[str, Any]:
        """What to ask of `capture`, by keyword; with `whole`, logits in full in place of a head."""
        logits = self.logits if whole else self.capture_logits
        return {name: getattr(self, name) for name in LAYERS} | {"logits": logits, "lens": self.lens}

    @property
    def capture_logits(self) -> bool | str:
        """What to ask of `capture` as `logits`: "head" where that will do."""
        return "head" if self.in_chunks else self.logits

    @classmethod
    def of(cls, asked: "Needs | Mapping | None", who: str) -> "Needs":
        """What a term's `needs` returned: these, the same as a mapping (`{"hidden_states": [1, 2]}`),
        or None for nothing.
        """
        if asked is None:
            return cls()
        if isinstance(asked, cls):
            return asked
        names = ("hidden_states", "attentions", "logits", "in_chunks", "inputs", "attention_outputs", "lens", *MLP)
        if not isinstance(asked, Mapping) or set(asked) - set(names):
            raise ValueError(
                f"{who} needs {asked!r}; return Needs(hidden_states=[…], attentions=[…], logits=…) or a dictionary "
                f"with keys of {', '.join(names)}."
            )
        wrong = {name: asked[name] for name in LAYERS if not _layers(asked.get(name, ()))}
        if wrong:
            raise ValueError(
                f"{who} needs {wrong}; layers are whole numbers: 0 the embeddings, i the output of block i."
            )
        return cls(**asked)


def _layers(given: object) -> bool:
    return isinstance(given, Iterable) and all(isinstance(layer, int) and layer >= 0 for layer in given)


class CountedBatch(Mapping):
    """A batch as a term counts it: the mapping that the models are given, and what follows from it.

    A term that is a mean over tokens, predicting positions, labels or texts returns their number (a sum over `mask`,
    `positions` …) from `Term.count`, so that the mean over several batches is the mean over all that counts in them.

    Attributes:
        mask: bool (B, T), the tokens; (B, 1) where there is no padding to tell (an image).
        documents: int64 (B, T), the number of each token's document where rows pack several; else None.
        labels: (B,), (B, C) or (B, T), as the task's loss sees them; None without labels.
        causal: logits at t predict the token at t + 1.
        token_logits: logits are (B, T, V), not (B, C).
    """

    def __init__(self, batch: Mapping[str, Tensor], causal: bool, token_logits: bool):
        self._batch, self.causal = batch, causal
        self.mask, labels = _tokens(batch), batch.get("labels")
        # labels of the tokens' shape are the tokens' (token classification); floats are several labels a text
        per_token = labels is not None and labels.shape == self.mask.shape and not labels.is_floating_point()
        self.token_logits = token_logits or per_token
        self.documents = find_documents(batch)

    def __getitem__(self, name: str) -> Tensor:
        return self._batch[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._batch)

    def __len__(self) -> int:
        return len(self._batch)

    @property
    def texts(self) -> Tensor:
        """The number of rows. ()"""
        return self.mask.new_tensor(len(self.mask), dtype=torch.long)

    @property
    def lengths(self) -> Tensor:
        """Tokens of every row, or of every document of packed rows. (B,) or (B · T,), 0 where there are no more"""
        if self.documents is None:
            return self.mask.sum(1)
        return torch.zeros_like(self.documents).scatter_add_(1, self.documents, self.mask.long()).flatten()

    @property
    def tokens(self) -> Tensor:
        """The number of tokens. ()"""
        return self.lengths.sum()

    @property
    def labeled_tokens(self) -> Tensor:
        """The tokens with a label, and all of texts without one; all where labels are not the tokens'. bool (B, T)"""
        labels = self._own_labels
        if labels is None or labels.shape != self.mask.shape:
            return self.mask
        return labeled_tokens(self.mask, labels, self.documents)

    @property
    def pairs(self) -> Tensor:
        """The number of pairs (query, key) that attention maps are over. ()"""
        lengths = self.lengths
        return (lengths * (lengths + 1) // 2 if self.causal else lengths**2).sum()

    def compared(self, tokens: str) -> Tensor:
        """The tokens that a term of these `tokens` compares: "all", "labeled" or "later". bool (B, T)"""
        if tokens == "labeled":
            return self.labeled_tokens
        return later_tokens(self.mask, self.documents) if tokens == "later" else self.mask

    def pairs_of(self, queries: Tensor) -> Tensor:
        """The number of pairs whose query is one of these. bool (B, T) -> ()"""
        keys = self.mask.long().cumsum(1)  # that a causal model's query sees
        if self.documents is not None:
            before = torch.where(self.mask, keys - 1, keys)
            first = torch.zeros_like(keys).scatter_reduce(1, self.documents, before, "amin", include_self=False)
            keys = keys - first.gather(1, self.documents)
        if not self.causal:
            of = self.documents if self.documents is not None else torch.zeros_like(keys)
            keys = torch.zeros_like(keys).scatter_add_(1, of, self.mask.long()).gather(1, of)
        return (keys * queries).sum()

    @property
    def positions(self) -> Tensor:
        """The number of distributions that logits are: predicting positions, or rows. ()"""
        if not self.token_logits:
            return self.texts
        labels = self.get("labels")
        if self.get("decoder_attention_mask") is not None:
            return self["decoder_attention_mask"].bool().sum()
        if not self.causal and labels is not None and labels.shape != self.mask.shape:  # a decoder's
            return (labels != -100).sum()
        return predicting_positions(self.mask, labels, self.causal, self.documents).sum()

    def corresponding(self, how: str) -> Tensor | None:
        """The number of positions at which the teacher, with tokens of its own, is compared; None where it has the
        student's. ()
        """
        same = (self.get(TEACHER_BATCH) or {}).get(f"same_{how}")
        if same is None:
            return None
        return corresponding_positions(self.mask, self.get("labels"), same, self.causal, self.documents).sum()

    @property
    def labeled_positions(self) -> Tensor:
        """The number of `positions` that carry a label. ()"""
        labels = self.labels
        assert labels is not None, "without labels the term is off"
        labeled, own = labels != -100, self.get("decoder_attention_mask")
        if own is not None and own.shape == labels.shape:
            labeled = labeled & own.bool()
        elif labels.shape == (len(self.mask), self.mask.shape[1] - self.causal):  # of the tokens that `mask` is of
            labeled = labeled & predicting_positions(self.mask, self.get("labels"), self.causal, self.documents)
        return labeled.sum()

    @property
    def labels(self) -> Tensor | None:
        """Labels as the task's loss sees them: without those that nothing predicts."""
        own = self._own_labels
        return own[:, 1:] if own is not None and self.causal and own.dim() == 2 else own

    @property
    def _own_labels(self) -> Tensor | None:
        return Trace(mask=self.mask, documents=self.documents, causal=self.causal).own_labels(self.get("labels"))


def _tokens(batch: Mapping[str, Tensor]) -> Tensor:
    mask = batch.get("attention_mask")
    if mask is not None and mask.dim() in (2, 3):  # (B, N, T): multiple choice, every choice a row
        return mask.flatten(0, -2).bool()
    ids = batch.get("input_ids")
    if ids is not None:
        return torch.ones_like(ids, dtype=torch.bool).flatten(0, -2)
    found = next(value for value in batch.values() if isinstance(value, Tensor))
    return found.new_ones(len(found), 1).bool()
