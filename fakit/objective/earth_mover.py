"""Any student layer from any teacher layer, by the cheapest flow between them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fakit.layer_maps import LayerMap, Pair
from fakit.objective.features import Features
from fakit.objective.needs import Needs
from fakit.objective.projections import Projection
from fakit.objective.schedules import Schedule
from fakit.tracing.trace import Trace


class Masses(nn.Module):
    """How much each student layer has to learn and each teacher layer to teach; each side sums to 1. Buffers: they are
    in the objective's state.
    """

    student: Tensor
    teacher: Tensor

    def __init__(self, students: int, teachers: int):
        super().__init__()
        self.register_buffer("student", torch.full((students,), 1 / students))
        self.register_buffer("teacher", torch.full((teachers,), 1 / teachers))


@dataclass(init=False)
class EarthMover(Features):
    """BERT-EMD (Li et al. 2020): any student layer learns from any teacher layer, most from where it costs least.

        D_st = loss(S[s], T[t])        F = argmin Σ F_st sg(D_st), Σ_t F_st = m_s, Σ_s F_st = n_t        L = Σ F_st D_st

    The flow F is that of the batch at hand, found exactly (linear programming), and no gradient goes through it; masses
    m and n are equal at first. Cost attention then moves them to layers whose mass travels cheaply, after every batch
    in train mode:

        m_s ← m_s / Σ_t F_st D_st        n_t ← n_t / Σ_s F_st D_st        each over its sum

    as in their code. Ours: a batch in which a layer's cost or mass is 0 changes none (their division would give NaN),
    and masses are this term's own (theirs: of attention and hidden states together, unless told otherwise). The costs
    have to reach the CPU in every step; each process has a flow, and masses, of its own part of the batch.

    Args:
        loss, weight, projection, layer_map, shared, at_equal_width, parameters, at, standardize, standardize_batches:
            see `Features`. The layer map names the layers, each of the student's with each of the teacher's:
            `LayerMap.every(2, 3)`. One projection for all, unless shared is False.
        cost_attention: change the masses while training.
    """

    cost_attention: bool = True

    def __init__(
        self,
        loss: str | Callable = "mse",
        weight: float | Schedule = 1.0,
        projection: Projection | None = "linear",
        layer_map: LayerMap | None = None,
        shared: bool = True,
        cost_attention: bool = True,
        **settings: Any,
    ):
        self.cost_attention = cost_attention
        super().__init__(loss, weight, projection, layer_map, shared, **settings)

    @property
    def masses(self) -> dict[str, dict[int, float]]:
        """{"student": {layer: mass}, "teacher": {layer: mass}} at this moment."""
        layers, masses = self._both(), self._masses()
        return {side: dict(zip(layers[side], getattr(masses, side).tolist(), strict=True)) for side in layers}

    def shares(self) -> dict[Pair, float]:
        """The flow of the last batch; before the first, all pairs alike."""
        return vars(self).get("_flow") or super().shares()

    def needs(self, side: str) -> Needs:
        return self._needs(self._layers(side, self._looked_at()))

    def prepare(self, student_width: int, teacher_width: int) -> None:
        super().prepare(student_width, teacher_width)
        self._masses()

    def compare(self, student: Trace, teacher: Trace, labels: Tensor | None) -> dict[Pair, Tensor]:
        layers, masses = self._both(), self._masses()
        pairs = [(s, t) for s in layers["student"] for t in layers["teacher"]]
        with torch.no_grad():
            costs = torch.stack([self.compare_pair(student, teacher, pair) for pair in pairs]).double().cpu()
        costs = costs.view(len(layers["student"]), -1)  # (S, T)
        flow = cheapest_flow(costs, masses.student.double().cpu(), masses.teacher.double().cpu())
        vars(self)["_flow"] = {pair: share for pair, share in zip(pairs, flow.flatten().tolist(), strict=True) if share}
        if self.cost_attention and masses.training and torch.is_grad_enabled():
            for side, dimension in (("student", 1), ("teacher", 0)):
                mass = getattr(masses, side)
                mass.copy_(_moved(mass.double().cpu(), (flow * costs).sum(dimension)))
        return {pair: self.compare_pair(student, teacher, pair) for pair in self.shares()}

    def _both(self) -> dict[str, list[int]]:
        """The layers of both sides, each in order."""
        pairs = self._looked_at()
        layers = {side: sorted(self._layers(side, pairs)) for side in ("student", "teacher")}
        if {(s, t) for s in layers["student"] for t in layers["teacher"]} != set(pairs):
            raise ValueError(
                f"EarthMover lets every student layer learn from every teacher layer of its map, and {pairs} pairs "
                "only some: LayerMap.every(S, T), or the pairs of some of the layers."
            )
        return layers

    def _masses(self) -> Masses:
        name, modules = f"{self.place.name}_masses", self.place.modules
        if name not in modules:
            layers = self._both()
            modules[name] = Masses(len(layers["student"]), len(layers["teacher"]))
        return cast(Masses, modules[name])


def cheapest_flow(costs: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """F ≥ 0 with rows that sum to `student` (S,), columns to `teacher` (T,), and the least Σ F · costs. (S, T) float64

    Of costs that are not finite, every row's share of every column: whoever looks at the loss then sees them.
    """
    if not costs.isfinite().all():
        return student[:, None] * teacher
    numbered = torch.zeros(costs.shape[0] + 1, costs.shape[1] + 1, dtype=torch.float64)
    numbered[1:, 1:] = costs
    found = LayerMap.emd(numbered, student.tolist(), teacher.tolist(), cost=True)
    flow = torch.zeros_like(costs)
    for (s, t), share in zip(found.pairs, found.pair_weights, strict=True):
        flow[s - 1, t - 1] = share
    return flow


def _moved(mass: Tensor, cost: Tensor) -> Tensor:
    if not (cost.isfinite().all() and (cost > 0).all() and (mass > 0).all()):
        return mass
    return (mass / cost) / (mass / cost).sum()
