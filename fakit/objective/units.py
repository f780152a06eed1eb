"""The teacher's units that matter to the task, in place of a projection: Flex-KD."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fakit.layer_maps import LayerMap, Pair
from fakit.losses.task import task_loss
from fakit.objective.features import Features
from fakit.objective.schedules import Schedule
from fakit.tracing.capture import capture
from fakit.tracing.trace import Trace

if TYPE_CHECKING:
    from fakit.objective.objective import Objective


class UnitScores(nn.Module):
    """How much each unit of a teacher layer matters to the task: Σ over tokens of |∂L/∂h · h|. Buffers: they are in the
    objective's state.
    """

    scores: Tensor
    tokens: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("scores", torch.zeros(width))
        self.register_buffer("tokens", torch.zeros((), dtype=torch.long))

    def chosen(self, number: int) -> Tensor:
        """The units of the highest scores, in order. int64 (number,)"""
        return self.scores.topk(number).indices.sort().values


@dataclass(init=False)
class Units(Features):
    """Flex-KD (Saadi and Wang 2025, arXiv 2507.10155): the student's d_S units learn from the d_S units of the teacher
    that matter most to the task, so that widths may differ without a projection.

        score_u = Σ over tokens |∂L_task/∂T[u] · T[u]|        loss(S, T[the d_S highest scores, in order])

    Its form is recalled, from memory of the paper and its abstract: the score, summed over tokens, and the correlation
    loss as in the authors' earlier work. Ours: each teacher layer has scores of its own. `fit_units` gathers them once,
    with the teacher's own task loss; the trainer does with `batches`.

    Args:
        loss, weight, layer_map, parameters, at: see `Features`; the default loss is "correlation".
        batches: have the trainer gather the scores over this many of the first training batches, before its first step.
    """

    batches: int | None = None

    def __init__(
        self,
        loss: str | Callable = "correlation",
        weight: float | Schedule = 1.0,
        layer_map: LayerMap | None = None,
        batches: int | None = None,
        **settings: Any,
    ):
        if batches is not None and batches < 1:
            raise ValueError(f"Units(batches={batches!r}): a number of batches, 1 or more.")
        self.batches = batches
        super().__init__(loss, weight, projection=None, layer_map=layer_map, **settings)
        if self.at != "block" or self.standardize is not None:
            raise ValueError(
                "Units chooses among the teacher's hidden states as they are: leave at and standardize out."
            )
        if self._widths_differ:
            raise ValueError(
                f"Units({loss!r}): this loss compares models of any two widths, and needs no choice of units; "
                f"Features({loss!r})."
            )

    def projects(self, student_width: int, teacher_width: int) -> bool:
        return False

    def prepare(self, student_width: int, teacher_width: int) -> None:
        """The scores of every teacher layer that may be asked for, 0 until they are gathered.

        Raises:
            ValueError: a student that is wider than its teacher.
        """
        self._check_widths(student_width, teacher_width)
        for layer in self.layers():
            if self._name(layer) not in self.place.modules:
                self.place.modules[self._name(layer)] = UnitScores(teacher_width)

    def layers(self) -> list[int]:
        """The teacher's that the term may look at."""
        return sorted(self._layers("teacher", self.possible_pairs()))

    def scores(self, layer: int) -> UnitScores | None:
        """Those of a teacher layer; None before `prepare`."""
        name = self._name(layer)
        return cast(UnitScores, self.place.modules[name]) if name in self.place.modules else None

    def sides(self, student: Trace, teacher: Trace, pair: Pair) -> tuple[Tensor, Tensor, Tensor | None]:
        ours, theirs, mask = super().sides(student, teacher, pair)
        self._check_widths(ours.shape[-1], theirs.shape[-1])
        found, known = self.scores(pair[1]), vars(self).setdefault("_known", set())
        # looked at once a layer: an accelerator would stop for it in every step
        if found is None or (pair[1] not in known and not int(found.tokens)):
            raise ValueError(
                f"{self.place.name} chooses units of the teacher's layer {pair[1]}, whose scores are not there: "
                "fakit.objective.units.fit_units(objective, teacher, batches) gathers them, and so does the trainer "
                "with batches=N, before its first step."
            )
        known.add(pair[1])
        return ours, theirs[..., found.chosen(ours.shape[-1])], mask

    def _check_widths(self, student: int, teacher: int) -> None:
        if student > teacher:
            raise ValueError(
                f"Units chooses as many of the teacher's units as the student has, and the student is {student} wide, "
                f"the teacher {teacher}; take Features with a projection."
            )

    def _name(self, layer: int) -> str:
        return f"units_T{layer}"  # of the teacher and the data alone: terms share it


