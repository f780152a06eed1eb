"""Exercises of notebook 08: an empty stub is not done yet, the solution passes,
each classic wrong answer is told what is wrong.
"""

import pytest
import torch

from tests.notebooks.cells import assert_ladder, assert_told, exercise


def svd(weight):
    return torch.linalg.svd(weight, full_matrices=False)


@pytest.mark.parametrize("name", ["pair", "saves", "inputs"])
def test_the_stub_is_not_done_and_the_solution_in_the_hints_passes(name):
    assert_ladder("08", name, {"torch": torch})


@pytest.mark.parametrize(
    "answer",
    [
        lambda w, r: (svd(w)[0][:, :r], svd(w)[1][:r, None] * svd(w)[2][:r]),
        lambda w, r: (svd(w)[0][:, :r] * svd(w)[1][:r], svd(w)[2][:r]),
        lambda w, r: (svd(w)[0][:, :r], svd(w)[0][:, :r].T @ w),
    ],
)
def test_every_way_to_share_the_singular_values_is_right(answer):
    assert exercise("08", "pair").check(answer)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda w, r: w, "two matrices are wanted"),
        (lambda w, r: (svd(w)[2][:r], svd(w)[0][:, :r]), "the two are exchanged"),
        (lambda w, r: (svd(w)[0], svd(w)[2]), r"yours are (7, 5) and (5, 5)"),
        (lambda w, r: (svd(w)[0][:, -r:] * svd(w)[1][-r:], svd(w)[2][-r:]), "keeps the weakest"),
        (lambda w, r: (svd(w)[0][:, :r] * svd(w)[1][:r], svd(w)[1][:r, None] * svd(w)[2][:r]), "in both factors"),
        (lambda w, r: (svd(w)[0][:, :r], svd(w)[2][:r]), "leaves the singular values out"),
        (lambda w, r: (svd(w)[0][:, :r] * svd(w)[1][:r].sqrt(), svd(w)[2][:r]), "square root once"),
        (lambda w, r: (svd(w)[0][:, :r] * svd(w)[1][:r], svd(w)[2].T[:r]), "returns Vᵀ"),
        (lambda w, r: (w[:, :r], torch.eye(5, dtype=w.dtype)[:r]), "is off by"),
    ],
)
def test_a_wrong_pair_is_told_what_is_wrong(answer, message):
    assert_told(exercise("08", "pair"), answer, message)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda d_out, d_in: min(d_out, d_in), "full rank"),
        (lambda d_out, d_in: d_out * d_in / (d_out + d_in), "whole number"),
        (lambda d_out, d_in: d_out * d_in // (d_out + d_in), "exactly as many parameters"),
        (lambda d_out, d_in: min(d_out, d_in) - 1, "more than the"),
        (lambda d_out, d_in: min(d_out, d_in) // 4, "saves something, and so does"),
    ],
)
def test_a_wrong_rank_is_told_what_is_wrong(answer, message):
    assert_told(exercise("08", "saves"), answer, message)


@pytest.mark.parametrize(("letter", "message"), [("a", "when the student"), ("c", "detached"), ("d", "no padding")])
def test_a_wrong_letter_is_told_what_was_missed(letter, message):
    assert_told(exercise("08", "inputs"), letter, message)
    assert_told(exercise("08", "inputs"), "e", "one letter")
