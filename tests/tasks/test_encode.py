"""From text to batches: what the labels are, what counts, and how batches are padded."""

import pytest
import torch
from datasets import Dataset

from fakit.tasks import load_task, task_from
from fakit.tasks.scans import scan_tokenizer

PAIRS = Dataset.from_dict({"source": ["tbe  end", "a vvord"], "target": ["the end", "a word"]})


def rows(n: int, **columns) -> Dataset:
    return Dataset.from_dict({"text": [f"sentence {'abcdefghij'[i % 10]} {'klm' * i}" for i in range(n)], **columns})


def test_a_causal_label_is_the_target_and_the_eos_and_nothing_else(characters):
    task = load_task("scans", labels=10)
    for pair, row in zip(task.train, task.encode("train", characters), strict=True):
        source, target = len(pair["source"]), len(pair["target"])
        assert characters.decode(row["input_ids"]) == f"{pair['source']}\n{pair['target']}<eos>"
        assert row["labels"][: source + 1] == [-100] * (source + 1)
        assert row["labels"][source + 1 :] == row["input_ids"][source + 1 :]
        assert row["labels"][-1] == characters.eos_token_id and len(row["labels"]) == source + target + 2
        assert row["attention_mask"] == [1] * len(row["labels"])


def test_every_pair_of_scans_fits_in_the_teachers_positions(characters):
    task = load_task("scans")
    assert max(map(len, task.encode("test", characters, max_length=10_000)["input_ids"])) <= 112


def test_an_unlabeled_pair_is_its_prompt(characters):
    row = load_task("scans", labels=10).encode(PAIRS.remove_columns("target"), characters)[0]
    assert characters.decode(row["input_ids"]) == "tbe  end\n"
    assert row["labels"] == [-100] * 9


def test_the_source_is_cut_first_and_a_cut_target_has_no_end(characters, caplog):
    task = load_task("scans", labels=10)

    def encoded(source: int, target: int) -> str:
        pair = Dataset.from_dict({"source": ["s" * source], "target": ["t" * target]})
        row = task.encode(pair, characters, max_length=40)[0]
        given = row["input_ids"].index(characters("\n").input_ids[0]) + 1
        assert row["labels"] == [-100] * given + row["input_ids"][given:]
        return characters.decode(row["input_ids"])

    assert encoded(5, 33) == "s" * 5 + "\n" + "t" * 33 + "<eos>"
    assert encoded(300, 33) == "s" * 5 + "\n" + "t" * 33 + "<eos>"
    assert encoded(300, 37) == "s" + "\n" + "t" * 37 + "<eos>"
    assert "1 of 1 texts are cut to max_length=40; 299 tokens are left out." in caplog.text
    assert encoded(300, 300) == "s" * 19 + "\n" + "t" * 20
    assert encoded(3, 300) == "s" * 3 + "\n" + "t" * 36
    assert (
        "1 of 1 texts are cut to max_length=40, 1 of them in the target, which then has no end; 265 tokens"
        in caplog.text
    )
    with pytest.raises(ValueError, match="max_length=2 was requested; a row takes 3 or more"):
        task.encode(PAIRS, characters, max_length=2)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_causal_batch_is_padded_to_its_longest_with_ignored_labels(characters, side):
    characters.padding_side = side
    task = load_task("scans", labels=10)
    encoded = list(task.encode(PAIRS, characters))
    batch = task.collator(characters)(encoded)
    lengths = [len(row["input_ids"]) for row in encoded]
    assert batch["input_ids"].shape == batch["labels"].shape == (2, max(lengths))
    assert batch["attention_mask"].sum(1).tolist() == lengths
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert (batch["labels"][padding] == -100).all() and (batch["input_ids"][padding] == characters.pad_token_id).all()
    assert padding[1, 0 if side == "left" else -1]


def test_a_causal_model_sees_the_same_loss_alone_and_in_a_padded_batch(characters):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(characters),
            n_layer=1,
            n_embd=16,
            n_head=2,
            n_positions=64,
            bos_token_id=None,
            eos_token_id=1,
        )
    ).eval()
    task = load_task("scans", labels=10)
    encoded, collate = list(task.encode(PAIRS, characters)), task.collator(characters)
    alone = [model(**collate([row])).loss for row in encoded]
    counts = torch.tensor([sum(label != -100 for label in row["labels"]) for row in encoded])
    expected = (torch.stack(alone) * counts).sum() / counts.sum()
    torch.testing.assert_close(model(**collate(encoded)).loss, expected)


