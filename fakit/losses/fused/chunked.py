"""Output matching and cross-entropy from hidden states: head, loss and gradient over chunks of tokens, in one pass.

At a vocabulary of 150,000 the logits of 2,048 tokens take 1.2 GB a side, and the losses over them several times that.
Here the two heads run on a few tokens at a time; their logits are compared,
turned into a gradient of hidden states and head, and dropped.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fakit.losses import outputs
from fakit.losses.fused import liger
from fakit.losses.fused.blocks import block_size, blocks
from fakit.losses.fused.output_head import ChunkedHead, Head, view
from fakit.losses.kl import small_kl
from fakit.losses.logits import asked_of, check_temperature, check_vocabularies
from fakit.losses.reduce import check_labels, check_mask, values_known

# Every chunk reads both heads and adds to one gradient of their size: below some 250 tokens that traffic costs more
# than the caches save (`blocks.SIZES`).
_FEWEST = 256


def fused_outputs(
    student: Head,
    teacher: Head,
    mask: Tensor | None = None,
    *,
    divergence: str | Callable[[Tensor, Tensor], Tensor] = "forward_kl",
    parameters: Mapping[str, float] | None = None,
    temperature: float | Tensor = 1.0,
    weights: tuple[float, float] = (1.0, 1.0),
    labels: Tensor | None = None,
    vocab_size: int | None = None,
    chunk: int | None = None,
    shares: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Output matching and the task's cross-entropy of two heads' logits, without storing the logits.

    Equal to the functions of `fakit.losses.outputs` and to `fakit.losses.task.task_loss` over `student.logits()` and
    `teacher.logits()`. Under torch.autocast the heads run in its dtype, else in the dtype of their weights; the losses
    in float32 or better. Where `liger.serves` the outputs term alone, Liger computes it.

    Args:
        student: hidden states (N, d_S) or (B, T, d_S) and a head (V_S, d_S). They get a gradient, and so does a bias
            (V_S,), where they require one.
        teacher: the same positions, (N, d_T) or (B, T, d_T), and a head (V_T, d_T); detached.
        mask: bool (N,) or (B, T), True = counts in the outputs term; None counts all.
        divergence: a name of `outputs.PER_POSITION`, or a function of that kind. One that names `labels` is given those
            of its positions, and counts where there are some; one that names `temperature` is given τ.
        parameters: the named divergence's own, by name: {"beta": 0.1} for "jsd".
        temperature: τ > 0 of the outputs term; a tensor () gets a gradient where it requires one.
        weights: γ of the outputs term and δ of the cross-entropy in the total; 0 leaves a term out.
        labels: integers (N,) or (B, T), -100 takes no part; without them there is no cross-entropy. A causal model's
            are shifted already: position t holds the label that it predicts.
        vocab_size: the outputs term compares the first `vocab_size` entries of both vocabularies; the cross-entropy
            keeps the student's whole.
        chunk: tokens a chunk; chosen from the vocabulary unless given.
        shares: further factors () of the two terms in the total, which may lie on any device; None for 1.

    Returns:
        total: γ·outputs + δ·task, each times its share. Its gradient is computed in this pass, so that backward only
            scales it.
        outputs, task: the raw terms, None where left out. A gradient asked of one of them alone is right as well, but
            takes a second pass.

    Raises:
        ValueError: shapes that do not fit, vocabularies that differ (but for "uld"), a parameter that the divergence
            does not have, labels that it wants and are not there, no valid position, a label that is no entry of the
            vocabulary and not -100 (the last two looked for on the CPU alone), or no term at all.

    >>> import torch
    >>> head = Head(hidden=torch.ones(5, 2), weight=torch.eye(3, 2))
    >>> total, outputs, task = fused_outputs(head, head, temperature=2.0)
    >>> total.item(), outputs.item(), task
    (0.0, 0.0, None)
    """
    weights = (weights[0], weights[1] if labels is not None else 0.0)
    formula = _formula(divergence, parameters or {})
    asked = asked_of(formula) if weights[0] else ()
    _check(student, teacher, mask, weights, labels, vocab_size, chunk, divergence, asked)
    check_temperature("fused_outputs", temperature)
    sizes = (student.weight.shape[0], teacher.weight.shape[0])
    kind = student.hidden.device.type
    tau = temperature.to(student.hidden.device) if isinstance(temperature, Tensor) else None
    plan = _Plan(
        divergence=formula,
        asked=asked,
        temperature=temperature if tau is None else tau.detach(),
        weights=weights,
        cuts=(vocab_size or sizes[0], vocab_size or sizes[1]),
        finish=(student.finish, teacher.finish),
        chunk=chunk or max(_FEWEST, block_size("outputs", kind) // max(sizes)),
        dtype=torch.float64 if torch.float64 in (student.weight.dtype, teacher.weight.dtype) else torch.float32,
        autocast=torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
        gradients=torch.is_grad_enabled(),
        # a device's number enters no comparison, so that nothing waits for it
        shares=tuple(1.0 if share is None else share.detach().to(student.hidden.device) for share in shares),
    )
    student, teacher = student.flatten(), teacher.detach().flatten()
    mask = None if mask is None else mask.flatten()
    bare = not weights[1] and vocab_size is None and student.finish is None and teacher.finish is None
    plain = isinstance(divergence, str) and not isinstance(temperature, Tensor) and not parameters
    if bare and plain and liger.serves(divergence, student, teacher):
        outputs_loss = liger.output_loss(student, teacher, mask, divergence, temperature)
        return plan.factors[0] * outputs_loss, outputs_loss, None
    used = weights[1] or "labels" in asked
    labels = labels.flatten().to(student.hidden.device) if labels is not None and used else None
    # what a teacher made under torch.inference_mode, a backward pass may keep as a copy alone
    tensors = [
        x.clone() if x is not None and x.is_inference() else x
        for x in (*student.tensors(), *teacher.tensors(), mask, labels, tau)
    ]
    total, outputs_loss, task = _FusedOutputs.apply(*tensors, plan)
    return total, outputs_loss if weights[0] else None, task if weights[1] else None


def _check(student, teacher, mask, weights, labels, vocab_size, chunk, divergence, asked) -> None:
    positions = student.hidden.shape[:-1]
    if positions != teacher.hidden.shape[:-1] or student.hidden.dim() not in (2, 3):
        raise ValueError(
            "fused_outputs compares hidden states of the same positions, (N, d) or (B, T, d) on both sides; the "
            f"student has {tuple(student.hidden.shape)}, the teacher {tuple(teacher.hidden.shape)}. Feed both models "
            "the same batch."
        )
    student.check("student")
    teacher.check("teacher")
    if not any(weights):
        raise ValueError(
            f"fused_outputs has nothing to compute: weights are {weights}, labels are "
            f"{'not ' if labels is None else ''}given. Give one term a weight."
        )
    if weights[0]:
        check_vocabularies(student.weight.shape[0], teacher.weight.shape[0], vocab_size, divergence)
        check_mask("fused_outputs", mask, positions)
    if "labels" in asked and labels is None:
        raise ValueError(
            f"divergence {divergence!r} looks at the label of each position, and no labels were given: labels=…, "
            f"integers {tuple(positions)}, -100 where there is none."
        )
    if weights[1] or "labels" in asked:
        if labels.shape != positions:
            raise ValueError(
                f"labels {tuple(labels.shape)} do not fit hidden states {tuple(student.hidden.shape)}; one label a "
                "position."
            )
        classes = vocab_size if vocab_size is not None and "labels" in asked else student.weight.shape[0]
        check_labels("fused_outputs", labels, classes)
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk}: a chunk has at least one token; None chooses.")


