"""Relations against loops in NumPy and SciPy: the same numbers, what a loss does not see, and where nothing is there."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from fakit.losses import features, relational
from fakit.losses.features import cka_loss, codir, correlation, gram, margin_ranking, mse, procrustes, rkd_angle
from fakit.similarity import cka

B, T = 3, 5
MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 0, 1, 1, 0], [0, 1, 0, 1, 0]]).bool()  # 4, 3 and 2 tokens


def tensors(d_student: int = 4, d_teacher: int = 6, seed: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = 2 * torch.randn(B, T, d_student, generator=generator, dtype=torch.float64)
    return student, torch.randn(B, T, d_teacher, generator=generator, dtype=torch.float64) + 1


def texts(x: Tensor) -> list[list[np.ndarray]]:
    """The tokens that count, text by text."""
    return [[x[b, t].numpy() for t in range(T) if MASK[b, t]] for b in range(B)]


def rows(x: Tensor) -> np.ndarray:
    """All tokens that count. (n, d)"""
    return np.stack([token for text in texts(x) for token in text])


def huber(x: float) -> float:
    return x * x / 2 if abs(x) < 1 else abs(x) - 0.5


def unit(x: np.ndarray) -> np.ndarray:
    return x / math.sqrt(float(x @ x))


def by_pair(student: Tensor, teacher: Tensor, measure) -> float:
    """The mean over pairs of tokens of one text of (measure of the student's - the teacher's)²."""
    found = []
    for ours, theirs in zip(texts(student), texts(teacher), strict=True):
        for i, j in itertools.product(range(len(ours)), repeat=2):
            found.append((measure(ours[i], ours[j]) - measure(theirs[i], theirs[j])) ** 2)
    return float(np.mean(found))


def by_loops_rkd_distance(student: Tensor, teacher: Tensor) -> float:
    found = []
    for text in zip(texts(student), texts(teacher), strict=True):
        pairs = list(itertools.permutations(range(len(text[0])), 2))
        sides = []
        for side in text:
            distances = [float(np.linalg.norm(side[i] - side[j])) for i, j in pairs]
            sides.append([d / (sum(distances) / len(distances)) for d in distances])
        found += [huber(s - t) for s, t in zip(*sides, strict=True)]
    return sum(found) / len(found)


def by_loops_rkd_angle(student: Tensor, teacher: Tensor) -> float:
    found = []
    for text in zip(texts(student), texts(teacher), strict=True):
        for i, j, k in itertools.permutations(range(len(text[0])), 3):
            ours, theirs = (float(unit(side[i] - side[j]) @ unit(side[k] - side[j])) for side in text)
            found.append(huber(ours - theirs))
    return sum(found) / len(found)


def by_loops_margin_ranking(student: Tensor, teacher: Tensor) -> float:
    found = []
    for text in zip(texts(student), texts(teacher), strict=True):
        pairs = list(itertools.combinations(range(len(text[0])), 2))
        ours, theirs = ([float(unit(side[i]) @ unit(side[j])) for i, j in pairs] for side in text)
        for a, b in itertools.combinations(range(len(pairs)), 2):
            above = ours[a] - ours[b] if theirs[a] > theirs[b] else ours[b] - ours[a]
            found.append(max(0.0, 0.015 - above))
    return sum(found) / len(found)


def by_loops_gram(student: Tensor, teacher: Tensor) -> float:
    ours, theirs = (rows(x) @ rows(x).T for x in (student, teacher))  # (n, n)
    return float(((ours - theirs) ** 2).sum() / (theirs**2).sum())


def by_scipy_procrustes(student: Tensor, teacher: Tensor) -> float:
    """SciPy's best rotation of both sides, the narrower one padded with zeros."""
    ours, theirs = rows(student), rows(teacher)
    width = max(ours.shape[1], theirs.shape[1])
    padded = [np.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in (ours, theirs)]
    rotation, _ = scipy.linalg.orthogonal_procrustes(*padded)
    return float(((padded[0] @ rotation - padded[1]) ** 2).sum() / theirs.size)


def by_grams_cka(student: Tensor, teacher: Tensor) -> float:
    """HSIC of centered Gram matrices."""
    n = len(rows(student))
    center = np.eye(n) - 1 / n
    ours, theirs = (center @ rows(x) @ rows(x).T @ center for x in (student, teacher))
    return 1 - math.sqrt((ours * theirs).sum() / math.sqrt((ours**2).sum() * (theirs**2).sum()))


