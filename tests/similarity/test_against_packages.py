"""Equal to other packages where they compute the same, on recorded values (scripts/record_package_similarity.py);
unequal where not.
"""

import json

import pytest
import torch

from fakit.similarity import MinibatchCKA, StreamingCKA, cka, cka_matrix, hsic, rsa
from scripts.record_package_similarity import RECORDED, N, features

PACKAGES = json.loads(RECORDED.read_text())
STUDENTS, TEACHERS = [[torch.from_numpy(x) for x in side] for side in features()]


def pairs(measure):
    return torch.tensor([[measure(x, y) for y in TEACHERS] for x in STUDENTS], dtype=torch.float64)


def minibatches(count):
    stream = MinibatchCKA()
    for rows in zip(*(x.split(N // count) for x in STUDENTS + TEACHERS), strict=True):
        stream.update(rows[: len(STUDENTS)], rows[len(STUDENTS) :])
    return stream.matrix()


SAME = {
    "torch-cka, one batch": lambda: cka_matrix(STUDENTS, TEACHERS),
    "torch-cka, four batches": lambda: minibatches(4),
    "cka-pytorch, HSIC₁": lambda: pairs(hsic),
    "rsatoolbox, spearman": lambda: pairs(rsa),
    "repsim, biased CKA": lambda: cka_matrix(STUDENTS, TEACHERS, estimator="biased"),
    "repsim, debiased HSIC": lambda: pairs(hsic),
}


def recorded(name):
    return torch.tensor(PACKAGES[name]["values"], dtype=torch.float64)


def test_every_recorded_value_is_compared_and_names_its_package_and_version():
    assert set(PACKAGES) == {*SAME, "repsim, debiased CKA"}
    for entry in PACKAGES.values():
        name, _, version = entry["package"].partition("==")
        assert name and version[0].isdigit()
        assert torch.tensor(entry["values"]).shape == (len(STUDENTS), len(TEACHERS))


@pytest.mark.parametrize("name", SAME)
def test_equal_where_a_package_computes_the_same(name):
    # torch-cka and rsatoolbox work in float32, in part
    torch.testing.assert_close(SAME[name](), recorded(name), rtol=1e-6, atol=1e-6)


def test_streaming_equals_torch_cka_on_one_batch():
    torch.testing.assert_close(
        StreamingCKA().update(STUDENTS, TEACHERS).matrix(), recorded("torch-cka, one batch"), rtol=1e-6, atol=1e-6
    )


def test_torch_cka_over_batches_is_not_the_value_of_all_rows():
    """It averages HSIC of batches: the minibatch estimator, not what one pass over all rows can have exactly."""
    assert (recorded("torch-cka, four batches") - cka_matrix(STUDENTS, TEACHERS)).abs().max() > 0.01


def test_repsim_divides_the_debiased_hsic_by_biased_ones():
    """Its debiased CKA is a mixture, which is not 1 for a layer with itself and not what the debiased estimators
    give.
    """
    own = [[hsic(x, x, "biased") for x in side] for side in (STUDENTS, TEACHERS)]
    norms = torch.tensor(own[0])[:, None].double() * torch.tensor(own[1]).double()
    found = recorded("repsim, debiased CKA")
    torch.testing.assert_close(pairs(hsic) / norms.sqrt(), found, rtol=1e-6, atol=1e-6)
    assert (found - cka_matrix(STUDENTS, TEACHERS)).abs().max() > 0.05


def test_the_estimators_are_far_enough_apart_to_be_told_apart():
    biased = cka_matrix(STUDENTS, TEACHERS, estimator="biased")
    assert (recorded("torch-cka, one batch") - biased).abs().max() > 0.01


def test_a_sequence_as_one_flat_row_counts_its_padding():
    """torch-cka and cka-pytorch flatten (B, T, d) to (B, T·d):
    half a batch of equal padding makes independent layers alike.
    """
    x, y = (
        torch.randn(24, 12, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in (0, 1)
    )
    mask = torch.arange(12) < torch.where(torch.arange(24) < 12, 12, 2)[:, None]
    x, y = (torch.where(mask[..., None], z, 4.0) for z in (x, y))
    assert cka(x.flatten(1), y.flatten(1)) > 0.9
    assert abs(StreamingCKA(clusters=True).update([x], [y], mask).matrix().item()) < 0.2
