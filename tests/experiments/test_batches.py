import numpy as np
import pytest

from fakit.experiments.batches import batch_plan


@pytest.mark.parametrize(("fraction", "each"), [(0.25, 2), (0.5, 4), (0.01, 1), (1.0, 8)])
def test_every_batch_holds_the_same_share_of_labels(fraction, each):
    plan = batch_plan(labeled=5, pool=30, batches=50, batch_size=8, labeled_fraction=fraction)
    assert plan.shape == (50, 8)
    assert ((plan < 5).sum(axis=1) == each).all()
    assert plan.max() < 35 and plan.min() == 0


def test_no_row_comes_twice_before_all_came_once():
    plan = batch_plan(labeled=7, pool=20, batches=35, batch_size=8, labeled_fraction=0.5, seed=3)
    labeled, pool = plan[:, :4].ravel(), plan[:, 4:].ravel() - 7
    for part, rows in ((labeled, 7), (pool, 20)):
        assert len(part) == 140
        for start in range(0, len(part), rows):
            assert sorted(part[start : start + rows]) == list(range(rows))
    assert np.unique(labeled, return_counts=True)[1].tolist() == [20] * 7


def test_without_a_pool_all_rows_are_labeled():
    plan = batch_plan(labeled=6, pool=0, batches=4, batch_size=3, labeled_fraction=0.5)
    assert np.unique(plan, return_counts=True)[1].tolist() == [2] * 6


def test_the_seed_decides_the_order_and_longer_plans_begin_alike():
    plan = batch_plan(20, 50, 10, 8, seed=1)
    assert (plan == batch_plan(20, 50, 10, 8, seed=1)).all()
    assert (plan != batch_plan(20, 50, 10, 8, seed=2)).any()
    assert (plan == batch_plan(20, 50, 30, 8, seed=1)[:10]).all()


def test_arms_of_one_seed_see_the_labeled_rows_in_the_same_order():
    mixed = batch_plan(20, 50, 40, 8, labeled_fraction=0.5, seed=1)[:, :4].ravel()
    alone = batch_plan(20, 0, 20, 8, seed=1).ravel()
    assert (mixed == alone).all()
    other_pool = batch_plan(20, 999, 40, 8, labeled_fraction=0.5, seed=1)[:, :4].ravel()
    assert (mixed == other_pool).all()


def test_no_labeled_row_is_an_error():
    with pytest.raises(ValueError, match="needs labeled rows; found 0 labeled and 5 unlabeled"):
        batch_plan(0, 5, 1, 1)


def test_rows_of_like_length_share_a_batch():
    lengths = np.random.default_rng(0).geometric(0.07, size=500)
    mixed = batch_plan(100, 400, 32, 16, seed=3)
    grouped = batch_plan(100, 400, 32, 16, seed=3, lengths=lengths.tolist())
    assert (grouped[:, :8] < 100).all() and (grouped[:, 8:] >= 100).all()
    for start in range(0, 32, 8):  # the same rows in the same eight batches
        assert (np.sort(grouped[start : start + 8], axis=None) == np.sort(mixed[start : start + 8], axis=None)).all()
    longest, shortest = (lengths[grouped].max(axis=1) for grouped in (mixed, grouped))
    assert shortest.mean() < 0.6 * longest.mean()
    steps = np.sign(np.diff(shortest.reshape(4, 8), axis=1))
    assert (steps > 0).any() and (steps < 0).any()  # short and long batches in any order


def test_lengths_of_other_rows_are_refused():
    with pytest.raises(ValueError, match="3 lengths were given for 2 labeled and 5 unlabeled rows"):
        batch_plan(2, 5, 1, 2, lengths=[1, 2, 3])
