"""Task metrics: labels, scores and texts in, one number out.

Predictions come first, references second, as in `metric(predictions, references)`. Labels and scores may be lists,
NumPy arrays or tensors. Values are fractions (accuracy 0.93, CER 0.086); only BLEU keeps its customary 0–100.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fakit import require

# Scripts that write no blanks between words: Thai to Burmese, Khmer, Japanese and Chinese.
NO_BLANKS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


@dataclass(frozen=True)
class Score:
    """A number with the protocol without which it cannot be compared.

    Attributes:
        name: the metric.
        value: the number itself; `float(score)` gives it too.
        signature: how it was computed, e.g. sacrebleu's `nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0`.
    """

    name: str
    value: float
    signature: str

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{self.name} {self.value:.2f} ({self.signature})"


def accuracy(predictions, labels) -> float:
    """Share of examples whose predicted class is the label. Both (N,) integers."""
    predictions, labels = _paired(predictions, labels, "predictions", "labels")
    return float((predictions == labels).mean())


def f1(predictions, labels, average: str = "binary") -> float:
    """F1, the harmonic mean of precision and recall (scikit-learn).

    Args:
        predictions, labels: (N,) classes.
        average: "binary" (of class 1, as GLUE reports MRPC and QQP) or "macro" (mean over the classes that occur).

    Raises:
        ValueError: unknown average; "binary" with classes other than 0 and 1.
    """
    require("eval", "sklearn")
    from sklearn.metrics import f1_score

    predictions, labels = _paired(predictions, labels, "predictions", "labels")
    if average not in ("binary", "macro"):
        raise ValueError(f"f1: average={average!r} was asked; use 'binary' (two classes) or 'macro' (any number)")
    classes = sorted({*predictions.tolist(), *labels.tolist()})
    if average == "binary" and not set(classes) <= {0, 1}:
        raise ValueError(f"f1: average='binary' needs classes 0 and 1, the data hold {classes}; use average='macro'")
    return float(f1_score(labels, predictions, average=average, zero_division=0.0))


def matthews(predictions, labels) -> float:
    """Matthews correlation of two (N,) class vectors, −1…1 (GLUE's CoLA); 0 when either side is constant."""
    require("eval", "sklearn")
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(*_paired(predictions, labels, "predictions", "labels")[::-1]))


def pearson(predictions, targets) -> float:
    """Pearson's linear correlation of two (N,) score vectors; NaN when either side is constant."""
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predictions, targets)


def spearman(predictions, targets) -> float:
    """Spearman's rank correlation of two (N,) score vectors (ties share ranks); NaN when either side is constant."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predictions, targets)


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> Score:
    """Corpus BLEU by sacrebleu's defaults, 0–100, with the signature that makes it comparable (Post 2018)."""
    require("eval", "sacrebleu")
    from sacrebleu.metrics import BLEU

    _check_texts(hypotheses, references)
    metric = BLEU()
    value = metric.corpus_score(list(hypotheses), [list(references)]).score
    return Score("BLEU", float(value), str(metric.get_signature()))