def _formula(divergence: str | Callable, parameters: Mapping[str, float]) -> Callable:
    if not callable(divergence):
        return outputs.per_position(divergence, **parameters)
    if parameters:
        raise ValueError(
            f"parameters {dict(parameters)} are for a divergence given by name, and {divergence!r} is a function; bind "
            "them to it with functools.partial."
        )
    return divergence


@dataclass(frozen=True)
class _Plan:
    """What is no tensor: settings that forward and backward share."""

    divergence: Callable
    asked: tuple[str, ...]  # what the divergence is given beside logits
    temperature: float | Tensor
    weights: tuple[float, float]
    cuts: tuple[int, int]  # of the two vocabularies, what is compared
    finish: tuple[Callable | None, Callable | None]
    chunk: int
    dtype: torch.dtype  # of logits and losses
    autocast: torch.dtype | None
    gradients: bool
    shares: tuple[Tensor | float, ...]  # of the two terms

    @property
    def factors(self) -> tuple[Tensor | float, Tensor | float]:
        """What the two terms are multiplied with in the total."""
        return self.weights[0] * self.shares[0], self.weights[1] * self.shares[1]


class _FusedOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, mask, labels, tau, plan):
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        inputs = (hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, mask, labels)
        wanted = [plan.gradients and needed for needed in (*ctx.needs_input_grad[:3], ctx.needs_input_grad[8])]
        factors = plan.factors
        with torch.autocast(hidden.device.type, enabled=False):  # the plan says the dtype
            (outputs_loss, task), grads = _sweep(*inputs, plan, factors, wanted)
        ctx.save_for_backward(*inputs, *grads)
        return factors[0] * outputs_loss + factors[1] * task, outputs_loss, task

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total, grad_outputs, grad_task):
        inputs, grads = ctx.saved_tensors[:8], ctx.saved_tensors[8:]  # of hidden, weight, bias and τ
        if grad_outputs is None and grad_task is None:
            grads = [None if grad is None or grad_total is None else grad_total * grad for grad in grads]
        else:  # one of the terms by itself: the same pass again, with the factors that came in
            plan = ctx.plan
            factors = [
                sum(part for part in (own, None if grad_total is None else grad_total * weight) if part is not None)
                for own, weight in zip((grad_outputs, grad_task), plan.factors, strict=True)
            ]
            _, grads = _sweep(*inputs, plan, factors, [grad is not None for grad in grads])
        *grads, grad_tau = grads
        grads = [None if grad is None else grad.to(x.dtype) for grad, x in zip(grads, inputs[:3], strict=True)]
        return *grads, None, None, None, None, None, grad_tau, None


