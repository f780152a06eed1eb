"""Several estimators of the same layers, the RBF kernel among all pairs, and rogue dimensions taken out one by one."""

import pytest
import torch

from fakit.similarity import LayerComparison, cka, compare_estimators, compare_layers, rogue_dimensions, scrub_rogue


def gaussian(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(rows=24, length=6):
    """Layers whose tokens share much within a sequence, and a mask."""
    shared, topic = gaussian(0, rows, length, 4), gaussian(1, rows, 1, 4)
    students = [shared @ gaussian(2 + i, 4, 6) + topic @ gaussian(6 + i, 4, 6) for i in range(2)]
    teachers = [shared @ gaussian(10 + i, 4, 9) + topic @ gaussian(14 + i, 4, 9) for i in range(3)]
    return students, teachers, torch.arange(length) < torch.arange(rows)[:, None] % length + 2


def test_each_estimator_is_what_its_name_says():
    students, teachers, mask = tokens()
    found = compare_estimators(students, teachers, mask, permutations=20, bootstrap=20, seed=3)
    assert next(iter(found)) == "debiased"
    expected = {
        "debiased": {},
        "biased": {"estimator": "biased"},
        "debiased, z-scored": {"standardized": True},
        "debiased, tokens pooled": {"pooled": True, "bootstrap": 0, "permutations": 10},
        "biased, tokens pooled": {"pooled": True, "estimator": "biased", "bootstrap": 0, "permutations": 10},
    }
    for name, how in expected.items():
        alone = compare_layers(
            students, teachers, mask, **({"draws": 4, "permutations": 20, "bootstrap": 20, "seed": 3} | how)
        )
        torch.testing.assert_close(torch.tensor(found[name].values), torch.tensor(alone.values))
        torch.testing.assert_close(torch.tensor(found[name].null), torch.tensor(alone.null))
    assert found["debiased, RBF kernel"].kernel == "rbf" and "RBF kernel" in str(found["debiased, RBF kernel"])
    assert (found["biased"].values > found["debiased"].values).all()


@pytest.mark.parametrize(("asked", "pooled"), [(0, 0), (5, 5), (20, 10), (200, 20)])
def test_pooled_tokens_get_a_tenth_of_the_permutations_and_never_more_than_asked(asked, pooled):
    found = compare_estimators(*tokens(), permutations=asked, bootstrap=0)
    assert found["debiased"].permutations == asked
    assert {found[name].permutations for name in found if "pooled" in name} == {pooled}


@pytest.mark.parametrize("estimator", ["debiased", "biased"])
def test_rbf_of_all_pairs_is_rbf_of_each(estimator):
    students, teachers, _ = tokens()
    rows = [[x[:, 0] for x in side] for side in (students, teachers)]  # (n, d): nothing is drawn
    found = LayerComparison().update(*rows).result(estimator, 30, 30, kernel="rbf", bandwidth=0.8)
    for s, x in enumerate(rows[0]):
        for t, y in enumerate(rows[1]):
            assert found[s, t].value == pytest.approx(cka(x, y, estimator, kernel="rbf", bandwidth=0.8), rel=1e-9)
            assert found.low[s, t] <= found.high[s, t]


def test_rbf_interval_and_null_tend_to_the_linear_ones():
    students, teachers, _ = tokens()
    rows = [[x[:, 0] for x in side] for side in (students, teachers)]
    linear = LayerComparison().update(*rows).result("debiased", 30, 30)
    wide = LayerComparison().update(*rows).result("debiased", 30, 30, kernel="rbf", bandwidth=1e3)
    # the linear bootstrap leaves in what a row alone has, which weights do not cancel to the last digit
    for part, close in (("values", 1e-5), ("null", 1e-5), ("low", 0.02), ("high", 0.02)):
        torch.testing.assert_close(
            torch.tensor(getattr(wide, part)), torch.tensor(getattr(linear, part)), atol=close, rtol=0
        )


def test_an_unknown_kernel_is_refused():
    students, teachers, mask = tokens()
    with pytest.raises(ValueError, match="kernel 'poly' is unknown"):
        LayerComparison().update(students, teachers, mask).result(kernel="poly")


def with_rogue(scale=50.0):
    """Independent layers that share one dimension, far larger than the rest."""
    x, y = gaussian(0, 64, 5, 20), gaussian(1, 64, 5, 20)
    x[..., 3] = scale * gaussian(2, 64, 5)
    y[..., 7] = x[..., 3] + 0.01 * gaussian(3, 64, 5)
    return x, y, torch.ones(64, 5, dtype=torch.bool)


@pytest.mark.parametrize("mode", ["drop", "z-score"])
def test_without_the_rogue_dimension_nothing_is_shared(mode):
    x, y, mask = with_rogue()
    found = scrub_rogue([x], [y], mask, [(0, 0)], largest=3)
    values = found.cka[mode][:, 0]
    assert values[0] > 0.99
    assert values[1:].abs().max() < 0.2
    assert found.dimensions["S0"][0] == 3 and found.dimensions["T0"][0] == 7


def test_nothing_scrubbed_is_cka_and_dropped_is_cka_of_the_others():
    x, y, mask = with_rogue(3.0)
    rows = torch.arange(64)[:, None].expand(64, 5)[mask]
    found = scrub_rogue([x, x + 1], [y], mask, [(1, 0)], largest=2)
    assert found.cka["drop"][0, 0].item() == pytest.approx(cka(x[mask], y[mask], clusters=rows), rel=1e-9)
    kept = [[i for i in range(20) if i not in found.dimensions[name][:2]] for name in ("S1", "T0")]
    others = cka(x[mask][:, kept[0]], y[mask][:, kept[1]], clusters=rows)
    assert found.cka["drop"][2, 0].item() == pytest.approx(others, rel=1e-9)
    first, second = rogue_dimensions(x, 2, mask).shares
    assert found.shares["S1"].tolist() == pytest.approx([0, first, first + second])
    assert found.largest == 2


def test_dimensions_without_variance_stay_as_they_are():
    """Three dimensions vary, the five largest are scrubbed: the constant two have no variance to be scaled to."""
    x, y, mask = with_rogue(3.0)
    few = torch.cat([x[..., :3], torch.ones_like(x[..., 3:])], dim=-1)
    with pytest.warns(RuntimeWarning, match="HSIC of student layer 0"):
        found = scrub_rogue([few], [y], mask, [(0, 0)], largest=5)
    assert found.shares["S0"].tolist()[3:] == pytest.approx([1, 1, 1]) and not found.shares["S0"].isnan().any()
    assert found.cka["drop"][:3].isfinite().all() and found.cka["drop"][3:].isnan().all()  # nothing is left
    rows = torch.arange(64)[:, None].expand(64, 5)[mask]
    assert found.cka["z-score"][0, 0].item() == pytest.approx(cka(few[mask], y[mask], clusters=rows), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_layers_of_few_digits_are_scaled_in_more(dtype):
    x, y, mask = with_rogue()
    x, y = (10 * x).to(dtype), (10 * y).to(dtype)
    found, exact = (scrub_rogue([a], [b], mask, [(0, 0)], 3) for a, b in ((x, y), (x.double(), y.double())))
    for mode in ("drop", "z-score"):
        torch.testing.assert_close(found.cka[mode], exact.cka[mode], atol=2e-6, rtol=0)


def test_scrub_leaves_padding_out():
    x, y, _ = with_rogue(3.0)
    mask = torch.arange(5) < torch.arange(64)[:, None] % 4 + 2
    junk = [z.masked_fill(~mask[..., None], torch.nan) for z in (x, y)]
    found, clean = (scrub_rogue([a], [b], mask, [(0, 0)], 2) for a, b in (junk, (x, y)))
    assert found.dimensions == clean.dimensions
    torch.testing.assert_close(found.cka["z-score"], clean.cka["z-score"])
    torch.testing.assert_close(found.shares["T0"], clean.shares["T0"])


def test_scrub_refuses():
    x, y, mask = with_rogue()
    with pytest.raises(ValueError, match=r"T1 is constant over its 320 tokens"):
        scrub_rogue([x], [y, torch.full_like(y, 0.1)], mask, [(0, 1)], largest=3)
    with pytest.raises(ValueError, match=r"pair \(0, 4\) asked of 1 student and 1 teacher layers"):
        scrub_rogue([x], [y], mask, [(0, 4)])
    with pytest.raises(ValueError, match=r"1 … 19 dimensions; found 1 pairs, 20"):
        scrub_rogue([x], [y], mask, [(0, 0)], largest=20)
    with pytest.raises(ValueError, match="found 0 pairs"):
        scrub_rogue([x], [y], mask, [])
