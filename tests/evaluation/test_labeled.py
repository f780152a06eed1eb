"""Logits at labeled positions, some at a time, against all of them at once."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from fakit import capture
from fakit.evaluation import Agreement, labeled, perplexity
from fakit.evaluation.batches import by_length
from fakit.evaluation.labeled import labeled_logits
from tests.families import batch_for, tiny


def _labels(ids: torch.Tensor, seed: int = 0) -> torch.Tensor:
    drawn = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    return ids.where(drawn, -100)


@pytest.mark.parametrize("entries", [1, 70_000, 2**23])
@pytest.mark.parametrize("vocabulary", [50, 9_000])  # small: logits as a whole; large: the head and its input
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "bloom"])
def test_some_at_a_time_are_all_of_them(family, vocabulary, entries, monkeypatch):
    monkeypatch.setattr(labeled, "ENTRIES", entries)
    model, other = tiny(family, vocab_size=vocabulary), tiny("llama", seed=1, vocab_size=vocabulary)
    batch = batch_for(model, rows=3, tokens=9, padding=2)
    labels = _labels(batch["input_ids"])
    labels[:, 0] = 5  # predicted by nothing
    with torch.no_grad():
        traces = [capture(one, batch, logits="head") for one in (model, other)]
        assert all((trace.head is None) == (vocabulary == 50) for trace in traces)
        found = list(labeled_logits(traces, labels))
        whole = [one(**batch).logits[:, :-1][labels[:, 1:] != -100] for one in (model, other)]
    for side, expected in enumerate(whole):
        torch.testing.assert_close(torch.cat([logits[side] for logits, _ in found]), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat([targets for _, targets in found]), labels[:, 1:][labels[:, 1:] != -100])
    rows = max(1, entries // max(one.shape[-1] for one in whole))
    assert [len(targets) for _, targets in found[:-1]] == [rows] * (len(found) - 1) and len(found[-1][1]) <= rows


def test_a_head_that_makes_its_own_logits_is_read_at_the_same_places(monkeypatch):
    """Without a head that can be taken apart, such as a quantized one, the logits are there as a whole."""
    model = tiny("llama", vocab_size=9_000)
    batch = batch_for(model, rows=2, tokens=6, padding=1)
    labels = _labels(batch["input_ids"])
    with torch.no_grad():
        ways = [capture(model, batch, logits=how) for how in (True, "head")]
        (((whole, by_head), targets),) = labeled_logits(ways, labels)
    assert ways[0].head is None and ways[1].logits is None and len(targets)
    torch.testing.assert_close(by_head, whole, rtol=1e-5, atol=1e-6)


def test_agreement_without_a_mask_counts_every_position():
    student, teacher = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    everything = torch.ones(3, 5, dtype=torch.bool)
    assert (
        Agreement(2).update(student, teacher).compute() == Agreement(2).update(student, teacher, everything).compute()
    )


@pytest.mark.parametrize("tokens", [1, 24, 4096, None])
def test_batches_hold_no_more_tokens_than_asked(tokens):
    lengths = [3, 9, 1, 7, 7, 2, 30, 8]
    batches = list(by_length(lengths, 4, tokens))
    assert sorted(index for batch in batches for index in batch) == list(range(8))
    for batch in batches:
        padded = len(batch) * max(lengths[index] for index in batch)
        assert len(batch) <= 4 and (tokens is None or padded <= tokens or len(batch) == 1)
    flat = [lengths[index] for batch in batches for index in batch]
    assert flat == sorted(lengths, reverse=True)
    if tokens == 24:
        assert [len(batch) for batch in batches] == [1, 2, 3, 2]


def test_perplexity_makes_few_logits_at_once(monkeypatch):
    """And is the perplexity of all of them, as cross_entropy over whole logits has it."""
    model = tiny("gpt2")
    seen = []
    monkeypatch.setattr(labeled, "ENTRIES", 4 * model.config.vocab_size)
    real = labeled._logits
    monkeypatch.setattr(labeled, "_logits", lambda trace, rows: seen.append(len(rows)) or real(trace, rows))
    tokenizer = _Letters()
    found = perplexity(model, tokenizer, ["abcdefghijkl", "xyz"], window=8, stride=4)
    expected = 0.0
    for text in ("abcdefghijkl", "xyz"):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        done = 1
        for begin in range(0, ids.shape[1], 4):
            end = min(begin + 8, ids.shape[1])
            with torch.no_grad():
                logits = model(ids[:, begin:end]).logits[0]
            some = slice(done - begin - 1, end - begin - 1)
            expected += cross_entropy(logits[some], ids[0, done:end], reduction="sum").item()
            done = end
            if end == ids.shape[1]:
                break
    assert found.nll == pytest.approx(expected, rel=1e-5) and max(seen) == 4


class _Letters:
    """A tokenizer of one letter a token."""

    is_fast = True

    def __call__(self, text, **_):
        return {
            "input_ids": [ord(letter) - 95 for letter in text],
            "offset_mapping": [(place, place + 1) for place in range(len(text))],
            "special_tokens_mask": [0] * len(text),
        }
