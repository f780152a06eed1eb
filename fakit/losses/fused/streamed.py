"""Attention alignment without a tokens × tokens matrix: scores, loss and gradient over blocks of queries, in one pass.

With rows of scores t (teacher) and s (student), KL = Σ_j softmax(t)_j (t_j - s_j) - LSE(t) + LSE(s), and d KL/d s_j =
softmax(s)_j - softmax(t)_j. Any loss of maps has its gradient in the scores from d/ds = a (d/da - Σ a d/da). Both need
one row at a time, so a block of rows is scored, compared, turned into its part of the gradient, and dropped.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fakit.losses.fused.attention_inputs import AttentionInputs
from fakit.losses.fused.blocks import Block, block_size, blocks
from fakit.losses.reduce import at_least_float32, check_mask, in_full, values_known


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
    """`map_kl` of the maps softmax(q kᵀ · scale), computed without storing them.
    A scalar with gradient for the student.

    Args:
        student_q, teacher_q: queries (B, H, T, d); d may differ between the two sides.
        student_k, teacher_k: keys (B, H_kv, T, d), H_kv dividing H (grouped heads).
        mask: bool (B, T), True = counts, as query and as key.
        student_scale, teacher_scale: factors of the scores; 1/√d unless given.
        causal: queries see no later keys.

    Raises:
        ValueError: B, H or T differ between the sides, or a mask of another shape.
    """
    student, teacher = (
        AttentionInputs(q, k, None, None, q.shape[-1] ** -0.5 if scale is None else scale, causal)
        for q, k, scale in ((student_q, student_k, student_scale), (teacher_q, teacher_k, teacher_scale))
    )
    return streamed_loss("kl", student, teacher, mask)


def streamed_loss(
    loss: str,
    student: AttentionInputs,
    teacher: AttentionInputs,
    mask: Tensor | None = None,
    heads: int | None = None,
    queries: Tensor | None = None,
) -> Tensor:
    """`map_kl` or `map_mse` of two layers' maps, or `score_mse` of their scores, computed without storing them. A
    scalar with gradient for the student.

    Args:
        loss: "kl", "mse" or "score_mse".
        student, teacher: attention inputs with one B and T on both sides; d_head and H_kv may differ.
        mask: bool (B, T), True = counts, as query and as key.
        heads: average neighboring heads' maps (scores) down to this many on both sides first; None compares head h with
            head h.
        queries: bool (B, T), those of `mask` whose maps are compared, over all keys of `mask`; None compares all.

    Maps are over the keys that count, whether or not the layer itself masks the padding. The KL takes no account of
    attention sinks (its rows sum to 1 over the tokens, as in `map_kl`); the MSE compares maps that a sink has taken its
    share of. A pair that both sides mask (future, window) takes no part in the MSE's mean; one that either side masks
    has no score there, and takes no part in that of scores.

    Raises:
        ValueError: B, H or T differ between the sides, or a mask of another shape.
    """
    _check(student, teacher, mask, heads)
    learned = [student.query, student.key, *student.biases()]
    if _learns_sinks(loss, student):
        learned.append(student.sinks)
    return _Streamed.apply(loss, student, teacher.detach(), mask, heads, queries, *learned)


def head_costs(
    loss: str,
    student: AttentionInputs,
    teacher: AttentionInputs,
    mask: Tensor | None = None,
    queries: Tensor | None = None,
) -> Tensor:
    """The loss of every student head against every teacher head, without graph. (H_S, H_T)"""
    with torch.no_grad(), in_full(student.query):
        ours, theirs = _sides(student, teacher, mask, loss)
        compared = _compared(ours.valid, queries)
        costs = ours.query.new_zeros(ours.query.shape[1], theirs.query.shape[1])
        for start, end, keys in _blocks(student, teacher):
            log_s, log_t = (side.rows(start, end, keys) for side in (ours, theirs))
            counts = compared[:, None, start:end, None]
            if loss == "score_mse":  # scores may be large and close: their squares apart would be no sum to trust
                pairs = _pairs(loss, ours, theirs, start, end, keys) & counts
                scores = log_t.masked_fill(~pairs, 0.0)
                for h, one in enumerate(log_s.masked_fill(~pairs, 0.0).split(1, dim=1)):
                    costs[h] += (scores - one).square().sum((0, 2, 3))
            elif loss == "kl":
                p = log_t.exp() * counts
                costs += (p * log_t).sum((0, 2, 3)) - torch.einsum("bhqk,bgqk->hg", log_s, p)
            else:
                p, q = log_t.exp() * counts, log_s.exp() * counts
                costs += q.square().sum((0, 2, 3))[:, None] + p.square().sum((0, 2, 3))
                costs -= 2 * torch.einsum("bhqk,bgqk->hg", q, p)
        return costs / compared.sum()


def match_heads(costs: Tensor) -> Tensor:
    """A teacher head for each student head: the cheapest pair first,
    each teacher head once while there are others. (H_S, H_T) → (H_S,)

    Greedy, and all on the device: an optimal assignment would stop an accelerator in every step. To look at heads, both
    rules are `fakit.similarity.match_heads`, by name.
    """
    students, teachers = costs.shape
    rounds = math.ceil(students / teachers)  # more student heads than teacher heads: each teacher head serves so many
    open_costs = costs.repeat(1, rounds)
    chosen = torch.zeros(students, dtype=torch.long, device=costs.device)
    for _ in range(students):
        cheapest = open_costs.argmin().unsqueeze(0)  # (1,), of the flattened matrix
        row, column = cheapest // open_costs.shape[1], cheapest % open_costs.shape[1]
        chosen = chosen.index_copy(0, row, column % teachers)
        open_costs = open_costs.index_fill(0, row, math.inf).index_fill(1, column, math.inf)
    return chosen


def relation_inputs(side: AttentionInputs, which: str, heads: int) -> AttentionInputs:
    """MiniLMv2's self-relations of one layer as attention inputs: softmax(X Xᵀ / √d_r) for X of "queries",
    "keys" or "values".

    All heads are concatenated and split anew into `heads` relation heads, so that two models need not have the same
    number (Wang et al. 2021, arXiv 2012.15828, eq. 3). Padding and, in causal layers, the future stay masked.
    """
    x = _vectors(side, which)  # (B, H, T, d)
    width = x.shape[1] * x.shape[3]
    if width % heads:
        raise ValueError(
            f"{heads} relation heads asked of {which} that are {width} wide ({x.shape[1]} heads × {x.shape[3]}): the "
            "number must divide the width on both sides; set Attention('relations', relation_heads=…)."
        )
    x = x.transpose(1, 2).flatten(2).unflatten(2, (heads, width // heads)).transpose(1, 2)  # (B, R, T, d_r)
    allowed = None
    if side.mask is not None:
        allowed = replace(side, causal=False, documents=None).allowed()
    if allowed is not None and allowed.shape[1] > 1:
        allowed = allowed.any(1, keepdim=True)  # heads are mixed
    return AttentionInputs(x, x, None, allowed, (width // heads) ** -0.5, side.causal, documents=side.documents)


def relation_heads(student: AttentionInputs, teacher: AttentionInputs, relations: Sequence[str]) -> int:
    """The largest number of relation heads, up to the student's heads, that divides every width concerned."""
    concerned = [_vectors(side, which) for which in relations for side in (student, teacher)]
    common = math.gcd(*(x.shape[1] * x.shape[3] for x in concerned))
    return max(r for r in range(1, student.query.shape[1] + 1) if common % r == 0)


