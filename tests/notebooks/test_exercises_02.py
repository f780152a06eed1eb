"""Exercises of notebook 02: the solution in the last hint passes, a classic wrong answer is told what is wrong."""

import nbformat
import pytest
import torch

from fakit.similarity import cka
from tests.notebooks.cells import NOTEBOOKS, assert_ladder, assert_told, exercise

KNOWN = {"torch": torch, "cka": cka}  # what earlier cells of the notebook define


def centered(K):
    return K - K.mean(0) - K.mean(1)[:, None] + K.mean()


def no_self(K):
    return K - torch.diag(K.diagonal())


def three_traces(K, L):
    n = len(K)
    whole = (K * L).sum() + K.sum() * L.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (K @ L).sum()
    return whole / (n * (n - 3))


def unbiased(K, L):
    return three_traces(no_self(K), no_self(L))


def flat(layer):
    return layer.flatten(0, 1)


def sentence_means(layer, mask):
    return (layer * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


@pytest.mark.parametrize("name", ["debiased", "padding", "order", "claim"])
def test_the_stub_is_not_done_and_the_solution_in_the_hints_passes(name):
    assert_ladder("02", name, KNOWN)


@pytest.mark.parametrize(
    ("name", "answer", "message"),
    [
        ("debiased", lambda K, L: (centered(K) * centered(L)).sum() / (len(K) - 1) ** 2, "equals the biased estimator"),
        ("debiased", three_traces, "with the diagonals of K and L left in"),
        ("debiased", lambda K, L: unbiased(K, L) * 18, "lacks the division"),
        ("debiased", lambda K, L: unbiased(K, L) * 18 / 30, "divided by n(n − 1)"),
        ("debiased", lambda K, L: 1.0, "compare term by term"),
        ("padding", lambda x, y, mask: cka(flat(x), flat(y)), "still counts padding: 120 rows, of which only 66 are"),
        ("padding", lambda x, y, mask: cka(flat(x * mask[..., None]), flat(y * mask[..., None])), "keeps its rows"),
        ("padding", lambda x, y, mask: cka(sentence_means(x, mask), sentence_means(y, mask)), "one mean a sentence"),
        ("padding", lambda x, y, mask: cka(x[mask], y[mask], "biased"), "has become biased"),
        ("padding", lambda x, y, mask: 0.5, "your function gives 0.500; of the tokens alone"),
        ("padding", lambda x, y, mask: cka(x[mask], flat(y)), "x has 66 rows and y has 120"),
        ("order", lambda rows, shuffle: rows, "still in the colleague's order"),
        ("order", lambda rows, shuffle: rows[shuffle], "shuffles once more"),
        ("order", lambda rows, shuffle: rows[:5], "(5, 4)"),
        ("order", lambda rows, shuffle: rows.flip(0), "is not yet sentence"),
        ("claim", "a", "no share of information"),
        ("claim", "b", "absence of evidence"),
        ("claim", "d", "is not the one that answers best"),
        ("claim", "7 %", "one letter"),
    ],
)
def test_a_wrong_answer_is_told_what_is_wrong(name, answer, message):
    assert_told(exercise("02", name), answer, message)


@pytest.mark.filterwarnings("ignore:CKA is NaN")
def test_keeping_the_padding_alone_is_told():
    assert_told(exercise("02", "padding"), lambda x, y, mask: cka(x[~mask], y[~mask]), "True in the mask marks the")


def test_the_planted_bug_is_there():
    cells = nbformat.read(NOTEBOOKS / "02_cka_similarity.ipynb", as_version=4).cells
    names = dict(KNOWN)
    exec(next(cell.source for cell in cells if cell.id == "s02-bug-code"), names)
    assert_told(exercise("02", "padding"), names["cka_of_tokens"], "still counts padding")