def test_plain_text_trains_a_causal_model_on_every_token(characters):
    task = task_from(rows(30), name="prose", kind="causal-lm")
    assert (task.metric, task.model_task, task.num_labels) == ("perplexity", "causal-lm", None)
    row = task.encode(rows(1), characters)[0]
    assert row["labels"] == row["input_ids"] == [*characters("sentence a ").input_ids, characters.eos_token_id]


def test_classification_rows(words):
    task = task_from(rows(40, label=[0, 1] * 20), name="toy")
    encoded = task.encode(task.test, words)
    assert set(encoded.column_names) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    assert encoded["labels"][:] == task.test["label"][:]
    assert len(encoded[0]["input_ids"]) >= 12
    assert max(map(len, task.encode(task.test, words, max_length=8)["input_ids"])) == 8
    batch = task.collator(words)(list(encoded))
    assert batch["labels"].shape == (4,) and batch["labels"].dtype == torch.int64
    assert batch["input_ids"].shape == batch["token_type_ids"].shape == batch["attention_mask"].shape
    assert (batch["input_ids"][batch["attention_mask"] == 0] == words.pad_token_id).all()


def test_pairs_carry_segments(words):
    pairs = rows(40, other=["b"] * 40, label=[0, 1] * 20)
    task = task_from(pairs, name="toy", text_pair="other")
    row = task.encode("test", words)[0]
    assert row["token_type_ids"][0] == 0 and row["token_type_ids"][-2:] == [1, 1]


def test_unlabeled_rows_get_the_ignored_label(words):
    classes = task_from(rows(40, label=[0, 1] * 20), name="toy", pool=6)
    assert classes.pool.column_names == ["text"] and classes.encode("pool", words)["labels"][:] == [-100] * 6
    scores = task_from(rows(40, label=[i / 7 for i in range(40)]), name="toy", pool=6)
    assert scores.kind == "regression"
    batch = scores.collator(words)([*scores.encode("pool", words), *scores.encode("train", words)])
    assert batch["labels"].dtype == torch.float32 and (batch["labels"][:6] == -100).all()


def test_a_regression_drives_a_model_with_one_output(words):
    from transformers import BertConfig, BertForSequenceClassification

    task = task_from(rows(40, label=[i / 7 for i in range(40)]), name="toy")
    config = BertConfig(
        vocab_size=len(words),
        num_labels=task.num_labels,
        num_hidden_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=16,
    )
    model = BertForSequenceClassification(config).eval()
    batch = task.collator(words)(list(task.encode("test", words)))
    out = model(**batch)
    torch.testing.assert_close(out.loss, (out.logits[:, 0] - batch["labels"]).square().mean())


def test_errors_say_what_is_there(words, characters):
    task = load_task("scans", labels=10)
    with pytest.raises(ValueError, match="has no split 'dev'; it has train, pool, validation, test, teacher_train"):
        task.encode("dev", characters)
    with pytest.raises(ValueError, match=r"columns \['text'\], but \['source'\]"):
        task.encode(rows(2), characters)
    with pytest.raises(ValueError, match="the target ends with an eos token"):
        task.encode("test", words)
    unpadded = scan_tokenizer()
    unpadded.pad_token = None
    with pytest.raises(ValueError, match=r"tokenizer.pad_token = tokenizer.eos_token"):
        task.collator(unpadded)


def test_a_length_that_the_special_tokens_take_whole_is_refused(words):
    labels = [0, 1] * 20
    texts = task_from(rows(40, label=labels), name="toy")
    pairs = task_from(rows(40, other=["b"] * 40, label=labels), name="toy", text_pair="other")
    for task, special in ((texts, 2), (pairs, 3)):
        with pytest.raises(ValueError, match=f"max_length={special} was requested, and {special} special tokens take"):
            task.encode("test", words, max_length=special)
        assert max(map(len, task.encode("test", words, max_length=special + 1)["input_ids"])) == special + 1