def _vectors(side: AttentionInputs, which: str) -> Tensor:
    vectors = {"queries": side.query, "keys": side.key, "values": side.value}[which]
    assert vectors is not None, f"{which} were not kept"
    return vectors


# -- one pass ---------------------------------------------------------------------------------------------------------


def _sides(
    student: AttentionInputs, teacher: AttentionInputs, mask: Tensor | None, loss: str
) -> tuple["_Side", "_Side"]:
    """Both in one dtype: float32, or float64 where one of them is."""
    dtype = torch.promote_types(*(at_least_float32(side.query).dtype for side in (student, teacher)))
    return _Side(student, mask, loss, dtype), _Side(teacher, mask, loss, dtype)


class _Side:
    """One side's log-maps over blocks of queries, and the way from their scores' gradient to what the layer
    computed.
    """

    def __init__(self, inputs: AttentionInputs, mask: Tensor | None, loss: str, dtype: torch.dtype):
        B, _, T, _ = inputs.query.shape
        self.inputs, self.loss = inputs, loss
        self.valid = torch.ones(B, T, dtype=torch.bool, device=inputs.query.device) if mask is None else mask.bool()
        # a mask that hides nothing would cost a pass over every block
        self.masked = mask is not None and not (values_known(self.valid) and self.valid.all())
        # models hand over views of (B, T, H, d); laid out by head once, no block's product has to copy them again
        self.query, key = (x.to(dtype).contiguous() for x in (inputs.query, inputs.key))
        if self.masked:  # NaN in padding must not reach the products
            padding = ~self.valid[:, None, :, None]
            self.query, key = self.query.masked_fill(padding, 0.0), key.masked_fill(padding, 0.0)
        self.groups = self.query.shape[1] // key.shape[1]
        self.key = key.repeat_interleave(self.groups, dim=1) if self.groups > 1 else key  # (B, H, T, d)
        self.biases = [bias.to(dtype) for bias in inputs.biases()]
        self.sinks: Tensor | None = None
        if inputs.sinks is not None and _learns_sinks(loss, inputs):
            self.sinks = inputs.sinks.to(dtype)
        # of the block at hand: masked pairs, whether the teacher may see some of them, and the slope of the soft cap
        self.hidden, self.hides_more, self._slope = None, False, None

    def rows(self, start: int, end: int, keys: int) -> Tensor:
        """What the loss compares of one block of rows: the logarithms of maps, or scores. (B, H, rows, keys)"""
        scores = self.scores(start, end, keys)
        return scores if self.loss == "score_mse" else self.log_maps(scores)

    def scores(self, start: int, end: int, keys: int) -> Tensor:
        """Of one block of rows, before the softmax; the lowest float where a pair is masked. (B, H, rows, keys)"""
        scores = (self.query[:, :, start:end] * self.inputs.scaling) @ self.key[:, :, :keys].transpose(-2, -1)
        if (cap := self.inputs.softcap) is not None:
            scores = scores.div_(cap).tanh_()
            self._slope = 1 - scores.square()
            scores = scores * cap
        for bias in self.biases:
            scores = scores + (bias[:, :, start:end, :keys] if bias.shape[2] > 1 else bias[..., :keys])
        allowed = self.inputs.allowed(start, end, keys)
        if self.masked:
            seen = self.valid[:, None, None, :keys]
            allowed = seen if allowed is None else allowed & seen
        if allowed is not None:
            self.hidden = ~allowed
            # added, since filling takes a CPU thrice as long: the lowest float swallows whatever score it is added to
            lowest = torch.zeros(self.hidden.shape, dtype=scores.dtype, device=scores.device)
            scores = scores.add_(lowest.masked_fill_(self.hidden, torch.finfo(scores.dtype).min))
            if (
                self.biases
            ):  # which may hold the lowest float themselves: a row that is masked whole must not become -inf
                scores = scores.clamp_min_(torch.finfo(scores.dtype).min)
        return scores

    def log_maps(self, scores: Tensor) -> Tensor:
        """Their log softmax over the keys that count."""
        if self.sinks is None:
            log_maps = scores.log_softmax(-1)
        else:
            self.total = torch.logaddexp(scores.logsumexp(-1, keepdim=True), self.sinks[:, None, None])
            log_maps = scores - self.total
        tiny = torch.finfo(scores.dtype).tiny
        return log_maps.clamp_min_(math.log(tiny))  # a map of 0 has a logarithm, as in `map_kl`

    def gradients(self) -> None:
        """Make room for the gradients."""
        self.grad_query, self.grad_key = torch.zeros_like(self.query), torch.zeros_like(self.key)
        self.grad_biases = [
            torch.zeros_like(own) if bias.requires_grad else None
            for own, bias in zip(self.biases, self.inputs.biases(), strict=True)
        ]
        self.grad_sinks = None if self.sinks is None else torch.zeros_like(self.sinks)

    def back(self, grad: Tensor, start: int, end: int, keys: int) -> None:
        """Add what one block's gradient of the scores (B, H, rows, keys) means for queries, keys and biases."""
        for total in self.grad_biases:
            if total is not None:
                part = total[:, :, start:end, :keys] if total.shape[2] > 1 else total[..., :keys]
                part += (grad * self.valid[:, None, start:end, None]).sum_to_size(*part.shape)
        if self._slope is not None:
            grad = grad * self._slope
        # padded queries are 0 here, so they give nothing to the keys; what they get themselves is dropped at the end
        self.grad_query[:, :, start:end] = grad @ self.key[:, :, :keys]
        self.grad_key[:, :, :keys] += grad.transpose(-2, -1) @ self.query[:, :, start:end]

    def collected(self) -> list[Tensor | None]:
        """The gradients in the order and the dtypes of what `streamed_loss` differentiates."""
        if self.masked:
            self.grad_query.masked_fill_(~self.valid[:, None, :, None], 0.0)
        inputs = self.inputs
        query, key = (grad.mul_(inputs.scaling) for grad in (self.grad_query, self.grad_key))
        key = key if self.groups == 1 else key.unflatten(1, (-1, self.groups)).sum(2)
        found = [query.to(inputs.query.dtype), key.to(inputs.key.dtype)]
        found += [None if g is None else g.to(b.dtype) for g, b in zip(self.grad_biases, inputs.biases(), strict=True)]
        if self.grad_sinks is None or inputs.sinks is None:
            return found
        return [*found, self.grad_sinks.to(inputs.sinks.dtype)]


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, student, teacher, mask, heads, queries, *learned):
        with in_full(student.query):
            ours, theirs = _sides(student, teacher, mask, loss)
            valid = _compared(ours.valid, queries)
            compare = {"kl": _kl, "mse": _mse, "score_mse": _score_mse}[loss]
            needs_grad = any(tensor.requires_grad for tensor in learned)
            if needs_grad:
                ours.gradients()
            total, pairs = ours.query.new_zeros(()), valid.new_zeros((), dtype=torch.long)
            for start, end, keys in _blocks(student, teacher):
                rows = counts = valid[:, None, start:end, None]  # (B, 1, rows, 1): padded queries take no part
                log_s, log_t = (side.rows(start, end, keys) for side in (ours, theirs))
                ours.hides_more = ours.hidden is not None and not _same(ours.hidden, theirs.hidden)
                if loss != "kl":
                    looked_at = _pairs(loss, ours, theirs, start, end, keys) & rows
                    pairs += looked_at.any(1).sum()
                    counts = looked_at if loss == "score_mse" else counts
                value, grad = compare(log_s, log_t, ours, counts, heads, needs_grad)
                total += value
                if needs_grad:
                    # of queries that are padding what follows is dropped at the end; of others it is not
                    ours.back(grad if queries is None else grad * rows, start, end, keys)
            compared = (student.query.shape[1] if heads is None else heads) * (valid.sum() if loss == "kl" else pairs)
            if needs_grad:
                ctx.save_for_backward(compared, *ours.collected())
            return total / compared

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        compared, *saved = ctx.saved_tensors
        factor = grad / compared
        return None, None, None, None, None, None, *(None if g is None else g * factor for g in saved)


