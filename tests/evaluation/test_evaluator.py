"""`evaluate` and `predictions` against one example at a time, whatever the batches, padding and order."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from sklearn.metrics import f1_score, matthews_corrcoef

from fakit.evaluation import evaluate, generation_metrics, predictions

CLASSES = SimpleNamespace(kind="sequence-classification", label_names=["a", "b", "c"])
SCORES = SimpleNamespace(kind="regression", label_names=None)
LINES = SimpleNamespace(kind="causal-lm", label_names=None, test=Dataset.from_dict({"source": ["a"], "target": ["b"]}))
PROSE = SimpleNamespace(kind="causal-lm", label_names=None, test=Dataset.from_dict({"text": ["a"]}))


def collator(examples: list[dict], side: str = "right") -> dict[str, torch.Tensor]:
    """Pads with ordinary tokens, so that a mask that is not used shows."""
    width = max(len(example["input_ids"]) for example in examples)
    fill = {"input_ids": 7, "attention_mask": 0, "labels": -100}
    batch = {}
    for name in examples[0]:
        values = [example[name] for example in examples]
        if isinstance(values[0], list):
            values = [
                [fill[name]] * (width - len(v)) + v if side == "left" else v + [fill[name]] * (width - len(v))
                for v in values
            ]
        batch[name] = torch.tensor(values)
    return batch


def texts(count: int = 30, labels=(0, 1, 2)) -> Dataset:
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        ids = [2, *rng.integers(5, 22, size=rng.integers(1, 12)).tolist(), 3]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": rng.choice(labels).item()})
    return Dataset.from_list(rows)


def lines(count: int = 12) -> Dataset:
    """Prompt, labels -100; then a target that ends with eos (1)."""
    rng = np.random.default_rng(1)
    rows = []
    for _ in range(count):
        prompt = [*rng.integers(5, 31, size=rng.integers(1, 9)).tolist(), 4]
        target = [*rng.integers(5, 31, size=rng.integers(1, 9)).tolist(), 1]
        ids = prompt + target
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(prompt) + target})
    return Dataset.from_list(rows)


def one_by_one(model, dataset: Dataset) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([row["input_ids"]])).logits.double() for row in dataset])


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_predictions_are_in_the_order_of_the_dataset(bert, batch_size):
    model, dataset = bert(), texts()
    logits = predictions(model, dataset, collator, batch_size)
    assert logits.shape == (30, 3) and logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), one_by_one(model, dataset), atol=1e-4, rtol=1e-4)
    (logits.requires_grad_() * 2).sum().backward()  # no inference tensors


def test_predictions_without_labels(bert):
    model, dataset = bert(), texts()
    unlabeled = dataset.remove_columns("labels")
    assert torch.equal(predictions(model, unlabeled, collator), predictions(model, dataset, collator))


def test_classification(bert):
    model, dataset = bert(), texts()
    probabilities = one_by_one(model, dataset).softmax(-1).numpy()
    labels = np.array(dataset["labels"])
    predicted = probabilities.argmax(1)
    result = evaluate(model, dataset, collator, CLASSES, batch_size=7)
    assert result == pytest.approx(
        {
            "accuracy": (predicted == labels).mean(),
            "f1": f1_score(labels, predicted, average="macro"),
            "matthews": matthews_corrcoef(labels, predicted),
            "ece": result["ece"],
            "nll": -np.log(probabilities[np.arange(30), labels]).mean(),
            "brier": ((probabilities - np.eye(3)[labels]) ** 2).sum(1).mean(),
        },
        rel=1e-4,
    )
    confidence, right = probabilities.max(1), predicted == labels
    bins = np.ceil(confidence * 15)
    ece = sum(abs((right[bins == b] - confidence[bins == b]).sum()) for b in range(1, 16)) / 30
    assert result["ece"] == pytest.approx(ece, rel=1e-3)
    assert all(type(value) is float for value in result.values())


def test_the_order_of_the_rows_changes_nothing(bert):
    model, dataset = bert(), texts()
    first = evaluate(model, dataset, collator, CLASSES, batch_size=8)
    assert evaluate(model, dataset.shuffle(seed=1), collator, CLASSES, batch_size=5) == pytest.approx(first, rel=1e-4)


def test_two_classes_use_binary_f1(bert):
    model, dataset = bert(labels=2), texts(labels=(0, 1))
    predicted = one_by_one(model, dataset).argmax(-1).numpy()
    task = SimpleNamespace(kind="sequence-classification", label_names=["no", "yes"])
    assert evaluate(model, dataset, collator, task)["f1"] == pytest.approx(f1_score(dataset["labels"], predicted))


def test_a_teacher_adds_agreement_over_all_rows(bert):
    student, teacher, dataset = bert(layers=1, seed=1), bert(), texts()
    partly = dataset.map(lambda row, i: {"labels": row["labels"] if i % 3 else -100}, with_indices=True)
    p, q = one_by_one(teacher, dataset).softmax(-1), one_by_one(student, dataset).softmax(-1)
    result = evaluate(student, partly, collator, CLASSES, batch_size=7, teacher=teacher)
    assert result["agreement"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert result["kl"] == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-4)
    labeled = dataset.filter(lambda _, i: i % 3 > 0, with_indices=True)
    alone = evaluate(student, labeled, collator, CLASSES)
    assert {name: result[name] for name in alone} == pytest.approx(alone, rel=1e-4)
    same = evaluate(teacher, dataset, collator, CLASSES, teacher=teacher)
    assert (same["agreement"], same["kl"]) == (1.0, 0.0)


def test_of_more_than_five_classes_their_order_is_compared_too(bert):
    names = list("abcdefg")
    task = SimpleNamespace(kind="sequence-classification", label_names=names)
    student, teacher, dataset = bert(layers=1, seed=1, labels=7), bert(labels=7), texts(labels=range(7))
    result = evaluate(student, dataset, collator, task, batch_size=7, teacher=teacher)
    ours, theirs = (
        one_by_one(model, dataset).argsort(-1, descending=True)[:, :5].tolist() for model in (student, teacher)
    )
    rows = list(zip(ours, theirs, strict=True))
    assert result["cr@5"] == pytest.approx(sum(a == b for a, b in rows) / len(rows))
    assert result["mor@5"] == pytest.approx(sum(len({*a} & {*b}) / 5 for a, b in rows) / len(rows))
    assert "cr@5" not in evaluate(bert(), texts(), collator, CLASSES, teacher=bert(seed=1))


def test_of_a_small_vocabulary_the_top_five_are_not_compared(gpt2):
    for size in (5, 4):
        rows = lines().map(
            lambda row, size=size: {n: [min(x, size - 1) for x in row[n]] for n in ("input_ids", "labels")}
        )
        models = gpt2(vocab_size=size), gpt2(vocab_size=size, seed=1)
        found = evaluate(models[0], rows, collator, LINES, batch_size=1, teacher=models[1])  # the collator pads with 7
        assert "mor@5" not in found and "agreement" in found


def test_regression(bert):
    model, teacher, dataset = bert(labels=1), bert(labels=1, seed=2), texts()
    dataset = dataset.map(lambda row, i: {"labels": float(i % 5) if i else -100.0}, with_indices=True)
    scores, wanted = one_by_one(model, dataset)[:, 0].numpy(), np.array([float(i % 5) for i in range(30)])
    theirs = one_by_one(teacher, dataset)[:, 0].numpy()
    result = evaluate(model, dataset, collator, SCORES, batch_size=7, teacher=teacher)
    assert result["pearson"] == pytest.approx(np.corrcoef(scores[1:], wanted[1:])[0, 1], rel=1e-4)
    assert result["mse"] == pytest.approx(((scores - wanted)[1:] ** 2).mean(), rel=1e-4)
    assert result["teacher_pearson"] == pytest.approx(np.corrcoef(scores, theirs)[0, 1], rel=1e-4)
    assert result["teacher_mse"] == pytest.approx(((scores - theirs) ** 2).mean(), rel=1e-4)
    assert -1 <= result["spearman"] <= 1


def labeled_positions(model, dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (positions, V) in float64 and the tokens they should predict, example by example."""
    logits, tokens = [], []
    for row in dataset:
        output = one_by_one(model, [row])[0]
        for position, label in enumerate(row["labels"]):
            if label != -100:
                logits.append(output[position - 1])
                tokens.append(label)
    return torch.stack(logits).log_softmax(-1), torch.tensor(tokens)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_causal_lm(gpt2, side, batch_size):
    model, teacher, dataset = gpt2(layers=1, seed=1), gpt2(), lines()
    log_q, tokens = labeled_positions(model, dataset)
    log_p, _ = labeled_positions(teacher, dataset)
    nll = -log_q.gather(1, tokens[:, None]).mean().item()

    def pad(examples):
        return collator(examples, side)

    result = evaluate(model, dataset, pad, PROSE, batch_size=batch_size, teacher=teacher)
    assert result["nll"] == pytest.approx(nll, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(nll), rel=1e-4)
    assert result["kl"] == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-4)
    assert result["agreement"] == pytest.approx((log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item())
    top = [set(row.tolist()) for row in log_p.topk(5).indices]
    overlap = [len(t & set(row.tolist())) / 5 for t, row in zip(top, log_q.topk(5).indices, strict=True)]
    assert result["mor@5"] == pytest.approx(np.mean(overlap))
    assert result["acceptance"] == pytest.approx(1 - 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1).mean().item())
    assert set(result) == {"nll", "perplexity", "agreement", "kl", "cr@5", "mor@5", "acceptance"}


