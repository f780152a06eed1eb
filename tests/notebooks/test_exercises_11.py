"""Exercises of notebook 11: an empty stub is not done yet, the solution passes,
each classic wrong answer is told what is wrong.
"""

import math
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.notebooks.cells import assert_ladder, assert_told, checks, exercise


@pytest.mark.parametrize("name", ["cost", "errors", "labels", "acceptance"])
def test_the_stub_is_not_done_and_the_solution_in_the_hints_passes(name):
    assert_ladder("11", name, {"math": math, "torch": torch})


# -- cost -------------------------------------------------------------------------------------------------------------


def nll(logits, labels, ahead=1):
    """−log P of every labeled token."""
    logits, targets = logits[:, : labels.shape[1] - ahead], labels[:, ahead:]
    counts = targets != -100
    return cross_entropy(logits[counts], targets[counts], reduction="none")


def right(logits, labels, size):
    each = nll(logits, labels)
    return each.mean().exp(), each.sum() / math.log(2) / size


def with_perplexity(made):
    return lambda logits, labels, size: (made(logits, labels), right(logits, labels, size)[1])


def with_bits(made):
    return lambda logits, labels, size: (right(logits, labels, size)[0], made(logits, labels, size))


def by_text(logits, labels):
    return [nll(z[None], y[None]) for z, y in zip(logits, labels, strict=True)]


def of_everything(logits, labels):
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].clamp(min=0).flatten(), reduction="sum")


def bare(logits, labels):
    counts = labels[:, 1:] != -100
    return -logits[:, :-1][counts].gather(-1, labels[:, 1:][counts][:, None]).mean()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (with_perplexity(lambda z, y: nll(z, y, 0).mean().exp()), "position t predicts the token at t + 1"),
        (with_perplexity(lambda z, y: nll(z.flip(1), y.flip(1)).mean().exp()), "the wrong way around"),
        (with_perplexity(lambda z, y: (of_everything(z, y) / y[:, 1:].numel()).exp()), "positions without a label"),
        (with_perplexity(lambda z, y: (nll(z, y).sum() / y[:, 1:].numel()).exp()), "divides by every position"),
        (
            with_perplexity(lambda z, y: sum(n.mean().exp() for n in by_text(z, y)) / 2),
            "mean of the texts' perplexities",
        ),
        (with_perplexity(lambda z, y: (sum(n.mean() for n in by_text(z, y)) / 2).exp()), "a mean of text means"),
        (with_perplexity(lambda z, y: nll(z, y).mean()), "exp is missing"),
        (with_perplexity(lambda z, y: 2 ** nll(z, y).mean()), "2 to the power of nats"),
        (with_perplexity(lambda z, y: nll(z, y).sum().exp()), "exp of the sum"),
        (with_perplexity(lambda z, y: bare(z, y).exp()), "log_softmax is missing"),
        (with_perplexity(lambda z, y: (-nll(z, y).mean()).exp()), "upside down"),
        (with_perplexity(lambda z, y: 7.0), "your perplexity is 7.0000, expected"),
        (with_bits(lambda z, y, b: nll(z, y, 0).sum() / math.log(2) / b), "position t predicts the token at t + 1"),
        (with_bits(lambda z, y, b: nll(z, y).sum() / b), "nats per byte"),
        (with_bits(lambda z, y, b: nll(z, y).sum() * math.log(2) / b), "multiplies by log 2"),
        (with_bits(lambda z, y, b: nll(z, y).mean() / math.log(2)), "bits per *token*"),
        (with_bits(lambda z, y, b: nll(z, y).mean() / math.log(2) / b + 0 * b), "one token's cost|divides the mean"),
        (with_bits(lambda z, y, b: of_everything(z, y) / math.log(2) / b), "positions without a label"),
        (with_bits(lambda z, y, b: 7.0), "your bits per byte is 7.0000, expected"),
        (lambda z, y, b: right(z, y, b)[0], "two numbers are wanted"),
        (lambda z, y, b: (nll(z, y), 1.0), "two single numbers"),
        (lambda z, y, b: (float("nan"), 1.0), "your perplexity is nan"),
    ],
)
def test_a_wrong_cost_is_told_what_is_wrong(answer, message):
    told = exercise("11", "cost").check(answer)
    assert told.status == "not right" and any(part in told.message for part in message.split("|")), told


# -- errors -----------------------------------------------------------------------------------------------------------


