"""Which rank for which weight, so that a model has no more parameters than asked for."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

from fakit.compression.spectra import Matrix, Spectra, Spectrum, stable_rank

METHODS = ("bottom", "top", "uniform", "energy")


@dataclass(frozen=True)
class Row:
    """One weight in a plan.

    Attributes:
        layer: the block's number, 1…L.
        module: the layer's name in the model; of fused experts the tensor's.
        shape: (d_out, d_in); experts are as many of them.
        rank: of the pair; None where the weight stays dense.
        highest_rank: the highest that saves something.
        before, after: parameters.
        error: predicted, ‖W - W_r‖ / ‖W‖; with activations ‖(W - W_r) x‖ / ‖W x‖ in the root mean square over tokens.
        stable_rank_weights, stable_rank_activations: ‖·‖_F² / ‖·‖_2² of W and of what it gives, W x over all tokens;
            the second is None in a plan from weights alone.
    """

    layer: int
    module: str
    shape: tuple[int, int]
    experts: int
    rank: int | None
    highest_rank: int
    before: int
    after: int
    error: float
    stable_rank_weights: float
    stable_rank_activations: float | None


@dataclass(frozen=True)
class Plan:
    """Ranks by name, and what they save; draws itself in a notebook, prints itself in a terminal.

    Attributes:
        before, after: parameters of the whole model, each shared tensor once.
    """

    spectra: Spectra
    method: str
    keep: float
    ranks: tuple[int | None, ...]
    after: int

    @property
    def before(self) -> int:
        """Parameters of the model as it is."""
        return self.spectra.parameters

    @property
    def rows(self) -> list[Row]:
        """One for each weight of the blocks, first to last."""
        return [
            _row(matrix, spectrum, rank)
            for matrix, spectrum, rank in zip(self.spectra.matrices, self.spectra.of, self.ranks, strict=True)
        ]

    def __str__(self) -> str:
        lines = [f"{'layer':>5}  {'rank':>10}  {'saved':>7}  {'error':>5}  module"]
        for row in self.rows:
            rank = "dense" if row.rank is None else f"{row.rank} of {min(row.shape)}"
            lines.append(
                f"{row.layer:>5}  {rank:>10}  {1 - row.after / row.before:>7.0%}  {row.error:>5.3f}  {row.module}"
            )
        return "\n".join([*lines, self._summary()])

    def _summary(self) -> str:
        share = self.after / self.before
        return (
            f"{self.method}: {self.before:,} → {self.after:,} parameters ({share:.1%} kept; asked were {self.keep:.1%})"
        )

    def _repr_markdown_(self) -> str:
        lines = [
            "| layer | module | rank | parameters | error | stable rank of weights | of activations |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            rank = "dense" if row.rank is None else f"{row.rank} of {min(row.shape)}"
            given = "" if row.stable_rank_activations is None else f"{row.stable_rank_activations:.1f}"
            cells = (row.layer, f"`{row.module}`", rank, f"{row.before:,} → {row.after:,}", f"{row.error:.3f}")
            lines.append(f"| {' | '.join(map(str, cells))} | {row.stable_rank_weights:.1f} | {given} |")
        return "\n".join([*lines, "", self._summary()])


def _row(matrix: Matrix, spectrum: Spectrum, rank: int | None) -> Row:
    return Row(
        layer=matrix.layer,
        module=matrix.name,
        shape=(matrix.d_out, matrix.d_in),
        experts=matrix.experts,
        rank=rank,
        highest_rank=matrix.highest_rank,
        before=matrix.parameters,
        after=matrix.parameters_at(rank),
        error=spectrum.error(rank),
        stable_rank_weights=stable_rank(spectrum.weights),
        stable_rank_activations=stable_rank(spectrum.values) if spectrum.tokens else None,
    )


def make_plan(spectra: Spectra, keep: float = 0.8, method: str = "bottom", lowest: float = 0.25) -> Plan:
    """The ranks with which a model has at most `keep` of its parameters, taken down one at a time until it does.

    Args:
        keep: of the parameters of the whole model, embeddings and head included, which stay as they are.
        method: whose rank goes down next:
            "bottom": that of the lowest block, as far as it may, then the next one's (Lillama's default);
            "top": that of the highest block;
            "uniform": in all blocks alike;
            "energy": the one that then still keeps the largest share of its energy Σ σ²; with spectra from activations,
            of the energy of what it gives.
            Within a block (of "uniform" in all of them) ranks go down in proportion.
        lowest: the lowest rank, as a share of the highest that saves something. Ours: Lillama gives r_min as a number.

    Raises:
        ValueError: another method, a share that is not within 0…1, or one that cannot be reached, with the bound.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not known; choose one of {', '.join(map(repr, METHODS))}.")
    for name, value in (("keep", keep), ("lowest", lowest)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ValueError(f"{name}={value!r} was requested; it is a share of parameters or ranks, between 0 and 1.")
    matrices, of = spectra.matrices, spectra.of
    floors = [max(1, round(lowest * matrix.highest_rank)) for matrix in matrices]
    budget = int(keep * spectra.parameters)
    reachable = _total(spectra, floors)
    if reachable > budget:
        thinnest = _total(spectra, [1] * len(matrices))
        raise ValueError(
            f"keep={keep} was requested: {budget:,} of {spectra.parameters:,} parameters of {spectra.name}, and with "
            f"ranks down to lowest={lowest} of the highest that saves something it has {reachable:,} left (keep="
            f"{_up(reachable / spectra.parameters)}); lowest=0 allows ranks of 1 and keep="
            f"{_up(thinnest / spectra.parameters)}. Embeddings, heads, norms and biases stay as they are."
        )

    priority = _priority(method, matrices, of)
    ranks: list[int | None] = [None] * len(matrices)
    total = spectra.parameters
    waiting = [(priority(i, matrix.highest_rank), i) for i, matrix in enumerate(matrices)]
    heapq.heapify(waiting)
    while total > budget:
        _, i = heapq.heappop(waiting)
        matrix, rank = matrices[i], ranks[i]
        lower = matrix.highest_rank if rank is None else rank - 1
        total += matrix.parameters_at(lower) - matrix.parameters_at(rank)
        ranks[i] = lower
        if lower > floors[i]:
            heapq.heappush(waiting, (priority(i, lower - 1), i))
    return Plan(spectra, method, keep, tuple(ranks), total)


def _priority(method: str, matrices: tuple[Matrix, ...], of: tuple[Spectrum, ...]) -> Callable[[int, int], tuple]:
    """Of the step that takes weight i to a rank: the smallest goes first."""
    if method == "energy":
        kept = []  # (k + 1,) of each: the share of energy that ranks 0…k keep
        for spectrum in of:
            sums = spectrum.values.square().sum(0).cumsum(0)
            kept.append([0.0, *(sums / sums[-1].clamp_min(1e-300)).tolist()])
        return lambda i, rank: (-kept[i][rank],)
    order = {"bottom": 1, "top": -1, "uniform": 0}[method]
    return lambda i, rank: (order * matrices[i].layer, -rank / matrices[i].highest_rank)


def _total(spectra: Spectra, ranks: list[int]) -> int:
    saved = sum(m.parameters - m.parameters_at(r) for m, r in zip(spectra.matrices, ranks, strict=True))
    return spectra.parameters - saved


def _up(share: float) -> float:
    """Rounded up to what can be typed."""
    return -(-share * 10_000 // 1) / 10_000
