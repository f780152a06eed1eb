"""Factors on the terms' weights that are found while training: by learned uncertainties, or by gradient norms.

The weights stay what was asked for: at 0 they switch a term off, and between the others they are its importance.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Balancing(nn.Module):
    """What `Objective(…, balancing=…)` takes; its state is checkpointed with the objective and not exported."""

    names: tuple[str, ...]
    by_step: ClassVar[bool] = False  # whether it asks for `Objective.set_step`

    def prepare(self, names: tuple[str, ...]) -> None:
        """Make the state for an objective's terms."""
        self.names = names

    def factors(self, weights: Mapping[str, float]) -> dict[str, Tensor]:
        """What the weights of the active terms are multiplied by in this step, () each, without graph."""
        raise NotImplementedError

    def cost(self, name: str, value: Tensor) -> Tensor:
        """What is added to a term's factor times its value (), which comes without graph: 0 but for a gradient of the
        factors' own.
        """
        return torch.zeros_like(value)

    def measure(self, step: int, weights: Mapping[str, float], losses: Callable[[], Mapping[str, Tensor]]) -> None:
        """Look at the losses of a step, with graph, where it is time for that."""

    def describe(self) -> dict[str, Any]:
        """Its settings, with its kind."""
        return {"kind": next(kind for kind, made in KINDS.items() if isinstance(self, made))}


class Uncertainty(Balancing):
    """L = Σ w_i (exp(-s_i) L_i + s_i), s_i learned beside the student. Kendall et al., CVPR 2018, arXiv 1705.07115.

    s_i is the logarithm of a term's variance: at the optimum exp(s_i) = L_i, so that every term counts relative to its
    size, times its weight. The paper's form has 1/2 at regressions and at s; up to constants it is the same.

    Args:
        learning_rate: of s, a group of its own in the trainer's optimizer, without weight decay: at a student's 2e-4 it
            would hardly move in a short training. In a loop of your own, give `objective.balancing.parameters()` to the
            optimizer so.

    Raises:
        ValueError: a learning rate that is not above 0.
    """

    def __init__(self, learning_rate: float = 0.01):
        super().__init__()
        if not 0 < learning_rate < math.inf:
            raise ValueError(f"Uncertainty(learning_rate={learning_rate!r}): a learning rate is finite and above 0.")
        self.learning_rate = learning_rate

    def prepare(self, names: tuple[str, ...]) -> None:
        super().prepare(names)
        self.log_variances = nn.Parameter(torch.zeros(len(names)))  # s

    def _own(self, name: str) -> Tensor:
        return self.log_variances[self.names.index(name)]

    def factors(self, weights: Mapping[str, float]) -> dict[str, Tensor]:
        return {name: (-self._own(name).detach()).exp() for name in weights}

    def cost(self, name: str, value: Tensor) -> Tensor:
        """s, and the gradient of exp(-s) L with respect to s."""
        s = self._own(name).to(value.device)
        factor = (-s).exp()
        return s + (factor - factor.detach()) * value

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"learning_rate": self.learning_rate}