def by_numpy_correlation(student: Tensor, teacher: Tensor) -> float:
    ours, theirs = rows(student), rows(teacher)
    return float(np.mean([(1 - np.corrcoef(ours[:, u], theirs[:, u])[0, 1]) ** 2 for u in range(ours.shape[1])]))


def by_loops_codir(student: Tensor, teacher: Tensor, scale: float = 20.0) -> float:
    ours, theirs = ([unit(sum(text) / len(text)) for text in texts(x)] for x in (student, teacher))
    found = []
    for b in range(B):
        scores = [math.exp(scale * float(ours[b] @ other)) for other in theirs]
        found.append(-math.log(scores[b] / sum(scores)))
    return sum(found) / B


AGAIN = {
    "nst": lambda s, t: by_pair(s, t, lambda a, b: float(a @ b) / len(a)),
    "similarity": lambda s, t: by_pair(s, t, lambda a, b: float(unit(a) @ unit(b))),
    "margin_ranking": by_loops_margin_ranking,
    "rkd_distance": by_loops_rkd_distance,
    "rkd_angle": by_loops_rkd_angle,
    "gram": by_loops_gram,
    "procrustes": by_scipy_procrustes,
    "cka_loss": by_grams_cka,
    "correlation": by_numpy_correlation,
    "codir": by_loops_codir,
}
ANY_WIDTHS = [name for name, loss in relational.LOSSES.items() if loss.widths_differ]
every = pytest.mark.parametrize("name", AGAIN)
every_relation = pytest.mark.parametrize("name", ANY_WIDTHS)


def test_all_are_recomputed_here_and_have_their_names_in_features():
    assert set(AGAIN) == set(relational.LOSSES) and set(AGAIN) - set(ANY_WIDTHS) == {"codir", "correlation"}
    assert all(getattr(features, name) is loss is features.LOSSES[name] for name, loss in relational.LOSSES.items())


@every
@pytest.mark.parametrize("widths", [(4, 6), (6, 4), (5, 5), (1, 9)])
def test_equals_an_independent_computation(name, widths):
    student, teacher = tensors(*(widths if name in ANY_WIDTHS else (6, 6)))
    assert relational.LOSSES[name](student, teacher, MASK).item() == pytest.approx(
        AGAIN[name](student, teacher), rel=1e-9
    )


@every
def test_float32_is_right_to_a_millionth(name):
    student, teacher = (x.float() for x in tensors(6, 6))
    exact = AGAIN[name](student.double(), teacher.double())
    assert relational.LOSSES[name](student, teacher, MASK).item() == pytest.approx(exact, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_rkd_angle_is_the_same_in_blocks_of_any_size(count, monkeypatch):
    student, teacher = tensors()
    results = []
    for block in (2**22, count * B * T * T):
        monkeypatch.setattr(relational, "_BLOCK", block)
        one = student.clone().requires_grad_()
        loss = rkd_angle(one, teacher, MASK)
        loss.backward()
        results.append((loss.item(), one.grad))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-12)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-10, atol=1e-12)


# -- what they do not see, and what they do -------------------------------------------------------------------------


def rotated(x: Tensor) -> Tensor:
    d = x.shape[-1]
    return x @ torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(1), dtype=x.dtype))[0]


def moved(x: Tensor) -> Tensor:
    return x + torch.linspace(1, 2, x.shape[-1], dtype=x.dtype)


def scaled(x: Tensor) -> Tensor:
    return 3 * x


def token_scaled(x: Tensor) -> Tensor:
    return x * torch.linspace(0.5, 2, B * T, dtype=x.dtype).view(B, T, 1)


def turned_by_text(x: Tensor) -> Tensor:
    """Every other text upside down: a rotation of its own for each text."""
    return x * torch.tensor([1.0, -1.0, 1.0], dtype=x.dtype).view(B, 1, 1)


CHANGES = [rotated, moved, scaled, token_scaled, turned_by_text]
BLIND = {
    "nst": {rotated, turned_by_text},
    "similarity": {rotated, scaled, token_scaled, turned_by_text},
    "margin_ranking": {rotated, scaled, token_scaled, turned_by_text},
    "rkd_distance": {rotated, moved, scaled, turned_by_text},
    "rkd_angle": {rotated, moved, scaled, turned_by_text},
    "gram": {rotated},
    "procrustes": {rotated},
    "cka_loss": {rotated, moved, scaled},
    "correlation": {moved, scaled},
    "codir": {scaled},
}


