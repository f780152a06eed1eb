"""What is kept of one forward pass: hidden states, attention inputs, logits and masks, by layer number."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor
from torch.nn.functional import pad

from fakit.losses.fused.attention_inputs import AttentionInputs
from fakit.losses.fused.output_head import Head
from fakit.losses.reduce import at_least_float32
from fakit.losses.top_k import TopK

# What a trace holds of layers as tensors (B, T, …).
BY_TOKEN = ("hidden_states", "attention_outputs", "mlp_outputs", "mlp_ups", "mlp_gates")


@dataclass
class Trace:
    """What `capture` kept of one forward pass. Dictionaries are keyed by layer number.

    Attributes:
        hidden_states: {i: (B, T, d)}
        attention: {i: AttentionInputs}, with `queries`, `keys` and `values` as views of it
        attention_outputs: {i: (B, T, d)}, what block i's attention adds to the hidden states: after its output
            projection, before any dropout or norm
        mlp_outputs: {i: (B, T, d)}, what block i's MLP adds to the hidden states, likewise
        mlp_ups, mlp_gates: {i: (B, T, d_ff)}, what the MLP's up and gate projections give, before any activation
        maps: {i: (B, H, T, T)} where the model itself returned its maps (families without the attention interface)
        logits: (B, T, V), (B, C), or None
        top_k: in place of logits, the largest alone and the mass of the rest (a teacher cache of them)
        logits_known: bool (B, T), the tokens at which these logits are known; None: all of them
        head: in place of logits over a large vocabulary, where asked for: the output head and what it was given
        lens: any layer's hidden states as the head's input, where asked for (`fakit.tracing.lens`)
        mask: bool (B, T), True = a token, False = padding
        documents: int64 (B, T), the number of each token's document in its row, where rows pack several
        decoder_mask: bool (B, T_dec), for an encoder-decoder: its decoder's tokens
        encoder_layers: for an encoder-decoder: layers 0…encoder_layers are the encoder's, the ones above the decoder's
        causal: True when logits at t predict the token at t + 1
        problem_type: what logits (B, C) mean, as the model's configuration says it
            (`fakit.models.head_kinds.problem_type`); None where it does not
        name: the model's class, for messages
        labels: (B,), (B, C) or (B, T), those that it is compared beside; None outside of a comparison
        same: of a teacher that was given the texts in tokens of its own, by kind of alignment ("order", "text"): its
            token that stands for each of the student's, int64 (B, T_S), -1 where none does
        shared_tokens: of such a teacher, int64 (n, 2): the tokens that both vocabularies have, the student's first
    """

    hidden_states: dict[int, Tensor] = field(default_factory=dict)
    attention_outputs: dict[int, Tensor] = field(default_factory=dict, kw_only=True)
    mlp_outputs: dict[int, Tensor] = field(default_factory=dict, kw_only=True)
    mlp_ups: dict[int, Tensor] = field(default_factory=dict, kw_only=True)
    mlp_gates: dict[int, Tensor] = field(default_factory=dict, kw_only=True)
    attention: dict[int, AttentionInputs] = field(default_factory=dict)
    maps: dict[int, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None
    top_k: TopK | None = field(default=None, kw_only=True)
    logits_known: Tensor | None = field(default=None, kw_only=True)
    head: Head | None = None
    lens: Callable[..., Head] | None = field(default=None, kw_only=True)
    mask: Tensor | None = None
    documents: Tensor | None = None
    decoder_mask: Tensor | None = None
    encoder_layers: int | None = None
    causal: bool = False
    problem_type: str | None = None
    name: str = "model"
    labels: Tensor | None = field(default=None, kw_only=True)
    same: dict[str, Tensor] | None = field(default=None, kw_only=True)
    shared_tokens: Tensor | None = field(default=None, kw_only=True)

    @property
    def queries(self) -> dict[int, Tensor]:
        """{i: (B, H, T, d_head)}, as the attention function received them."""
        return {i: a.query for i, a in self.attention.items()}

    @property
    def keys(self) -> dict[int, Tensor]:
        """{i: (B, H_kv, T, d_head)}, before grouped heads are repeated."""
        return {i: a.key for i, a in self.attention.items()}

    @property
    def values(self) -> dict[int, Tensor]:
        """{i: (B, H_kv, T, d_head)}."""
        return {i: a.value for i, a in self.attention.items() if a.value is not None}

    def layer_mask(self, layer: int) -> Tensor | None:
        """The tokens a layer works on: the encoder's, or above `encoder_layers` the decoder's. bool (B, T)"""
        return self.mask if self.encoder_layers is None or layer <= self.encoder_layers else self.decoder_mask

    @property
    def logits_mask(self) -> Tensor | None:
        """The tokens that logits (B, T, V) stand for. bool (B, T)"""
        return self.mask if self.encoder_layers is None else self.decoder_mask

    def own_labels(self, labels: Tensor | None) -> Tensor | None:
        """Labels without those that a causal model has nothing to go by for: -100 where a text begins."""
        mask, documents = self.mask, self.documents
        if labels is None or mask is None or not self.causal or labels.shape != mask.shape:
            return labels
        begins = mask[:, 1:] & ~mask[:, :-1]  # (B, T - 1)
        begins = begins if documents is None else begins | (documents.diff(dim=1) != 0)
        return labels.masked_fill(pad(begins, (1, 0), value=True).to(labels.device), -100)

    def attention_maps(self, layer: int) -> Tensor:
        """Attention maps of one layer, before dropout, in float32 or better. (B, H, T, T)

        Raises:
            ValueError: the layer's attention was not captured; says which were.
        """
        if layer in self.maps:
            return at_least_float32(self.maps[layer])
        if layer not in self.attention:
            raise ValueError(
                f"attention of layer {layer} asked of a trace of {self.name} that holds attention of layers "
                f"{sorted({*self.maps, *self.attention})}; capture(..., attentions=[{layer}]) keeps it."
            )
        return self.attention[layer].maps()

    def detach(self) -> "Trace":
        """The same trace, cut from the graph. Nothing is copied."""
        return replace(
            self,
            **{name: {i: x.detach() for i, x in getattr(self, name).items()} for name in BY_TOKEN},
            attention={i: a.detach() for i, a in self.attention.items()},
            maps={i: m.detach() for i, m in self.maps.items()},
            logits=None if self.logits is None else self.logits.detach(),
            top_k=None if self.top_k is None else self.top_k.map(Tensor.detach),
            head=None if self.head is None else self.head.detach(),
        )

    def __repr__(self) -> str:
        logits = None if self.logits is None else tuple(self.logits.shape)
        attention = sorted({*self.maps, *self.attention})
        inside = {name: sorted(getattr(self, name)) for name in BY_TOKEN[1:]}
        outputs = "".join(f", {name}={layers}" for name, layers in inside.items() if layers)
        states = sorted(self.hidden_states)
        return f"Trace({self.name}: hidden_states={states}, attention={attention}{outputs}, logits={logits})"