def fit_units(
    objective: "Objective",
    teacher: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    gather: Callable[[Tensor], Tensor] | None = None,
) -> dict[int, int]:
    """Gather the scores by which `Units` chooses, once: they stay in the objective's state, and its checkpoints.

    Args:
        objective: prepared (`objective.prepare`), with one Units term or more.
        teacher: its gradients are those of its hidden states alone; no parameter gets one.
        batches: its inputs, with labels, on its device.
        gather: of several processes, puts their tensors one after another along the first dimension.

    Returns:
        {teacher layer: number of tokens}

    Raises:
        ValueError: no Units term, one that is not prepared, or a batch without labels.
    """
    terms = objective.of_kind(Units).values()
    found = {layer: term.scores(layer) for term in terms for layer in term.layers()}
    if not found or None in found.values():
        raise ValueError(
            "fit_units scores the units of teacher layers that Units terms compare, and found "
            + ("terms that are not prepared: objective.prepare(student_width, teacher_width)." if found else "none.")
        )
    layers = sorted(found)
    sums = {layer: torch.zeros_like(cast(UnitScores, found[layer]).scores, dtype=torch.float64) for layer in layers}
    tokens = dict.fromkeys(layers, 0)
    for batch in batches:
        if batch.get("labels") is None:
            raise ValueError("fit_units asks for the teacher's own task loss, and the batch has no labels.")
        trace, loss = _with_task_loss(teacher, batch, layers)
        gradients = torch.autograd.grad(loss, [trace.hidden_states[layer] for layer in layers])
        for layer, gradient in zip(layers, gradients, strict=True):
            states, mask = trace.hidden_states[layer].detach(), trace.layer_mask(layer)
            products = (gradient * states).abs().double()  # (B, T, d)
            products = products.flatten(0, 1) if mask is None else products[mask]
            sums[layer] += products.sum(0).to(sums[layer].device)
            tokens[layer] += len(products)
    for layer in layers:
        scores = cast(UnitScores, found[layer])
        total, number = sums[layer], torch.tensor(tokens[layer])
        if gather is not None:
            total, number = gather(total[None]).sum(0), gather(number[None]).sum()
        scores.scores.copy_(total)
        scores.tokens.copy_(number)
        tokens[layer] = int(number)
    return tokens


def _with_task_loss(teacher: nn.Module, batch: Mapping[str, Tensor], layers: list[int]) -> tuple[Trace, Tensor]:
    """The teacher's trace with graph, and its task loss, summed over what it is a mean over."""
    with torch.enable_grad(), _graph_from_embeddings(teacher):
        trace = capture(teacher, batch, hidden_states=layers)
    labels = trace.own_labels(batch["labels"])
    assert trace.logits is not None and labels is not None, "asked for; looked at"
    number = (labels[:, 1:] if trace.causal and labels.dim() == 2 else labels).ne(-100).sum()
    return trace, number * task_loss(trace.logits, labels, trace.causal, trace.problem_type)


@contextmanager
def _graph_from_embeddings(teacher: nn.Module) -> Iterator[None]:
    """A frozen model has no graph unless what it works on has one."""
    transformer: Any = teacher
    handle = transformer.get_input_embeddings().register_forward_hook(
        lambda module, args, output: output.requires_grad_()
    )
    try:
        yield
    finally:
        handle.remove()