@every
@pytest.mark.parametrize("change", CHANGES)
def test_blind_to_what_its_docstring_says_and_to_nothing_else(name, change):
    loss = relational.LOSSES[name]
    student, teacher = tensors(6, 6)
    before, after = loss(student, teacher, MASK).item(), loss(change(student), teacher, MASK).item()
    if change in BLIND[name]:
        assert after == pytest.approx(before, rel=1e-9, abs=1e-12)
    else:
        assert abs(after - before) > 1e-3 * abs(before)


@pytest.mark.parametrize("name", [name for name in ANY_WIDTHS if name != "margin_ranking"])
def test_0_at_a_rotation_into_a_wider_space(name):
    """What no projection is needed for: a student of half the width can have the same geometry."""
    teacher = tensors(4, 4)[1]
    wider = torch.cat([teacher, torch.zeros_like(teacher)], -1)
    wider = rotated(wider) * (math.sqrt(2) if name == "nst" else 1)  # which divides by the width
    assert relational.LOSSES[name](teacher, wider, MASK).item() == pytest.approx(0, abs=1e-12)


def test_procrustes_is_mse_where_no_rotation_helps_and_never_more():
    student, teacher = tensors(6, 6)
    assert procrustes(student, teacher, MASK).item() < mse(student, teacher, MASK).item()
    spread = torch.tensor(rows(teacher).T @ rows(teacher))
    near = teacher + 0.01 * teacher @ spread  # SᵀT is symmetric and positive: R = I is best
    assert procrustes(near, teacher, MASK).item() == pytest.approx(mse(near, teacher, MASK).item(), rel=1e-9)
    by_norms = [np.linalg.norm(rows(x)) ** 2 for x in (student, teacher)]
    nuclear = np.linalg.norm(rows(student).T @ rows(teacher), "nuc")
    expected = (sum(by_norms) - 2 * nuclear) / rows(teacher).size
    assert procrustes(student, teacher, MASK).item() == pytest.approx(expected, rel=1e-9)


def test_cka_loss_is_one_minus_the_root_of_the_kits_biased_cka():
    student, teacher = tensors()
    found = cka(torch.tensor(rows(student)), torch.tensor(rows(teacher)), estimator="biased")
    assert cka_loss(student, teacher, MASK).item() == pytest.approx(1 - math.sqrt(found), rel=1e-9)


def test_cka_is_blind_to_geometry_that_procrustes_and_gram_see():
    """Theorem 1 of arXiv 2509.25253 in its simplest form: CKA is 0 although the student is three times too large."""
    _, teacher = tensors()
    student = 3 * teacher + 5
    assert cka_loss(student, teacher).item() == pytest.approx(0, abs=1e-12)
    assert procrustes(student, teacher).item() > 1 and gram(student, teacher).item() > 1


def test_codir_falls_as_texts_find_their_own():
    _, teacher = tensors(6, 6)
    right = codir(teacher, teacher, MASK).item()
    assert right < codir(teacher[[1, 2, 0]], teacher, torch.ones(B, T)).item()
    assert codir(teacher, teacher, MASK, scale=40.0).item() < right
    assert codir(teacher[:1], teacher[:1], MASK[:1]).item() == 0  # none to be told from
    with pytest.raises(ValueError, match=r"widths must agree; student has 6, teacher has 4.*learns a projection"):
        codir(teacher, teacher[..., :4])
    with pytest.raises(ValueError, match="scale above 0, not -1"):
        codir(teacher, teacher, scale=-1)


def test_correlation_leaves_out_units_that_never_change():
    student, teacher = tensors(6, 6)
    expected = correlation(student[..., :4], teacher[..., :4], MASK).item()
    student[..., 4], teacher[..., 5] = 1 / 3, 0
    assert correlation(student, teacher, MASK).item() == pytest.approx(expected, rel=1e-12)
    assert correlation(student[:1, :1], teacher[:1, :1]).item() == 0
    assert correlation(-teacher[..., :5], teacher[..., :5], MASK).item() == pytest.approx(4)
    with pytest.raises(ValueError, match=r"student has 6, teacher has 4.*Units chooses among the teacher's"):
        correlation(teacher, teacher[..., :4])


# -- where nothing is there ------------------------------------------------------------------------------------------


