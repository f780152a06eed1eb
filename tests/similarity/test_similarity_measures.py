"""Measures beside CKA (fakit.similarity.measures), against definitions, limits and other implementations."""

import math

import pytest
import torch

from fakit.similarity import cka, cknna, mutual_knn, procrustes, pwcca, rogue_dimensions, rsa, svcca


def gaussian(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_procrustes_equals_scipy_and_is_one_for_a_rotation():
    from scipy.linalg import orthogonal_procrustes

    x, y = gaussian(0, 20, 6), gaussian(1, 20, 6)
    unit = [(z - z.mean(0)) / (z - z.mean(0)).norm() for z in (x, y)]
    rotation, scale = orthogonal_procrustes(unit[0].numpy(), unit[1].numpy())
    assert procrustes(x, y) == pytest.approx(scale, rel=1e-10)
    distance = (unit[0] @ torch.from_numpy(rotation) - unit[1]).square().sum()
    assert float(distance) == pytest.approx(2 - 2 * procrustes(x, y), rel=1e-9)
    turned = 3 * x @ torch.linalg.qr(gaussian(2, 6, 6)).Q + 5
    assert procrustes(x, turned) == pytest.approx(1, rel=1e-12)
    assert procrustes(x, x) == pytest.approx(1, rel=1e-12)


def test_procrustes_of_wide_features_takes_the_small_side_and_fits_anything():
    x, y = gaussian(0, 30, 768), gaussian(1, 30, 768)
    assert procrustes(x, y) == pytest.approx(0.991, abs=0.005)
    whole = torch.linalg.svdvals((x - x.mean(0)).T @ (y - y.mean(0))).sum()
    norms = (x - x.mean(0)).norm() * (y - y.mean(0)).norm()
    assert procrustes(x, y) == pytest.approx(float(whole / norms), rel=1e-9)


def test_mutual_knn_of_independent_data_is_k_over_n_minus_one():
    n, k, repeats = 40, 5, 60
    values = torch.tensor([mutual_knn(gaussian(2 * s, n, 8), gaussian(2 * s + 1, n, 8), k) for s in range(repeats)])
    assert abs(values.mean() - k / (n - 1)) < 3 * values.std() / math.sqrt(repeats)
    assert mutual_knn(gaussian(0, n, 8), 2 * gaussian(0, n, 8), k) == 1


def test_mutual_knn_by_hand():
    x = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]])  # neighbors: 0–1, 2–3
    y = torch.tensor([[1.0, 0], [0, 1], [0.1, 1], [1, 0.1]])  # neighbors: 0–3, 1–2
    assert mutual_knn(x, x, 1) == 1
    assert mutual_knn(x, y, 1) == 0
    assert mutual_knn(x, y, 3) == 1


def test_cknna_of_all_neighbors_is_cka_of_unit_rows():
    x, y = gaussian(0, 30, 5), gaussian(0, 30, 5) + gaussian(1, 30, 5)
    unit = [torch.nn.functional.normalize(z, dim=1) for z in (x, y)]
    assert cknna(x, y, 29) == pytest.approx(cka(*unit), rel=1e-9)
    assert cknna(x, x, 5) == pytest.approx(1)
    assert abs(cknna(x, gaussian(7, 30, 5), 5)) < cknna(x, y, 5)


def test_svcca_and_pwcca_see_through_a_linear_map_and_match_cca():
    x, y = gaussian(0, 200, 4), gaussian(1, 200, 6)
    linear = x @ gaussian(2, 4, 4)
    assert svcca(x, linear, variance=1.0) == pytest.approx(1)
    assert pwcca(x, linear) == pytest.approx(1)
    # canonical correlations from the covariance matrices, the textbook way
    a, b = x - x.mean(0), y - y.mean(0)
    inverse_x, inverse_y = torch.linalg.inv(a.T @ a), torch.linalg.inv(b.T @ b)
    squared = torch.linalg.eigvals(inverse_x @ a.T @ b @ inverse_y @ b.T @ a).real
    assert svcca(x, y, variance=1.0) == pytest.approx(float(squared.sqrt().mean()), rel=1e-8)
    assert squared.min().sqrt() < pwcca(x, y) < squared.max().sqrt()


def test_svcca_drops_the_directions_without_variance():
    x = torch.cat([gaussian(0, 100, 3), 1e-4 * gaussian(1, 100, 2)], 1)
    y = torch.cat([x[:, :3], 1e-4 * gaussian(2, 100, 2)], 1)
    assert svcca(x, y) == pytest.approx(1, abs=1e-5)
    assert svcca(x, y, variance=1.0) < 0.95


def test_rsa():
    from scipy.spatial.distance import pdist
    from scipy.stats import spearmanr

    x, y = gaussian(0, 25, 8), gaussian(0, 25, 8) + gaussian(1, 25, 8)
    expected = spearmanr(pdist(x, "correlation"), pdist(y, "correlation")).statistic
    assert rsa(x, y) == pytest.approx(expected, rel=1e-9)
    assert rsa(x, 2 * x + 1) == pytest.approx(1)


def test_rogue_dimensions():
    x = gaussian(0, 400, 20)
    x[:, 7] *= 50
    report = rogue_dimensions(x, k=2)
    assert report.dimensions[0] == 7 and report.width == 20
    assert report.shares[0] == pytest.approx(2500 / 2519, abs=0.01)
    assert report.share == sum(report.shares) and report.expected == 0.1
    assert "7 (99" in str(report) and "| 7 | 99" in report._repr_markdown_()
    padded = torch.cat([x.view(40, 10, 20), torch.full((40, 2, 20), 1e6, dtype=torch.float64)], 1)
    mask = (torch.arange(12) < 10).expand(40, 12)
    assert rogue_dimensions(padded, k=2, mask=mask) == report
    rows = torch.cat([x, torch.full((5, 20), torch.nan, dtype=torch.float64)])
    assert rogue_dimensions(rows, k=2, mask=torch.arange(405) < 400) == report  # (n, d) with a mask of rows