def edits(text, reference, change=1, add=1, miss=1):
    """The textbook table, written as a recursion."""
    known = {}

    def least(i, j):
        if (i, j) not in known:
            ways = [(0, i, j)] if i == j == 0 else []
            if i:
                ways.append((least(i - 1, j) + add, i, j))
            if j:
                ways.append((least(i, j - 1) + miss, i, j))
            if i and j:
                ways.append((least(i - 1, j - 1) + (change if text[i - 1] != reference[j - 1] else 0), i, j))
            known[i, j] = min(ways)[0]
        return known[i, j]

    return least(len(text), len(reference))


def unequal(text, reference):
    return sum(a != b for a, b in zip(text, reference, strict=False))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (edits, "is a number of edits"),
        (lambda t, r: edits(t, r) / max(1, len(t)), "the length of the text that was written"),
        (lambda t, r: edits(t, r) / max(len(t), len(r)), "the longer of the two"),
        (lambda t, r: min(1.0, edits(t, r) / len(r)), "ends at 1"),
        (lambda t, r: (unequal(t, r) + abs(len(t) - len(r))) / len(r), "everything behind it counts as wrong"),
        (lambda t, r: unequal(t, r) / len(r), "stops where the shorter text ends"),
        (lambda t, r: edits(t, r, change=2) / len(r), "counts a changed character twice"),
        (lambda t, r: edits(t, r, add=0) / len(r), "does not count characters that were added"),
        (lambda t, r: edits(t, r, miss=0) / len(r), "does not count characters that are missing"),
        (lambda t, r: 1 - edits(t, r) / len(r), "1 minus the error rate"),
        (lambda t, r: 0.0, "for 'te house' beside 'the house' yours is 0.0000, expected 0.1111"),
        (lambda t, r: "none", "one number is wanted"),
        (lambda t, r: t == r, "one number is wanted"),
    ],
)
def test_a_wrong_rate_is_told_what_is_wrong(answer, message):
    assert_told(exercise("11", "errors"), answer, message)


# -- labels -----------------------------------------------------------------------------------------------------------


def marked(ids, header, end, *, before=0, inside=0, behind=0, only=slice(None), closed=False, to_the_end=False):
    """Labels on the answers, with a mistake."""
    starts = [i + len(header) for i in range(len(ids)) if ids[i : i + len(header)] == header]
    spans = [(start, next((i + 1 for i in range(start, len(ids)) if ids[i] == end), len(ids))) for start in starts]
    if closed:
        spans = [(start, stop) for start, stop in spans if ids[stop - 1] == end]
    if to_the_end:
        spans = [(start, len(ids)) for start, _ in spans[:1]]
    found = [-100] * len(ids)
    for start, stop in spans[only]:
        for i in range(start - before + inside, min(stop + behind, len(ids))):
            found[i] = ids[i]
    return found


def without_ends(ids, header, end):
    return [-100 if label == end else label for label in marked(ids, header, end)]


def inverted(ids, header, end):
    return [-100 if a != -100 else token for token, a in zip(ids, marked(ids, header, end), strict=True)]


def falsely_closed(ids, header, end):
    found = marked(ids, header, end)
    return [*found, end] if found[-1] not in (-100, end) else found


def from_the_word(ids, header, end):
    """Takes the word "assistant" for the header, and a line break behind it for a part of it."""
    found, inside, skip = [-100] * len(ids), False, False
    for i, token in enumerate(ids):
        if inside and not (skip and token == header[-1]):
            found[i] = token
        skip = False
        if token == end:
            inside = False
        if token == header[1]:
            inside = skip = True
    return found


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda i, h, e: list(i), "the prompt's too"),
        (lambda i, h, e: [-100] * len(i), "nothing has a label"),
        (inverted, "the answers have none"),
        (without_ends, "never learns to stop"),
        (lambda i, h, e: marked(i, h, e, before=3), "the header has labels"),
        (lambda i, h, e: marked(i, h, e, before=1), "the end of the header"),
        (lambda i, h, e: marked(i, h, e, inside=1), "the first token of an answer"),
        (lambda i, h, e: marked(i, h, e, behind=1), "the line break behind an answer"),
        (lambda i, h, e: marked(i, h, e, only=slice(-1, None)), "only the last answer"),
        (lambda i, h, e: marked(i, h, e, only=slice(0, 1)), "only the first answer"),
        (lambda i, h, e: marked(i, h, e, to_the_end=True), "the next prompt too"),
        (lambda i, h, e: marked(i, h, e, closed=True), "an answer without an end has no labels"),
        (lambda i, h, e: [*marked(i, h, e)[1:], -100], "shifted by one"),
        (from_the_word, "also where a user says it"),
        (falsely_closed, "a false end"),
        (lambda i, h, e: marked(i, h, e)[:-1], "one label a token"),
        (lambda i, h, e: tuple(i), "a list of labels is wanted"),
        (lambda i, h, e: [1, *marked(i, h, e)[1:]], "the token 1 at place 0 has 1, expected -100"),
    ],
)
def test_wrong_labels_are_told_what_is_wrong(answer, message):
    assert_told(exercise("11", "labels"), answer, message)


