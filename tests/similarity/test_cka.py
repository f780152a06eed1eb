"""CKA: every formula equals every other, its invariances and its statistical limits (fakit.similarity.cka, hsic)."""

import itertools
import math

import pytest
import torch

from fakit.similarity import StreamingCKA, cka, cka_matrix, hsic
from fakit.similarity.cka import draw_rows
from fakit.similarity.hsic import centered_gram, cheaper_route, gram_scale


def gaussian(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def related(seed, n, p, q):
    """Features that share one factor."""
    z = gaussian(seed, n, 1)
    return gaussian(seed + 1, n, p) + z, gaussian(seed + 2, n, q) + z


def song(x, y):
    """HSIC₁ as written in Song et al. (2012), letter by letter."""
    n = len(x)
    k, m = (x @ x.T).fill_diagonal_(0), (y @ y.T).fill_diagonal_(0)
    return ((k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ m).sum()) / (n * (n - 3))


def gretton(x, y):
    """HSIC₀ = tr(KHLH)/(n − 1)², letter by letter."""
    n = len(x)
    h = torch.eye(n, dtype=x.dtype) - 1 / n
    return torch.trace(x @ x.T @ h @ y @ y.T @ h) / (n - 1) ** 2


def ratio_of(formula, x, y):
    return float(formula(x, y) / (formula(x, x) * formula(y, y)).sqrt())


SIZES = [(4, 3, 2), (5, 1, 1), (17, 40, 3), (33, 5, 8), (70, 64, 96)]


@pytest.mark.parametrize(("n", "p", "q"), SIZES)
@pytest.mark.parametrize("route", ["gram", "features"])
def test_both_routes_equal_the_literal_formulas(n, p, q, route):
    x, y = related(n, n, p, q)
    for estimator, formula in (("debiased", song), ("biased", gretton)):
        assert hsic(x, y, estimator) == pytest.approx(float(formula(x, y)), rel=1e-10)
        got = float(cka_matrix([x], [y], estimator=estimator, route=route))
        assert got == pytest.approx(ratio_of(formula, x, y), rel=1e-10)


@pytest.mark.parametrize(("n", "p", "q"), SIZES)
def test_u_centered_inner_product_is_the_debiased_hsic(n, p, q):
    x, y = related(n, n, p, q)
    k, m = (centered_gram(z @ z.T, "debiased") for z in (x, y))
    assert float((k * m).sum()) / gram_scale(n, "debiased") == pytest.approx(float(song(x, y)), rel=1e-10)
    assert k.sum(0).abs().max() < 1e-10 * k.abs().max()  # rows of a U-centered matrix sum to 0


@pytest.mark.parametrize("shift", [0.0, 1.0, 1e4])
def test_a_shift_changes_nothing(shift):
    x, y = related(3, 50, 6, 9)
    for estimator in ("debiased", "biased"):
        assert cka(x + shift, y - 3 * shift, estimator) == pytest.approx(cka(x, y, estimator), rel=1e-10)


def test_the_float32_gram_route_loses_everything_where_this_one_does_not():
    x, y = (z.float() + 1e4 for z in related(3, 50, 6, 9))
    exact = ratio_of(song, x.double() - 1e4, y.double() - 1e4)
    assert cka(x, y) == pytest.approx(exact, rel=1e-8)
    k, m = (centered_gram(z @ z.T, "biased") for z in (x, y))  # in float32: |x|² ≈ 6e8 leaves no digit for the rest
    naive = float((k * m).sum() / ((k * k).sum() * (m * m).sum()).sqrt())
    assert abs(naive - cka(x, y, "biased")) > 0.1


def test_many_layers_at_once_equal_one_pair_at_a_time():
    z = gaussian(0, 300, 4)
    students = [z @ gaussian(i, 4, 5 + i) + gaussian(10 + i, 300, 5 + i) for i in range(3)]
    teachers = [z @ gaussian(20 + i, 4, 9) + gaussian(30 + i, 300, 9) for i in range(4)]
    for estimator, route in itertools.product(("debiased", "biased"), ("gram", "features", None)):
        matrix = cka_matrix(students, teachers, estimator=estimator, route=route)
        one_by_one = torch.tensor([[cka(x, y, estimator) for y in teachers] for x in students], dtype=torch.float64)
        torch.testing.assert_close(matrix, one_by_one, rtol=1e-10, atol=0)


def test_the_cheaper_route_is_taken():
    assert cheaper_route(64, [768] * 4, [768] * 7) == "gram"
    assert cheaper_route(20000, [64] * 4, [64] * 7) == "features"


def test_invariances():
    x, y = related(5, 40, 6, 8)
    rotation = torch.linalg.qr(gaussian(9, 6, 6)).Q
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    for estimator in ("debiased", "biased"):
        value = cka(x, y, estimator)
        same = {
            "rotation": cka(x @ rotation, y, estimator),
            "scale": cka(-7 * x, 0.01 * y, estimator),
            "joint permutation": cka(x[order], y[order], estimator),
            "zero features": cka(torch.cat([x, torch.zeros(40, 3)], 1), y, estimator),
            "duplicated features": cka(torch.cat([x, x], 1), y, estimator),
            "symmetry": cka(y, x, estimator),
        }
        assert same == pytest.approx(dict.fromkeys(same, value), rel=1e-10)
        assert cka(x, x, estimator) == pytest.approx(1, rel=1e-12)
        stretched = x @ torch.diag(torch.tensor([30.0, 1, 1, 1, 1, 1], dtype=torch.float64))
        assert abs(cka(stretched, y, estimator) - value) > 0.01  # a general linear map does change it


def test_one_dimension_biased_is_pearson_squared():
    x, y = related(1, 30, 1, 1)
    r = torch.corrcoef(torch.cat([x, y], 1).T)[0, 1]
    assert cka(x, y, "biased") == pytest.approx(float(r**2), rel=1e-12)


def test_a_subset_of_k_dimensions_gives_root_k_over_d():
    a = gaussian(0, 4000, 32)
    for k in (2, 8, 24):
        assert cka(a, a[:, :k]) == pytest.approx(math.sqrt(k / 32), abs=0.02)


def test_debiased_hsic_is_the_squared_norm_of_the_covariance_on_average():
    a, b = gaussian(1, 3, 4), gaussian(2, 3, 5)
    truth = float((a.T @ b).square().sum())
    values = []
    for seed in range(400):
        z = gaussian(100 + seed, 12, 3)
        noise = gaussian(5000 + seed, 12, 9)
        values.append(hsic(z @ a + noise[:, :4], z @ b + noise[:, 4:]))
    values = torch.tensor(values)
    assert abs(values.mean() - truth) < 3 * values.std() / math.sqrt(400)


@pytest.mark.parametrize(("n", "repeats"), [(16, 60), (64, 40), (256, 20), (1024, 8)])
def test_independent_data_debiased_is_zero_on_average_and_biased_is_not(n, repeats):
    d = 96
    pairs = [(gaussian(2 * s + 1000 * n, n, d), gaussian(2 * s + 1 + 1000 * n, n, d)) for s in range(repeats)]
    for estimator, unbiased in (("debiased", True), ("biased", False)):
        values = torch.tensor([cka(x, y, estimator) for x, y in pairs])
        near = bool(abs(values.mean()) < 3 * values.std() / math.sqrt(repeats))
        assert near is unbiased, (estimator, n, values.mean())


def test_known_bias_at_768_dimensions():
    x, y = gaussian(0, 16, 768), gaussian(1, 16, 768)
    assert cka(x, y, "biased") == pytest.approx(0.979, abs=0.01)
    assert abs(cka(x, y)) < 0.1


def test_half_precision_inputs():
    x, y = related(2, 200, 32, 48)
    for dtype in (torch.bfloat16, torch.float16):
        assert abs(cka(x.to(dtype), y.to(dtype)) - cka(x, y)) < 5e-3


def test_one_rogue_dimension_decides_until_features_are_standardized():
    x, y, shared = gaussian(0, 500, 64), gaussian(1, 500, 64), 50 * gaussian(2, 500, 1)
    x, y = torch.cat([x, shared], 1), torch.cat([y, shared], 1)
    assert cka(x, y) > 0.99
    assert abs(cka(x, y, standardized=True)) < 0.05


def test_rbf_converges_to_linear_as_the_bandwidth_grows():
    x, y = related(4, 60, 5, 7)
    for estimator in ("debiased", "biased"):
        linear = cka(x, y, estimator)
        gaps = [abs(cka(x, y, estimator, kernel="rbf", bandwidth=c) - linear) for c in (1, 10, 100, 1e4)]
        assert gaps == sorted(gaps, reverse=True)
        assert gaps[-1] < 1e-6 < gaps[0]
    assert cka(x, x, kernel="rbf") == pytest.approx(1)


# --- clusters ---------------------------------------------------------------------------------------------------------


def test_clusters_equal_the_mean_over_every_possible_draw():
    sizes = [1, 2, 3, 2, 2]
    labels = torch.repeat_interleave(torch.arange(5), torch.tensor(sizes))
    x, y = related(8, 10, 3, 2)
    starts = [0, 1, 3, 6, 8]
    sums = torch.zeros(3, dtype=torch.float64)
    for offsets in itertools.product(*map(range, sizes)):
        rows = torch.tensor([start + offset for start, offset in zip(starts, offsets, strict=True)])
        a, b = x[rows], y[rows]
        sums += torch.stack([song(a, b), song(a, a), song(b, b)])
    expected = float(sums[0] / (sums[1] * sums[2]).sqrt())
    assert cka(x, y, clusters=labels) == pytest.approx(expected, rel=1e-10)
    shuffle = torch.randperm(
        10, generator=torch.Generator().manual_seed(0)
    )  # labels need no order and may be any integers
    assert cka(x[shuffle], y[shuffle], clusters=(7 - 3 * labels)[shuffle]) == pytest.approx(expected, rel=1e-10)


def test_clusters_of_one_row_are_plain_rows():
    x, y = related(8, 20, 3, 2)
    assert cka(x, y, clusters=torch.arange(20)) == pytest.approx(cka(x, y), rel=1e-10)
    assert cka(x, y, "biased", clusters=torch.arange(20), draws=1) == pytest.approx(cka(x, y, "biased"), rel=1e-10)


def test_draws_take_one_row_of_each_cluster_and_every_row_in_turn():
    labels = torch.tensor([0, 1, 0, 2, 1, 0])
    rows = draw_rows(labels, 6, seed=0)
    assert rows.shape == (6, 3)
    assert torch.equal(labels[rows], torch.arange(3).expand(6, 3))
    assert sorted(rows[:3, 0].tolist()) == [0, 2, 5]
    assert torch.equal(rows, draw_rows(labels, 6, seed=0))


def test_pooled_tokens_inflate_and_clusters_do_not():
    """Independent models, 32 sequences × 32 tokens: what a sequence shares makes its tokens look like agreement."""
    labels = torch.arange(32).repeat_interleave(32)
    pooled, clustered = [], []
    for seed in range(20):
        x, y = ((gaussian(s, 32, 1, 64) + gaussian(s + 1, 32, 32, 64)).flatten(0, 1) for s in (4 * seed, 4 * seed + 2))
        pooled.append(cka(x, y))
        clustered.append(cka(x, y, clusters=labels))
    pooled, clustered = torch.tensor(pooled), torch.tensor(clustered)
    assert pooled.min() > 0.15
    assert abs(clustered.mean()) < 3 * clustered.std() / math.sqrt(20)


def test_clusters_find_the_similarity_that_is_there():
    """A shared sequence factor and independent tokens: the truth is the CKA of one token a sequence."""
    labels = torch.arange(400).repeat_interleave(4)
    shared = gaussian(0, 400, 1, 5)
    x = (shared @ gaussian(1, 5, 8) + gaussian(2, 400, 4, 8)).flatten(0, 1)
    y = (shared @ gaussian(3, 5, 8) + gaussian(4, 400, 4, 8)).flatten(0, 1)
    a, b = gaussian(1, 5, 8), gaussian(3, 5, 8)
    covariances = [m.T @ m + torch.eye(8) for m in (a, b)]
    truth = float((a.T @ b).square().sum() / math.sqrt(math.prod(float(c.square().sum()) for c in covariances)))
    assert cka(x, y, clusters=labels) == pytest.approx(truth, abs=0.05)


def test_clusters_with_biased_and_rbf_average_over_draws():
    labels = torch.arange(40).repeat_interleave(3)
    x, y = related(8, 120, 3, 2)
    assert cka(x, y, "biased", clusters=labels) > cka(x, y, clusters=labels)
    linear = cka(x, y, "biased", clusters=labels)
    assert cka(x, y, "biased", clusters=labels, kernel="rbf", bandwidth=1e4) == pytest.approx(linear, abs=1e-6)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_self_hsic_that_is_not_positive_gives_nan_and_the_reason():
    with pytest.warns(RuntimeWarning, match="HSIC of y with itself is 0"):
        assert math.isnan(cka(gaussian(0, 10, 3), torch.full((10, 2), 0.1)))
    alone = torch.zeros(10, 3, dtype=torch.float64)
    alone[4] = gaussian(1, 3)  # one row differs: nothing is left without the diagonal, and rounding is no signal
    with pytest.warns(RuntimeWarning, match="HSIC of x with itself is 0"):
        assert math.isnan(cka(alone, gaussian(0, 10, 3)))
    assert cka(alone, gaussian(0, 10, 3), "biased") > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(10, 2), torch.ones(12, 2)), "x has 10 rows and y has 12"),
        ((torch.ones(3, 2), torch.ones(3, 2)), "at least 4 rows, found 3"),
        ((torch.ones(1, 2), torch.ones(1, 2), "biased"), "at least 2 rows, found 1"),
        ((torch.ones(8, 2), torch.ones(8, 2), "unbiased"), "'unbiased' is unknown"),
        ((torch.ones(8, 2, 2), torch.ones(8, 2)), r"x has shape \(8, 2, 2\)"),
        ((torch.ones(8, 2), torch.full((8, 2), torch.nan)), "y holds NaN"),
        ((torch.ones(8, 2), torch.ones(8, 2), "debiased", torch.arange(7)), r"clusters has shape \(7,\).*8 rows"),
        ((torch.ones(8, 2), torch.ones(8, 2), "debiased", [0, 0, 0, 1, 1, 1, 2, 2]), "at least 4 clusters, found 3"),
    ],
)
def test_errors_name_what_was_asked_and_found(arguments, message):
    with pytest.raises(ValueError, match=message):
        cka(*arguments)


def test_unknown_kernel():
    with pytest.raises(ValueError, match="most rows of x coincide"):
        cka(torch.ones(8, 2), gaussian(0, 8, 2), kernel="rbf")
    with pytest.raises(ValueError, match="'poly' is unknown"):
        cka(torch.ones(8, 2), torch.ones(8, 2), kernel="poly")


def test_layers_of_different_rows_are_both_named():
    with pytest.raises(ValueError, match=r"student layer 0 has \(8,\) rows and teacher layer 1 has \(9,\)"):
        cka_matrix([torch.ones(8, 2)], [torch.ones(8, 2), torch.ones(9, 2)])
    with pytest.raises(ValueError, match="1 of the student and 0 of the teacher"):
        StreamingCKA().update([torch.ones(8, 2)], [])
