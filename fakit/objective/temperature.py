"""A term's temperature: set at any time, or learned against the student, the curriculum temperature of CTKD."""

import math
from numbers import Real
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fakit.objective.schedules import Schedule
from fakit.objective.term import Term


class Softened(Term):
    """A term with a temperature, which may be set at any time."""

    temperature: float | Schedule
    settable: ClassVar[frozenset[str]] = frozenset({"temperature"})

    @property
    def tau(self) -> float | Tensor:
        """τ of this step."""
        return cast(float, self.temperature)  # a Schedule is at its number in an objective

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "temperature":
            lowest = value.lowest if isinstance(value, Schedule) else value
            if not isinstance(lowest, Real) or not 0 < float(lowest) < math.inf:
                raise ValueError(f"{type(self).__name__}(temperature={value!r}): a temperature is finite and above 0.")
        super().__setattr__(name, value)


class LearnedTemperature(nn.Module):
    """τ = lowest + span · σ(θ), one learned number θ for all texts, whose gradient is turned around. CTKD, its global
    form (Li et al., AAAI 2023, arXiv 2211.16231).

    The student goes down the loss and θ goes up it, by λ times the gradient: the temperature looks for what is hard for
    the student, and λ, which rises from 0, is how hard it may become. θ starts at 1, as in the released code, so that τ
    starts at lowest + 0.73 span.
    """

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.ones(1))  # not (): FSDP shards no scalars

    def forward(self, lowest: float, span: float, strength: float) -> Tensor:
        """τ, () with graph, whose gradient reaches θ times -strength.

        >>> learned = LearnedTemperature()
        >>> tau = learned(1.0, 20.0, strength=0.5)
        >>> tau.backward()
        >>> round(tau.item(), 3), round(learned.theta.grad.item(), 3)  # -0.5 · 20 σ'(1)
        (15.621, -1.966)
        """
        return lowest + span * _Reversed.apply(self.theta, strength).sigmoid().squeeze(0)


class _Reversed(torch.autograd.Function):
    """x; its gradient times -strength (Ganin and Lempitsky 2015)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradient, None