class GradientNorm(Balancing):
    """L = Σ w_i f_i L_i, with f such that the gradients ‖w_i f_i ∇L_i‖ at the student stand in the ratio of the weights
    w_i, and Σ w_i f_i = Σ w_i. GradNorm: Chen et al., ICML 2018, arXiv 1711.02257.

    It is where GradNorm settles with its asymmetry α at 0 (equations 1 and 2). Ours: the norms are measured every so
    many steps and kept as a running mean, and f solves the equations in place of a gradient descent on them; they are
    over all trainable parameters of the student, because terms of different layers have no last layer in common; the
    weights say the ratio. Norms are those of the first micro-batch of a step, in several processes their mean.

    Args:
        every: steps between two measurements. One takes a backward pass a term. A term that rises is measured when it
            does.
        momentum: of the running mean; 0 keeps only the last.

    Raises:
        ValueError: an `every` below 1, a momentum outside of 0 … 1 (without 1); in a call, no student to measure at.
    """

    by_step: ClassVar[bool] = True
    norms: Tensor

    def __init__(self, every: int = 20, momentum: float = 0.9):
        super().__init__()
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"GradientNorm(every={every!r}): a whole number of steps, at least 1.")
        if not 0 <= momentum < 1:
            raise ValueError(f"GradientNorm(momentum={momentum!r}): 0 ≤ momentum < 1.")
        self.every, self.momentum = every, momentum
        self._parameters_of_student: list[nn.Parameter] = []
        self._measured: int | None = None  # the step that was measured last
        self._seen: set[str] | None = None  # terms that were measured; None: look at the norms
        self.register_load_state_dict_post_hook(lambda module, _: vars(module).update(_seen=None))

    def prepare(self, names: tuple[str, ...]) -> None:
        super().prepare(names)
        # NaN: not measured yet; 0: without a gradient, which no factor can mend
        self.register_buffer("norms", torch.full((len(names),), math.nan))

    def watch(self, student: nn.Module) -> None:
        """Measure at this student. `DistillationTrainer` calls it; a loop of one's own once, before the first step."""
        self._parameters_of_student = [p for p in student.parameters() if p.requires_grad]

    def factors(self, weights: Mapping[str, float]) -> dict[str, Tensor]:
        norms = torch.stack([self.norms[self.names.index(name)] for name in weights])  # (terms on,)
        w = norms.new_tensor(list(weights.values()))
        known = norms > 0  # NaN is not
        pull = (w * known).sum() / torch.where(known, w / norms, 0.0).sum()
        return dict(zip(weights, torch.where(known, pull / norms, 1.0), strict=True))

    def measure(self, step: int, weights: Mapping[str, float], losses: Callable[[], Mapping[str, Tensor]]) -> None:
        if self._seen is None:
            self._seen = {
                name for name, norm in zip(self.names, self.norms.tolist(), strict=True) if not math.isnan(norm)
            }
        if step == self._measured or (step % self.every and weights.keys() <= self._seen):
            return
        if not self._parameters_of_student:
            raise ValueError(
                "balancing by gradient norms measures them at the student, and there is none with trainable "
                "parameters: call objective.balancing.watch(student) before the first step."
            )
        reached = False
        found = losses()
        for name in weights:  # also one that has nothing to compare
            at = self.names.index(name)
            gradients = self._gradients(found[name]) if name in found else []
            reached = reached or bool(gradients)
            before = self.norms[at]
            norm = self._mean_norm(gradients, before.device)
            mean = torch.where(before > 0, self.momentum * before + (1 - self.momentum) * norm, norm)
            # a batch that a term has nothing to say about is no news
            self.norms[at] = torch.where(norm > 0, mean, before.nan_to_num(0.0))
            self._seen.add(name)
        if not reached:
            raise ValueError(
                f"none of the terms depends on the student that is watched ({', '.join(found)}), so that their "
                "gradients have no norms: call objective.balancing.watch(student) with the one that is trained."
            )
        self._measured = step

    def _gradients(self, loss: Tensor) -> list[Tensor]:
        """By parameter of the student, those that there are."""
        if not loss.requires_grad:
            return []
        asked = self._parameters_of_student
        return [g for g in torch.autograd.grad(loss, asked, retain_graph=True, allow_unused=True) if g is not None]

    def _mean_norm(self, gradients: list[Tensor], device: torch.device) -> Tensor:
        """‖∇L‖ over the student, the mean of all processes. ()"""
        squares = [g.float().square().sum().to(device) for g in gradients]
        found = torch.stack([torch.zeros((), device=device), *squares]).sum().sqrt()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(found)
            found = found / torch.distributed.get_world_size()
        return found.nan_to_num(0.0, 0.0)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"every": self.every, "momentum": self.momentum}


KINDS: dict[str, type[Balancing]] = {"uncertainty": Uncertainty, "gradient_norm": GradientNorm}


def make_balancing(given: "str | Balancing | None") -> Balancing | None:
    """A named kind with its defaults, or the one that was given.

    Raises:
        ValueError: an unknown name.
    """
    if given is None or isinstance(given, Balancing):
        return given
    if given not in KINDS:
        raise ValueError(
            f"Objective(balancing={given!r}) is not known; choose one of {', '.join(map(repr, KINDS))}, a Balancing "
            "made with its own settings, or None."
        )
    return KINDS[given]()
