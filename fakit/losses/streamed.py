"""Attention alignment without a tokens × tokens matrix: scores, loss and gradient over blocks of queries, in one pass.

With rows of scores t (teacher) and s (student), KL = Σ_j softmax(t)_j (t_j - s_j) - LSE(t) + LSE(s), and d KL/d s_j = softmax(s)_j -
softmax(t)_j. Both need one row at a time, so a block of rows is scored, compared, turned into its part of the gradient, and dropped.
"""

import torch
from torch import Tensor

from fakit.losses.reduce import at_least_float32, check_mask

# Elements of one score block, over batch, heads, queries and keys: 4 MiB in float32, which stays in a CPU's caches.
_BLOCK = 2**20


def streamed_map_kl(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    mask: Tensor | None = None,
    student_scale: float | None = None,
    teacher_scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """`map_kl` of the maps softmax(q kᵀ · scale), computed without storing them. A scalar with gradient for the student.

    Args:
        student_q, teacher_q: queries (B, H, T, d); d may differ between the two sides.
        student_k, teacher_k: keys (B, H_kv, T, d), H_kv dividing H (grouped heads).
        mask: bool (B, T), True = counts, as query and as key.
        student_scale, teacher_scale: factors of the scores; 1/√d unless given.
        causal: queries see no later keys.

    Raises:
        ValueError: B, H or T differ between the sides, or a mask of another shape.
    """
    shapes = [tuple(x.shape) for x in (student_q, student_k, teacher_q, teacher_k)]
    same = student_q.dim() == 4 and student_q.shape[:3] == teacher_q.shape[:3]
    keys = all(
        k.dim() == 4 and (k.shape[0], k.shape[2:]) == (q.shape[0], q.shape[2:]) and q.shape[1] % k.shape[1] == 0
        for q, k in ((student_q, student_k), (teacher_q, teacher_k))
    )
    if not (same and keys):
        raise ValueError(
            "streamed_map_kl compares queries (B, H, T, d) and keys (B, H_kv, T, d) with one B, H and T on both sides; the student has "
            f"{shapes[0]} and {shapes[1]}, the teacher {shapes[2]} and {shapes[3]}. For unequal heads use Attention(..., heads='group-mean')."
        )
    check_mask("streamed_map_kl", mask, torch.Size((student_q.shape[0], student_q.shape[2])))
    return _StreamedMapKL.apply(
        student_q,
        student_k,
        teacher_q.detach(),
        teacher_k.detach(),
        mask,
        student_q.shape[-1] ** -0.5 if student_scale is None else student_scale,
        teacher_q.shape[-1] ** -0.5 if teacher_scale is None else teacher_scale,
        causal,
    )


class _StreamedMapKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_q, student_k, teacher_q, teacher_k, mask, student_scale, teacher_scale, causal):
        B, H, T, _ = student_q.shape
        sq, sk, tq, tk = (at_least_float32(x) for x in (student_q, student_k, teacher_q, teacher_k))
        if mask is not None:  # NaN in padding must not reach the products
            padding = ~mask.bool()[:, None, :, None]
            sq, sk, tq, tk = (x.masked_fill(padding, 0.0) for x in (sq, sk, tq, tk))
        sk_all, tk_all = (k.repeat_interleave(H // k.shape[1], dim=1) for k in (sk, tk))  # (B, H, T, d)
        valid = torch.ones(B, T, dtype=torch.bool, device=sq.device) if mask is None else mask.bool()
        share = valid.to(sq.dtype) / (valid.sum() * H)  # (B, T): each valid query's share of the mean, 0 for the others
        lowest = torch.finfo(sq.dtype).min
        needs_grad = student_q.requires_grad or student_k.requires_grad
        loss = sq.new_zeros(())
        grad_q, grad_k = (torch.zeros_like(sq), torch.zeros_like(sk_all)) if needs_grad else (None, None)

        rows = max(1, _BLOCK // max(1, B * H * T))
        for start in range(0, T, rows):
            end = min(start + rows, T)
            seen = end if causal else T  # later keys are masked for every query of this block
            hidden = ~valid[:, None, None, :seen]  # (B, 1, 1, K)
            if causal:
                future = torch.ones(end - start, seen, dtype=torch.bool, device=sq.device).triu(start + 1)
                hidden = hidden | future  # (B, 1, rows, K)
            s = _scores(sq[:, :, start:end], sk_all[:, :, :seen], student_scale).masked_fill_(hidden, lowest)
            t = _scores(tq[:, :, start:end], tk_all[:, :, :seen], teacher_scale).masked_fill_(hidden, lowest)
            s -= s.logsumexp(-1, keepdim=True)  # log q
            t -= t.logsumexp(-1, keepdim=True)  # log p
            difference, p = t - s, t.exp_()
            weights = share[:, None, start:end]  # (B, 1, rows)
            loss += ((p * difference).sum(-1) * weights).sum()
            if needs_grad:
                ds = s.exp_().sub_(p).mul_(weights.unsqueeze(-1) * student_scale)  # (B, H, rows, K)
                grad_q[:, :, start:end] = ds @ sk_all[:, :, :seen]
                grad_k[:, :, :seen] += ds.transpose(-2, -1) @ sq[:, :, start:end]
        if needs_grad:
            grad_k = grad_k.unflatten(1, (sk.shape[1], -1)).sum(2)  # (B, H_kv, T, d)
            ctx.save_for_backward(grad_q.to(student_q.dtype), grad_k.to(student_k.dtype))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grad_q, grad_k = ctx.saved_tensors
        return grad * grad_q, grad * grad_k, None, None, None, None, None, None


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return (q * scale) @ k.transpose(-2, -1)