CONSTANT = torch.full((30, 3), 0.1, dtype=torch.float64)  # no whole number, so that a mean of it rounds


@pytest.mark.parametrize("measure", [svcca, pwcca])
def test_a_constant_side_has_no_correlation_and_the_reason_is_said(measure):
    for x, y, names in (
        (CONSTANT, gaussian(0, 30, 4), ["x"]),
        (gaussian(0, 30, 4), CONSTANT, ["y"]),
        (CONSTANT, CONSTANT, ["x", "y"]),
    ):
        with pytest.warns(RuntimeWarning) as said:
            assert math.isnan(measure(x, y))
        reasons = [
            f"{measure.__name__} is NaN: {name} is constant over its 30 rows: no direction of it varies"
            for name in names
        ]
        assert [str(warning.message) for warning in said] == reasons
        assert {warning.filename for warning in said} == {__file__}


@pytest.mark.parametrize("measure", [mutual_knn, cknna])
@pytest.mark.parametrize(
    "x", [CONSTANT, torch.zeros(30, 3), torch.linspace(0.5, 2, 30)[:, None] * torch.tensor([0.3, 0.7, 0.2]).double()]
)
def test_rows_of_one_direction_have_no_nearest_neighbors(measure, x):
    with pytest.warns(RuntimeWarning, match=f"{measure.__name__} is NaN: all 30 rows of x point one way"):
        assert math.isnan(measure(x, gaussian(0, 30, 4), 5))


def test_rsa_of_rows_that_are_all_as_far_apart_is_nan_not_the_order_of_rounding_errors():
    alike = gaussian(0, 1, 6).expand(7, 6)
    for x in (alike, 0.3 * torch.eye(7)):
        with pytest.warns(RuntimeWarning, match="rsa is NaN: all 21 pairs of rows of x are equally dissimilar"):
            assert math.isnan(rsa(x, gaussian(1, 7, 6)))
    with pytest.raises(ValueError, match="row 2 of x is constant"):
        rsa(torch.cat([gaussian(1, 2, 3), CONSTANT[:1]]), gaussian(2, 3, 3))  # whose mean is not 0.1


def test_with_one_row_more_than_features_every_correlation_is_still_one():
    """Centring takes a row: n − 1 dimensions are left, and n − 1 features span them all."""
    for measure in (svcca, pwcca):
        with pytest.raises(ValueError, match=r"n = 9, p = 8, q = 3.* at least 10 rows"):
            measure(gaussian(0, 9, 8), gaussian(1, 9, 3))
        assert measure(gaussian(0, 10, 8), gaussian(1, 10, 3)) < 1


@pytest.mark.parametrize("measure", [procrustes, mutual_knn, cknna, svcca, pwcca, rsa])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_full(measure, dtype):
    x, y = gaussian(0, 30, 4).to(dtype), (gaussian(0, 30, 4) + gaussian(1, 30, 4)).to(dtype)
    assert measure(x, y) == measure(x.double(), y.double())


@pytest.mark.parametrize("measure", [procrustes, mutual_knn, cknna, svcca, pwcca, rsa])
def test_sides_on_two_devices_and_nan_are_refused_by_name(measure):
    x = gaussian(0, 30, 4)
    with pytest.raises(ValueError, match="x is on cpu, y on meta: move one to the other's device"):
        measure(x, x.to("meta"))
    with pytest.raises(ValueError, match="y holds NaN or infinity"):
        measure(x, x.log())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: svcca(torch.ones(5, 8), torch.ones(5, 3)), "n = 5, p = 8, q = 3"),
        (lambda: pwcca(torch.ones(5, 3), torch.ones(5, 5)), "n = 5, p = 3, q = 5"),
        (lambda: svcca(torch.ones(9, 3), torch.ones(9, 5), variance=0), "variance is 0"),
        (lambda: procrustes(torch.ones(5, 3), gaussian(0, 5, 3)), "x is constant over its 5 rows"),
        (lambda: procrustes(gaussian(0, 5, 3), gaussian(0, 6, 3)), "x has 5 rows and y has 6"),
        (lambda: mutual_knn(torch.ones(5, 3), torch.ones(5, 3), 5), "5 neighbors among 5 rows: choose 1 … 4"),
        (lambda: cknna(gaussian(0, 3, 3), gaussian(1, 3, 3), 1), "at least 4 rows, found 3"),
        (lambda: rsa(torch.ones(2, 3), torch.ones(2, 3)), "at least 3 rows, found 2"),
        (lambda: rsa(gaussian(0, 4, 3), torch.ones(4, 3)), "row 0 of y is constant"),
        (lambda: rogue_dimensions(torch.ones(4, 3)), "constant over its 4 rows"),
        (lambda: rogue_dimensions(gaussian(0, 4, 3), k=4), "k is 4, x has 3 features"),
        (lambda: rogue_dimensions(torch.ones(2, 2, 3), mask=torch.zeros(2, 2)), "no rows to measure"),
        (
            lambda: rogue_dimensions(gaussian(0, 4, 5, 3), mask=torch.ones(5, 4)),
            r"mask has shape \(5, 4\), x \(4, 5, 3\)",
        ),
        (lambda: rogue_dimensions(gaussian(0, 4, 3), mask=torch.ones(1, 4)), r"mask has shape \(1, 4\), x \(4, 3\)"),
        (lambda: rogue_dimensions(gaussian(0, 4, 3).log()), "x holds NaN or infinity in 4 of its 4 rows"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
