"""An output head in place of its logits."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F


@dataclass
class Head:
    """A linear output head with its input, in place of logits: logits = finish(hidden @ weightᵀ + bias).

    Attributes:
        hidden: (B, T, d)
        weight: (V, d)
        bias: (V,) or None
        finish: elementwise, on the logits: a soft cap, a scale; None for nothing
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    finish: Callable[[Tensor], Tensor] | None = None

    def logits(self) -> Tensor:
        """All of them at once. (B, T, V)"""
        logits = F.linear(self.hidden, self.weight, self.bias)
        return logits if self.finish is None else self.finish(logits)

    def detach(self) -> "Head":
        """The same, cut from the graph. Nothing is copied."""
        bias = None if self.bias is None else self.bias.detach()
        return Head(self.hidden.detach(), self.weight.detach(), bias, self.finish)
