"""Relations: does the student arrange tokens, or texts, as the teacher does?

Every function takes student (B, T, d_S), teacher (B, T, d_T) and mask, bool (B, T), True = counts (None = all count),
and returns a scalar in float32 or better. What is compared is how the rows of one model lie to each other, so widths
may differ and no projection is learned (`codir` and `correlation`, which compare the two models' own, are the
exceptions).

Two questions tell them apart.

* Which rows? Tokens of one text (`nst`, `similarity`, `margin_ranking`, `rkd_distance`, `rkd_angle`: the mean over
  pairs or triples of tokens of a text), all valid tokens of the batch (`gram`, `procrustes`, `cka_loss`), or texts,
  each the mean of its tokens (`codir`). `Pooled` gives them texts in place of tokens.
* What do they not see? `cka_loss` no rotation, offset or scale; `rkd_angle` and `rkd_distance` neither; `similarity`
  and `margin_ranking` no rotation and no length of a row; `gram`, `procrustes` and `nst` no rotation alone.

A text of one token has no pair, one of two no angle: it does not count, and where no text has one the loss is 0.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fakit.losses.reduce import at_least_float32, check_mask, in_full, unit

Loss = TypeVar("Loss", bound=Callable[..., Tensor])
Count = Callable[[Tensor], Tensor]


def relational(count: Count, widths_differ: bool = True) -> Callable[[Loss], Loss]:
    """Say of a loss (student, teacher, mask) what `Features` must know of it.

    Args:
        count: what its mean is over, of the number of valid tokens in each row of the batch: (B,) int64 -> () int64.
        widths_differ: it compares tensors (B, T, d_S) and (B, T, d_T), so that no projection is learned.

    >>> @relational(count=pairs)
    ... def squared_lengths(student, teacher, mask=None): ...
    """

    def mark(loss: Loss) -> Loss:
        vars(loss).update(count=count, widths_differ=widths_differ)
        return loss

    return mark


def tokens(lengths: Tensor) -> Tensor:
    """The number of tokens. (B,) -> ()"""
    return lengths.sum()


def texts(lengths: Tensor) -> Tensor:
    """The number of rows that hold a token. (B,) -> ()"""
    return (lengths > 0).sum()


def pairs(lengths: Tensor) -> Tensor:
    """The number of pairs (i, j) of tokens of one row, i = j among them. (B,) -> ()"""
    return lengths.square().sum()


def distinct_pairs(lengths: Tensor) -> Tensor:
    """The number of pairs of two tokens of one row. (B,) -> ()"""
    return (lengths * (lengths - 1)).sum()


def pairs_of_pairs(lengths: Tensor) -> Tensor:
    """The number of pairs {a, b} of unordered pairs a = {i, j} of tokens of one row. (B,) -> ()"""
    unordered = lengths * (lengths - 1) // 2
    return (unordered * (unordered - 1) // 2).sum()


def distinct_triples(lengths: Tensor) -> Tensor:
    """The number of triples of three tokens of one row. (B,) -> ()"""
    return (lengths * (lengths - 1) * (lengths - 2)).sum()


def _prepare(name: str, student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Both sides in one precision, 0 in padding, and the mask, all True where there is none."""
    if student.shape[:-1] != teacher.shape[:-1] or student.dim() != 3:
        raise ValueError(
            f"{name} compares the same tokens of two models, (B, T, d_S) and (B, T, d_T); student has "
            f"{tuple(student.shape)}, teacher has {tuple(teacher.shape)}. Give both models the same batch."
        )
    check_mask(name, mask, student.shape[:2])
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    student, teacher = student.to(dtype), teacher.to(dtype)
    if mask is None:
        return student, teacher, student.new_ones(student.shape[:2], dtype=torch.bool)
    mask = mask.bool()
    padding = ~mask.unsqueeze(-1)
    return student.masked_fill(padding, 0.0), teacher.masked_fill(padding, 0.0), mask


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """Mean over what counts, 0 where nothing does. ()"""
    return values.masked_fill(~where, 0.0).sum() / where.sum().clamp_min(1)