def _compared(valid: Tensor, queries: Tensor | None) -> Tensor:
    """The queries whose maps are compared. bool (B, T)"""
    return valid if queries is None else valid & queries.to(valid.device)


def _kl(log_s: Tensor, log_t: Tensor, ours: _Side, counts: Tensor, heads: int | None, needs_grad: bool):
    """Σ a_T (log a_T - log a_S) of one block, and its gradient in the student's scores."""
    if heads is None or heads == log_s.shape[1]:
        log_t = log_t if log_t.shape[1] == log_s.shape[1] else _grouped(log_t.exp(), heads).log()
        p = log_t.exp()
        value = (log_t.sub_(log_s).mul_(p).sum(-1, keepdim=True) * counts).sum()
        if not needs_grad:
            return value, None
        q = log_s.exp_()
        if ours.hidden is None or not ours.hides_more:
            return value, q.sub_(p)
        # what the teacher gives to a key that the student masks is a constant: it pulls at no score, and the rest of p
        # sums to less than 1
        p = p.masked_fill_(ours.hidden, 0.0)
        return value, q.mul_(p.sum(-1, keepdim=True)).sub_(p).masked_fill_(ours.hidden, 0.0)
    q = log_s.exp()
    tiny = torch.finfo(q.dtype).tiny
    q_mean = _grouped(q, heads).clamp_min(tiny)
    q = q if ours.hidden is None else q.masked_fill_(ours.hidden, 0.0)
    p = _grouped(log_t.exp(), heads)
    value = ((p * (p.clamp_min(tiny).log() - q_mean.log())).sum(-1, keepdim=True) * counts).sum()
    return value, _through_softmax(q, -p / q_mean, ours, counts) if needs_grad else None


