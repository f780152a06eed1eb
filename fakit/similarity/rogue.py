"""What a similarity becomes when its rogue dimensions lose their say: dropped, or z-scored, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .hsic import center, paired_rows, valid_rows
from .streaming import StreamingCKA

MODES = ("drop", "z-score")


@dataclass(frozen=True)
class RogueScrub:
    """CKA of pairs of layers after the k largest dimensions of both sides were taken care of, k = 0 … K.

    Attributes:
        pairs: (student layer number, teacher layer number).
        cka: "drop" and "z-score" → (K + 1, pairs), debiased, one token a sequence.
        shares: "S1", "T2" … → (K + 1,), the share of the layer's variance in its k largest dimensions.
        dimensions: "S1", "T2" … → the K largest dimensions, largest first.
    """

    pairs: tuple[tuple[int, int], ...]
    cka: Mapping[str, Tensor]
    shares: Mapping[str, Tensor]
    dimensions: Mapping[str, tuple[int, ...]]

    @property
    def largest(self) -> int:
        """K"""
        return len(self.cka["drop"]) - 1


def scrub_rogue(
    student_layers: Sequence[Tensor],
    teacher_layers: Sequence[Tensor],
    mask: Tensor,
    pairs: Sequence[tuple[int, int]],
    largest: int = 10,
) -> RogueScrub:
    """CKA of `pairs` with 0, 1 … `largest` of each layer's dimensions of the most variance dropped, or z-scored.

    A z-scored dimension is scaled down to the mean variance of those that are never touched, so that it counts as one
    of many. What falls with the first few was said by them alone; what stays is shared by the rest. Where nothing that
    varies is left, CKA is NaN, with a warning.

    Args:
        student_layers: (B, T, d), by layer number.
        teacher_layers: the same of the teacher.
        mask: bool (B, T), True where a token counts.
        pairs: (student layer number, teacher layer number).
        largest: K, fewer than the dimensions of any layer.

    Raises:
        ValueError: no pairs, a pair of layers that are not there, a K that is not in 1 … d − 1, no valid token, or a
            layer that is constant over them.
    """
    xs, ys, mask = paired_rows(student_layers, teacher_layers, mask)
    for s, t in pairs:
        if not (0 <= s < len(xs) and 0 <= t < len(ys)):
            raise ValueError(
                f"pair ({s}, {t}) asked of {len(xs)} student and {len(ys)} teacher layers (0 = embeddings)"
            )
    narrowest = min(x.shape[-1] for x in xs + ys)
    if not pairs or not 1 <= largest < narrowest:
        raise ValueError(
            f"scrub_rogue wants at least one pair and 1 … {narrowest - 1} dimensions; found {len(pairs)} pairs, "
            f"{largest}"
        )
    layers = {f"S{s}": xs[s] for s, _ in pairs} | {f"T{t}": ys[t] for _, t in pairs}
    # half precision and whole numbers have too few digits for a scaled dimension
    layers = {name: x.detach().to(torch.promote_types(x.dtype, torch.float32)) for name, x in layers.items()}
    order, shares, scales = {}, {}, {}
    for name, layer in layers.items():
        rows = valid_rows([layer], mask)[0]
        variances = center(rows).square().mean(0)
        if variances.sum() == 0:
            raise ValueError(
                f"{name} is constant over its {len(rows)} tokens: it has no variance to share out; leave it out"
            )
        top = variances.topk(largest)
        order[name] = top.indices
        total = variances.sum()
        shares[name] = torch.cat([total.new_zeros(1), top.values.cumsum(0) / total])
        rest = variances.sort().values[:-largest].mean()  # not total − top, which rounding leaves below 0
        # what has no more variance, as a constant dimension, stays
        scales[name] = torch.where(top.values > rest, rest / top.values, 1.0).sqrt()
    students, teachers = (list(dict.fromkeys(f"{side}{pair[i]}" for pair in pairs)) for i, side in ((0, "S"), (1, "T")))
    found: dict[str, list[Tensor]] = {mode: [] for mode in MODES}
    for mode in MODES:
        for k in range(largest + 1):

            def scrubbed(name: str, mode: str = mode, k: int = k) -> Tensor:
                factor = layers[name].new_ones(layers[name].shape[-1])
                factor[order[name][:k]] = 0 if mode == "drop" else scales[name][:k].to(factor)
                return layers[name] * factor

            matrix = StreamingCKA(clusters=True)
            matrix.update([scrubbed(name) for name in students], [scrubbed(name) for name in teachers], mask)
            values = matrix.matrix()
            found[mode].append(
                torch.stack([values[students.index(f"S{s}"), teachers.index(f"T{t}")] for s, t in pairs])
            )
    return RogueScrub(
        tuple((int(s), int(t)) for s, t in pairs),
        {mode: torch.stack(rows) for mode, rows in found.items()},
        shares,
        {name: tuple(dimensions.tolist()) for name, dimensions in order.items()},
    )