def _sweep(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, mask, labels, plan, factors, wanted):
    """One pass over all chunks: the two terms, and the gradient of factors[0]·outputs + factors[1]·task.

    Args:
        factors: numbers, or scalars where backward asks.
        wanted: whether hidden, weight, bias and τ need a gradient.

    Returns:
        (outputs, task), and the gradients of hidden (N, d), weight (V, d) and bias (V,) in their own dtypes, and of τ
        (); None where not wanted.
    """
    N, device = hidden.shape[0], hidden.device
    nowhere = torch.zeros(N, dtype=torch.bool, device=device)
    compared = nowhere if not plan.weights[0] else ~nowhere if mask is None else mask.bool()
    if "labels" in plan.asked:
        compared = compared & (labels != -100)
    has_task = labels is not None and bool(plan.weights[1])
    labeled = labels != -100 if has_task else nowhere

    # Rows with a label come first, rows that count nowhere are left out. An accelerator would have to stop and count
    # them: it takes all.
    rows, labeled_rows = None, N if has_task else 0
    if values_known(labeled):
        with_label = labeled.nonzero().squeeze(1)
        rows = torch.cat([with_label, (compared & ~labeled).nonzero().squeeze(1)])
        labeled_rows = with_label.shape[0]
        if rows.shape[0] == N and labeled_rows in (0, N):
            rows = None  # all of them, in their order
    student = ChunkedHead(Head(hidden, weight, bias, plan.finish[0]), plan, compared | labeled, rows)
    if plan.weights[0]:
        cut = slice(plan.cuts[1])
        teacher_bias = None if teacher_bias is None else teacher_bias[cut]
        teacher = Head(teacher_hidden, teacher_weight[cut], teacher_bias, plan.finish[1])
        teacher = ChunkedHead(teacher, plan, compared, rows)
    if rows is not None:
        compared, labeled = compared[rows], labeled[rows]
        labels = None if labels is None else labels[rows]
    targets = labels if "labels" in plan.asked else None
    # every row's part of its term's mean, 0 where it does not count
    outputs_share = compared.to(student.dtype) / compared.sum().clamp_min(1)
    task_share = labeled.to(student.dtype) / labeled.sum().clamp_min(1)

    sums = [torch.zeros((), dtype=student.dtype, device=device) for _ in range(2)]
    grads = student.zero_grads(wanted[:3])
    grad_tau = torch.zeros((), dtype=student.dtype, device=device) if wanted[3] else None
    by_hand = plan.divergence is outputs.PER_POSITION["forward_kl"] and grad_tau is None
    step = _forward_kl_step if by_hand else partial(_any_step, plan.divergence, plan.asked, grad_tau is not None)
    work = [torch.empty(min(plan.chunk, N) * weight.shape[0], dtype=student.dtype, device=device) for _ in range(2)]
    for start, end, _ in blocks(compared.shape[0], plan.chunk, lambda _: weight.shape[0]):
        chunk = slice(start, end)
        z, g = student.logits(chunk), None  # (n, V_S)
        if plan.weights[0]:
            t = teacher.logits(chunk)  # (n, V)
            given = None if targets is None else targets[chunk].long().masked_fill(~compared[chunk], 0)
            values, g, of_tau = step(z[:, : plan.cuts[0]], t, plan.temperature, work, given)
            sums[0] += torch.dot(values.masked_fill(~compared[chunk], 0.0), outputs_share[chunk])
            g.mul_((outputs_share[chunk] * factors[0]).unsqueeze(-1))
            if grad_tau is not None:
                grad_tau += factors[0] * torch.dot(of_tau.masked_fill(~compared[chunk], 0.0), outputs_share[chunk])
            g = F.pad(g, (0, z.shape[1] - g.shape[1])) if g.shape[1] < z.shape[1] else g
        n = min(max(labeled_rows - start, 0), z.shape[0])
        if labels is not None and n:
            part = slice(start, start + n)
            values, ce = _cross_entropy_step(z[:n], labels[part].long().masked_fill(~labeled[part], 0), work[0])
            sums[1] += torch.dot(values.masked_fill(~labeled[part], 0.0), task_share[part])
            share = (task_share[part] * factors[1]).unsqueeze(-1)
            if g is None:
                g = ce.mul_(share)
            else:
                g[:n].addcmul_(ce, share)
        if g is not None and any(wanted[:3]):
            student.backward(chunk, g, grads)
    return sums, (*student.finish_grads(grads, rows), grad_tau)


