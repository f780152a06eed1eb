"""KL divergences and differences of two softmaxes, accurate also where the two hardly differ.

Everything here takes two logits (..., V) without -inf (`lowest` stands for it) and compares P = softmax(first) with Q =
softmax(second).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fakit.losses.fused.blocks import blocks, may_look


def lowest(dtype: torch.dtype) -> float:
    """What a logit of -inf is replaced by: its probability is 0 all the same, but 0 times it is 0 and not NaN.

    An eighth of the range, so that sums and differences of a few stay finite.
    """
    return torch.finfo(dtype).min / 8


def kl(first: Tensor, second: Tensor, share: float = 0.0) -> Tensor:
    """KL(P ‖ M), M = share·P + (1 - share)·Q. (..., V) -> (...)

    With share = 0 this is KL(P ‖ Q); with any other it is at most -log(share), whatever Q excludes.
    """
    return _KL.apply(first, second, share)


def difference(first: Tensor, second: Tensor) -> Tensor:
    """Q - P of every class. (..., V)"""
    log_p, u = _log_ratio(first, second)
    p, q = log_p.exp(), second.softmax(-1)
    found = torch.where(u.abs() < 1, p * torch.expm1(u.clamp(-1, 1)), q - p)
    # all u share the error of the log-sum-exps; the sum, which is 0, tells how large it is
    return found - found.sum(-1, keepdim=True).detach() * q.detach()


class _KL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, first, second, share):
        log_p, u = _log_ratio(first, second)
        p, w = log_p.exp(), _to_mixture(u, share)

        def mixture(rows: slice) -> Tensor:
            q = second.flatten(0, -2)[rows].softmax(-1)
            return torch.lerp(q, p.flatten(0, -2)[rows], share) if share else q

        values = small_kl(-(p * w).sum(-1), p, w, mixture)
        ctx.save_for_backward(first, second, values)
        ctx.share = share
        return values

    @staticmethod
    def backward(ctx, gradient):
        first, second, values = ctx.saved_tensors
        log_p, u = _log_ratio(first, second)
        p, q = log_p.exp(), second.softmax(-1)
        gradient, values = gradient.unsqueeze(-1), values.unsqueeze(-1)
        if not ctx.share:
            u = u - ((p * u).sum(-1, keepdim=True) + values)  # Σ p u = -KL, so what all u are wrong by is known
            to_first = -p * (u + values)
            to_second = torch.where(u.abs() < 1, p * torch.expm1(u.clamp(-1, 1)), q - p)
        else:
            w = _to_mixture(u, ctx.share)
            x = torch.expm1(-w)  # p/m - 1, from -1 to 1/share - 1
            pull = w + ctx.share * x
            to_first = p * ((p * pull).sum(-1, keepdim=True) - pull)
            to_second = (1 - ctx.share) * q * ((q * x).sum(-1, keepdim=True) - x)
        return gradient * to_first, gradient * to_second, None


def _log_ratio(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """log p and u = log q - log p, the logits subtracted first:
    logarithms of small probabilities would swallow their difference.
    """
    above = [z.logsumexp(-1, keepdim=True) for z in (first, second)]
    return first - above[0], (second - first) - (above[1] - above[0])


def _to_mixture(u: Tensor, share: float) -> Tensor:
    """log m - log p = log(share + (1 - share) eᵘ)."""
    if not share:
        return u
    near = torch.log1p((1 - share) * torch.expm1(u.clamp(-1, 1)))
    far = torch.logaddexp(u + math.log1p(-share), u.new_tensor(math.log(share)))
    return torch.where(u.abs() < 1, near, far)


# Below it a KL is summed up anew: in float32 Σ p (log p - log q) is right to some 1e-6 over a large vocabulary, however
# small it is itself.
_SMALL = 0.03
# Elements of one block of the sum; its few intermediate results stay in a CPU's caches.
_BLOCK = 2**17


def small_kl(values: Tensor, p: Tensor, u: Tensor, q_of: Callable) -> Tensor:
    """KL divergences, the small ones computed anew without cancellation.

    With v = u - Σ p u and φ(v) = eᵛ - 1 - v ≥ 0, KL(p ‖ q) = log(1 + Σ p φ(v)): every summand is small where the KL is,
    and a number that is added to all u, such as the error of a log-sum-exp, changes nothing.

    Args:
        values: (...), Σ -p u.
        p, u: (..., V), u = log q - log p.
        q_of: gives q, the rows counted over all leading dimensions, of those that a slice selects.
    """
    if not may_look(values):
        anew = _around_zero(p.flatten(0, -2), u.flatten(0, -2), q_of, slice(None)).view(values.shape)
        return torch.where(values < _SMALL, anew, values)
    shape, values, p, u = values.shape, values.flatten(), p.reshape(-1, p.shape[-1]), u.reshape(-1, u.shape[-1])
    for block in blocks(len(p), max(1, _BLOCK // p.shape[-1]), lambda end: p.shape[-1]):
        rows = slice(block.start, block.end)
        small = values[rows] < _SMALL
        if small.any():
            values[rows] = torch.where(small, _around_zero(p[rows], u[rows], q_of, rows), values[rows])
    return values.view(shape)


def _around_zero(p: Tensor, u: Tensor, q_of: Callable, rows: slice) -> Tensor:
    """log(1 + Σ p φ(v)): φ by its series near 0, where the difference would cancel; by q where eᵛ would overflow.
    (n, V) -> (n,)
    """
    mean = torch.linalg.vecdot(p, u).unsqueeze(-1)
    v = u - mean
    near = torch.finfo(u.dtype).eps ** 0.25
    low, high = (x.item() for x in v.aminmax()) if may_look(v) else (-math.inf, math.inf)
    if max(-low, high) < near:
        return torch.linalg.vecdot(p, _series(v)).log1p()
    if high < 20 and p.shape[-1] > 1000:  # what cancels in one of so many summands is nothing in their sum
        return torch.linalg.vecdot(p, torch.expm1(v).sub_(v)).log1p()
    w = v.clamp_max(20.0)
    phi = torch.where(v.abs() < near, _series(v.clamp(-near, near)), torch.expm1(w) - w)
    return torch.where(v > 20, q_of(rows) * torch.exp(-mean) - p - p * v, p * phi).sum(-1).log1p()


def _series(v: Tensor) -> Tensor:
    """eᵛ - 1 - v = v²/2 + v³/6 + v⁴/24 + v⁵/120 + …"""
    return v.div(120).add_(1 / 24).mul_(v).add_(1 / 6).mul_(v).add_(1 / 2).mul_(v).mul_(v)
