"""Each metric against literal numbers or a second route, and the errors it promises."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from fakit.evaluation import accuracy, aligned, bleu, cer, f1, matthews, pearson, rouge, spearman


def edits(a: str, b: str) -> int:
    """Levenshtein distance, the textbook table."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def test_labels_by_hand():
    predicted, labels = [1, 1, 0, 0, 1, 0], [1, 0, 0, 1, 1, 0]  # tp 2, fp 1, fn 1, tn 2
    assert accuracy(predicted, labels) == pytest.approx(4 / 6)
    assert f1(predicted, labels) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert matthews(predicted, labels) == pytest.approx((2 * 2 - 1 * 1) / math.sqrt(3 * 3 * 3 * 3))


def test_macro_f1_is_the_mean_over_classes():
    predicted, labels = torch.tensor([0, 1, 2, 2, 1]), torch.tensor([0, 2, 2, 2, 1])
    by_class = [1.0, 2 / 3, 2 * 2 / (2 * 2 + 1)]
    assert f1(predicted, labels, average="macro") == pytest.approx(sum(by_class) / 3)


def test_precision_and_recall_differ_so_sides_matter():
    assert f1([1, 1, 1], [1, 0, 0]) == pytest.approx(0.5)
    assert f1([0, 0, 0], [1, 0, 0]) == 0.0
    assert matthews([1, 1, 1], [1, 0, 0]) == 0.0


def test_correlations_by_their_definitions():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=50), rng.normal(size=50)
    y[:10] = x[:10]

    def correlation(a, b):
        a, b = a - a.mean(), b - b.mean()
        return (a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum())

    def ranks(a):
        return np.array([(a < value).sum() + (a == value).sum() / 2 for value in a])

    assert pearson(x, y) == pytest.approx(correlation(x, y), abs=1e-12)
    assert spearman(x, y) == pytest.approx(correlation(ranks(x), ranks(y)), abs=1e-12)
    tied = np.round(x)
    assert spearman(tied, y) == pytest.approx(correlation(ranks(tied), ranks(y)), abs=1e-12)


@pytest.mark.parametrize("measure", [pearson, spearman])
def test_a_constant_side_is_nan_without_a_warning(measure, recwarn):
    assert math.isnan(measure([1.0, 1.0, 1.0], [0.0, 1.0, 2.0]))
    assert not recwarn.list


def test_bleu_of_one_sentence_by_hand():
    # 1- to 4-gram precisions of "a b c d e" in "a b c d f": 4/5, 3/4, 2/3, 1/2; equal length, no penalty.
    score = bleu(["a b c d e"], ["a b c d f"])
    assert score.value == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    assert float(score) == score.value
    assert "tok:13a" in score.signature and "version:" in score.signature
    assert str(score) == f"BLEU 66.87 ({score.signature})"


def test_bleu_pools_counts_over_the_corpus():
    whole = bleu(["a b c d e", "x y z w"], ["a b c d f", "x y z w"]).value
    precisions = [8 / 9, 6 / 7, 4 / 5, 2 / 3]
    assert whole == pytest.approx(100 * math.prod(precisions) ** 0.25)


def test_rouge_by_hand_with_the_stemmer():
    scores = rouge(["the cats sat"], ["the cat sat down"])  # stemmed: cats = cat; 3 of 3 and 3 of 4 words
    assert scores["rouge1"] == pytest.approx(2 * 1.0 * 0.75 / 1.75)
    assert scores["rouge2"] == pytest.approx(2 * 1.0 * (2 / 3) / (1 + 2 / 3))
    assert scores["rougeL"] == pytest.approx(scores["rouge1"])
    both = rouge(["the cats sat", "x"], ["the cat sat down", "y"])
    assert both["rouge1"] == pytest.approx(scores["rouge1"] / 2)


def test_rouge_of_unequal_lengths():
    assert rouge(["a b c d"], ["a"])["rouge1"] == pytest.approx(2 * 0.25 * 1 / 1.25)


