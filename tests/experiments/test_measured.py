"""`fakit evaluate`: any folder, beside its teacher."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fakit.__main__ import main
from fakit.compression import low_rank
from fakit.experiments import measured
from fakit.experiments.baselines import prepare_run
from fakit.experiments.config import ExperimentConfig
from fakit.experiments.measured import measure
from fakit.experiments.run import run_experiment


@pytest.fixture
def lines(world):
    """A run of a language model from source to target."""
    return ExperimentConfig.from_dict(
        {
            "task": {"name": str(world / "pairs.jsonl"), "options": {"validation": 20, "test": 20}},
            "teacher": {"id": str(world / "causal")},
            "student": {"layers": 1},
            "training": {"steps": 2, "batch_size": 4, "max_length": 150, "bf16": False},
            "attention": None,
            "device": "cpu",
        }
    )


def test_the_folder_of_a_run_is_scored_as_the_run_was(config, tmp_path, capsys):
    out = tmp_path / "student"
    result = run_experiment(config.replace(out=str(out)), progress=False)
    assert main(["evaluate", str(out)]) == 0
    said = capsys.readouterr().out
    found = json.loads((out / "evaluation.json").read_text())
    assert found["scores"] == pytest.approx(result.test) and found["parameters"] == result.parameters
    assert found["rows"] == 60 and found["teacher"]["accuracy"] >= 0 and found["draft"] is None
    assert f"{found['scores']['accuracy']:.4f}" in said and f"Written to {out / 'evaluation.json'}" in said
    assert min(found["latency"], found["teacher_latency"]) > 0 and found["batch"] == 8
    again = measure(out, config, split="validation", rows=12, write=False)
    assert again.rows == 12 and json.loads((out / "evaluation.json").read_text()) == found


def test_pairs_of_low_rank_are_read(config, tmp_path):
    out = tmp_path / "student"
    student = {"low_rank": {"keep": 0.9, "texts": 60, "calibration": 40, "epochs": 1, "batch_size": 8, "bf16": False}}
    result = run_experiment(config.replace(student=student, out=str(out)), progress=False)
    assert measure(out, config).scores == pytest.approx(result.test)


def test_a_language_model_shows_what_it_writes_and_drafts(lines, tmp_path):
    out = tmp_path / "student"
    result = run_experiment(lines.replace(out=str(out)), progress=False)
    found = measure(out, lines, rows=20, draft=3)
    assert {"bleu", "rougeL", "cer", "cer_copy", "perplexity", "agreement", "mor@5"} <= found.scores.keys()
    assert found.scores["perplexity"] == pytest.approx(result.test["perplexity"])
    assert {"bleu", "rougeL", "cer"} <= found.teacher.keys()
    assert len(found.samples) == 3 and {*found.samples[0]} == {"source", "reference", "student", "teacher"}
    assert found.draft["tokens"] == 3 and 0 <= found.draft["acceptance"] <= 1 and found.draft["speedup"] > 0
    assert "as a draft of its teacher: tokens 3" in str(found)


def test_answers_are_written_and_counted_in_bits_per_byte(world, lines, tmp_path):
    rows = [{"prompt": f"{word} a cat", "completion": f"{word} cat."} for word in ("mm", "no", "la", "so", "to", "he")]
    rows = [{**row, "prompt": f"{n * 'x'} {row['prompt']}"} for n in range(8) for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": str(tmp_path / "rows.jsonl"), "options": {"validation": 6, "test": 10}}
    out = tmp_path / "student"
    result = run_experiment(lines.replace(task=task, out=str(out)), progress=False)
    found = measure(out, lines.replace(task=task))
    written = {"bits_per_byte", "rougeL", "bleu", "cer"}
    assert written <= result.test.keys() and written <= result.validation.keys() and written <= found.teacher.keys()
    assert {name: found.scores[name] for name in result.test} == pytest.approx(result.test)
    assert "cer_copy" not in found.scores and 0 < found.scores["acceptance"] < 1
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=False)
    prepared = prepare_run(lines.replace(task=task))
    nll, size = 0.0, 0
    for row in prepared.task.test:
        ids = [*tokenizer(row["text"] + "\n" + row["answer"]).input_ids, 4]
        begin = len(tokenizer(row["text"] + "\n").input_ids)
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        nll -= sum(log_p[place - 1, ids[place]].item() for place in range(begin, len(ids)))
        size += len(row["answer"].encode())
    assert found.scores["bits_per_byte"] == pytest.approx(nll / math.log(2) / size, rel=1e-4)
    assert found.samples[0]["reference"] == prepared.task.test[0]["answer"]


def test_plain_texts_have_bits_per_byte(world, lines, tmp_path):
    rows = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": row["target"]}) + "\n" for row in rows))
    options = {"kind": "causal-lm", "validation": 20, "test": 20}
    config = lines.replace(task={"name": str(tmp_path / "texts.jsonl"), "options": options})
    AutoModelForCausalLM.from_pretrained(world / "causal").save_pretrained(tmp_path / "same")
    found = measure(tmp_path / "same", config)
    assert found.scores["bits_per_byte"] == found.teacher["bits_per_byte"] > 0
    assert found.scores["agreement"] == 1.0 and found.samples == []


def test_models_that_do_not_fit_their_teacher_are_refused_before_any_score(world, config, lines, tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "scores_of", lambda *_, **__: pytest.fail("scored"))

    def saved(model, name, tokenizer=None):
        model.save_pretrained(tmp_path / name)
        if tokenizer is not None:
            tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    whole = AutoModelForCausalLM.from_pretrained(world / "causal")
    made = type(whole.config).from_pretrained(world / "causal")
    made.vocab_size -= 3
    with pytest.raises(ValueError, match=r"vocabulary"):
        measure(saved(type(whole)(made), "smaller"), lines)
    made = type(whole.config).from_pretrained(world / "causal", n_positions=20)
    with pytest.raises(ValueError, match=r"the model \(GPT2LMHeadModel\) has 20 positions"):
        measure(saved(type(whole)(made), "shorter"), lines)
    words = AutoTokenizer.from_pretrained(world / "teacher")
    with pytest.raises(ValueError, match=r"tokeni[sz]er|vocabulary|tokens"):
        measure(saved(whole, "other words", words), lines)
    classifier = AutoModelForSequenceClassification.from_pretrained(world / "teacher")
    low_rank.save(low_rank.compress(classifier, keep=0.9), tmp_path / "pairs")
    with pytest.raises(ValueError, match=r"holds a BertForSequenceClassification, and .* is a causal-lm task"):
        measure(tmp_path / "pairs", lines)


def test_what_cannot_be_measured_is_one_sentence(config, world, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    config.to_yaml(file)
    for typed, said in (
        ([str(tmp_path)], f"{tmp_path} holds no experiment.yaml"),
        ([str(tmp_path / "nowhere"), "--config", str(file)], "there is no such folder"),
        ([str(world / "teacher"), "--config", str(file), "--split", "train"], "'train' is not one of test, validation"),
        ([str(world / "teacher"), "--config", str(file), "--rows", "0"], "rows: found 0"),
        ([str(world / "teacher"), "--config", str(file), "--draft", "4"], "a draft proposes tokens of a language"),
        ([str(tmp_path), "--config", str(file)], "config.json"),
    ):
        assert main(["evaluate", *typed]) == 2
        assert said in capsys.readouterr().err


def test_of_plain_texts_in_pieces_all_scores_are_of_the_same_texts(world, lines, tmp_path):
    rows = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": row["target"]}) + "\n" for row in rows))
    options = {"kind": "causal-lm", "validation": 20, "test": 20}
    task = {"name": str(tmp_path / "texts.jsonl"), "options": options}
    config = lines.replace(task=task, **{"training.max_length": 8})
    AutoModelForCausalLM.from_pretrained(world / "causal").save_pretrained(tmp_path / "same")
    prepared = prepare_run(config)
    pieces = len(prepared.task.encode(prepared.task.test.select(range(3)), prepared.tokenizer, 8))
    found = measure(tmp_path / "same", config, rows=3)
    assert found.rows == pieces > 3


def test_a_draft_of_plain_texts_goes_on_from_their_beginnings(world, lines, tmp_path, monkeypatch):
    """Where the tokenizer puts a BOS without a label before them, too."""
    seen = []

    def quality(student, teacher, prompts, *rest):
        seen.append(prompts)
        raise KeyboardInterrupt

    monkeypatch.setattr("fakit.evaluation.draft_quality", quality)
    encoded = Dataset.from_list([{"input_ids": [0, 5 + n, 6, 7], "labels": [-100, 5 + n, 6, 7]} for n in range(3)])
    model = AutoModelForCausalLM.from_pretrained(world / "causal")
    with pytest.raises(KeyboardInterrupt):
        measured._drafted(model, model, encoded, SimpleNamespace(eos_token_id=1, pad_token_id=1), 2, writes=False)
    assert seen == [[[0, 5 + n, 6, 7] for n in range(3)]]