def rouge(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, -2 and -L: mean F-measure over the pairs, 0–1, by rouge-score with the Porter stemmer.

    Of English texts the words are rouge-score's own. Its tokenizer keeps a-z and 0-9 alone, so that a perfect answer in
    another script would score 0; here a word is a run of letters, marks and digits of any script, a character where a
    script writes no blanks (Chinese, Japanese, Thai …), and of a text without any word each sign.

    Returns:
        {"rouge1": …, "rouge2": …, "rougeL": …}
    """
    require("eval", "rouge_score")
    from rouge_score.rouge_scorer import RougeScorer

    _check_texts(hypotheses, references)
    kinds = ["rouge1", "rouge2", "rougeL"]
    # a tokenizer given: else it logs through absl, which then configures the root logger for everybody
    scorer = RougeScorer(kinds, tokenizer=_Words())
    scores = [scorer.score(target=r, prediction=h) for h, r in zip(hypotheses, references, strict=True)]
    return {kind: float(np.mean([score[kind].fmeasure for score in scores])) for kind in kinds}


class _Words:
    """What `rouge` counts; as rouge-score's DefaultTokenizer where a text is ASCII."""

    def __init__(self):
        from rouge_score.tokenizers import DefaultTokenizer

        self.own = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        text = unicodedata.normalize("NFC", text.lower())
        kept = "".join(
            f" {sign} " if NO_BLANKS.match(sign) else sign if unicodedata.category(sign)[0] in "LMN" else " "
            for sign in text
        )
        words = [part for word in kept.split() for part in (self.own.tokenize(word) if word.isascii() else [word])]
        return words or [sign for sign in text if not sign.isspace()]


def cer(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Character error rate by jiwer, (S + D + I) / N: edits of all lines over characters of all references.

    Every character counts, leading and trailing blanks too (jiwer's default would strip them). May exceed 1.
    """
    require("eval", "jiwer")
    import jiwer

    _check_texts(hypotheses, references)
    if not any(references):
        raise ValueError("cer: all references are empty texts, N = 0 characters; give at least one reference with text")
    characters = jiwer.ReduceToListOfListOfChars()
    return float(
        jiwer.cer(
            reference=list(references),
            hypothesis=list(hypotheses),
            reference_transform=characters,
            hypothesis_transform=characters,
        )
    )


def aligned(hypothesis: str, reference: str) -> list[tuple[str, str]]:
    """Two texts character by character, by the fewest edits, those that `cer` counts (jiwer).

    Returns:
        ("a", "a") where they are the same, ("b", "a") a changed character, ("b", "") an added one, ("", "a") a missing
        one; the first parts make the hypothesis, the second ones the reference.

    >>> aligned("hose", "house")
    [('h', 'h'), ('o', 'o'), ('', 'u'), ('s', 's'), ('e', 'e')]
    """
    require("eval", "jiwer")
    import jiwer

    if not reference:
        return [(character, "") for character in hypothesis]
    characters = jiwer.ReduceToListOfListOfChars()
    found = jiwer.process_characters(reference, hypothesis, characters, characters)
    pairs = []
    for chunk in found.alignments[0]:
        ours = hypothesis[chunk.hyp_start_idx : chunk.hyp_end_idx]
        wanted = reference[chunk.ref_start_idx : chunk.ref_end_idx]
        pairs += itertools.zip_longest(ours, wanted, fillvalue="")
    return pairs


def _correlation(measure, predictions, targets) -> float:
    predictions, targets = _paired(predictions, targets, "predictions", "targets")
    if len(predictions) < 2:
        raise ValueError(f"a correlation needs at least 2 pairs, found {len(predictions)}")
    with warnings.catch_warnings():
        # A collapsed student predicts a constant: NaN says so, and a study must be able to record it.
        warnings.filterwarnings("ignore", message=".*constant.*")
        return float(measure(predictions.astype(np.float64), targets.astype(np.float64)).statistic)


def _paired(first, second, first_name: str, second_name: str) -> tuple[np.ndarray, np.ndarray]:
    """Two vectors (N,) of equal, positive length."""
    first, second = np.asarray(first), np.asarray(second)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(
            f"{first_name} have shape {first.shape}, {second_name} {second.shape}; "
            "give two vectors of one length (for logits: predictions = logits.argmax(-1))"
        )
    if len(first) == 0:
        raise ValueError(f"{first_name} and {second_name} are empty; a metric needs at least one example")
    return first, second


def _check_texts(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    for name, texts in (("hypotheses", hypotheses), ("references", references)):
        if isinstance(texts, str):
            raise ValueError(f"{name} is one str; give a list of texts, one an example: [{texts[:20]!r}]")
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses against {len(references)} references; give one reference each")
    if len(references) == 0:
        raise ValueError("hypotheses and references are empty; a metric needs at least one pair")