def test_cer_is_corpus_level():
    references, hypotheses = ["in the beginning", "ab"], ["in tbe begining", "abcd"]
    total = sum(edits(h, r) for h, r in zip(hypotheses, references, strict=True))
    assert total == 4
    assert cer(hypotheses, references) == pytest.approx(4 / 18)
    assert cer(hypotheses, references) != pytest.approx((2 / 16 + 2 / 2) / 2)  # the mean of the lines' rates


def test_cer_counts_every_blank_and_may_exceed_one():
    assert cer([" ab "], ["ab"]) == pytest.approx(1.0)
    assert cer(["abcdef"], ["x"]) == pytest.approx(6.0)
    assert cer(["", "ab"], ["cd", "ab"]) == pytest.approx(0.5)
    assert cer(["x", "ab"], ["", "ab"]) == pytest.approx(0.5)


@pytest.mark.parametrize("measure", [accuracy, f1, matthews, pearson, spearman])
def test_shape_mismatch_names_both_sides(measure):
    with pytest.raises(ValueError, match=r"\(3,\).*\(2,\)"):
        measure([0, 1, 1], [0, 1])


@pytest.mark.parametrize("measure", [accuracy, f1, matthews, pearson, spearman])
def test_empty_labels(measure):
    with pytest.raises(ValueError, match="empty"):
        measure([], [])


def test_logits_in_place_of_classes():
    with pytest.raises(ValueError, match=r"\(2, 3\).*argmax"):
        accuracy(torch.zeros(2, 3), [0, 1])


def test_f1_errors():
    with pytest.raises(ValueError, match=r"\[0, 1, 2\].*macro"):
        f1([0, 1, 2], [0, 1, 1])
    with pytest.raises(ValueError, match=r"'micro'.*'binary'"):
        f1([0, 1], [0, 1], average="micro")


@pytest.mark.parametrize("measure", [bleu, rouge, cer])
def test_text_errors(measure):
    with pytest.raises(ValueError, match="1 hypotheses against 2 references"):
        measure(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="empty"):
        measure([], [])
    with pytest.raises(ValueError, match="hypotheses is one str"):
        measure("abc", ["abc"])


def test_cer_without_a_reference_character():
    with pytest.raises(ValueError, match="N = 0"):
        cer(["a"], [""])


def test_a_correlation_needs_two_pairs():
    with pytest.raises(ValueError, match="at least 2 pairs, found 1"):
        pearson([1.0], [2.0])


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("hose", "house"),
        ("kitten", "sitting"),
        (" a  b ", "a b"),
        ("", "ab"),
        ("ab", ""),
        ("", ""),
        ("naïve\n", "naive"),
    ],
)
def test_aligned_characters_make_both_texts_by_the_fewest_edits(text, reference):
    pairs = aligned(text, reference)
    assert "".join(own for own, _ in pairs) == text and "".join(wanted for _, wanted in pairs) == reference
    assert sum(own != wanted for own, wanted in pairs) == edits(text, reference)


def test_rouge_leaves_the_root_logger_alone():
    code = "import logging; from fakit.evaluation import rouge; rouge(['a b'], ['a c']); print(logging.root.handlers)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]" and done.stderr == ""


def test_rouge_of_english_is_the_librarys_and_other_scripts_count():
    from rouge_score.rouge_scorer import RougeScorer

    pairs = [("The QUICK_brown fox's jumping, 3.14!", "quick brown foxes jump 3 14"), ("running late", "he ran late")]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    for hypothesis, reference in pairs:
        own = rouge([hypothesis], [reference])["rougeL"]
        assert own == scorer.score(target=reference, prediction=hypothesis)["rougeL"].fmeasure
    for text in ("Привет мир", "你好世界", "schön über", "हिन्दी भाषा", "สวัสดีครับ", "+ - ="):
        assert rouge([text], [text])["rougeL"] == 1.0
    assert rouge(["Привет всем"], ["Привет мир"])["rouge1"] == 0.5
    assert rouge(["你好"], ["你坏"])["rouge1"] == 0.5
    assert rouge(["schon"], ["schön"])["rouge1"] == 0.0
