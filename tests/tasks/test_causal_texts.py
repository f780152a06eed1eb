"""Causal texts: the special tokens that the tokenizer has, an end where the text ends, every token once,
and numbers to match.
"""

import math

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from fakit.evaluation import evaluate, generation_metrics
from fakit.tasks import task_from
from fakit.tasks.special_tokens import added_tokens
from fakit.tasks.task import say

BOS, EOS, PAD = 0, 1, 2
LONG = "in the beginning god created the heaven and the earth"


def letters(template: str = "$A", **names) -> PreTrainedTokenizerFast:
    """One token a character; `template` says which special tokens stand around a text."""
    vocabulary = {
        token: i for i, token in enumerate(["<s>", "</s>", "<pad>", "<unk>", *"\n abcdefghijklmnopqrstuvwxyz"])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"} | names
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def prose(*texts: str, **options):
    fill = [f"{word} and more" for word in ("one", "two", "three", "four", "five")]
    splits = {"train": fill, "validation": ["held out"], "test": list(texts)}
    return task_from(
        {name: Dataset.from_dict({"text": rows}) for name, rows in splits.items()},
        name="prose",
        kind="causal-lm",
        **options,
    )


def pairs(source: str, target: str):
    rows = [{"source": f"row {word}", "target": "some"} for word in ("one", "two", "three")]
    test = [{"source": source, "target": target}]
    splits = {"train": rows[1:], "validation": rows[:1], "test": test}
    return task_from({name: Dataset.from_list(rows) for name, rows in splits.items()}, name="pairs")


def tiny(positions: int = 64) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=33,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=positions,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=1,
    )
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize(
    ("template", "around"),
    [("$A", ([], [])), ("<s> $A", ([BOS], [])), ("$A </s>", ([], [EOS])), ("<s> $A </s>", ([BOS], [EOS]))],
)
@pytest.mark.parametrize(
    "names", [{}, {"pad_token": "</s>"}, {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "</s>"}]
)
def test_what_the_tokenizer_adds_is_added_and_one_end_closes_the_text(template, around, names):
    tokenizer = letters(template, **names)
    assert added_tokens(tokenizer) == around
    ids = tokenizer("abc", add_special_tokens=False).input_ids
    begin = around[0]
    task = prose("abc")
    row = task.encode("test", tokenizer)[0]
    assert row["input_ids"] == [*begin, *ids, EOS] and row["attention_mask"] == [1] * len(row["input_ids"])
    assert row["labels"] == [-100] * len(begin) + [*ids, EOS]
    pair = pairs("ab", "ba").encode("test", tokenizer)[0]
    assert tokenizer.convert_ids_to_tokens(pair["input_ids"]) == [*(["<s>"] * len(begin)), *"ab\nba", "</s>"]
    assert pair["labels"] == [-100] * (len(begin) + 3) + pair["input_ids"][-3:]
    # a padding token that is the end masks no real end
    batch = task.collator(tokenizer)([row, pair])
    assert (batch["labels"] == EOS).sum() == 2 and batch["attention_mask"].sum() == len(row["input_ids"]) + len(
        pair["input_ids"]
    )


def test_the_tokenizer_is_asked_as_it_is_now():
    tokenizer = letters()
    tokenizer.add_bos_token = True
    assert prose("abc").encode("test", tokenizer)[0]["input_ids"][0] == BOS
    tokenizer.add_bos_token, tokenizer.add_eos_token = False, True
    assert prose("abc").encode("test", tokenizer)[0]["input_ids"] == [*letters()("abc").input_ids, EOS]


def test_special_tokens_that_a_text_spells_out_are_not_doubled():
    row = prose("<s>abc</s>").encode("test", letters("<s> $A"))[0]
    assert row["input_ids"] == [BOS, *letters()("abc").input_ids, EOS]


