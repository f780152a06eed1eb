"""Null band, interval and the objects that carry them (fakit.similarity.uncertainty, results)."""

import math

import numpy as np
import pytest
import torch

from fakit.similarity import LayerComparison, cka, cka_matrix, compare, compare_layers, procrustes, svcca
from fakit.similarity.uncertainty import _bootstrap_sums, _sums


def gaussian(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layers(seed, *rows):
    """Two student layers, the second unrelated to the three of the teacher."""
    z = gaussian(seed, *rows, 4)
    students = [z @ gaussian(seed + 1, 4, 6) + gaussian(seed + 2, *rows, 6), gaussian(seed + 3, *rows, 6)]
    teachers = [z @ gaussian(seed + 20 + i, 4, 9) + gaussian(seed + 30 + i, *rows, 9) for i in range(3)]
    return students, teachers


@pytest.mark.parametrize("estimator", ["debiased", "biased"])
def test_values_of_rows_are_plain_cka(estimator):
    students, teachers = layers(0, 40)
    found = compare_layers(students, teachers, estimator=estimator, permutations=5, bootstrap=5)
    np.testing.assert_allclose(found.values, cka_matrix(students, teachers, estimator=estimator), rtol=1e-10)
    assert found.n == 40 and found.clusters is None and found.draws == 1


def test_values_of_tokens_approach_the_exact_mean_over_draws():
    students, teachers = layers(1, 60, 6)
    mask = torch.arange(6) < torch.arange(60)[:, None] % 6 + 1
    labels = torch.arange(60)[:, None].expand(60, 6)[mask]
    exact = [[cka(x[mask], y[mask], clusters=labels) for y in teachers] for x in students]
    found = compare_layers(students, teachers, mask, draws=400, permutations=0, bootstrap=0)
    np.testing.assert_allclose(found.values, exact, atol=0.02)
    assert np.isnan(found.null).all() and np.isnan(found.low).all()
    assert found.clusters == 60 and found.draws == 6  # a sequence of 6 tokens has 6 draws


def test_padding_changes_nothing():
    students, teachers = layers(2, 20, 5)
    mask = torch.arange(5) < torch.arange(20)[:, None] % 5 + 1
    junk = [[torch.where(mask[..., None], x, torch.nan) for x in side] for side in (students, teachers)]
    clean = compare_layers(students, teachers, mask, permutations=10, bootstrap=10)
    np.testing.assert_array_equal(compare_layers(*junk, mask, permutations=10, bootstrap=10).values, clean.values)


def test_the_null_separates_the_related_from_the_unrelated_layer():
    students, teachers = layers(3, 100, 4)
    found = compare_layers(students, teachers, permutations=100, bootstrap=50)
    assert (found.values[0] > found.null[0]).all()
    assert (found.low <= found.values).all() and (found.values <= found.high).all()
    assert (found.null < 0.1).all()
    np.testing.assert_array_equal(found.inside_null, ~(found.values > found.null))
    assert not found.inside_null[0].any()


def test_the_biased_null_shows_the_bias():
    x, y = [gaussian(0, 30, 100)], [gaussian(1, 30, 100)]
    found = compare_layers(x, y, estimator="biased", permutations=50, bootstrap=0)
    assert found.values.item() > 0.7 and found.null.item() > 0.7


@pytest.mark.parametrize("estimator", ["debiased", "biased"])
@pytest.mark.parametrize("more", ["teachers", "students"])  # the side with fewer layers is the one that is moved
def test_permuted_values_are_the_values_of_permuted_rows(estimator, more):
    students, teachers = layers(4, 20)
    a, b = (students, teachers) if more == "teachers" else (teachers, students)
    orders = torch.stack([torch.randperm(20, generator=torch.Generator().manual_seed(s)) for s in range(3)])
    grams = torch.stack([(x - x.mean(0)) @ (x - x.mean(0)).T for x in [*a, *b]])
    cross, own, permuted = _sums(grams, len(a), orders, estimator)
    scale = (own[: len(a), None] * own[len(a) :]).sqrt()
    torch.testing.assert_close(cross / scale, cka_matrix(a, b, estimator=estimator), rtol=1e-10, atol=0)
    for order, values in zip(orders, permuted / scale, strict=True):
        moved = [x[order] for x in a] if more == "teachers" else a
        other = b if more == "teachers" else [y[order] for y in b]
        torch.testing.assert_close(values, cka_matrix(moved, other, estimator=estimator), rtol=1e-9, atol=1e-12)


def test_false_alarms_and_coverage():
    """5 % of independent pairs exceed the 95 % null; the 95 % interval holds the truth about 95 times in 100."""
    a, b = gaussian(5, 6, 10), gaussian(6, 6, 12)
    covariances = [m.T @ m + torch.eye(m.shape[1]) for m in (a, b)]
    truth = float((a.T @ b).square().sum() / math.sqrt(math.prod(float(c.square().sum()) for c in covariances)))
    covered = alarms = 0
    for seed in range(120):
        z = gaussian(3 * seed, 50, 6)
        x, y = z @ a + gaussian(3 * seed + 1, 50, 10), z @ b + gaussian(3 * seed + 2, 50, 12)
        low, high = compare(x, y, permutations=0, seed=seed).interval
        covered += low <= truth <= high
        alarms += compare(x, gaussian(9999 + seed, 50, 12), permutations=100, bootstrap=0, seed=seed).above_null
    assert 106 <= covered <= 120  # binomial(120, .95): 3 standard errors below
    assert 0 <= alarms <= 14


def test_bootstrap_weights_of_distinct_sequences_equal_the_sums_by_hand():
    """The weighted U-statistic against loops over distinct indices."""
    n, x, y = 6, gaussian(0, 6, 3), gaussian(1, 6, 2)
    w = torch.tensor([2.0, 0, 1, 1, 2, 0], dtype=torch.float64)
    k, m = x @ x.T, y @ y.T
    sums, weights = [0.0] * 3, [0.0] * 3
    index = range(n)
    for i in index:
        for j in set(index) - {i}:
            pair = w[i] * w[j]
            sums[0], weights[0] = sums[0] + pair * k[i, j] * m[i, j], weights[0] + pair
            for h in set(index) - {i, j}:
                triple = pair * w[h]
                sums[1], weights[1] = sums[1] + triple * k[i, j] * m[i, h], weights[1] + triple
                for g in set(index) - {i, j, h}:
                    quad = triple * w[g]
                    sums[2], weights[2] = sums[2] + quad * k[i, j] * m[h, g], weights[2] + quad
    expected = sums[0] / weights[0] - 2 * sums[1] / weights[1] + sums[2] / weights[2]
    cross, own = _bootstrap_sums(torch.stack([k, m]), 1, w[None], "debiased")
    assert float(cross) == pytest.approx(float(expected), rel=1e-10)
    assert own.shape == (1, 2)


def test_bootstrap_of_the_biased_estimator_is_the_plain_value_of_the_resample():
    x, y = gaussian(0, 8, 3), gaussian(1, 8, 2)
    rows = torch.tensor([0, 0, 1, 3, 3, 3, 6, 7])
    weights = rows.bincount(minlength=8).double()[None]
    cross, own = _bootstrap_sums(torch.stack([x @ x.T, y @ y.T]), 1, weights, "biased")
    value = float(cross / (own[:, 0] * own[:, 1]).sqrt())
    assert value == pytest.approx(cka(x[rows], y[rows], "biased"), rel=1e-10)


def test_weights_of_one_give_the_value_itself():
    x, y = gaussian(0, 8, 3), gaussian(0, 8, 3) + gaussian(1, 8, 3)
    for estimator in ("debiased", "biased"):
        cross, own = _bootstrap_sums(torch.stack([x @ x.T, y @ y.T]), 1, torch.ones(1, 8), estimator)
        assert float(cross / (own[:, 0] * own[:, 1]).sqrt()) == pytest.approx(cka(x, y, estimator), rel=1e-10)


def test_pooling_shows_its_inflation_and_its_null_shows_it_too():
    x = [gaussian(0, 32, 1, 32) + gaussian(1, 32, 16, 32)]
    y = [gaussian(2, 32, 1, 32) + gaussian(3, 32, 16, 32)]
    honest = compare_layers(x, y, draws=16, permutations=40, bootstrap=0)
    pooled = compare_layers(x, y, draws=16, permutations=40, bootstrap=40, pooled=True)
    assert pooled.values.item() > 0.15 > honest.values.item() + 0.1
    assert pooled.null.item() > pooled.values.item() - 0.1 > 0.05  # whole sequences permuted: just as inflated
    np.testing.assert_allclose(
        pooled.values.item(), cka(x[0].flatten(0, 1), y[0].flatten(0, 1)), rtol=1e-10
    )  # all 16 tokens drawn, in another order
    assert pooled.n == 512 and pooled.clusters == 32 and "not independent" in pooled.warnings[0]
    assert np.isnan(pooled.low).all()


def test_pooling_names_the_sequences_it_leaves_out():
    students, teachers = layers(0, 12, 4)
    mask = torch.ones(12, 4, dtype=torch.bool)
    mask[:3, 2:] = False
    pooled = compare_layers(students, teachers, mask, draws=4, permutations=0, pooled=True)
    assert pooled.clusters == 9 and pooled.n == 36
    assert "3 of 12 sequences have fewer than 4 tokens" in pooled.warnings[1]


def test_batches_add_up():
    students, teachers = layers(5, 40, 1)
    whole = compare_layers(students, teachers, permutations=20, bootstrap=20)
    comparison = LayerComparison()
    for part in range(0, 40, 15):
        comparison.update([x[part : part + 15] for x in students], [y[part : part + 15] for y in teachers])
    parts = comparison.result(permutations=20, bootstrap=20)
    for name in ("values", "null", "low", "high"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-10)


def test_the_same_seed_gives_the_same_numbers():
    students, teachers = layers(6, 30, 4)
    one, two, other = (compare_layers(students, teachers, permutations=20, bootstrap=20, seed=s) for s in (1, 1, 2))
    for name in ("values", "null", "low", "high"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
        assert (getattr(one, name) != getattr(other, name)).any()


def test_standardized_undoes_a_rogue_dimension():
    shared = 50 * gaussian(2, 200, 1)
    x, y = [torch.cat([gaussian(0, 200, 20), shared], 1)], [torch.cat([gaussian(1, 200, 20), shared], 1)]
    assert compare_layers(x, y, permutations=0, bootstrap=0).values.item() > 0.99
    assert compare_layers(x, y, permutations=0, bootstrap=0, standardized=True).values.item() < 0.1


def test_a_constant_layer_is_nan_everywhere_with_its_reason():
    students, teachers = layers(7, 20)
    found = compare_layers([students[0], torch.full((20, 3), 0.1)], teachers, permutations=5, bootstrap=5)
    for name in ("values", "null", "low", "high"):
        assert np.isnan(getattr(found, name)[1]).all() and not np.isnan(getattr(found, name)[0]).any()
    assert "student layer 1 with itself is 0" in found.warnings[0]
    assert "NaN" in str(found) and "⚠" in found._repr_markdown_()
    assert found[1, 0].format() == "NaN [NaN, NaN]"
    assert list(found.best) == [0]


def test_the_matrix_draws_itself_and_hands_out_single_similarities():
    students, teachers = layers(8, 60, 4)
    found = compare_layers(
        students, teachers, permutations=30, bootstrap=30, student_numbers=[0, 3], teacher_numbers=[0, 4, 6]
    )
    text = str(found)
    assert "S3" in text and "T6" in text and "debiased" in text and "60 sequences" in text
    markdown = found._repr_markdown_()
    assert markdown.startswith("| | T0 | T4 | T6 |") and "| **S3** | (" in markdown  # unrelated: in brackets
    one = found[0, 4]
    assert float(one) == found.values[0, 1] and one.interval == (found.low[0, 1], found.high[0, 1])
    assert one.null == found.null[0, 1] and one.above_null is True and one.clusters == 60
    low, high = one.interval
    assert one.format() == f"{one.value:.2f} [{low:.2f}, {high:.2f}]" and f"| {one.format(3)} |" in markdown
    assert found[3, 0].format().startswith("(") and found[3, 0].format().endswith("])")
    assert "95% interval" in str(one) and "chance reaches" in one._repr_markdown_() and str(one).startswith("CKA 0.")
    with pytest.raises(ValueError, match=r"student 1, teacher 4.*\[0, 3\].*\[0, 4, 6\]"):
        found[1, 4]
    assert found.best[0] in (0, 4, 6)


def test_compare_adds_a_null_to_any_measure():
    x, y = gaussian(0, 30, 200), gaussian(1, 30, 200)
    found = compare(x, y, procrustes, permutations=40)
    assert found.value == procrustes(x, y) and found.measure == "procrustes" and found.interval is None
    assert abs(found.null - found.value) < 0.02  # high, and no higher than chance
    rotated = compare(x, x @ torch.linalg.qr(gaussian(2, 200, 200)).Q, procrustes, permutations=40)
    assert rotated.above_null and rotated.value == pytest.approx(1)


def test_compare_keeps_the_reason_why_a_measure_is_nan():
    with pytest.warns(RuntimeWarning, match="svcca is NaN") as said:
        found = compare(gaussian(0, 30, 4), torch.ones(30, 3), svcca, permutations=5)
    assert math.isnan(found.value) and len(said) == 1  # once, not once a permutation
    assert found.warnings == (str(said[0].message),)


def test_compare_with_clusters_draws_one_row_of_each():
    labels = torch.arange(40).repeat_interleave(4)
    z = gaussian(0, 40, 1, 3)
    x, y = (torch.cat([z + gaussian(s, 40, 4, 3), gaussian(s + 1, 40, 4, 3)], 2).flatten(0, 1) for s in (1, 3))
    found = compare(x, y, clusters=labels, draws=200, permutations=20, bootstrap=20)
    assert found.value == pytest.approx(cka(x, y, clusters=labels), abs=0.03)
    assert found.clusters == 40 and found.n == 40 and found.interval[0] < found.value < found.interval[1]
    assert compare(x, y, procrustes, clusters=labels, permutations=5, draws=3).clusters == 40


def test_refusals():
    students, teachers = layers(9, 6, 3)
    with pytest.raises(ValueError, match="no valid token"):
        compare_layers(students, teachers, torch.zeros(6, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="at least 4 sequences, found 3"):
        compare_layers([x[:3] for x in students], [y[:3] for y in teachers])
    with pytest.raises(ValueError, match=r"student layer 0 has \(5, 3\) rows and teacher layer 0 has \(6, 3\)"):
        compare_layers([students[0][:5]], teachers)
    with pytest.raises(ValueError, match="2 student layers, but 1 student_numbers"):
        compare_layers(students, teachers, student_numbers=[0])
    with pytest.raises(ValueError, match="draws is 0"):
        LayerComparison(draws=0)
    with pytest.raises(ValueError, match="no batch yet"):
        LayerComparison().result()
    with pytest.raises(ValueError, match=r"widths \[6\].*first one had \[6, 6\]"):
        LayerComparison().update(students, teachers).update(students[:1], teachers)