def _mse(log_s: Tensor, log_t: Tensor, ours: _Side, counts: Tensor, heads: int | None, needs_grad: bool):
    """Σ (a_S - a_T)² of one block, and its gradient in the student's scores."""
    q, p = log_s.exp_(), log_t.exp_()
    difference = _grouped(q, heads) - _grouped(p, heads)
    value = (difference.square() * counts).sum()
    return value, _through_softmax(q, 2 * difference, ours, counts) if needs_grad else None


def _score_mse(s: Tensor, t: Tensor, ours: _Side, pairs: Tensor, heads: int | None, needs_grad: bool):
    """Σ (s - t)² of one block over the pairs that count, and its gradient in the student's scores."""
    members = 1 if heads is None else s.shape[1] // heads
    # before the mean of heads: masked scores are the lowest float, whose sum is -inf
    s, t = (_grouped(x.masked_fill(~pairs, 0.0), heads) for x in (s, t))
    difference = s - t  # 0 at pairs that do not count
    grad = (2 / members * difference).repeat_interleave(members, dim=1) if needs_grad else None
    return difference.square().sum(), grad


def _pairs(loss: str, ours: _Side, theirs: _Side, start: int, end: int, keys: int) -> Tensor:
    """The pairs of one block that a mean of squares is over: of maps those that a side sees, of scores those that both
    see, in every head. bool (B, 1 or H, rows, keys)
    """
    pairs = ours.valid[:, None, start:end, None] & ours.valid[:, None, None, :keys]
    hidden = [side.hidden for side in (ours, theirs) if side.hidden is not None]
    if loss == "score_mse":
        for masked in hidden:
            pairs = pairs & ~masked.any(1, keepdim=True)
    elif len(hidden) == 2:
        pairs = pairs & ~(hidden[0] & hidden[1])
    return pairs