@pytest.mark.parametrize("template", ["$A", "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize("length", [3, 7, 16, len(LONG), len(LONG) + 1, len(LONG) + 2])
def test_a_long_text_is_cut_into_pieces_that_label_every_token_once(template, length):
    tokenizer, task = letters(template), prose(LONG, "short")
    begin = added_tokens(tokenizer)[0]
    rows = list(task.encode("test", tokenizer, max_length=length))
    assert max(len(row["input_ids"]) for row in rows) <= length
    assert all(row["input_ids"][: len(begin)] == begin for row in rows)
    labels = [label for row in rows for label in row["labels"] if label != -100]
    text, short = (letters()(text).input_ids for text in (LONG, "short"))
    assert labels == [*text, EOS, *short, EOS]
    # each label but a text's first has the token before it as context
    for row, before in zip(rows[1:], rows, strict=False):
        context = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100][
            len(begin) :
        ]
        assert context == ([] if before["input_ids"][-1] == EOS else before["input_ids"][-1:])


def test_the_log_says_how_many_pieces_there_are_and_shows_two_rows(caplog):
    say.cache_clear()
    tokenizer, task = letters("<s> $A"), prose("abc", LONG, "short", too_long="pieces")
    rows = task.encode("test", tokenizer, max_length=20)
    tokens = sum(map(len, rows["input_ids"]))
    labels = sum(label != -100 for row in rows["labels"] for label in row)
    assert labels == len("abc") + len(LONG) + len("short") + 3
    assert (
        f"prose, test: 3 texts read, all kept, 1 of them in 3 pieces of at most 20 tokens; 5 rows, {tokens} tokens, "
        f"{labels} of them with labels. As the model sees them, labels in ⟦ ⟧:\n  row 1: <s>⟦abc</s>⟧\n  row 2: <s>⟦in the "
        "beginning go⟧\n"
    ) in caplog.text
    task.encode("test", letters("$A"), max_length=100)  # nothing predicts the first token of all
    assert "3 texts read, all kept; 3 rows, 64 tokens, 61 of them with labels" in caplog.text
    assert "row 1: a⟦bc</s>⟧" in caplog.text


def test_long_texts_are_refused_where_that_is_asked():
    task = prose("abc", LONG, too_long="refuse")
    assert len(task.encode("test", letters("<s> $A"), max_length=55)) == 2
    with pytest.raises(
        ValueError, match=r"prose, test: text 2 \('in the .*'\) has 55 tokens, and max_length=54; give a"
    ):
        task.encode("test", letters("<s> $A"), max_length=54)
    with pytest.raises(
        ValueError, match="prose: too_long='cut' is not known of plain texts; choose 'pieces' or 'refuse'"
    ):
        prose("abc", too_long="cut")
    rows = Dataset.from_dict({"text": [f"t{n}" for n in range(20)], "label": [0, 1] * 10})
    with pytest.raises(ValueError, match=r"x: too_long is for instruction data and .* rows of text and label are cut"):
        task_from(rows, name="x", too_long="cut")


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("template", ["$A", "<s> $A"])
def test_perplexity_is_that_of_each_token_given_its_piece(template, side):
    tokenizer, task, model = letters(template, padding_side=side), prose(LONG, "short"), tiny()
    rows = task.encode("test", tokenizer, max_length=20)
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
            for position, label in enumerate(row["labels"]):
                if position and label != -100:
                    total, count = total - logits[position - 1, label].item(), count + 1
    found = evaluate(model, rows, task.collator(tokenizer), task, tokenizer=tokenizer)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    # every token and both ends; without a BOS the first token of a text has no context
    assert count == len(LONG) + len("short") + 2 - (0 if template.startswith("<s>") else 2)


def test_a_row_has_room_for_something_new():
    with pytest.raises(ValueError, match="prose, test: max_length=2 was requested; a row takes 3 or more"):
        prose(LONG).encode("test", letters("<s> $A"), max_length=2)


def test_generation_starts_from_the_prompt_with_its_bos(monkeypatch):
    tokenizer, task, model = letters("<s> $A </s>"), pairs("ab", "ba"), tiny()
    given = []

    def generate(input_ids, attention_mask):
        given.append(tokenizer.convert_ids_to_tokens(input_ids[0]))
        return torch.cat([input_ids, torch.tensor([[*letters()("ba").input_ids, EOS]])], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    scores = evaluate(model, task.encode("test", tokenizer), task.collator(tokenizer), task, tokenizer=tokenizer)
    assert given == [["<s>", "a", "b", "\n"]] and scores["cer"] == 0 and scores["cer_copy"] == 1


def test_a_cut_target_is_no_reference():
    tokenizer, task = letters(), pairs("ab", "a" * 40)
    rows = task.encode("test", tokenizer, max_length=16)
    with pytest.raises(ValueError, match=r"1 of 1 targets do not end with the eos token 1 .*cut to fit 16 tokens"):
        generation_metrics(tiny(), rows, tokenizer)


def test_a_tokenizer_without_line_breaks_cannot_part_source_and_target():
    tokenizer = letters()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", behavior="isolated")]
    )
    with pytest.raises(ValueError, match="makes no token of it; source and target would run together"):
        pairs("ab", "ba").encode("test", tokenizer)


def test_how_much_of_texts_is_cut_is_said(words, caplog):
    rows = Dataset.from_dict({"text": [f"word {'x' * i}" for i in range(20)], "label": [0, 1] * 10})
    task = task_from(rows, name="cut texts")
    encoded = task.encode(task_rows := rows.select([2, 9]), words, max_length=10)
    full = [len(words(text).input_ids) for text in task_rows["text"]]
    assert [len(row["input_ids"]) for row in encoded] == [8, 10] and full == [8, 15]
    assert "cut texts: 1 of 2 texts are cut to max_length=10; 5 tokens are left out." in caplog.text


def test_a_pool_of_plain_texts_has_no_labels():
    """Else `labels:` would limit nothing: every text is its own label."""
    task = prose("the owl", pool=2)
    rows = {name: task.encode(name, letters()) for name in ("train", "validation", "test", "pool")}
    for name, of_split in rows.items():
        assert all(len(row["labels"]) == len(row["input_ids"]) for row in of_split)
        assert all((set(row["labels"]) == {-100}) == (name == "pool") for row in of_split), name
