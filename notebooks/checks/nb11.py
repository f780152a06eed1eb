"""Checks of the exercises of notebook 11."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fakit.evaluation import Agreement, cer
from fakit.teaching import Exercise

COST_HINT = """```python
def my_cost(logits, labels, bytes):
    logits, targets = logits[:, :-1], labels[:, 1:]
    counts = targets != -100
    nll = torch.nn.functional.cross_entropy(logits[counts], targets[counts], reduction="sum")
    perplexity = (nll / counts.sum()).exp()
    return perplexity, nll / math.log(2) / bytes
```"""

ERRORS_HINT = """```python
def my_cer(text, reference):
    row = list(range(len(text) + 1))  # edits from nothing to the first j characters of the text
    for i, wanted in enumerate(reference, 1):
        before, row[0] = row[0], i
        for j, found in enumerate(text, 1):
            change = before + (found != wanted)
            before, row[j] = row[j], min(change, row[j] + 1, row[j - 1] + 1)
    return row[-1] / len(reference)
```"""

LABELS_HINT = """```python
def my_labels(ids, header, end):
    labels, inside = [-100] * len(ids), False
    for place, token in enumerate(ids):
        if inside:
            labels[place] = token
        if token == end:
            inside = False
        if ids[max(0, place + 1 - len(header)) : place + 1] == header:
            inside = True
    return labels
```"""

ACCEPTANCE_HINT = """```python
def my_acceptance(student, teacher):
    q, p = student.softmax(-1), teacher.softmax(-1)
    return torch.minimum(p, q).sum(-1).mean()
```"""


# -- 11.1 -------------------------------------------------------------------------------------------------------------


def check_cost(answer) -> str | None:
    """Perplexity and bits per byte of two texts, of 6 and 3 tokens with 4 and 1 labels, that have 11 bytes."""
    generator = torch.Generator().manual_seed(11)
    logits = 2 * torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    labels = torch.tensor([[-100, -100, 3, 1, 4, 2], [-100, -100, 0, -100, -100, -100]])
    size = 11
    nll = _nll(logits, labels)
    truth = float(nll.mean().exp()), float(nll.sum()) / math.log(2) / size
    found = answer(logits.clone(), labels.clone(), size)
    if not isinstance(found, Sequence) or isinstance(found, str) or len(found) != 2:
        return "two numbers are wanted: perplexity, bits per byte."
    if any(getattr(value, "numel", lambda: 1)() != 1 for value in found):
        return "two single numbers are wanted, each of all the texts together."
    for name, value, right, known in zip(
        ("perplexity", "bits per byte"), map(float, found), truth, _wrong_costs(logits, labels, size), strict=True
    ):
        if not abs(value - right) < 1e-5:
            why = next((why for why, wrong in known.items() if abs(value - wrong) < 1e-5), None)
            return f"your {name} {value:.4f} {why}." if why else f"your {name} is {value:.4f}, expected {right:.4f}."
    return None


def _nll(logits: Tensor, labels: Tensor, ahead: int = 1) -> Tensor:
    """−log P of every labeled token, (N,); `ahead` is how far behind its prediction a label stands."""
    length = labels.shape[1] - ahead
    targets = labels[:, ahead:]
    counts = targets != -100
    return -logits[:, :length].log_softmax(-1)[counts].gather(-1, targets[counts][:, None])[:, 0]


def _wrong_costs(logits: Tensor, labels: Tensor, size: int) -> tuple[dict[str, float], dict[str, float]]:
    """Of perplexity and of bits per byte: what is wrong → the value that it makes."""
    nll, unshifted = _nll(logits, labels), _nll(logits, labels, 0)
    backwards = _nll(logits.flip(1), labels.flip(1))
    texts = [_nll(row[None], of[None]) for row, of in zip(logits, labels, strict=True)]
    positions = labels[:, 1:].numel()
    everything = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].clamp(min=0).flatten(), reduction="sum"
    )
    bare = torch.stack(
        [-logits[b, t - 1, labels[b, t]] for b, t in (labels[:, 1:] != -100).nonzero() + torch.tensor([0, 1])]
    )
    no_shift = "compares each logit with the token it stands at: position t predicts the token at t + 1"
    perplexities = {
        no_shift: unshifted.mean().exp(),
        "has the shift the wrong way around: position t predicts t + 1, not t − 1": backwards.mean().exp(),
        "counts the positions without a label: −100 does not count": (everything / positions).exp(),
        "divides by every position: divide by the labeled ones": (nll.sum() / positions).exp(),
        "is a mean of the texts' perplexities: take the mean of −log P over all tokens, then exp": torch.stack(
            [one.mean().exp() for one in texts]
        ).mean(),
        "is exp of a mean of text means: a token of a short text weighs more than one of a long text": torch.stack(
            [one.mean() for one in texts]
        )
        .mean()
        .exp(),
        "is the mean −log P itself: exp is missing": nll.mean(),
        "is 2 to the power of nats: exp belongs to log, 2 to log₂": 2 ** nll.mean(),
        "is exp of the sum: a mean belongs inside": nll.sum().exp(),
        "takes logits for log-probabilities: log_softmax is missing": bare.mean().exp(),
        "is upside down: −log P, not log P": (-nll.mean()).exp(),
    }
    bits = {
        no_shift: unshifted.sum() / math.log(2) / size,
        "is in nats per byte: divide by log 2": nll.sum() / size,
        "multiplies by log 2: 1 bit is log 2 nats, so divide": nll.sum() * math.log(2) / size,
        "is bits per *token*: divide the sum by the bytes": nll.mean() / math.log(2),
        "divides the mean by the bytes: the sum is what all the bytes cost": nll.mean() / math.log(2) / size,
        "counts the positions without a label: −100 does not count": everything / math.log(2) / size,
        "is log₂ of the perplexity over the bytes: that is one token's cost, not that of all": nll.mean().exp().log2()
        / size,
    }
    return tuple({why: float(value) for why, value in known.items()} for known in (perplexities, bits))


cost = Exercise(
    "Write perplexity and bits per byte. Logits are (B, T, V), labels (B, T) with −100 where nothing counts; the "
    "labels are *not* shifted: the label at t + 1 is what position t predicts. `bytes` are those of all the labeled "
    "text. Return both.",
    check_cost,
    hints=[
        "Which logits predict which labels? Cut both first; the rest is a cross-entropy over what counts.",
        "`logits[:, :-1]` belong to `labels[:, 1:]`. Sum −log P over the labels that are not −100: the sum over their "
        "number goes into exp, the sum over log 2 and the bytes is the other one.",
        COST_HINT,
    ],
    done="one number for each token, one for each byte; only the second compares between tokenizers.",
    number="11.1",
    difficulty=2,
    minutes=8,
)


# -- 11.2 -------------------------------------------------------------------------------------------------------------

PAIRS = [("the house", "the house"), ("te house", "the house"), ("the hhouse", "the house"), ("tbe house", "the house"),
         ("", "abc"), ("abcdefgh", "ab"), ("kitten", "sitting"), ("he hous", "the house")]  # fmt: skip


def check_errors(answer) -> str | None:
    """The rate of eight pairs: the same, one missing, one added, one changed, nothing, too long, two classics."""
    found = []
    for text, reference in PAIRS:
        value = answer(text, reference)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"one number is wanted; for {text!r} beside {reference!r} yours is {value!r}."
        found.append(float(value))
    truth = [cer([text], [reference]) for text, reference in PAIRS]
    if _equal(found, truth):
        return None
    for why, wrong in _WRONG_RATES.items():
        if _equal(found, [wrong(text, reference) for text, reference in PAIRS]):
            return f"your rate {why}."
    place = next(i for i, (a, b) in enumerate(zip(found, truth, strict=True)) if not abs(a - b) < 1e-9)
    text, reference = PAIRS[place]
    return f"for {text!r} beside {reference!r} yours is {found[place]:.4f}, expected {truth[place]:.4f}."


def _equal(found: Sequence[float], truth: Sequence[float]) -> bool:
    return all(abs(a - b) < 1e-9 for a, b in zip(found, truth, strict=True))


def _edits(text: str, reference: str, change: float = 1, add: float = 1, miss: float = 1) -> float:
    row = [j * add for j in range(len(text) + 1)]
    for i, wanted in enumerate(reference, 1):
        before, row[0] = row[0], i * miss
        for j, found in enumerate(text, 1):
            same = before + (0 if found == wanted else change)
            before, row[j] = row[j], min(same, row[j] + miss, row[j - 1] + add)
    return row[-1]


def _by_place(text: str, reference: str, rest: bool) -> float:
    differ = sum(a != b for a, b in zip(text, reference, strict=False))
    return (differ + rest * abs(len(text) - len(reference))) / len(reference)


_WRONG_RATES: dict[str, Callable[[str, str], float]] = {
    "is a number of edits: divide by the length of the reference": _edits,
    "divides by the length of the text that was written: divide by the reference's": lambda t, r: (
        _edits(t, r) / max(1, len(t))
    ),
    "divides by the longer of the two: divide by the reference's length": lambda t, r: (
        _edits(t, r) / max(len(t), len(r))
    ),
    "ends at 1: a text that is much too long has more edits than the reference has characters": lambda t, r: min(
        1.0, _edits(t, r) / len(r)
    ),
    "compares place by place: after one missing character everything behind it counts as wrong": lambda t, r: _by_place(
        t, r, True
    ),
    "compares place by place, and stops where the shorter text ends": lambda t, r: _by_place(t, r, False),
    "counts a changed character twice, as one missing and one added: it is one edit": lambda t, r: (
        _edits(t, r, 2) / len(r)
    ),
    "does not count characters that were added": lambda t, r: _edits(t, r, add=0) / len(r),
    "does not count characters that are missing": lambda t, r: _edits(t, r, miss=0) / len(r),
    "is 1 minus the error rate: the rate of what is right": lambda t, r: 1 - _edits(t, r) / len(r),
}

errors = Exercise(
    "Write the character error rate: the fewest edits (a character changed, added or missing) that make the text of "
    "the reference, over the length of the reference.",
    check_errors,
    hints=[
        "Compare prefixes: if you know the edits for all pairs of shorter prefixes, the next one has three ways.",
        "A table with one row for each prefix of the reference: `min(above + 1, left + 1, diagonal + (a != b))`.",
        ERRORS_HINT,
    ],
    done="the same number that jiwer gives; above 1 where a text runs on.",
    number="11.2",
    difficulty=3,
    minutes=10,
)


# -- 11.3 -------------------------------------------------------------------------------------------------------------

HEADER, END, ASSISTANT, NEWLINE = [1, 8, 9], 2, 8, 9  # <|im_start|> assistant ⏎ … <|im_end|>
CHAT = [1, 7, 9, 20, 21, END, 9, *HEADER, 30, 31, END, 9, 1, 7, 9, 22, ASSISTANT, 23, END, 9, *HEADER, 32, END, 9]
CUT = [1, 7, 9, 20, END, 9, *HEADER, 33, 34, 35]  # an answer that lost its end
WITHOUT = [1, 7, 9, 20, 21, END, 9]  # a prompt alone


def check_labels(answer) -> str | None:
    """The labels of a chat of two turns, of one whose answer was cut, and of a prompt alone."""
    for name, ids in (
        ("a chat of two answers", CHAT),
        ("a row whose answer was cut", CUT),
        ("a prompt alone", WITHOUT),
    ):
        found = answer(list(ids), list(HEADER), END)
        found = found.tolist() if isinstance(found, Tensor) else found
        if not isinstance(found, list):
            return f"a list of labels is wanted; for {name} yours is a {type(found).__name__}."
        if len(found) != len(ids):
            if name == "a row whose answer was cut" and len(found) == len(ids) + 1 and found[-1] == END:
                return (
                    "your labels close the answer that was cut: a false end. The student would learn to stop in the "
                    "middle of a sentence; a cut answer has no end."
                )
            return f"one label a token is wanted; {name} has {len(ids)} tokens, and yours has {len(found)} labels."
        truth = _labels(ids)
        if found != truth:
            for why, wrong in _WRONG_LABELS.items():
                if found == wrong(ids):
                    return f"in {name} {why}."
            place = next(i for i, (a, b) in enumerate(zip(found, truth, strict=True)) if a != b)
            return f"in {name} the token {ids[place]} at place {place} has {found[place]}, expected {truth[place]}."
    return None


def _answers(ids: Sequence[int]) -> list[tuple[int, int]]:
    """First place of every answer, and the one behind its end."""
    found = []
    for place in range(len(ids)):
        if list(ids[place : place + len(HEADER)]) == HEADER:
            first = place + len(HEADER)
            last = next((i + 1 for i in range(first, len(ids)) if ids[i] == END), len(ids))
            found.append((first, last))
    return found


def _labels(
    ids: Sequence[int], first: int = 0, last: int = 0, spans: Sequence[tuple[int, int]] | None = None
) -> list[int]:
    """Labels on every answer, from `first` places behind its beginning to `last` behind its end."""
    labels = [-100] * len(ids)
    for start, stop in _answers(ids) if spans is None else spans:
        for place in range(max(0, start + first), min(len(ids), stop + last)):
            labels[place] = ids[place]
    return labels


def _shifted(ids: Sequence[int]) -> list[int]:
    return [*_labels(ids)[1:], -100]


_WRONG_LABELS: dict[str, Callable[[Sequence[int]], list[int]]] = {
    "every token has a label, the prompt's too: the student is graded on what the user says": list,
    "an answer without an end has no labels: what is left of it is still the student's to learn": lambda ids: _labels(
        ids, spans=[(first, last) for first, last in _answers(ids) if ids[last - 1] == END]
    ),
    "nothing has a label": lambda ids: [-100] * len(ids),
    "the labels are on the prompt, and the answers have none": lambda ids: [
        token if label == -100 else -100 for token, label in zip(ids, _labels(ids), strict=True)
    ],
    "the token that ends an answer has no label: the student never learns to stop": lambda ids: [
        -100 if label == END else label for label in _labels(ids)
    ],
    "the header has labels: the template writes it, not the student": lambda ids: _labels(ids, first=-len(HEADER)),
    "the end of the header has a label: the template writes it, not the student": lambda ids: _labels(ids, first=-1),
    "the first token of an answer has no label": lambda ids: _labels(ids, first=1),
    "the line break behind an answer has a label: the template writes it, after the student has stopped": (
        lambda ids: _labels(ids, last=1)
    ),
    "only the last answer has labels: the student wrote the first one, too": lambda ids: _labels(
        ids, spans=_answers(ids)[-1:]
    ),
    "only the first answer has labels": lambda ids: _labels(ids, spans=_answers(ids)[:1]),
    "everything behind the first header has labels, the next prompt too": lambda ids: _labels(
        ids, spans=[(first, len(ids)) for first, _ in _answers(ids)[:1]]
    ),
    "the labels are shifted by one: losses of transformers shift them themselves": _shifted,
    "the word of the header alone begins an answer, also where a user says it: the whole header does": lambda ids: (
        _labels(
            ids,
            spans=[
                (
                    place + (2 if ids[place + 1] == NEWLINE else 1),
                    next((i + 1 for i in range(place, len(ids)) if ids[i] == END), len(ids)),
                )
                for place in range(len(ids))
                if ids[place] == ASSISTANT
            ],
        )
    ),
}

labels = Exercise(
    "Write the labels of a chat: the token itself where the student answers, −100 elsewhere. An answer begins behind "
    "`header`, the ids of `<|im_start|>assistant⏎`, and ends with the token `end`, which is the student's to write, "
    "too. A row may hold several answers, and its last one may have been cut.",
    check_labels,
    hints=[
        "Who writes which token when the model is used? The template writes the header, the student what follows it, "
        "up to and with the end.",
        "Walk through the ids with a flag: it goes on behind a whole header, and off behind `end`.",
        LABELS_HINT,
    ],
    done="and nothing was added where the end was cut off.",
    number="11.3",
    difficulty=2,
    minutes=8,
)


# -- 11.4 -------------------------------------------------------------------------------------------------------------


def check_acceptance(answer) -> str | None:
    """Acceptance at 40 places over six tokens."""
    generator = torch.Generator().manual_seed(4)
    s, t = (1.5 * torch.randn(40, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    truth = Agreement(k=None, acceptance=True).update(s, t).compute()["acceptance"]
    found = answer(s.clone(), t.clone())
    if getattr(found, "numel", lambda: 1)() != 1:
        return f"one number is wanted, the mean over places; yours has shape {tuple(found.shape)}."
    value = float(found)
    if abs(value - truth) < 1e-5:
        return None
    why = next((why for why, wrong in _wrong_acceptances(s, t).items() if abs(value - wrong) < 1e-5), None)
    return f"your value {value:.4f} {why}." if why else f"your value is {value:.4f}, expected {truth:.4f}."


def _wrong_acceptances(s: Tensor, t: Tensor) -> dict[str, float]:
    """What is wrong → the value that it makes."""
    q, p = s.softmax(-1), t.softmax(-1)
    overlap = torch.minimum(p, q)
    best = q.argmax(-1, keepdim=True)
    wrong = {
        "is the share of places with the same likeliest token: that is greedy acceptance": (
            s.argmax(-1) == t.argmax(-1)
        )
        .double()
        .mean(),
        "is the total variation: acceptance is 1 minus it": 1 - overlap.sum(-1).mean(),
        "is Σ p · q, the chance that two samples are the same token: a token is kept with min(1, p / q)": (p * q)
        .sum(-1)
        .mean(),
        "takes the larger of the two: min": torch.maximum(p, q).sum(-1).mean(),
        "is a mean over tokens: sum over the vocabulary": overlap.mean(),
        "is a sum over places: take their mean": overlap.sum(),
        "takes min of logits: make probabilities of them first": torch.minimum(s, t).sum(-1).mean(),
        "is 1 whatever the models say, since one softmax sums to 1: take the min of two probabilities": torch.minimum(
            s, t
        )
        .softmax(-1)
        .sum(-1)
        .mean(),
        "is min(1, p / q) averaged over all tokens alike: a token comes as often as the student proposes it, Σ q · "
        "min(1, p / q)": (p / q).clamp(max=1).mean(),
        "is min(1, p / q) summed over all tokens alike: weigh each by q": (p / q).clamp(max=1).sum(-1).mean(),
        "looks at the student's likeliest token alone: sum over the vocabulary": (p / q)
        .clamp(max=1)
        .gather(-1, best)
        .mean(),
        "is min(p, q) of the student's likeliest token alone: sum over the vocabulary": overlap.gather(-1, best).mean(),
        "normalizes over places: softmax(-1), over the vocabulary": torch.minimum(s.softmax(0), t.softmax(0))
        .sum(-1)
        .mean(),
    }
    return {why: float(value) for why, value in wrong.items()}


acceptance = Exercise(
    "Write the acceptance: the chance that a token which the student samples is kept, Σ min(p, q) over the vocabulary, "
    "and then the mean over places. Logits are (N, V), p is the teacher's, q the student's.",
    check_acceptance,
    hints=[
        "Logits are no probabilities yet. Over which dimension do they become some?",
        "`torch.minimum(p, q)` is (N, V): sum the last dimension, average the first.",
        ACCEPTANCE_HINT,
    ],
    done="it is 1 − TV: two models that agree are kept always.",
    number="11.4",
    difficulty=1,
    minutes=5,
)