def _forward_kl_step(z, t, temperature, work, labels=None):
    """τ² KL(P‖Q) of each row (n,), and its gradient for z, (n, V). By hand: `outputs` has the formula.
    Overwrites t and both of work.

    With a = z/τ and b = t/τ, u = log Q - log P = a - b - LSE(a) + LSE(b), LSE(x) = max x - log max softmax(x),
    and the gradient is τ (Q - P).
    """
    a, p = (view(buffer, z.shape) for buffer in work)
    torch.div(z, temperature, out=a)
    b = t.div_(temperature)
    top_a, top_b = a.amax(-1, keepdim=True), b.amax(-1, keepdim=True)
    torch.softmax(b, -1, out=p)
    u = torch.sub(a, b, out=b).sub_(top_a - top_b)
    q = torch.softmax(a, -1, out=a)
    u.add_(q.amax(-1, keepdim=True).log() - p.amax(-1, keepdim=True).log())
    values = torch.linalg.vecdot(p, u).neg()
    values = small_kl(values, p, u, lambda rows: q[rows])
    return values.mul_(temperature**2), torch.sub(q, p, out=b).mul_(temperature), None


def _any_step(per_position, asked, tau_learns, z, t, temperature, work, labels=None):
    """τ² times any divergence of each row (n,), and its gradients for z, (n, V), and for τ, (n,), by autograd."""
    with torch.enable_grad():
        leaf, leaves = z.detach().requires_grad_(), ()
        if tau_learns:
            temperature = temperature.to(z.dtype).expand(len(z), 1).detach().requires_grad_()  # one a row
            b, leaves = t / temperature, (temperature,)
        else:
            b = t.div_(temperature)
        given = {name: value for name, value in (("labels", labels), ("temperature", temperature)) if name in asked}
        values = per_position(leaf / temperature, b, **given)
        values = values * (temperature.squeeze(-1) if tau_learns else temperature) ** 2
        gradient, *of_tau = torch.autograd.grad(values.sum(), (leaf, *leaves))
    return values.detach(), gradient, of_tau[0].squeeze(-1) if of_tau else None


def _cross_entropy_step(z, labels, work):
    """-log softmax(z) at the labels (n,), and its gradient for z, softmax(z) - onehot(labels), (n, V)."""
    r = torch.softmax(z, -1, out=view(work, z.shape))
    labels = labels.unsqueeze(-1)
    values = z.amax(-1) - r.amax(-1).log() - z.gather(-1, labels).squeeze(-1)
    return values, r.scatter_add_(-1, labels, r.new_full(labels.shape, -1.0))