def _pairs(mask: Tensor, distinct: bool) -> Tensor:
    """Which pairs of tokens of a text count. (B, T) -> (B, T, T)"""
    both = mask.unsqueeze(2) & mask.unsqueeze(1)
    return both & ~torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device) if distinct else both


# -- tokens of one text ---------------------------------------------------------------------------------------------


@relational(count=pairs)
def nst(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Token Gram matrices, `mean_ij (sᵢ·sⱼ/d_S - tᵢ·tⱼ/d_T)²` over the pairs of each text (i = j among them).

    TextBrewer's `mmd_loss` (Yang et al. 2020) of one layer: after neuron selectivity transfer (Huang and Wang 2017),
    whose own form is the squared MMD of normalized channels under a polynomial kernel.

    >>> import torch
    >>> nst(torch.ones(1, 2, 3), 2 * torch.ones(1, 2, 5)).item()  # (1 - 4)²
    9.0
    """
    student, teacher, mask = _prepare("nst", student, teacher, mask)
    with in_full(student):
        ours, theirs = (x @ x.mT / x.shape[-1] for x in (student, teacher))  # (B, T, T)
        return _mean((ours - theirs).square(), _pairs(mask, distinct=False))


@relational(count=pairs)
def similarity(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Similarity matrices, `mean_ij (cos(sᵢ, sⱼ) - cos(tᵢ, tⱼ))²` over the pairs of each text (i = j among them).

    Jasper (Zhang et al. 2024) over the embeddings of a batch's texts, which is `Pooled("similarity")`; over a text's
    tokens it is ours. A row of zeros has cosine 0 with every other.
    """
    student, teacher, mask = _prepare("similarity", student, teacher, mask)
    with in_full(student):
        ours, theirs = (unit(x) @ unit(x).mT for x in (student, teacher))  # (B, T, T)
        return _mean((ours - theirs).square(), _pairs(mask, distinct=False))


@relational(count=pairs_of_pairs)
def margin_ranking(student: Tensor, teacher: Tensor, mask: Tensor | None = None, margin: float = 0.015) -> Tensor:
    """Order of similarities: of two pairs of rows, the student's more similar one is to be the teacher's, by a margin.

        mean over pairs a = (i, j), b = (k, l) of max(0, margin - sign(cos_T(a) - cos_T(b)) · (cos_S(a) - cos_S(b)))

    Jasper (Zhang et al. 2024) over the embeddings of a batch's texts, which is `Pooled("margin_ranking")`: n rows have
    n⁴/8 pairs of pairs, all in memory, too many for the tokens of a long text. Not 0 where the two sides are equal, if
    similarities lie closer together than the margin. Where the teacher's are the same, b is to be the larger one, as in
    released code. The teacher gets no gradient.
    """
    if not margin >= 0:
        raise ValueError(f"margin_ranking wants a margin of 0 or more, not {margin!r}.")
    student, teacher, mask = _prepare("margin_ranking", student, teacher, mask)
    i, j = torch.triu_indices(mask.shape[1], mask.shape[1], offset=1, device=mask.device)  # the pairs
    a, b = torch.triu_indices(len(i), len(i), offset=1, device=mask.device)  # the pairs of pairs
    with in_full(student):
        ours, theirs = ((unit(x) @ unit(x).mT)[:, i, j] for x in (student, teacher))  # (B, pairs)
        above = theirs[:, a] - theirs[:, b]  # (B, pairs of pairs)
        sign = torch.where(above > 0, 1.0, -1.0).masked_fill(above.isnan(), torch.nan)
        counts = mask[:, i] & mask[:, j]
        return _mean((margin - sign * (ours[:, a] - ours[:, b])).relu(), counts[:, a] & counts[:, b])


@relational(count=distinct_pairs)
def rkd_distance(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Distances, `mean_{i≠j} huber(‖sᵢ - sⱼ‖/μ_S - ‖tᵢ - tⱼ‖/μ_T)`, μ the mean distance in the text.

    Relational KD (Park et al. 2019) over the examples of a batch, which is `Pooled("rkd_distance")`; over the tokens
    of a text as in Park et al. 2021. Their released code divides by n² in place of the n(n-1) pairs of the paper.
    """
    student, teacher, mask = _prepare("rkd_distance", student, teacher, mask)
    where = _pairs(mask, distinct=True)
    with in_full(student):
        ours, theirs = (_over_mean(_distances(x), where) for x in (student, teacher))  # (B, T, T)
        return _mean(F.smooth_l1_loss(ours, theirs, reduction="none"), where)


@relational(count=distinct_triples)
def rkd_angle(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Angles, `mean_{i,j,k} huber(cos∠sᵢsⱼsₖ - cos∠tᵢtⱼtₖ)` over the triples of different tokens of each text.

    Relational KD (Park et al. 2019), see `rkd_distance`. Two equal tokens have no direction to each other: cosine 0.
    In float64, a block of vertices j at a time, which is computed anew for the gradient; time grows as B · T³.
    """
    student, teacher, mask = _prepare("rkd_angle", student, teacher, mask)
    (B, T), dtype = mask.shape, student.dtype
    with in_full(student):
        sides = [part for x in (student, teacher) for part in _gram_and_directions(x.double(), mask)]
        step = max(1, _BLOCK // (B * T * T))
        blocks = [
            checkpoint(_angles, *sides, start, start + step, use_reentrant=False, preserve_rng_state=False)
            for start in range(0, T, step)
        ]
        return (torch.stack(blocks).sum() / distinct_triples(mask.sum(1)).clamp_min(1)).to(dtype)


_BLOCK = 2**22  # cosines of one block of vertices: 32 MiB in float64


def _angles(gram_s: Tensor, to_s: Tensor, gram_t: Tensor, to_t: Tensor, start: int, stop: int) -> Tensor:
    """Σ huber over all i, k of the vertices j = start … stop - 1. ()"""
    ours, theirs = _cosines(gram_s, to_s, start, stop), _cosines(gram_t, to_t, start, stop)  # (B, j, i, k)
    T = gram_s.shape[-1]
    equal = torch.eye(T, dtype=torch.bool, device=gram_s.device)  # i = k; i = j and k = j are 0 on both sides
    return F.smooth_l1_loss(ours, theirs, reduction="none").masked_fill(equal, 0.0).sum()


def _cosines(gram: Tensor, to: Tensor, start: int, stop: int) -> Tensor:
    """cos∠ijk = (xᵢ - xⱼ)·(xₖ - xⱼ) / (‖xᵢ - xⱼ‖ ‖xₖ - xⱼ‖). (B, j, i, k)"""
    at, to = gram[:, start:stop], to[:, start:stop]  # (B, j, T)
    own = gram.diagonal(dim1=1, dim2=2)[:, start:stop, None, None]  # xⱼ·xⱼ
    product = gram.unsqueeze(1) - at.unsqueeze(3) - at.unsqueeze(2) + own
    return product * to.unsqueeze(3) * to.unsqueeze(2)


def _gram_and_directions(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Products of a text's centered tokens, and 1/‖xᵢ - xⱼ‖, 0 where there is no direction or one does not count."""
    distances, where = _distances(x), _pairs(mask, distinct=True)
    where = where & (distances > 0)
    # angles do not depend on the origin, and near it products lose fewer digits
    center = x.detach().sum(1, keepdim=True) / mask.sum(1)[:, None, None].clamp_min(1)
    x = x - center
    return x @ x.mT, torch.where(where, 1 / torch.where(where, distances, 1.0), 0.0)


def _distances(x: Tensor) -> Tensor:
    """Of the tokens of each text, from their differences: 0 (without gradient) where two are equal. (B, T, T)"""
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")


def _over_mean(distances: Tensor, where: Tensor) -> Tensor:
    """Distances over the mean of those that count in their text; all 0 where all tokens are equal. (B, T, T)"""
    mean = distances.masked_fill(~where, 0.0).sum((1, 2), keepdim=True) / where.sum((1, 2), keepdim=True).clamp_min(1)
    return distances / torch.where(mean > 0, mean, 1.0)


# -- all tokens of the batch ----------------------------------------------------------------------------------------


@relational(count=tokens)
def gram(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Gram matrices of all valid tokens of the batch, `‖S Sᵀ - T Tᵀ‖²_F / ‖T Tᵀ‖²_F`, S (n, d_S) and T (n, d_T).

    Bhattarai et al. 2025 (arXiv 2509.25253): 0 only where the student keeps every length and angle, which neither a
    projection with MSE nor CKA asks for. That it is relative to the teacher's, and which tokens are the rows, is ours.
    In float64, as ‖SᵀS‖² - 2‖SᵀT‖² + ‖TᵀT‖², so that no n × n matrix is stored.
    """
    student, teacher, mask = _prepare("gram", student, teacher, mask)
    with in_full(student):
        ours, theirs = student.flatten(0, 1).double(), teacher.flatten(0, 1).double()  # (n, d_S), (n, d_T)
        own, cross, reference = ((x.mT @ y).square().sum() for x, y in ((ours, ours), (ours, theirs), (theirs, theirs)))
        difference = own - 2 * cross + reference
        return (difference / torch.where(reference > 0, reference, 1.0)).to(student.dtype)


@relational(count=tokens)
def procrustes(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """What the best rotation leaves of the MSE over all valid tokens of the batch, the narrower side padded with zeros:

        min_R ‖S R - T‖²_F / (n d_T) = (‖S‖²_F + ‖T‖²_F - 2 ‖SᵀT‖_*) / (n d_T)

    Bhattarai et al. 2025 (arXiv 2509.25253); the division by n d_T is ours and makes it `mse` where R = I is best, and
    never more. Neither side is centered or scaled. R comes from one SVD of d_S × d_T in float64; that it follows the
    student does not matter to the gradient, since it is a minimum. Where several rotations are equally good, one is
    taken.
    """
    student, teacher, mask = _prepare("procrustes", student, teacher, mask)
    with in_full(student):
        ours, theirs = student.flatten(0, 1).double(), teacher.flatten(0, 1).double()  # (n, d_S), (n, d_T)
        with torch.no_grad():  # NaN and infinity stay in the sum below, where the objective names their layer
            product = (ours.mT @ theirs).nan_to_num(posinf=0.0, neginf=0.0)
            left, _, right = torch.linalg.svd(product, full_matrices=False)
            rotation = left @ right  # (d_S, d_T): its rows are orthonormal, or its columns, those of the narrower side
        narrow = ours.shape[1] <= theirs.shape[1]
        rest = ours @ rotation - theirs if narrow else ours - theirs @ rotation.mT  # the wider side's zeros move along
        return (rest.square().sum() / (mask.sum() * theirs.shape[1])).to(student.dtype)


@relational(count=tokens)
def cka_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """`1 - √CKA` with linear kernels over all valid tokens of the batch, each side centered; in 0…1.

        √CKA = ‖SᵀT‖_F / √(‖SᵀS‖_F ‖TᵀT‖_F)

    Dasgupta and Cohn 2025, in float64 as theirs. The estimator is the biased one, which is near 1 for any two models
    unless the batch has many more tokens than the models have dimensions. 1 where all tokens of a side are equal.
    """
    student, teacher, mask = _prepare("cka_loss", student, teacher, mask)
    with in_full(student):
        ours, theirs = _centered(student, mask), _centered(teacher, mask)  # (n, d_S), (n, d_T)
        own, cross, reference = (
            torch.linalg.matrix_norm(x.mT @ y) for x, y in ((ours, ours), (ours, theirs), (theirs, theirs))
        )
        product = own * reference
        nothing = product == 0  # of NaN it is False
        root = product.masked_fill(nothing, 1.0).sqrt()
        return (1 - (cross / root).masked_fill(nothing, 0.0)).to(student.dtype)


def _centered(x: Tensor, mask: Tensor) -> Tensor:
    """Tokens without their mean, padding 0, and all 0 where nothing but rounding is left. (B, T, d) -> (B · T, d)"""
    x, counts = x.flatten(0, 1).double(), mask.flatten().unsqueeze(-1)
    centered = (x - x.sum(0) / counts.sum()).masked_fill(~counts, 0.0)
    rest, whole = centered.detach().square().sum(), x.detach().square().sum()
    return centered.masked_fill(rest <= 1e-24 * whole, 0.0)


@relational(count=tokens, widths_differ=False)
def correlation(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Each unit against the teacher's, `mean_u (1 - ρ_u)²`, ρ_u its correlation over all valid tokens of the batch.

    Saadi et al. 2023 (Findings of EMNLP), recalled; for Flex-KD over chosen units, which is `Units`. A unit's offset
    and scale do not count. In float64. Units that are the same at all tokens on one side do not count; where all are,
    as in a batch of one token, the loss is 0.
    """
    student, teacher, mask = _prepare("correlation", student, teacher, mask)
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"correlation compares unit with unit, so widths must agree; student has {student.shape[-1]}, teacher has "
            f"{teacher.shape[-1]}. Features('correlation') learns a projection, Units chooses among the teacher's."
        )
    with in_full(student):
        ours, theirs = (_centered_units(x, mask) for x in (student, teacher))  # (n, d)
        squares = ours.square().sum(0) * theirs.square().sum(0)  # (d,)
        where = (squares > 0) | squares.isnan()
        correlations = (ours * theirs).sum(0) / squares.masked_fill(~where, 1.0).sqrt()
        return _mean((1 - correlations).square(), where).to(student.dtype)


def _centered_units(x: Tensor, mask: Tensor) -> Tensor:
    """Tokens without their mean, unit by unit over its largest value; padding 0, as units of rounding alone.
    (B, T, d) -> (B · T, d)
    """
    x, counts = x.flatten(0, 1).double(), mask.flatten().unsqueeze(-1)
    largest = x.detach().abs().amax(0)
    x = x / torch.where(largest > 0, largest, 1.0)  # squares of squares would leave float64
    centered = (x - x.sum(0) / counts.sum()).masked_fill(~counts, 0.0)
    return centered.masked_fill(centered.detach().square().sum(0) <= 1e-24 * counts.sum(), 0.0)


# -- texts ----------------------------------------------------------------------------------------------------------


@relational(count=texts, widths_differ=False)
def codir(student: Tensor, teacher: Tensor, mask: Tensor | None = None, scale: float = 20.0) -> Tensor:
    """InfoNCE over the texts of the batch: the student's text picks its own among the teacher's.

        mean_b -log softmax_c(scale · cos(s̄_b, t̄_c))[b],    s̄, t̄ means over the text's valid tokens

    CoDIR (Sun et al. 2020) and CRD (Tian et al. 2020). Theirs are a memory bank of negatives, and projections learned
    on both sides; ours are the batch's other texts, no projection at equal widths, and the scale (1/τ). Not 0 where the
    two models are equal, and 0 for a single text, which has none to be told from.
    """
    student, teacher, mask = _prepare("codir", student, teacher, mask)
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"codir compares a student's text with a teacher's, so widths must agree; student has "
            f"{student.shape[-1]}, teacher has {teacher.shape[-1]}. Features('codir') learns a projection."
        )
    if not scale > 0:
        raise ValueError(f"codir wants a scale above 0, not {scale!r}; 1/τ is one.")
    present = mask.any(1)  # (B,)
    with in_full(student):
        lengths = mask.sum(1, keepdim=True).clamp_min(1)
        ours, theirs = (unit(x.sum(1) / lengths) for x in (student, teacher))  # (B, d)
        scores = (scale * ours @ theirs.mT).masked_fill(~present, torch.finfo(ours.dtype).min)  # (B, B)
        return _mean(-scores.log_softmax(-1).diagonal(), present)


LOSSES = {
    "nst": nst,
    "similarity": similarity,
    "margin_ranking": margin_ranking,
    "rkd_distance": rkd_distance,
    "rkd_angle": rkd_angle,
    "gram": gram,
    "procrustes": procrustes,
    "cka_loss": cka_loss,
    "correlation": correlation,
    "codir": codir,
}