def test_vocabularies_padded_to_different_sizes_are_compared_over_the_tokenizers(gpt2, characters):
    student, teacher, tokenizer, dataset = (
        gpt2(layers=1, seed=1, vocab_size=35),
        gpt2(vocab_size=48),
        characters(),
        lines(),
    )
    result = evaluate(student, dataset, collator, PROSE, tokenizer, teacher=teacher)
    p, q = [], []
    for row in dataset:
        for side, model in ((p, teacher), (q, student)):
            logits = one_by_one(model, [row])[0, :, : len(tokenizer)]
            side += [logits[i - 1].log_softmax(-1) for i, label in enumerate(row["labels"]) if label != -100]
    p, q = torch.stack(p), torch.stack(q)
    assert result["kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert result["nll"] == pytest.approx(evaluate(student, dataset, collator, PROSE)["nll"])


def test_source_and_target_add_cer(gpt2, characters):
    model, tokenizer, dataset = gpt2(), characters(), lines()
    assert set(evaluate(model, dataset, collator, LINES)) == {"nll", "perplexity"}
    assert set(evaluate(model, dataset, collator, PROSE, tokenizer)) == {"nll", "perplexity"}
    result = evaluate(model, dataset, collator, LINES, tokenizer, max_examples=4)
    expected = generation_metrics(model, dataset, tokenizer, max_examples=4).metrics
    assert result["cer"] == expected["cer"] and result["cer_copy"] == expected["cer_copy"]


def test_models_are_left_as_found(bert):
    student, teacher, dataset = bert(layers=1).train(), bert(), texts()
    student.bert.embeddings.dropout.eval()
    expected = evaluate(student, dataset, collator, CLASSES)
    assert evaluate(student, dataset, collator, CLASSES, teacher=teacher).items() >= expected.items()
    assert student.training and not student.bert.embeddings.dropout.training and not teacher.training
    assert torch.is_grad_enabled()

    def broken(_):
        raise RuntimeError("collator")

    with pytest.raises(RuntimeError, match="collator"):
        evaluate(student, dataset, broken, CLASSES)
    assert student.training and not student.bert.embeddings.dropout.training and torch.is_grad_enabled()


def test_errors(bert, gpt2):
    model, dataset = bert(), texts()
    with pytest.raises(ValueError, match=r"'token-classification'.*sequence-classification, regression, causal-lm"):
        evaluate(model, dataset, collator, SimpleNamespace(kind="token-classification"))
    with pytest.raises(ValueError, match="the dataset is empty"):
        evaluate(model, dataset.select([]), collator, CLASSES)
    with pytest.raises(ValueError, match=r"columns \['text'\].*encode"):
        evaluate(model, Dataset.from_dict({"text": ["a"]}), collator, CLASSES)
    with pytest.raises(ValueError, match="none of the 30 rows has a label"):
        evaluate(model, dataset.map(lambda _: {"labels": -100}), collator, CLASSES)
    with pytest.raises(ValueError, match="none of the 30 rows has a label"):
        evaluate(model, dataset.remove_columns("labels"), collator, CLASSES)
    with pytest.raises(ValueError, match="model has 2 classes, the task has 3"):
        evaluate(bert(labels=2), dataset, collator, CLASSES)
    with pytest.raises(ValueError, match=r"\(30, 3\).*\(30, 2\)"):
        evaluate(model, dataset, collator, CLASSES, teacher=bert(labels=2))
    with pytest.raises(ValueError, match="one output, the model has 3"):
        evaluate(model, dataset, collator, SCORES)
    with pytest.raises(ValueError, match="one output, the teacher has 3"):
        evaluate(bert(labels=1), dataset, collator, SCORES, teacher=model)
    with pytest.raises(ValueError, match="batch_size=0"):
        evaluate(model, dataset, collator, CLASSES, batch_size=0)
    with pytest.raises(ValueError, match=r"\(B, C\) was expected.*'causal-lm'"):
        predictions(gpt2(), dataset, collator)
    with pytest.raises(ValueError, match="no labeled token"):
        evaluate(gpt2(), lines().map(lambda row: {"labels": [-100] * len(row["labels"])}), collator, PROSE)
    with pytest.raises(ValueError, match=r"\['attention_mask', 'input_ids'\], but no labels"):
        evaluate(gpt2(), lines().remove_columns("labels"), collator, PROSE)
    with pytest.raises(ValueError, match=r"student logits.*35\).*teacher logits.*40\)"):
        evaluate(gpt2(), lines(), collator, PROSE, teacher=gpt2(vocab_size=40))
