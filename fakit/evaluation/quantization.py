"""What quantizing does to a teacher: its hidden states, attention maps and logits against those of the full one,
layer by layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from fakit.evaluation.batches import eval_mode
from fakit.evaluation.fidelity import Agreement, AttentionDivergence
from fakit.models.blocks import depth, encoder_depth
from fakit.tracing.capture import capture
from fakit.tracing.trace import Trace

MIB = 2**20


@dataclass(frozen=True)
class LayerFidelity:
    """One layer of the quantized model against the same layer of the full one.

    Attributes:
        layer: its number, 0 = embeddings.
        relative_error: ‖Ĥ − H‖ / ‖H‖ (Frobenius) over the tokens that count; 0 = exact.
        cosine: of a token's two hidden states, mean over the tokens that count.
        attention_jsd: Jensen–Shannon divergence of the attention maps in nats (0…log 2), mean over heads and the
            queries that count; None for the embeddings, and where attention was left out.
    """

    layer: int
    relative_error: float
    cosine: float
    attention_jsd: float | None


@dataclass(frozen=True)
class QuantizationFidelity:
    """How far a quantized model is from the full one; draws itself in a notebook and prints itself in a terminal.

    Attributes:
        layers: one `LayerFidelity` a layer, by number.
        kl: KL(full ‖ quantized) of the outputs in nats, mean over positions; None without logits, or where there is one
            class only (regression).
        agreement: share of positions with the same top-1; None as above.
        largest_logit_difference: max |ẑ − z| over all logits that count; None without logits.
        full_mib, quantized_mib: what the weights take, with the scales of quantized ones, in MiB.
        texts: rows of the batches. tokens: tokens that count (of an encoder-decoder, the encoder's).
        full_form, quantized_form: "8bit", "4bit", or the dtype of the weights.
        model: the class of the full model.
    """

    layers: tuple[LayerFidelity, ...]
    kl: float | None
    agreement: float | None
    largest_logit_difference: float | None
    full_mib: float
    quantized_mib: float
    texts: int
    tokens: int
    full_form: str
    quantized_form: str
    model: str

    def __getitem__(self, layer: int) -> LayerFidelity:
        """The row of layer `layer`, by number."""
        for row in self.layers:
            if row.layer == layer:
                return row
        raise ValueError(f"layer {layer} was not compared; compared were {[row.layer for row in self.layers]}")

    def rows(self) -> list[dict]:
        """One dict a layer: layer, relative_error, cosine, attention_jsd.
        What `figures.quantization_by_layer` draws.
        """
        return [asdict(row) for row in self.layers]

    def _title(self) -> str:
        return f"{self.model}: {self.quantized_form} against {self.full_form}"

    def _facts(self) -> list[str]:
        facts = []
        if self.kl is not None:
            facts += [f"KL(full ‖ quantized) {self.kl:.2g} nats", f"same top-1 {self.agreement:.1%}"]
        if self.largest_logit_difference is not None:
            facts.append(f"largest logit difference {self.largest_logit_difference:.2g}")
        facts.append(f"weights {self.quantized_mib:.1f} of {self.full_mib:.1f} MiB")
        return [*facts, f"{self.texts} texts, {self.tokens} tokens"]

    def _table(self) -> list[tuple[str, str, str, str]]:
        return [
            (
                str(row.layer),
                f"{row.relative_error:.4f}",
                f"{row.cosine:.4f}",
                "–" if row.attention_jsd is None else f"{row.attention_jsd:.2e}",
            )
            for row in self.layers
        ]

    def __str__(self) -> str:
        lines = [self._title()]
        if self.layers:
            cells = [("layer", "relative error", "cosine", "attention JSD (nats)"), *self._table()]
            lines += [f"{a:>5}  {b:>14}  {c:>7}  {d:>20}" for a, b, c, d in cells]
        return "\n".join([*lines, "; ".join(self._facts())])

    def _repr_markdown_(self) -> str:
        lines = [f"**{self._title()}** · " + " · ".join(self._facts())]
        if self.layers:
            lines += ["", "| layer | relative error | cosine | attention JSD (nats) |", "|---:|---:|---:|---:|"]
            lines += [f"| {' | '.join(cells)} |" for cells in self._table()]
        return "\n".join(lines)


def quantization_fidelity(
    full: nn.Module,
    quantized: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    layers: Iterable[int] | None = None,
    attentions: bool = True,
    logits: bool = True,
) -> QuantizationFidelity:
    """Compare a quantized model with the full one on the same batches: hidden states and attention maps by layer,
    and logits.

    Nothing has to be quantized: any two models of one shape may be compared (bfloat16 with float32, before with after
    pruning), and `full` is the one that errors are relative to. Both run in evaluation mode and are left as they were
    found. Sums alone are kept from batch to batch; within one, the hidden states of all layers asked for and one
    layer's maps (B, H, T, T) at a time. Padding takes no part.

    Args:
        full: the model in full precision.
        quantized: the same model in another form, as by `load_teacher(..., quantize="8bit")`; may be on another device.
        batches: what the tokenizer or a collator returns: input_ids (B, T), attention_mask (B, T).
        layers: layer numbers 0…L to compare; None compares all. In an encoder-decoder the decoder's follow the
            encoder's.
        attentions: False leaves the maps out, for models that have none to show.
        logits: False leaves the outputs out, and ends the forward pass after the last layer.

    Raises:
        ValueError: before any work, for models of different shapes or a layer that they do not have;
            for batches that hold no token.

    >>> full, tokenizer = embedded_teacher("glosses")  # doctest: +SKIP
    >>> print(quantization_fidelity(full, embedded_teacher("glosses", quantize="8bit")[0], batches))  # doctest: +SKIP
    """
    _check_one_shape(full, quantized)
    wanted = list(range(depth(full) + 1)) if layers is None else sorted(set(layers))
    if wrong := [i for i in wanted if not 0 <= i <= depth(full)]:
        raise ValueError(f"layers {wrong} asked of two {depth(full)}-layer models; they have layers 0…{depth(full)}")
    if isinstance(batches, Mapping):
        raise ValueError("batches is one batch (a mapping); pass an iterable of batches: [batch]")
    with_maps = [i for i in wanted if i > 0] if attentions else []

    sums = {i: _LayerSums() for i in wanted}
    outputs = _OutputSums()
    texts = tokens = 0
    with torch.no_grad(), ExitStack() as modes:
        for model in (full, quantized):
            modes.enter_context(eval_mode(model))
        for batch in batches:
            theirs, ours = (capture(model, batch, wanted, with_maps, logits) for model in (full, quantized))
            counted = _counted(theirs, batch)
            texts, tokens = texts + len(counted), tokens + int(counted.sum())
            for i in wanted:
                sums[i].add_hidden_states(ours.hidden_states[i], theirs.hidden_states[i], theirs.layer_mask(i))
            for i in with_maps:
                sums[i].add_maps(ours.attention_maps(i), theirs.attention_maps(i), theirs.layer_mask(i))
            if theirs.logits is not None:
                mask = theirs.logits_mask if theirs.logits.dim() == 3 else None
                outputs.add(ours.logits, theirs.logits, mask)
    if tokens == 0:
        raise ValueError("the batches hold no token that counts; pass at least one batch with a True in its mask")
    return QuantizationFidelity(
        layers=tuple(sums[i].compute(i) for i in wanted),
        **outputs.compute(),
        full_mib=weight_bytes(full) / MIB,
        quantized_mib=weight_bytes(quantized) / MIB,
        texts=texts,
        tokens=tokens,
        full_form=_form(full),
        quantized_form=_form(quantized),
        model=type(full).__name__,
    )


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the weights, each shared one once, with what bitsandbytes keeps beside quantized ones:
    a scale a row (8 bits) or a block (4 bits).

    `model.get_memory_footprint()` leaves those scales out: an eighth of the 4-bit weights' bytes,
    where they are float32 and blocks have 64.
    """
    kept = {id(tensor): tensor for tensor in model.parameters()}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        blockwise = getattr(weight, "quant_state", None)
        found = [getattr(holder, "SCB", None) for holder in (weight, getattr(module, "state", None))]
        for state in (blockwise, getattr(blockwise, "state2", None)):  # state2: the scales, quantized themselves
            found += [getattr(state, name, None) for name in ("absmax", "code", "offset")]
        kept.update({id(tensor): tensor for tensor in found if isinstance(tensor, Tensor)})
    return sum(tensor.numel() * tensor.element_size() for tensor in kept.values())


class _LayerSums:
    """What is kept of one layer from batch to batch."""

    def __init__(self):
        self.error = self.size = self.cosine = 0.0
        self.tokens = 0
        self.maps = AttentionDivergence()

    def add_hidden_states(self, ours: Tensor, theirs: Tensor, mask: Tensor | None) -> None:
        """(B, T, d) each; mask (B, T) or None. Squares in float64: an 8-bit error is 1e-2 of what it is taken from."""
        ours = ours.to(theirs.device)
        if mask is not None:
            ours, theirs = ours[mask.to(ours.device)], theirs[mask.to(theirs.device)]
        ours, theirs = ours.double().flatten(0, -2), theirs.double().flatten(0, -2)  # (N, d)
        self.error += (ours - theirs).square().sum().item()
        self.size += theirs.square().sum().item()
        self.cosine += cosine_similarity(ours, theirs, dim=-1).sum().item()
        self.tokens += len(theirs)

    def add_maps(self, ours: Tensor, theirs: Tensor, mask: Tensor | None) -> None:
        self.maps.update(ours.to(theirs.device), theirs, mask)

    def compute(self, layer: int) -> LayerFidelity:
        error = math.sqrt(self.error)
        return LayerFidelity(
            layer=layer,
            relative_error=error / math.sqrt(self.size) if self.size else (math.inf if error else 0.0),
            cosine=self.cosine / self.tokens if self.tokens else math.nan,
            attention_jsd=self.maps.compute().mean().item() if self.maps.queries else None,
        )


class _OutputSums:
    """What is kept of the logits from batch to batch."""

    def __init__(self):
        self.agreement = Agreement(k=None)
        self.largest: float | None = None

    def add(self, ours: Tensor, theirs: Tensor, mask: Tensor | None) -> None:
        """(B, T, V) or (B, C) each; mask (B, T) or None."""
        ours = ours.to(theirs.device)
        if theirs.shape[-1] > 1:  # of one number no distribution can be made
            self.agreement.update(ours, theirs, mask)
        difference = (ours.float() - theirs.float()).abs()
        difference = difference if mask is None else difference[mask.to(difference.device)]
        if difference.numel():
            self.largest = max(difference.max().item(), self.largest or 0.0)

    def compute(self) -> dict[str, float | None]:
        found = self.agreement.compute() if self.agreement.positions else {"kl": None, "agreement": None}
        return {**found, "largest_logit_difference": self.largest}


def _counted(trace: Trace, batch: Mapping[str, Tensor]) -> Tensor:
    """The tokens that count, (B, T); of an image or a sound, which has no padding, the positions of the first layer."""
    if trace.mask is not None:
        return trace.mask
    rows = next(value for value in batch.values() if isinstance(value, Tensor)).shape[0]
    hidden = next(iter(trace.hidden_states.values()), None)
    return torch.ones(rows, 1 if hidden is None else hidden.shape[1], dtype=torch.bool)


def _form(model: nn.Module) -> str:
    """ "8bit" or "4bit" where bitsandbytes holds weights of the model, else the dtype of the first ones."""
    kinds = {type(parameter).__name__ for parameter in model.parameters()}
    known = [form for kind, form in (("Int8Params", "8bit"), ("Params4bit", "4bit")) if kind in kinds]
    return " and ".join(known) or str(next(model.parameters()).dtype).removeprefix("torch.")


def _shape(model: nn.Module) -> dict[str, int | None]:
    """What two models must share to be compared place by place."""
    config = model.config.get_text_config()
    embedding = model.get_input_embeddings()
    return {
        "layers": depth(model),
        "encoder layers": encoder_depth(model),
        "width": getattr(config, "hidden_size", None),
        "attention heads": getattr(config, "num_attention_heads", None),
        "vocabulary": getattr(embedding, "num_embeddings", None),
        "classes": getattr(model.config, "num_labels", None),
    }


def _check_one_shape(full: nn.Module, quantized: nn.Module) -> None:
    theirs, ours = _shape(full), _shape(quantized)
    different = [f"{name} {theirs[name]} and {ours[name]}" for name in theirs if theirs[name] != ours[name]]
    if different:
        raise ValueError(
            f"fidelity is measured place by place, and the full model ({type(full).__name__}) and the quantized one "
            f"({type(quantized).__name__}) differ in {'; '.join(different)}. Load both from one checkpoint: "
            "load_teacher(name) and load_teacher(name, quantize='8bit'). For a student of another shape use "
            "fakit.similarity or evaluate(student, ..., teacher=teacher)."
        )
