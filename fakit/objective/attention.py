"""Attention alignment: maps, scores or relations of attention compared at the mapped layers (arXiv 2412.19449)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fakit.layer_maps import LayerMap, Pair
from fakit.losses import attention as attention_losses
from fakit.losses.fused import streamed
from fakit.losses.fused.attention_inputs import AttentionInputs
from fakit.objective.breakdown import total
from fakit.objective.needs import CountedBatch, Needs
from fakit.objective.over_layers import OverLayers
from fakit.objective.positions import Tokens, check_tokens, common_mask, compared_tokens, kept
from fakit.objective.schedules import Schedule
from fakit.objective.term import choose
from fakit.tracing.trace import Trace

# Those with relations are no function of two maps: the term compares them itself.
ATTENTION_LOSSES = attention_losses.LOSSES | {"relations": None, "minilm": None}
Heads = Literal["one-to-one", "group-mean", "best-match"]
HEADS: tuple[str, ...] = get_args(Heads)


@dataclass(init=False)
class Attention(OverLayers):
    """Attention alignment over the mapped layers (layer 0 has none and is left out).

    Args:
        loss: "kl" or "mse" of the maps; "score_mse" of the scores before the softmax (TinyBERT, Jiao et al. 2020); the
            mean KL of relations softmax(X Xᵀ/√d_r) ("relations", MiniLMv2, Wang et al. 2021: for queries, keys and
            values); the KL of the maps plus that of the values' relations ("minilm", Wang et al. 2020, for the last
            layers alone: layer_map=LayerMap([(L_S, L_T)])); or any function (student maps, teacher maps, mask) of (B,
            H, T, T) tensors. The named ones never hold a T × T map where both models hand over their queries and keys;
            a function is given the maps in full.
        weight: β.
        heads: how maps of unequal head counts are compared. "one-to-one" compares head h with head h and needs equal
            counts; "group-mean" first averages neighboring heads of the side that has more; "best-match" gives each
            student head the teacher head that it is closest to in this batch (greedily, each teacher head once while
            there are others): see `Breakdown.heads`.
        relations: which of "queries", "keys" and "values" the relations of "relations" are of.
        relation_heads: R, of "relations" and "minilm"; the largest number up to the student's heads that divides both
            widths unless given, MiniLM's own where both sides have as many heads.
        layer_map: for this term alone; the objective's unless given.
        tokens: "all", or "labeled": the maps of those tokens that carry a label (of texts without any label all), over
            every key that they see; of a language model that learns answers, where the answers' tokens look; or
            "later", all but the first token of each text, which sees itself alone.
    """

    embeddings = False  # they do not attend

    loss: str | Callable = "kl"
    weight: float | Schedule = 1.0
    heads: Heads = "one-to-one"
    relations: tuple[str, ...] = ("queries", "keys", "values")
    relation_heads: int | None = None
    layer_map: LayerMap | None = None
    tokens: Tokens = "all"

    def __init__(
        self,
        loss: str | Callable = "kl",
        weight: float | Schedule = 1.0,
        heads: Heads = "one-to-one",
        relations: tuple[str, ...] = ("queries", "keys", "values"),
        relation_heads: int | None = None,
        layer_map: LayerMap | None = None,
        tokens: Tokens = "all",
    ):
        check_tokens("Attention", tokens)
        self.tokens = tokens
        self.loss, self.weight, self.heads, self.relations = loss, weight, heads, tuple(relations)
        self.relation_heads, self.layer_map = relation_heads, layer_map
        self.function = choose("Attention", loss, ATTENTION_LOSSES)
        if heads not in HEADS:
            raise ValueError(
                f"Attention(heads={heads!r}) is not known; choose 'one-to-one', 'group-mean' or 'best-match'."
            )
        if not self.relations or not set(self.relations) <= {"queries", "keys", "values"}:
            raise ValueError(
                f"Attention(relations={self.relations!r}): relations are of 'queries', 'keys' and 'values', one or "
                "more of them."
            )
        if callable(loss) and tokens != "all":
            raise ValueError(
                f"Attention(a function, tokens={tokens!r}): a function of maps is given the mask of all tokens, and "
                "would compare them all; name a loss, or take tokens='all'."
            )
        self._made = True

    def needs(self, side: str) -> Needs:
        return Needs(attentions=self._layers(side, self.shares()), inputs=self._inputs())

    def cached(self) -> Needs:
        return Needs(attentions=self._layers("teacher", self.possible_pairs()), inputs=self._inputs())

    def _inputs(self) -> frozenset[str]:
        if self.loss == "relations":
            return frozenset(self.relations)
        return frozenset(("queries", "keys", "values") if self.loss == "minilm" else ("queries", "keys"))

    def count(self, batch: CountedBatch) -> Tensor:
        if self.tokens != "all":
            compared = batch.compared(self.tokens)
            return batch.pairs_of(compared) if self.loss in ("mse", "score_mse") else compared.sum()
        return batch.pairs if self.loss in ("mse", "score_mse") else batch.tokens

    def compare_pair(self, student: Trace, teacher: Trace, pair: Pair) -> Tensor:
        mask = common_mask(student, teacher, pair)
        shown = pair[0] in student.attention and pair[1] in teacher.attention
        # maps in full: a function wants them, or a family gives nothing else
        if callable(self.loss) or (self.loss in ("kl", "mse") and not shown):
            return self._compare_maps(student, teacher, pair, mask)
        ours, theirs = self._inputs_at(student, teacher, pair)
        queries = self._queries(student, mask, ours.query.transpose(1, 2))
        if self.loss == "relations":
            return self._compare_relations(ours, theirs, self.relations, mask, queries)
        heads = self._heads(pair, ours.query.shape[1], theirs.query.shape[1])
        loss, same = ("kl" if self.loss == "minilm" else self.loss), theirs
        if self.heads == "best-match":
            costs = streamed.head_costs(loss, ours, theirs, mask, queries)
            self.place.matches[pair] = streamed.match_heads(costs)
            same = theirs.select_heads(self.place.matches[pair])
        found = streamed.streamed_loss(loss, ours, same, mask, heads, queries)
        if self.loss == "minilm":
            found = found + self._compare_relations(ours, theirs, ("values",), mask, queries)
        return found

    def _queries(self, student: Trace, mask: Tensor | None, like: Tensor) -> Tensor | None:
        """Those whose maps are compared, bool (B, T); None: all that the mask counts."""
        return None if self.tokens == "all" else compared_tokens(self.place.name, self.tokens, student, mask, like)

    def _compare_maps(self, student: Trace, teacher: Trace, pair: Pair, mask: Tensor | None) -> Tensor:
        ours, theirs = student.attention_maps(pair[0]), teacher.attention_maps(pair[1])  # (B, H, T, T)
        heads, mask = self._heads(pair, ours.shape[1], theirs.shape[1]), self._by_pair(student, teacher, mask, ours)
        if self.heads == "best-match":
            measure = attention_losses.map_kl if callable(self.loss) else self.function
            costs = attention_losses.head_costs(measure, ours.detach(), theirs, mask)
            self.place.matches[pair] = streamed.match_heads(costs)
            theirs = theirs[:, self.place.matches[pair]]
        elif heads is not None:
            ours, theirs = attention_losses.group_mean(ours, heads), attention_losses.group_mean(theirs, heads)
        return self.function(ours, theirs, mask)

    def _by_pair(self, student: Trace, teacher: Trace, mask: Tensor | None, maps: Tensor) -> Tensor | None:
        """The mask (B, T) as a function wants it; of named losses pair by pair, (B, 1, T, T), where some do not count:
        the future takes no part in a mean.
        """
        causal = student.causal and teacher.causal
        queries = self._queries(student, mask, maps.transpose(1, 2))
        if callable(self.loss) or (not causal and queries is None):
            return mask
        tokens = torch.ones(maps.shape[0::2], dtype=torch.bool, device=maps.device) if mask is None else mask
        queries = tokens if queries is None else queries.to(tokens.device) & tokens
        pairs = queries[:, None, :, None] & tokens[:, None, None, :]
        pairs = pairs.tril() if causal else pairs
        if causal and student.documents is not None:
            pairs = pairs & (student.documents[:, None, :, None] == student.documents[:, None, None, :])
        return pairs

    def _inputs_at(self, student: Trace, teacher: Trace, pair: Pair) -> list[Any]:
        """Both sides' attention inputs; ValueError where a side shows its maps alone."""
        for trace, layer in zip((student, teacher), pair, strict=True):
            if layer in trace.maps:
                of = "scores before the softmax" if self.loss == "score_mse" else "queries, keys and values"
                raise ValueError(
                    f"{self.loss!r} is of {of}, and {trace.name} gives only its attention maps; use Attention('kl') or "
                    "Attention('mse'), or a model that uses transformers' attention interface."
                )
        return [kept(trace, "attentions", layer) for trace, layer in zip((student, teacher), pair, strict=True)]

    def _compare_relations(
        self, ours: AttentionInputs, theirs: AttentionInputs, of: tuple[str, ...], mask, queries
    ) -> Tensor:
        heads = self.relation_heads
        heads = streamed.relation_heads(ours, theirs, of) if heads is None else heads
        losses = []
        for which in of:
            sides = streamed.relation_inputs(ours, which, heads), streamed.relation_inputs(theirs, which, heads)
            losses.append(streamed.streamed_loss("kl", *sides, mask, queries=queries))
        return total(losses) / len(losses)

    def _heads(self, pair: Pair, student: int, teacher: int) -> int | None:
        """The number of heads that maps are averaged down to; None where heads are compared as they are."""
        if student == teacher or self.heads == "best-match":
            return None
        if self.heads == "one-to-one":
            raise ValueError(
                f"one-to-one attention alignment at S{pair[0]}←T{pair[1]}: the student has {student} heads, the "
                f"teacher {teacher}. Use Attention(..., heads='group-mean' or 'best-match'), Attention('relations'), "
                f"or a student with {teacher} heads."
            )
        return min(student, teacher)
