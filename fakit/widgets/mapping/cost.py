"""What a layer map costs a training step, from the numbers of layers, widths and heads alone."""

from __future__ import annotations

from dataclasses import dataclass

from fakit.layer_maps import LayerMap


@dataclass(frozen=True)
class MapCost:
    """Costs of one step that come from the map: feature matching (`mse`) and attention alignment (`kl`),
    as the kit runs them.

    B sequences of T tokens, student d_S wide, teacher d_T wide; P feature pairs, A attention pairs (layer 0 does not
    attend). Sizes that need widths or heads are None where these are not known.

    Attributes:
        feature_pairs, attention_pairs: P and A.
        blocks, of: the teacher blocks that must run where outputs are not matched (the deepest mapped layer), of how
            many.
        hidden_states, attentions: distinct teacher layers whose hidden state, and whose attention inputs, are kept.
        features: elements compared, P·B·T·d_T.
        attention: elements compared, A·B·H·T², computed in blocks and never held at once; H the student's heads, or the
            common number after grouping.
        kept: bytes of teacher tensors kept until the loss: (B·T·d_T a hidden state + 3·B·T·d_T for queries, keys and
            values) · bytes; less where several query heads share their keys and values.
        projections: parameters of the linear maps d_S → d_T, P·d_S·d_T where the widths differ, else 0. A random map
            has one for every pair that it may draw.
        flops: extra matrix products of a training step, a multiply-add being 2: 6·B·T·d_S·d_T a projection (forward and
            both gradients), 2·B·T²·(3·d_S + d_T) an attention pair (both sides' scores,
            gradients of the student's queries and keys).
        teacher_flops: a forward pass through these blocks for comparison,
            each 24·B·T·d_T² + 4·B·T²·d_T (feed-forward 4·d_T).
    """

    feature_pairs: int
    attention_pairs: int
    blocks: int
    of: int
    hidden_states: int
    attentions: int
    features: int | None
    attention: int | None
    kept: int | None
    projections: int | None
    flops: int | None
    teacher_flops: int | None

    def lines(self) -> list[str]:
        """The costs in sentences, with units."""
        if not self.feature_pairs:
            return ["nothing extra: no layer is kept or compared"]
        teacher = (
            f"teacher: {self.blocks} of {self.of} blocks must run for this map"
            + ("" if self.blocks == self.of else " (all of them where outputs are matched too)")
            + f"; kept until the loss: {_count(self.hidden_states, 'hidden state')}, "
            f"attention inputs of {_count(self.attentions, 'layer')}"
        )
        if self.kept is None:
            return [
                teacher,
                f"features: {self.feature_pairs} · B·T·d elements compared",
                f"attention: {self.attention_pairs} · B·H·T² elements compared, in blocks",
                "B sequences, T tokens, width d, H heads: give widths=(student, teacher) for numbers",
            ]
        compared = [f"features: {amount(self.features)} elements compared"]
        if self.attention is not None:
            compared.append(f"attention: {amount(self.attention)} elements compared, in blocks")
        if self.projections:
            compared.append(f"projections: {amount(self.projections)} more parameters to train")
        return [
            f"{teacher}: {amount(self.kept, 'B')}",
            *compared,
            f"extra compute: {amount(self.flops, 'FLOP')} a step, beside {amount(self.teacher_flops, 'FLOP')} of the "
            "teacher's blocks",
        ]


def map_cost(
    layer_map: LayerMap,
    teacher_layers: int,
    widths: tuple[int, int] | None = None,
    heads: tuple[int, int] | None = None,
    batch: int = 32,
    tokens: int = 128,
    element_bytes: int = 4,
) -> MapCost:
    """The cost of a map; see `MapCost` for the formulas.

    Args:
        layer_map: the map.
        teacher_layers: depth of the teacher, embeddings not counted.
        widths: (d_S, d_T); None leaves sizes out.
        heads: (H_S, H_T); None leaves the compared attention elements out.
        batch, tokens: B sequences of T tokens, padding included.
        element_bytes: bytes of one activation: 4 for float32, 2 for bfloat16.

    >>> map_cost(LayerMap.uniform(3, 6), 6, widths=(384, 384), heads=(12, 12), batch=32, tokens=64).features
    2359296
    """
    pairs = layer_map.pairs
    attending = [(s, t) for s, t in pairs if min(s, t) > 0]
    P, A = len(pairs), len(attending)
    hidden, attention_layers = len({t for _, t in pairs}), len({t for _, t in attending})
    counts = (P, A, max((t for _, t in pairs), default=0), teacher_layers, hidden, attention_layers)
    if widths is None:
        return MapCost(*counts, *[None] * 6)
    (d_s, d_t), B, T = widths, batch, tokens
    projection = d_s * d_t if d_s != d_t else 0
    return MapCost(
        *counts,
        features=P * B * T * d_t,
        attention=None if heads is None else A * B * min(heads) * T**2,
        kept=element_bytes * B * T * d_t * (hidden + 3 * attention_layers),
        projections=len(layer_map.possible_pairs()) * projection,
        flops=6 * B * T * P * projection + A * 2 * B * T**2 * (3 * d_s + d_t),
        teacher_flops=counts[2] * (24 * B * T * d_t**2 + 4 * B * T**2 * d_t),
    )


def amount(number: float, unit: str = "") -> str:
    """A number with an SI prefix: 2359296 → "2.36 M", with a unit "2.36 MB"."""
    for power, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * power:
            return f"{number / power:.3g} {prefix}{unit}"
    return f"{number:g} {unit}".rstrip()


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