def test_labels_may_be_a_tensor():
    assert exercise("11", "labels").check(lambda i, h, e: torch.tensor(marked(i, h, e)))


def test_the_rows_of_the_check_are_those_of_a_chat_template(scans_chat):
    """What the library labels of a rendered chat is what the exercise asks for."""
    tokenizer, rows = scans_chat
    header = tokenizer("<|im_start|>assistant\n", add_special_tokens=False).input_ids
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for row in rows:
        assert marked(row["input_ids"], header, end) == row["labels"]


@pytest.fixture
def scans_chat():
    from fakit.tasks import load_task
    from fakit.tasks.scans import scan_tokenizer

    tokenizer = scan_tokenizer()
    tokenizer.chat_template = (
        "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    task = load_task("instructions")
    return tokenizer, task.encode(task.test.select(range(12)), tokenizer, 512).to_list()


# -- acceptance -------------------------------------------------------------------------------------------------------


def pq(s, t):
    return t.softmax(-1), s.softmax(-1)


def overlap(s, t):
    return torch.minimum(*pq(s, t))


def ratio(s, t):
    p, q = pq(s, t)
    return (p / q).clamp(max=1)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda s, t: (s.argmax(-1) == t.argmax(-1)).double().mean(), "greedy acceptance"),
        (lambda s, t: 1 - overlap(s, t).sum(-1).mean(), "the total variation"),
        (lambda s, t: (pq(s, t)[0] * pq(s, t)[1]).sum(-1).mean(), "two samples are the same token"),
        (lambda s, t: torch.maximum(*pq(s, t)).sum(-1).mean(), "takes the larger"),
        (lambda s, t: overlap(s, t).mean(), "a mean over tokens"),
        (lambda s, t: overlap(s, t).sum(), "a sum over places"),
        (lambda s, t: torch.minimum(s, t).sum(-1).mean(), "takes min of logits"),
        (lambda s, t: torch.minimum(s, t).softmax(-1).sum(-1).mean(), "is 1 whatever the models say"),
        (lambda s, t: ratio(s, t).mean(), "as often as the student proposes it"),
        (lambda s, t: ratio(s, t).sum(-1).mean(), "weigh each by q"),
        (lambda s, t: ratio(s, t).gather(-1, s.argmax(-1, keepdim=True)).mean(), "looks at the student's likeliest"),
        (lambda s, t: overlap(s, t).gather(-1, s.argmax(-1, keepdim=True)).mean(), "of the student's likeliest token"),
        (lambda s, t: torch.minimum(s.softmax(0), t.softmax(0)).sum(-1).mean(), "normalizes over places"),
        (lambda s, t: overlap(s, t).sum(-1), "one number is wanted"),
        (lambda s, t: 0.123, "your value is 0.1230, expected"),
    ],
)
def test_a_wrong_acceptance_is_told_what_is_wrong(answer, message):
    assert_told(exercise("11", "acceptance"), answer, message)


def test_keeping_by_ratio_is_the_same_acceptance():
    """Σ q · min(1, p / q) is Σ min(p, q)."""
    assert exercise("11", "acceptance").check(lambda s, t: (pq(s, t)[1] * ratio(s, t)).sum(-1).mean())


def test_no_two_wrong_answers_make_the_same_value():
    """Else a reader would be told of the wrong one."""
    draw = torch.Generator().manual_seed(4)
    s, t = (1.5 * torch.randn(40, 6, generator=draw, dtype=torch.float64) for _ in range(2))
    values = sorted(checks("11")._wrong_acceptances(s, t).values())
    assert min(b - a for a, b in pairwise(values)) > 1e-4
