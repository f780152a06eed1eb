"""Exercises of notebook 02: the solution in the last hint passes, a classic wrong answer is told what is wrong."""

import numpy as np
import pytest
import torch

from fakit.similarity import Similarity, cka, hsic
from fakit.teaching import Exercise
from tests.notebooks.old_cells import assert_ladder, assert_told, exercise, source

ROWS = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
# what earlier cells of the notebook define
KNOWN = {
    **{"torch": torch, "np": np, "cka": cka, "hsic": hsic, "Similarity": Similarity},
    **{"Exercise": Exercise, "n": 20, "S": 3, "T": 6, "SEED": 0},
    **{"student_vectors": {3: ROWS}, "teacher_vectors": {6: ROWS + 0.1 * ROWS.flip(1)}},
}


def centered(K):
    return K - K.mean(0) - K.mean(1)[:, None] + K.mean()


def no_self(K):
    return K - torch.diag(K.diagonal())


def debiased(K, L):
    n, K, L = len(K), no_self(K), no_self(L)
    whole = (K * L).sum() + K.sum() * L.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (K @ L).sum()
    return whole / (n * (n - 3))


HSIC = ("02_cka_similarity", "s02-ex1-check")
ORDER = ("02_cka_similarity", "s02-ex2-check")
CLAIM = ("02_cka_similarity", "s02-ex3-check")
BUG = ("02_cka_similarity", "s02-bug-check")


def flat(layer):
    return layer.flatten(0, 1)


def sentence_means(layer, mask):
    return (layer * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


@pytest.mark.parametrize("where", [HSIC, ORDER, CLAIM, BUG], ids=lambda where: where[1])
def test_the_stub_is_not_done_and_the_solution_in_the_hints_passes(where):
    assert_ladder(*where, *exercise(*where, KNOWN))


@pytest.mark.parametrize(
    ("where", "answer", "message"),
    [
        (HSIC, lambda K, L: (centered(K) * centered(L)).sum() / (len(K) - 1) ** 2, "equals the biased estimator"),
        (HSIC, lambda K, L: debiased(K, L) * 18, "lacks the division"),
        (HSIC, lambda K, L: debiased(K, L) * 18 / 30, "divided by n(n − 1)"),
        (HSIC, lambda K, L: 1.0, "compare term by term"),
        (BUG, lambda x, y, mask: cka(flat(x), flat(y)), "still counts padding: 120 rows, of which only 66 are tokens"),
        (BUG, lambda x, y, mask: cka(flat(x * mask[..., None]), flat(y * mask[..., None])), "keeps its rows"),
        (BUG, lambda x, y, mask: cka(sentence_means(x, mask), sentence_means(y, mask)), "one mean a sentence"),
        (BUG, lambda x, y, mask: cka(x[mask], y[mask], "biased"), "has become biased"),
        (BUG, lambda x, y, mask: 0.5, "your function gives 0.500; of the tokens alone"),
        (BUG, lambda x, y, mask: cka(x[mask], flat(y)), "x has 66 rows and y has 120"),
        (CLAIM, "a", "no share of information"),
        (CLAIM, "b", "absence of evidence"),
        (CLAIM, "d", "is not the one that answers best"),
    ],
)
def test_a_wrong_answer_is_told_what_is_wrong(where, answer, message):
    assert_told(exercise(*where, KNOWN)[0], answer, message)


def test_rows_in_a_wrong_order_are_told_which():
    task, names = exercise(*ORDER, KNOWN)
    sent, shuffle = names["colleague_rows"], names["shuffle"]
    assert "still in the colleague's order" in task.check(sent).message
    assert "shuffles once more" in task.check(sent[shuffle]).message
    assert "(5, 5)" in task.check(sent[:5]).message
    assert "row i is not yet sentence i" in task.check(sent.flip(0)).message


@pytest.mark.filterwarnings("ignore:CKA is NaN")
def test_keeping_the_padding_alone_is_told():
    task, _ = exercise(*BUG, KNOWN)
    assert "True in the mask marks the tokens" in task.check(lambda x, y, mask: cka(x[~mask], y[~mask])).message


def test_the_planted_bug_is_there():
    planted = source("02_cka_similarity", "s02-bug-code").split("def padded_further")[0]
    names = {"cka": cka}
    exec(planted, names)
    task, _ = exercise(*BUG, KNOWN)
    assert "still counts padding" in task.check(names["cka_of_tokens"]).message
