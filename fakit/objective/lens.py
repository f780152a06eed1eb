"""Hidden states compared as what the models would say by them: the logit lens."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fakit.layer_maps import LayerMap, Pair
from fakit.losses import outputs as output_losses
from fakit.losses.fused.chunked import fused_outputs
from fakit.losses.fused.output_head import Head
from fakit.losses.logits import asked_of
from fakit.losses.outputs import PER_POSITION
from fakit.objective.loss_parameters import ends
from fakit.objective.needs import CountedBatch, Needs
from fakit.objective.over_layers import OverLayers
from fakit.objective.positions import common_mask, kept, predicting
from fakit.objective.schedules import Schedule
from fakit.objective.temperature import Softened
from fakit.tracing.trace import Trace


@dataclass(init=False)
class Lens(Softened, OverLayers):
    """DistillLens (Dhakal et al. 2026, arXiv 2602.13567): each mapped layer's states, turned into a distribution over
    the vocabulary as each model turns its last ones.

        loss(softmax(W_S norm_S(S[s]) / τ), softmax(W_T norm_T(T[t]) / τ))        by predicting position, times τ²

    Widths may differ and nothing is projected, but the vocabularies must be one. Positions are those of `Outputs`, so
    that at the last layers this is the outputs term. Logits are made a chunk of tokens at a time.

    Their code gives the head hidden states as they are, without the final norm that each model was trained with, and
    lets gradients into the student's head: `Lens(norm=False, train_head=True)`. Ours: the norm, and that gradients
    reach the student's states alone, since the head is the ruler that both are read by.

    Args:
        loss: a name of `fakit.losses.outputs.LOSSES` that looks at no labels; theirs is "jsd".
        weight, layer_map: see `Features`; a layer map pairs decoder layers in an encoder-decoder, the head is theirs.
        temperature: τ > 0.
        norm: go through the model's own final norm (BERT's transform, OPT's projection …) before the head.
        train_head: gradients also into the student's norm and head.
        vocab_size: see `Outputs`.
        parameters: the loss's own, by name, as further keywords: `Lens("jsd", beta=0.3)`.
    """

    loss: str = "jsd"
    weight: float | Schedule = 1.0
    layer_map: LayerMap | None = None
    temperature: float | Schedule = 1.0
    norm: bool = True
    train_head: bool = False
    vocab_size: int | None = None
    parameters: dict[str, Any] = field(default_factory=dict)

    def __init__(
        self,
        loss: str = "jsd",
        weight: float | Schedule = 1.0,
        layer_map: LayerMap | None = None,
        temperature: float | Schedule = 1.0,
        norm: bool = True,
        train_head: bool = False,
        vocab_size: int | None = None,
        parameters: Mapping[str, Any] | None = None,
        **more: Any,
    ):
        self.loss, self.weight, self.layer_map, self.temperature = loss, weight, layer_map, temperature
        self.norm, self.train_head, self.vocab_size = norm, train_head, vocab_size
        self.parameters = dict(parameters or {}) | more
        known = [name for name, formula in PER_POSITION.items() if "labels" not in asked_of(formula)]
        if loss not in known:
            raise ValueError(f"Lens({loss!r}) is not known; choose one of {', '.join(map(repr, known))}.")
        for given in ends(self.parameters):  # what it refuses of them (beta = 2), it refuses now
            output_losses.per_position(loss, **given)
        self._made = True

    def needs(self, side: str) -> Needs:
        return Needs(hidden_states=self._layers(side, self.shares()), lens=True)

    def cached(self) -> Needs:
        return Needs(hidden_states=self._layers("teacher", self.possible_pairs()), lens=True)

    def count(self, batch: CountedBatch) -> Tensor:
        return batch.positions

    def compare(self, student: Trace, teacher: Trace, labels: Tensor | None) -> dict[Pair, Tensor]:
        return {pair: self._compare_at(pair, student, teacher, labels) for pair in self.shares()}

    def _compare_at(self, pair: Pair, student: Trace, teacher: Trace, labels: Tensor | None) -> Tensor:
        for trace, layer in zip((student, teacher), pair, strict=True):
            if trace.encoder_layers is not None and layer <= trace.encoder_layers:
                raise ValueError(
                    f"Lens at S{pair[0]}←T{pair[1]}: layer {layer} of {trace.name} is its encoder's, and its head "
                    f"reads its decoder's; map layers above {trace.encoder_layers}."
                )
        common_mask(student, teacher, pair)  # batches of one shape
        ours, theirs = kept(student, "hidden_states", pair[0]), kept(teacher, "hidden_states", pair[1])
        mask = predicting(student, teacher, labels, ours)  # (B, T), of causal models (B, T - 1)
        if student.causal:
            ours, theirs = ours[:, :-1], theirs[:, :-1]
        with torch.no_grad():
            read = self._read(teacher, theirs, mask.to(theirs.device), False)
        total, _, _ = fused_outputs(
            self._read(student, ours, mask, self.train_head),
            replace(read, hidden=read.hidden.to(ours.device)),
            mask,
            divergence=self.loss,
            parameters=self.parameters,
            temperature=self.tau,
            weights=(1.0, 0.0),
            vocab_size=self.vocab_size,
        )
        return total

    def _read(self, trace: Trace, hidden: Tensor, mask: Tensor, train: bool) -> Head:
        if trace.lens is None:
            raise ValueError(
                f"Lens reads hidden states by the head of {trace.name}, and its trace has none; capture(..., "
                "lens=True) keeps it."
            )
        # NaN in padding must not reach the norm's gradient
        return trace.lens(hidden.masked_fill(~mask.unsqueeze(-1), 0.0), self.norm, train)