def degenerate() -> dict[str, tuple[Tensor, Tensor]]:
    student, teacher = tensors(6, 6)
    zeros, one_row = torch.zeros_like(student), student.clone()
    one_row[0, 0] = 0
    equal = student[:, :1].expand(B, T, 6).clone()
    same = student[:1, :1].expand(B, T, 6).clone()
    flat = student @ torch.diag(torch.tensor([1.0, 1.0, 0, 0, 0, 0], dtype=torch.float64))  # rank 2
    two = student.clone()
    two[:, 1] = two[:, 0]
    return {
        "a student of zeros": (zeros, teacher),
        "a teacher of zeros": (student, zeros),
        "both zeros": (zeros, zeros.clone()),
        "a row of zeros": (one_row, teacher),
        "every text of equal tokens": (equal, teacher),
        "all tokens equal": (same, teacher),
        "rank 2": (flat, flat.flip(-1)),
        "two equal tokens": (two, teacher),
        "two equal tokens on both sides": (two, two.flip(-1)),
        "student is teacher": (teacher, teacher.clone()),
    }


@every
@pytest.mark.parametrize("what", degenerate())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_value_and_gradient_are_finite_where_nothing_is_there(name, what, dtype):
    student, teacher = (x.to(dtype).requires_grad_() for x in degenerate()[what])
    loss = relational.LOSSES[name](student, teacher, MASK)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()
    assert teacher.grad.isfinite().all() if name != "margin_ranking" else teacher.grad is None
    assert student.grad.abs().max() < 1e4
    if what in ("both zeros", "student is teacher") and name not in ("codir", "margin_ranking"):
        expected = 1.0 if (name, what) == ("cka_loss", "both zeros") else 0.0
        assert loss.item() == pytest.approx(expected, abs=1e-6) and student.grad.abs().max() < 1e-6


def test_tokens_that_are_all_equal_have_no_cka():
    student, teacher = degenerate()["all tokens equal"]
    for shift in (0.0, 1e6 / 3):
        assert cka_loss(student + shift, teacher, MASK).item() == 1


@pytest.mark.parametrize(
    ("name", "length"), [("margin_ranking", 2), ("rkd_distance", 1), ("rkd_angle", 1), ("rkd_angle", 2)]
)
def test_texts_too_short_for_a_relation_count_nothing(name, length):
    student, teacher = (x.requires_grad_() for x in tensors())
    loss = relational.LOSSES[name](student[:, :length], teacher[:, :length])
    loss.backward()
    assert loss.item() == 0 and (student.grad == 0).all()
    assert relational.LOSSES[name].count(torch.tensor([length] * B)) == 0


@every
def test_nan_in_a_token_that_counts_shows_in_the_loss(name):
    for side, number in itertools.product((0, 1), (torch.nan, torch.inf)):
        sides = tensors(6, 6)
        sides[side][0, 0, 0] = number
        assert not relational.LOSSES[name](*sides, MASK).isfinite()


@every_relation
def test_batches_that_differ_are_refused(name):
    student, teacher = tensors()
    with pytest.raises(ValueError, match=rf"{name} compares the same tokens.*\(3, 4, 4\), .*\(3, 5, 6\).*same batch"):
        relational.LOSSES[name](student[:, :4], teacher)


# -- what the mean is over -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nst", "similarity", "margin_ranking", "rkd_distance", "rkd_angle"])
def test_the_mean_over_parts_of_a_batch_is_the_mean_over_all_of_it(name):
    loss = relational.LOSSES[name]
    student, teacher = tensors()
    whole = loss(student, teacher, MASK).item()
    weights = [loss.count(MASK[b : b + 1].sum(1)).item() for b in range(B)]
    values = [loss(student[b : b + 1], teacher[b : b + 1], MASK[b : b + 1]).item() for b in range(B)]
    assert sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights) == pytest.approx(whole, rel=1e-12)
    assert loss.count(MASK.sum(1)).item() == sum(weights) != B


def test_margin_ranking_in_a_case_of_three_texts():
    """cos of the pairs (1, 2), (1, 3), (2, 3): the student's 0.6, 0.8, 0; the teacher's 0.8, 0.6, 0."""
    student = torch.tensor([[[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.8, -0.6, 0.0]]], dtype=torch.float64)
    teacher = student[:, [0, 2, 1]]
    wrong_order = 0.2 + 0.015  # of the first two pairs; the third is below both by more than the margin
    assert margin_ranking(student, teacher).item() == pytest.approx(wrong_order / 3, rel=1e-12)
    assert margin_ranking(student, teacher, margin=0.65).item() == pytest.approx((0.85 + 0.05) / 3, rel=1e-12)
    assert margin_ranking(teacher, teacher).item() == 0
    with pytest.raises(ValueError, match="margin of 0 or more, not -1"):
        margin_ranking(student, teacher, margin=-1)