def _through_softmax(q: Tensor, grad: Tensor, ours: _Side, counts: Tensor) -> Tensor:
    """From the gradient of (averaged) maps to the gradient of scores: d/ds = a (d/da - Σ a d/da).
    A sink's map is no part of `q`.
    """
    if grad.shape[1] != q.shape[1]:
        members = q.shape[1] // grad.shape[1]
        grad = grad.repeat_interleave(members, dim=1) / members
    inner = (q * grad).sum(-1, keepdim=True)
    if ours.sinks is not None and ours.grad_sinks is not None:
        share = (ours.sinks[:, None, None] - ours.total).exp()  # (B, H, rows, 1)
        ours.grad_sinks -= (share * inner * counts).sum((0, 2, 3))
    return q * (grad - inner)


def _grouped(maps: Tensor, heads: int | None) -> Tensor:
    return maps if heads in (None, maps.shape[1]) else maps.unflatten(1, (heads, -1)).mean(2)


def _same(hidden: Tensor, other: Tensor | None) -> bool:
    """Whether both sides are known to mask the same pairs."""
    return other is not None and values_known(hidden) and torch.equal(hidden, other)


def _learns_sinks(loss: str, side: AttentionInputs) -> bool:
    """The KL is over the tokens alone; maps that the MSE compares have given a sink its share."""
    return loss == "mse" and side.sinks is not None


def _blocks(student: AttentionInputs, teacher: AttentionInputs) -> Iterator[Block]:
    """Queries, and the keys that any of them sees, so that a block of scores stays small."""
    B, H, T, _ = student.query.shape
    elements = block_size("attention", student.query.device.type)
    rows = max(1, elements // max(1, B * max(H, teacher.query.shape[1]) * T))
    causal = student.causal and teacher.causal
    return blocks(T, rows, lambda end: end if causal else T)


def _check(student: AttentionInputs, teacher: AttentionInputs, mask: Tensor | None, heads: int | None) -> None:
    sides = (student, teacher)
    keys = all(
        s.query.dim() == 4
        and s.key.dim() == 4
        and (s.key.shape[0], s.key.shape[2:]) == (s.query.shape[0], s.query.shape[2:])
        and s.query.shape[1] % s.key.shape[1] == 0
        for s in sides
    )
    (ours, theirs), shapes = (
        (tuple(s.query.shape) for s in sides),
        [tuple(x.shape) for s in sides for x in (s.query, s.key)],
    )
    if not keys or (ours[0], ours[2]) != (theirs[0], theirs[2]) or (heads is None and ours[1] != theirs[1]):
        raise ValueError(
            "attention is compared between queries (B, H, T, d) and keys (B, H_kv, T, d) with one B, H and T on both "
            f"sides; the student has {shapes[0]} and {shapes[1]}, the teacher {shapes[2]} and {shapes[3]}. For unequal "
            "heads use Attention(..., heads='group-mean')."
        )
    if heads is not None and (ours[1] % heads or theirs[1] % heads):
        raise ValueError(
            f"group-mean averages heads in equal groups, and {heads} divides not both {ours[1]} (student) and "
            f"{theirs[1]} (teacher). Use heads='best-match' or Attention('relations')."
        )
    check_mask("attention alignment", mask, torch.Size((ours[0], ours[2])))
