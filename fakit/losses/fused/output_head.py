"""An output head in place of its logits: all of them at once, or some rows at a time, forward and backward."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fakit.losses.fused.gemm import times_transposed
from fakit.losses.kl import lowest


@dataclass
class Head:
    """A linear output head with its input, in place of logits: logits = finish(hidden @ weightᵀ + bias).

    Attributes:
        hidden: (B, T, d) or (N, d)
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

    def flatten(self) -> "Head":
        """The same with hidden states (N, d)."""
        return Head(self.hidden.flatten(0, -2), self.weight, self.bias, self.finish)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """hidden, weight and bias."""
        return self.hidden, self.weight, self.bias

    def check(self, side: str) -> None:
        """Raise ValueError where hidden states, weight and bias of `side` ("student", "teacher")
        do not fit each other.
        """
        hidden, weight, bias = self.tensors()
        if not weight.is_floating_point() or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
            raise ValueError(
                f"the {side}'s head must be a floating-point matrix (V, {hidden.shape[-1]}) for its hidden states "
                f"{tuple(hidden.shape)}; it is {weight.dtype} {tuple(weight.shape)}. A quantized head makes its own "
                "logits: compare those with fakit.losses.outputs."
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(
                f"the {side}'s head has {weight.shape[0]} entries and a bias of {tuple(bias.shape)}; one number an "
                "entry."
            )
        dtypes = {x.dtype for x in self.tensors() if x is not None}
        if len(dtypes) > 1 and not torch.is_autocast_enabled(hidden.device.type):
            raise ValueError(
                f"the {side}'s hidden states, head and bias are {', '.join(sorted(map(str, dtypes)))}: one dtype "
                "without torch.autocast; cast one."
            )


class ChunkedHead:
    """One side: hidden states of the rows that count, and how they become logits and gradients."""

    def __init__(self, head: Head, plan, counts: Tensor, rows: Tensor | None):
        self.parameters = hidden, weight, bias = head.tensors()
        hidden = hidden.masked_fill(~counts.unsqueeze(-1), 0.0)  # NaN in padding must not reach the products
        if rows is not None:
            hidden = hidden[rows]

        def cast(x: Tensor) -> Tensor:
            if plan.autocast is not None and x.dtype != torch.float64:
                x = x.to(plan.autocast)
            return x.double() if plan.dtype == torch.float64 else x  # also where it is the other side's alone

        self.hidden, self.weight, self.finish, self.dtype = cast(hidden), cast(weight), head.finish, plan.dtype
        self.buffer: Tensor | None = None
        # -inf can come from a bias or a finishing function alone; it is replaced there, and not in a pass over all
        # logits
        tau = plan.temperature
        self.share_of_lowest = tau.clamp_max(1.0) if isinstance(tau, Tensor) else min(1.0, tau)
        self.bias: Tensor | None = None
        if bias is not None:
            bias = cast(bias)
            self.bias = bias.clamp_min(self.share_of_lowest * lowest(bias.dtype))

    def logits(self, chunk: slice) -> Tensor:
        """finish(h Wᵀ + b), float32 or float64. (n, V), good until the next call"""
        h = self.hidden[chunk]
        if h.device.type == "cpu" and self.dtype == h.dtype == torch.float32:
            out = times_transposed(h, self.weight, self.bias)
        else:
            if self.buffer is None:  # the first chunk is the largest
                self.buffer = torch.empty(len(h) * self.weight.shape[0], dtype=self.dtype, device=h.device)
            out = view(self.buffer, (len(h), self.weight.shape[0]))
            if out.dtype != h.dtype:
                out.copy_(F.linear(h, self.weight, self.bias))
            elif self.bias is None:
                torch.mm(h, self.weight.t(), out=out)
            else:
                torch.addmm(self.bias, h, self.weight.t(), out=out)
        if self.finish is None:
            return out
        with torch.enable_grad():
            self.before = out.detach().requires_grad_()
            self.after = self.finish(self.before).clamp_min(self.share_of_lowest * lowest(out.dtype))
        return self.after.detach()

    def zero_grads(self, wanted):
        hidden, weight, bias = (
            torch.zeros(x.shape, dtype=self.dtype, device=x.device) if want and x is not None else None
            for x, want in zip((self.hidden, self.weight, self.bias), wanted, strict=True)
        )
        return hidden, weight, bias

    def backward(self, chunk: slice, g: Tensor, grads):
        """Add what the gradient g of the chunk's logits, (n, V), means for hidden, weight and bias."""
        if self.finish is not None:
            (g,) = torch.autograd.grad(self.after, self.before, g)
        hidden, weight, bias = grads
        if bias is not None:
            bias += g.sum(0)
        size = None
        if self.weight.dtype == torch.float16:  # shares of a mean over many tokens would round to 0
            size = g.abs().amax().clamp_min(torch.finfo(g.dtype).tiny)
            g = g / size
        g, h = g.to(self.weight.dtype), self.hidden[chunk]
        if hidden is not None:
            hidden[chunk] = times_transposed(g, self.weight.t())
            if size is not None:
                hidden[chunk] *= size
        if weight is not None and weight.dtype == g.dtype:
            weight.addmm_(g.t(), h)
        elif weight is not None:
            weight += g.t() @ h if size is None else (g.t() @ h).to(weight.dtype) * size

    def finish_grads(self, grads, rows):
        """The sums in the dtypes of what they belong to; rows that were left out get 0.

        float16 has to wait for backward: before a GradScaler's factor has come in, it would round them to 0.
        """
        hidden, *others = grads
        if hidden is not None and rows is not None:
            hidden = hidden.new_zeros(self.parameters[0].shape).index_copy_(0, rows, hidden)
        return [
            g if g is None or x is None or x.dtype == torch.float16 else g.to(x.dtype)
            for g, x in zip((hidden, *others), self.parameters, strict=True)
        ]


def view(buffer: Tensor, shape) -> Tensor:
    """The first of a buffer's elements as a matrix."""
    return buffer[: shape[0] * shape[1]].view(shape)
