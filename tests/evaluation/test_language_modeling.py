"""Perplexity against a loop that predicts one token at a time, and bytes counted by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fakit.evaluation import perplexity
from fakit.evaluation.language_modeling import Perplexity, exponential

TEXT = "in the beginning god created the heaven and the earth.\nand é so on"


def nll_token_by_token(model, ids: list[int], window: int, stride: int, first: int) -> tuple[float, int]:
    """Each token from `first` on, alone, from exactly the context that its window gives it; float64."""
    total, count = 0.0, 0
    with torch.no_grad():
        for position in range(first, len(ids)):
            begin = 0
            while begin + window <= position:  # the earliest window that holds the token
                begin += stride
            logits = model(input_ids=torch.tensor([ids[begin:position]])).logits[0, -1].double()
            total -= logits.log_softmax(-1)[ids[position]].item()
            count += 1
    return total, count


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 15), (10, 1), (48, 24), (7, 3)])
def test_equals_the_loop(gpt2, characters, window, stride):
    model, tokenizer = gpt2(), characters()
    ids = tokenizer(TEXT)["input_ids"]
    total, count = nll_token_by_token(model, ids, window, stride, first=1)
    result = perplexity(model, tokenizer, TEXT, window=window, stride=stride, corpus="genesis", batch_size=3)
    assert result.tokens == count == len(TEXT) - 1
    assert result.nll == pytest.approx(total, rel=1e-5)
    assert result.value == float(result) == pytest.approx(math.exp(total / count), rel=1e-5)
    assert result.bytes == len(TEXT.encode()) - 1 == len(TEXT)  # é has two bytes; the first character is not scored
    assert result.bits_per_byte == pytest.approx(total / math.log(2) / result.bytes, rel=1e-5)
    assert f"genesis: {count} tokens, {result.bytes} bytes; window {window}, stride {stride}" in str(result)


def test_a_bos_gives_context_to_the_first_token_and_is_not_scored(gpt2, characters):
    model, tokenizer = gpt2(), characters(bos=True)
    total, count = nll_token_by_token(model, tokenizer(TEXT)["input_ids"], 16, 8, first=1)
    result = perplexity(model, tokenizer, TEXT, window=16, stride=8)
    assert result.tokens == count == len(TEXT)
    assert result.bytes == len(TEXT.encode())
    assert result.nll == pytest.approx(total, rel=1e-5)


def test_a_closing_special_token_is_not_scored(gpt2, characters):
    from tokenizers import processors

    model, plain, closed = gpt2(), characters(bos=True), characters()
    closed.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    assert closed(TEXT)["input_ids"] == [*plain(TEXT)["input_ids"], 1]
    results = [perplexity(model, tokenizer, TEXT, window=16, stride=8) for tokenizer in (plain, closed)]
    assert results[0].tokens == results[1].tokens and results[0].bytes == results[1].bytes
    assert results[1].nll == pytest.approx(results[0].nll, rel=1e-5)


def test_texts_are_read_apart_and_weighted_by_tokens(gpt2, characters):
    model, tokenizer = gpt2(), characters()
    texts = ["the earth was without form", "a", "", "and void"]
    parts = [perplexity(model, tokenizer, text) for text in (texts[0], texts[3])]
    whole = perplexity(model, tokenizer, texts, batch_size=2)
    assert whole.tokens == sum(part.tokens for part in parts)
    assert whole.bytes == sum(part.bytes for part in parts)
    assert whole.nll == pytest.approx(sum(part.nll for part in parts), rel=1e-5)


def test_batch_size_changes_nothing(gpt2, characters):
    model, tokenizer = gpt2(), characters()
    texts = [TEXT, TEXT[:20], TEXT[:5]]
    values = [perplexity(model, tokenizer, texts, window=12, batch_size=size).nll for size in (1, 2, 50)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)


def test_a_uniform_model_has_the_vocabulary_as_perplexity(gpt2, characters):
    model = gpt2()
    torch.nn.init.zeros_(model.transformer.wte.weight)  # tied to the head: all logits are 0
    result = perplexity(model, characters(), "some text")
    assert result.value == pytest.approx(35, rel=1e-6)
    assert result.bits_per_byte == pytest.approx(math.log2(35), rel=1e-6)


def test_defaults_and_the_model_left_as_found(gpt2, characters):
    model = gpt2().train()
    model.transformer.drop.eval()
    result = perplexity(model, characters(), TEXT)
    assert (result.window, result.stride) == (48, 24)
    assert model.training and not model.transformer.drop.training


def test_errors(gpt2, characters):
    model, tokenizer = gpt2(), characters()
    with pytest.raises(ValueError, match=r"window=49.*48 positions"):
        perplexity(model, tokenizer, TEXT, window=49)
    with pytest.raises(ValueError, match=r"stride=16 with window=16"):
        perplexity(model, tokenizer, TEXT, window=16, stride=16)
    with pytest.raises(ValueError, match="no texts"):
        perplexity(model, tokenizer, [])
    with pytest.raises(ValueError, match="2 texts hold no token with context"):
        perplexity(model, tokenizer, ["a", ""])


def test_a_diverged_model_is_infinitely_perplexed():
    assert Perplexity("x", 8, 4, tokens=2, bytes=9, nll=1e5).value == math.inf
    assert exponential(math.log(7.0)) == pytest.approx(7.0) and math.isnan(exponential(math.nan))
