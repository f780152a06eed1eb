"""Greedy decoding against a loop without cache, padding or batches; the metrics of what was decoded."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import RwkvConfig, RwkvForCausalLM

from fakit.evaluation import cer, generate, generation, generation_metrics, split_prompts

EOS, PAD = 1, 2
PROMPTS = [[0, 5, 6], [0, 7, 8, 9, 10, 11], [0], [0, 20, 21, 22], [30, 31]]


def greedy(model, prompt: list[int], limit: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + limit:
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if token == EOS:
                break
            ids.append(token)
    return ids[len(prompt) :]


def spread(model):
    """A model that favors the end token somewhat, so that sequences of a batch end at different steps."""
    with torch.no_grad():
        model.transformer.wte.weight[EOS] *= 2.5
    return model


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_equals_one_by_one(gpt2, batch_size):
    model = spread(gpt2(seed=3))
    expected = [greedy(model, prompt, 12) for prompt in PROMPTS]
    lengths = {len(output) for output in expected}
    assert len(lengths) > 1 and min(lengths) < 12, "the test needs sequences that end at different steps"
    assert generate(model, PROMPTS, EOS, PAD, max_new_tokens=12, batch_size=batch_size) == expected


def test_the_pad_token_may_be_the_end_token(gpt2):
    model = spread(gpt2(seed=3))
    assert generate(model, PROMPTS, EOS, EOS, 12) == generate(model, PROMPTS, EOS, PAD, 12)


def test_options_of_the_models_own_config_are_not_used_and_stay(gpt2):
    model = gpt2(seed=4).train()
    expected = [greedy(model.eval(), prompt, 8) for prompt in PROMPTS]
    model.train()
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.do_sample = True
    found = model.generation_config
    assert generate(model, PROMPTS, EOS, PAD, 8) == expected
    assert model.generation_config is found and found.repetition_penalty == 5.0 and model.training


def test_generate_errors_leave_the_model_as_found(gpt2, monkeypatch):
    model = gpt2().train()
    with pytest.raises(ValueError, match=r"2 prompts, empty ones at \[1\]"):
        generate(model, [[0], []], EOS, PAD, 4)
    with pytest.raises(ValueError, match="0 prompts"):
        generate(model, [], EOS, PAD, 4)
    with pytest.raises(ValueError, match=r"longest prompt has 3 tokens and 46 new ones.*48 positions"):
        generate(model, [[0, 4, 5]], EOS, PAD, 46)
    found = model.generation_config

    def fail(**_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(RuntimeError):
        generate(model, PROMPTS, EOS, PAD, 4)
    assert model.training and model.generation_config is found


def row(tokenizer, source: str, target: str) -> dict:
    prompt = tokenizer(source + "\n")["input_ids"]
    answer = [*tokenizer(target)["input_ids"], EOS]
    return {
        "input_ids": prompt + answer,
        "attention_mask": [1] * len(prompt + answer),
        "labels": [-100] * len(prompt) + answer,
    }


def test_split_prompts(characters):
    tokenizer = characters()
    rows = [row(tokenizer, "tbe eartb", "the earth"), row(tokenizer, "a", "b")]
    prompts, targets = split_prompts(rows, EOS)
    assert [tokenizer.decode(ids) for ids in prompts] == ["tbe eartb\n", "a\n"]
    assert [tokenizer.decode(ids) for ids in targets] == ["the earth", "b"]
    with pytest.raises(ValueError, match="row 1 has no prompt: 3 of its 3 tokens are labeled"):
        split_prompts([rows[0], {"input_ids": [4, 5, 6], "labels": [4, 5, 6]}], EOS)
    with pytest.raises(ValueError, match="row 0 has no prompt: 0 of its 2 tokens"):
        split_prompts([{"input_ids": [4, 5], "labels": [-100, -100]}], EOS)


def test_metrics_and_the_copy_baseline(gpt2, characters):
    model, tokenizer = gpt2(seed=5), characters()
    pairs = [("tbe eartb", "the earth"), ("anb  void", "and void"), ("m", "n"), ("left out", "left out")]
    dataset = Dataset.from_list([row(tokenizer, *pair) for pair in pairs])
    result = generation_metrics(model, dataset, tokenizer, max_examples=3, max_new_tokens=10)
    assert result.sources == [source for source, _ in pairs[:3]]
    assert result.references == [target for _, target in pairs[:3]]
    expected = [greedy(model, tokenizer(source + "\n")["input_ids"], 10) for source, _ in pairs[:3]]
    assert result.outputs == [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
    assert result.metrics["cer_copy"] == pytest.approx((2 + 2 + 1) / (9 + 8 + 1))
    assert result.metrics["cer"] == cer(result.outputs, result.references)
    names = {"cer", "bleu", "rouge1", "rouge2", "rougeL"}
    assert set(result.metrics) == names | {f"{name}_copy" for name in names}
    assert "tok:13a" in result.bleu_signature
    assert "| tbe eartb |" in result._repr_markdown_() and "3 lines: CER" in str(result)


def test_a_model_that_knows_the_task_scores_zero(gpt2, characters, monkeypatch):
    model, tokenizer = gpt2(), characters()
    dataset = Dataset.from_list([row(tokenizer, "tbe eartb", "the earth")])

    def generate(input_ids, attention_mask):
        return torch.cat([input_ids, torch.tensor([[*tokenizer("the earth")["input_ids"], EOS, PAD]])], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    metrics = generation_metrics(model, dataset, tokenizer).metrics
    assert (metrics["cer"], metrics["rougeL"]) == (0.0, 1.0)


def test_the_default_limit_is_the_longest_target_and_a_margin(gpt2, characters):
    model, tokenizer = gpt2(seed=5), characters()
    with torch.no_grad():
        model.transformer.wte.weight[EOS] *= 0.01  # hardly ever ends
    dataset = Dataset.from_list([row(tokenizer, "a", "bc"), row(tokenizer, "abcde", "bcde")])
    outputs = generation_metrics(model, dataset, tokenizer).outputs
    assert max(len(tokenizer(output)["input_ids"]) for output in outputs) <= 4 + 16
    crowded = Dataset.from_list([row(tokenizer, "a" * 40, "b")])
    assert len(generation_metrics(model, crowded, tokenizer).outputs[0]) <= 48 - 41


def test_errors_of_the_metrics(gpt2, characters):
    tokenizer = characters()
    dataset = Dataset.from_list([row(tokenizer, "a", "b")])
    with pytest.raises(ValueError, match="max_examples=0"):
        generation_metrics(gpt2(), dataset, tokenizer, max_examples=0)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"pad None.*set tokenizer.pad_token"):
        generation_metrics(gpt2(), dataset, tokenizer)


def test_of_several_answers_the_last_is_the_target():
    row = {"input_ids": [1, 2, 3, 4, 5, 6, 7, 8], "labels": [-100, 2, 3, -100, -100, 6, 7, -100]}
    assert split_prompts([row], 7) == ([[1, 2, 3, 4, 5]], [[6]])
    assert split_prompts([row], {9}) == ([[1, 2, 3, 4, 5]], [[6, 7]])


def test_what_ends_an_answer_is_read_off_the_labels(characters):
    tokenizer = characters()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    end, letter = tokenizer.convert_tokens_to_ids(["<end>", "a"])
    rows = [{"input_ids": [letter] * 3, "labels": [-100, letter, last]} for last in (end, letter)]
    assert generation.ends_of(rows, tokenizer) == {tokenizer.eos_token_id, end}


def test_a_long_prompt_leaves_the_others_their_room(gpt2, characters, caplog):
    model, tokenizer = gpt2(seed=5), characters()
    with torch.no_grad():
        model.transformer.wte.weight[EOS] *= 0.01  # hardly ever ends
    short = [row(tokenizer, "a", "bcdefg"), row(tokenizer, "abcde", "b")]
    alone = generation_metrics(model, Dataset.from_list(short), tokenizer).outputs
    assert max(len(tokenizer(output)["input_ids"]) for output in alone) > 7
    crowded = [short[0], row(tokenizer, "a" * 40, "bcdefgh"), short[1], row(tokenizer, "b" * 38, "b")]
    with caplog.at_level("WARNING"):
        together = generation_metrics(model, Dataset.from_list(crowded), tokenizer, max_examples=4).outputs
    limits = {0: 23, 2: 23}
    for own, place in enumerate(limits):
        assert together[place][: len(alone[own])] == alone[own]
    assert len(tokenizer(together[1])["input_ids"]) <= 48 - 41 and len(tokenizer(together[3])["input_ids"]) <= 48 - 39
    assert not caplog.records  # 7 letters and no more are wanted where 7 have room
    crowded[1] = row(tokenizer, "a" * 42, "bcdefgh")
    with caplog.at_level("WARNING"):
        generation_metrics(model, Dataset.from_list(crowded), tokenizer)
    assert "1 of 4 prompts leave fewer positions than their target has tokens" in caplog.text
    crowded[1] = row(tokenizer, "a" * 47, "b")
    with pytest.raises(ValueError, match="has a prompt of 48 tokens, and GPT2LMHeadModel has 48 positions"):
        generation_metrics(model, Dataset.from_list(crowded), tokenizer)


def test_a_recurrent_model_writes_what_it_writes_alone():
    """Padding on the left would change its state."""
    torch.manual_seed(0)
    config = RwkvConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16, eos_token_id=1)
    model = RwkvForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    together = generate(model, PROMPTS, EOS, PAD, 6)
    assert together == [generate(model, [prompt], EOS, PAD, 6)[0] for prompt in PROMPTS]
    assert len({tuple(output) for output in together}) > 1
